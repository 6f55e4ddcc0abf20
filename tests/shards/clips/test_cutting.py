"""Clips of videos of every kind: which frames, which sound, and what is left out.

Covers: shards/clips/clip.py, shards/clips/library.py, shards/clips/names.py, shards/clips/pictures.py
"""

from __future__ import annotations

import gc
import io
import os
import signal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.cleaning.rules import Cleaning
from shards.clips import cutting, library, pictures
from shards.clips.clip import Clip, ClipSettings
from shards.clips.clock import JUMPS_BACK
from shards.clips.cutting import LONG_SOUND, TOO_FEW, clip_of_pair, clips_of_video
from shards.clips.names import is_sound, is_video
from shards.clips.pictures import CUT, DAMAGED_PARTS, NO_PICTURES, UNKNOWN_CODEC, Picture
from shards.clips.sound import from_flac
from shards.ground.errors import InputError
from shards.images.reading import ImageError
from tests.helpers.videos import CODECS, moving_square, tone, turn_mp4, write_sound, write_video

SMALL = ClipSettings(frame_rate=5, clip_seconds=1, sound_rate=16_000)


def cut(path: Path, settings: ClipSettings = SMALL, cleaning: Cleaning | None = None) -> tuple[list[Clip], list[str]]:
    """The clips of a video, and what is left out."""
    notes: list[str] = []
    check = (cleaning or Cleaning()).check_size
    clips = clips_of_video(partial(path.open, "rb"), settings, quality=90, check=check, note=notes.append)
    return list(clips), notes


def seen(frame: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")).astype(int)


def squares(count: int) -> list[np.ndarray]:
    return [moving_square(number) for number in range(count)]


def noise(count: int) -> list[np.ndarray]:
    """Frames that no codec makes small, so that a cut or a hole falls into them."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(count)]


def pitch(flac: bytes) -> float:
    samples, rate = from_flac(flac)
    middle = samples[len(samples) // 4 :][: 2**13]
    return float(np.abs(np.fft.rfft(middle * np.hanning(len(middle)))).argmax() * rate / len(middle))


@pytest.mark.parametrize("suffix", CODECS)
def test_every_container_gives_frames_at_the_rate_and_the_sound_that_goes_with_them(tmp_path, suffix):
    path = write_video(tmp_path / f"a.{suffix}", squares(50), sound=None if suffix == "gif" else tone(2.0, hertz=440))
    clips, notes = cut(path)
    assert not notes and [clip.number for clip in clips] == [0, 1] and [clip.start for clip in clips] == [0, 1]
    assert [len(clip.frames) for clip in clips] == [5, 5] and {(clip.width, clip.height) for clip in clips} == {
        (64, 48)
    }
    for clip in clips:
        assert np.abs(np.array(clip.times) - [0, 0.2, 0.4, 0.6, 0.8]).max() < 0.03  # GIF: hundredths of a second
        number = round(25 * (clip.start + clip.times[3]))
        assert np.abs(seen(clip.frames[3]) - moving_square(number)).mean() < 20
        assert np.abs(seen(clip.frames[3]) - moving_square(number + 5)).mean() > 20
        if suffix != "gif":
            assert clip.sound.rate == 16_000 and abs(pitch(clip.sound.flac) - 440) < 3
            assert abs(clip.sound.num_samples - 16_000) < 1000 and clip.sound.start < 0.05


def test_frames_of_a_variable_rate_come_once_with_their_own_times(tmp_path):
    times = [0, 0.04, 0.08, 0.5, 0.54, 1.3, 1.34, 1.42, 1.46, 3.9]
    clips, notes = cut(write_video(tmp_path / "a.mkv", squares(10), times=times))
    assert not notes
    found = [(clip.number, round(clip.start + time, 3)) for clip in clips for time in clip.times]
    assert found == [(0, 0.0), (0, 0.5), (1, 1.3), (1, 1.42), (3, 3.9)]


def test_a_variable_rate_with_frames_stored_out_of_order_keeps_its_times(tmp_path):
    """The mp4 says how long frames last in the order in which they are stored, which is not that of their times."""
    times = np.concatenate([[0], np.cumsum(np.random.default_rng(0).choice([0.02, 0.04, 0.3, 0.5], 39))])
    path = write_video(tmp_path / "a.mp4", squares(40), times=times.tolist())
    [clip], notes = cut(path, ClipSettings(frame_rate=50, clip_seconds=100))
    assert not notes and np.abs(np.array(clip.times) - times).max() < 2e-3


def test_joined_files_whose_clock_begins_again_go_on_without_foreign_sound(tmp_path):
    parts = [
        write_video(tmp_path / f"{count}.ts", squares(count), sound=tone(count / 25, hertz=hertz)).read_bytes()
        for count, hertz in ((50, 400), (25 * 4, 2000))
    ]
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    clips, notes = cut(tmp_path / "a.ts")
    assert notes == [JUMPS_BACK] and [len(clip.frames) for clip in clips] == [5] * 6
    assert [clip.sound.num_samples > 15_000 for clip in clips] == [True, True] + [False] * 4
    assert all(abs(pitch(clip.sound.flac) - 400) < 4 for clip in clips[:2])


class _Failing(io.FileIO):
    """A file that can be read a number of times; then its store goes away, or its disk fails."""

    error: Exception
    left = 0

    def read(self, size=-1):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("error", [InputError("a store does not answer"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("left", [1, 2])
def test_what_cannot_be_read_is_not_called_damaged(tmp_path, error, left):
    path = write_video(tmp_path / "a.mkv", noise(300))
    assert path.stat().st_size > 2**18  # which is read at once

    def opened() -> _Failing:
        file = _Failing(path)
        file.error, file.left = error, left
        return file

    notes: list[str] = []
    clips = clips_of_video(opened, SMALL, quality=90, check=Cleaning().check_size, note=notes.append)
    with pytest.raises(type(error), match=str(error.args[-1])):
        list(clips)
    assert not notes


def test_a_slow_video_keeps_all_of_its_frames_and_no_more(tmp_path):
    [clip], _ = cut(write_video(tmp_path / "a.mp4", squares(6), rate=3), ClipSettings(frame_rate=8, sound_rate=0))
    assert np.allclose(clip.times, np.arange(6) / 3, atol=1e-3)


@pytest.mark.parametrize("rate", [24, 30, 50, 60])
def test_a_rate_equal_to_that_of_the_video_keeps_every_frame_though_times_are_rounded(tmp_path, rate):
    path = write_video(tmp_path / "a.mkv", squares(rate), rate=rate)  # Matroska counts milliseconds
    [clip], _ = cut(path, ClipSettings(frame_rate=rate, clip_seconds=1))
    assert len(clip.frames) == rate


@pytest.mark.parametrize("matrix", [(a, 0, 0, b) for a in (1, -1) for b in (1, -1)])
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_video_is_turned_and_mirrored_as_it_is_shown(tmp_path, matrix, is_turned):
    corner = np.zeros((48, 64, 3), np.uint8)
    corner[:24, :32] = (255, 0, 0)  # top left as it is stored
    a, b, c, d = matrix = (0, matrix[0], matrix[3], 0) if is_turned else matrix
    path = write_video(tmp_path / "a.mp4", [corner] * 5)
    turn_mp4(path, matrix)
    [clip], _ = cut(path)
    pixels = seen(clip.frames[0])
    assert pixels.shape == ((64, 48, 3) if is_turned else (48, 64, 3)) == (clip.height, clip.width, 3)
    x, y = pixels.shape[1] // 2 - 16 * a - 12 * c, pixels.shape[0] // 2 - 16 * b - 12 * d  # of the middle of the corner
    assert pixels[y, x][0] > 200, f"{matrix}: {pixels[y, x]}"
    assert (pixels[..., 0] > 128).mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("matrix", ["unspecified", "bt709"])
@pytest.mark.parametrize("span", ["tv", "pc"])
def test_colours_are_those_that_the_file_means(tmp_path, matrix, span):
    bars = np.zeros((48, 128, 3), np.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (200, 100, 50), (50, 100, 200)]
    colours += [(255, 255, 255), (9, 9, 9)]
    for number, colour in enumerate(colours):
        bars[:, 16 * number : 16 * (number + 1)] = colour
    path = write_video(tmp_path / "a.mkv", [bars] * 5, matrix=matrix, span=span)
    for side in (0, 24):
        [clip], _ = cut(path, ClipSettings(frame_side=side))
        scale = clip.height / 48
        shown = seen(clip.frames[1])[clip.height // 2, [int(scale * (8 + 16 * number)) for number in range(8)]]
        assert np.abs(shown - colours).max() < 12, shown - colours


def test_frames_are_shrunk_to_a_side_and_never_enlarged(tmp_path):
    wide = write_video(tmp_path / "a.mp4", [moving_square(0, 160, 80)] * 3)
    for side, size in ((20, (40, 20)), (0, (160, 80)), (500, (160, 80))):
        [clip], _ = cut(wide, ClipSettings(frame_side=side))
        assert (clip.width, clip.height) == size == seen(clip.frames[0]).shape[1::-1]


def test_pixels_become_square_and_what_is_transparent_white(tmp_path):
    [clip], _ = cut(write_video(tmp_path / "a.mp4", [moving_square(0)] * 3, pixel_width=2))
    assert (clip.width, clip.height) == (128, 48) and seen(clip.frames[0])[12, 16:][:4].min() > 200
    first, second = (Image.new("RGBA", (40, 30), (255, 0, 0, 255 * number)) for number in (0, 1))
    first.save(tmp_path / "b.gif", save_all=True, append_images=[second], duration=500, disposal=2)
    [clip], _ = cut(tmp_path / "b.gif")
    assert seen(clip.frames[0]).min() > 240 and seen(clip.frames[1])[15, 20, 1] < 60


def test_motion_is_none_where_nothing_moves_and_grows_with_speed(tmp_path):
    still, _ = cut(write_video(tmp_path / "still.mp4", [moving_square(0)] * 25))
    slow, _ = cut(write_video(tmp_path / "slow.mp4", [moving_square(i, step=1) for i in range(25)]))
    fast, _ = cut(write_video(tmp_path / "fast.mp4", [moving_square(i, step=2) for i in range(20)]))
    assert still[0].motion[0] == 0 and max(still[0].motion) < 0.3
    assert 1 < np.mean(slow[0].motion[1:]) < 0.8 * np.mean(fast[0].motion[1:4])


def test_motion_of_a_clip_that_is_turned_within_is_known_for_the_others():
    encoder = cutting._Encoder(90)
    shapes = [(32, 48), (32, 48), (48, 32), (48, 32), (32, 48)]
    planes = [tuple(np.full(shape, 40 * number, np.uint8) for _ in range(3)) for number, shape in enumerate(shapes)]
    each = [Picture(number, number / 5, one) for number, one in enumerate(planes)]
    first = encoder.clip(0, Fraction(0), iter(each))
    assert first.motion == [0, 40, 0, 40, 0] and encoder.clip(1, Fraction(1), iter(each[:2])).motion == [160, 40]


def test_sound_that_begins_late_says_when_and_what_lacks_sound_has_none(tmp_path):
    clips, _ = cut(write_video(tmp_path / "a.mkv", squares(75), sound=tone(1.0), sound_start=0.5))
    assert [(clip.sound.start, clip.sound.num_samples) for clip in clips] == [(0.5, 8000), (0, 8000), (0, 0)]
    assert clips[2].sound.flac == b"" and len(clips[2].frames) == 5


def test_sound_goes_on_while_a_frame_is_seen_for_long(tmp_path):
    path = write_video(tmp_path / "a.mkv", squares(3), times=[0, 0.2, 1.5], sound=tone(1.5))
    clips, notes = cut(path)
    assert not notes and [(clip.sound.start, clip.sound.num_samples) for clip in clips] == [(0, 16_000), (0, 8000)]


def test_one_frame_is_a_clip_unless_more_are_asked_for(tmp_path):
    path = write_video(tmp_path / "a.mp4", squares(1))
    [clip], notes = cut(path)
    assert len(clip.frames) == 1 and not notes
    assert cut(path, ClipSettings(min_frames=2)) == ([], [TOO_FEW])


def test_what_is_no_video_is_left_out_for_a_reason(tmp_path):
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n%s\n#EXT-X-ENDLIST\n"
    inside = write_video(tmp_path / "inside.mp4", squares(5))
    files = {
        "empty.mp4": (b"", "empty file"),
        "text.mp4": (b"no video at all", "damaged, cut, or of an unknown format"),
        "playlist.mp4": (playlist % str(inside).encode(), "damaged, cut, or of an unknown format"),
        "concat.mp4": (b"ffconcat version 1.0\nfile '%s'\n" % str(inside).encode(), "damaged, cut"),
        "cut.mp4": (inside.read_bytes()[:-200], "damaged, cut, or of an unknown format"),
    }
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=reason):
            cut(tmp_path / name)
    unknown = bytearray(inside.read_bytes())
    place = unknown.index(b"avc1", unknown.index(b"stsd"))
    unknown[place : place + 4] = b"zzzz"
    (tmp_path / "codec.mp4").write_bytes(unknown)
    with pytest.raises(ImageError, match=UNKNOWN_CODEC):
        cut(tmp_path / "codec.mp4")
    with pytest.raises(ImageError, match=NO_PICTURES):
        cut(write_sound(tmp_path / "sound.mp4", tone(0.2), "aac"))
    with pytest.raises(ImageError, match="too small"):
        cut(inside, cleaning=Cleaning(min_side=100))
    with pytest.raises(ImageError, match="too many pixels"):
        cut(inside, cleaning=Cleaning(max_pixels=1000))


def test_of_a_damaged_video_what_decodes_is_kept_and_the_damage_noted(tmp_path):
    whole = write_video(tmp_path / "a.mkv", noise(100), sound=tone(4.0)).read_bytes()
    fast = write_video(tmp_path / "a.mp4", noise(100), sound=tone(4.0), options={"movflags": "faststart"}).read_bytes()
    hole = bytearray(whole)
    hole[len(hole) // 2 : len(hole) // 2 + 3000] = np.random.default_rng(1).bytes(3000)
    num_whole = sum(len(clip.frames) for clip in cut(tmp_path / "a.mkv")[0])
    assert num_whole == 20
    for content, suffix, expected in (
        (whole[: len(whole) // 2], "mkv", {CUT}),
        (fast[: len(fast) // 2], "mp4", {CUT, DAMAGED_PARTS}),  # the cut may fall into a frame, or between two
        (bytes(hole), "mkv", {CUT, DAMAGED_PARTS}),  # whether the demuxer finds its way behind it
    ):
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(content)
        clips, notes = cut(path)
        assert expected & set(notes)
        assert 8 <= sum(len(clip.frames) for clip in clips) <= (20 if content == bytes(hole) else 13)


def test_a_video_whose_pictures_begin_after_its_sound_is_not_called_cut(tmp_path):
    late = [3 + number / 25 for number in range(50)]
    clips, notes = cut(write_video(tmp_path / "late.mkv", noise(50), times=late, sound=tone(5.0)))
    assert clips and not notes


def test_of_an_hour_no_more_is_decoded_than_the_clip_at_hand_needs(tmp_path, monkeypatch):
    path = write_video(tmp_path / "hour.mp4", (moving_square(number) for number in range(3600)), rate=1)
    num_decoded, decode = 0, pictures.decoded

    def counted(*arguments):
        nonlocal num_decoded
        for frame in decode(*arguments):
            num_decoded += 1
            yield frame

    monkeypatch.setattr(pictures, "decoded", counted)
    settings = ClipSettings(frame_rate=1, clip_seconds=60)
    check, notes = Cleaning().check_size, []
    clips = clips_of_video(partial(path.open, "rb"), settings, quality=90, check=check, note=notes.append)
    for number, clip in enumerate(clips):
        assert (clip.number, clip.start, len(clip.frames)) == (number, 60.0 * number, 60)
        assert num_decoded <= 60 * (number + 1) + 2  # the first one of the next clip, and the one after it
    assert num_decoded == 3600 and not notes


def test_an_image_and_its_sound_are_a_clip_of_one_frame(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (400, 300), (200, 30, 30)).save(image, "PNG")
    sound = write_sound(tmp_path / "dog.wav", tone(1.5, hertz=600), "pcm_s16le")
    notes: list[str] = []
    rules = {"quality": 90, "check": Cleaning().check_size, "max_pixels": 10**6, "note": notes.append}
    pair = clip_of_pair(image.getvalue(), partial(sound.open, "rb"), ClipSettings(frame_side=90), **rules)
    assert (pair.width, pair.height) == (120, 90) and abs(seen(pair.frames[0]) - (200, 30, 30)).max() < 8
    assert pair.sound.num_samples == 72_000 and abs(pitch(pair.sound.flac) - 600) < 6 and not notes
    pair = clip_of_pair(image.getvalue(), partial(sound.open, "rb"), SMALL, **rules)
    assert pair.sound.num_samples == 16_000 and notes == [LONG_SOUND]
    sound.write_bytes(b"no sound")
    with pytest.raises(ImageError, match="an image whose sound cannot be read"):
        clip_of_pair(image.getvalue(), partial(sound.open, "rb"), SMALL, **rules)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"frame_rate": 0}, "--frame-rate=0: expected a number above 0"),
        ({"clip_seconds": 0.01}, "shorter than a frame"),
        ({"min_frames": 81}, "expected 1 to 80"),
        ({"sound_rate": 5}, "expected 1000 to 192000"),
        ({"frame_side": -1}, "expected pixels"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, line):
    with pytest.raises(InputError, match=line):
        ClipSettings(**wrong)


def test_without_pyav_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'largescale\[clips\]'"):
        library.pyav()


def test_a_process_that_is_forked_afterwards_waits_for_nothing(tmp_path):
    """What FFmpeg holds in a cycle of references would be freed in the child, and wait for threads of the parent."""
    gc.disable()
    try:
        cut(write_video(tmp_path / "a.mp4", squares(30), sound=tone(1.2)))
        child = os.fork()
    finally:
        gc.enable()
    if child == 0:
        signal.alarm(60)
        gc.collect()
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_suffixes():
    assert is_video("a/B.MP4") and is_video("x.gif") and not is_video("x.png") and not is_video("x.ogg")
    assert is_sound("x.OGG") and not is_sound("x.mp4")
