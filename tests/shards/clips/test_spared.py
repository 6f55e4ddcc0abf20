"""Frames that are not decoded change nothing in the clips, and are some of those that nobody keeps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shards.cleaning.rules import Cleaning
from shards.clips import pictures, spared
from shards.clips.clip import Clip, ClipSettings
from shards.clips.cutting import clips_of_video
from shards.clips.pictures import DAMAGED_PARTS
from shards.clips.spared import Spared
from tests.helpers.videos import moving_square, tone, write_video

SQUARES = [moving_square(number) for number in range(100)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """H.264 with frames that none other refers to, in containers that say different things about times."""
    folder = tmp_path_factory.mktemp("spared")
    found = {name: write_video(folder / f"a.{name}", SQUARES, sound=tone(4.0)) for name in ("mp4", "mkv", "ts", "avi")}
    times = np.cumsum(np.random.default_rng(0).choice([0.005, 0.02, 0.04, 0.3], 100))
    found["variable"] = write_video(folder / "variable.mkv", SQUARES, times=times.tolist())
    parts = [write_video(folder / f"{count}.ts", SQUARES[:count]).read_bytes() for count in (60, 90)]
    found["joined"] = folder / "joined.ts"
    found["joined"].write_bytes(b"".join(parts))
    return found


def cut(path: Path, rate: float, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Clip], list[str], int]:
    """The clips of a video, what is left out, and how many frames were decoded."""
    notes: list[str] = []
    num_decoded, decode = 0, pictures.decoded

    def counted(*arguments):
        nonlocal num_decoded
        for frame in decode(*arguments):
            num_decoded += 1
            yield frame

    settings = ClipSettings(frame_rate=rate, clip_seconds=2, sound_rate=8000)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "decoded", counted)
        check = Cleaning().check_size
        clips = list(clips_of_video(partial(path.open, "rb"), settings, quality=90, check=check, note=notes.append))
    return clips, notes, num_decoded


@pytest.mark.parametrize("name", ["mp4", "mkv", "ts", "avi", "variable", "joined"])
def test_clips_are_those_of_all_frames(files, name, monkeypatch):
    counts = []
    for rate in (3, 8, 12.5, 25):
        found, notes, few = cut(files[name], rate, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(spared, "_CODECS", ())
            expected, expected_notes, every = cut(files[name], rate, monkeypatch)
        assert found == expected and notes == expected_notes and every == (150 if name == "joined" else 100)
        counts.append(every - few)
    if name == "avi":  # MPEG-4
        assert counts == [0, 0, 0, 0]
    else:
        assert min(counts[:3]) > (5 if name == "joined" else 10)


def test_damage_is_noted_and_costs_two_frames_more_at_most(tmp_path, monkeypatch):
    """A damaged frame may have been the first of its step, and those behind it be spared before that is known."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 200, (6, 16, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    frames = [np.roll(blocks, number, 1)[:, :64] + rng.integers(0, 50, (48, 64, 3), np.uint8) for number in range(100)]
    content = bytearray(write_video(tmp_path / "a.mp4", frames).read_bytes())
    start = 7 * len(content) // 10  # a frame takes some hundred bytes
    content[start : start + 4000] = rng.bytes(4000)
    (tmp_path / "a.mp4").write_bytes(content)
    found, notes, few = cut(tmp_path / "a.mp4", 8, monkeypatch)
    monkeypatch.setattr(spared, "_CODECS", ())
    expected, expected_notes, every = cut(tmp_path / "a.mp4", 8, monkeypatch)
    assert few < every < 100 and notes[0] == expected_notes[0] == DAMAGED_PARTS
    lost = sum(len(clip.frames) for clip in expected) - sum(len(clip.frames) for clip in found)
    assert 0 <= lost <= 2


class Decoder:
    """What `Spared` sees: a packet of each frame, stored in another order than shown; some are referred to by none."""

    def __init__(self) -> None:
        self.context = SimpleNamespace(name="h264", skip_frame="DEFAULT")
        self.spared = Spared(SimpleNamespace(codec_context=self.context), lambda time: time // 5)
        self.number = 0

    def group(self, *, is_lost: bool = False) -> list[int]:
        """Three frames, the last two of which none refers to; the first may be lost. Returns times that were spared."""
        found, shown = [], []
        for place, time in enumerate((3, 1, 2)):
            is_spared = self.send(time + self.number, place + self.number) and place > 0
            (found if is_spared else shown).append(time + self.number)
        said = [one for time in sorted(shown[is_lost:]) for one in self.spared.before(time)]
        assert said == [(time, 1) for time in found]
        self.number += 3
        return found

    def send(self, time: int | None, stored: int | None) -> bool:
        """A packet; returns whether the decoder is told to leave it out if none refers to it."""
        self.spared.send(SimpleNamespace(pts=time, dts=stored, duration=1, is_discard=False, size=1))
        return self.context.skip_frame == "NONREF"


def test_frames_are_spared_behind_the_first_of_a_step_once_32_came_out_as_they_should():
    decoder = Decoder()
    found = [decoder.group() for _ in range(30)]
    assert not any(found[:11]) and sum(map(len, found)) > 10
    assert all(time % 5 for times in found for time in times)


def test_what_is_lost_ends_it_unless_that_is_at_the_beginning():
    decoder = Decoder()
    decoder.group(is_lost=True)
    found = [decoder.group() for _ in range(30)]
    assert not any(found[:11]) and any(found)
    decoder.group(is_lost=True)
    decoder.group()  # after which it is known
    assert not any(decoder.group() for _ in range(60))


@pytest.mark.parametrize(("time", "stored"), [(63, 50), (63, None), (None, 62)])
def test_a_clock_that_falls_or_is_not_known_ends_it(time, stored):
    decoder = Decoder()
    assert any(decoder.group() for _ in range(20))
    assert not decoder.send(time, stored)
    decoder.number += 3
    assert not any(decoder.send(decoder.number + place, decoder.number + place) for place in range(90))


def test_two_frames_of_one_time_are_no_fall_of_the_clock():
    decoder = Decoder()
    assert any(decoder.group() for _ in range(20))
    for place, time in enumerate((3, 1, 1, 2)):  # 60 to 62 are on the way
        decoder.send(60 + time, 60 + place)
    said = [decoder.spared.before(60 + time) for time in (1, 1, 3)]
    assert said[1] == [] and all(ticks < 63 for ticks, _ in said[2])
