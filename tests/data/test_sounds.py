"""Sound beside images: which window goes with which frame, that it is decoded exactly, and what stands in for silence.

Covers: largescale/config/sound_settings.py, largescale/data/clip_facts.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.config import MethodConfig, SoundConfig
from largescale.data.batches import Unreadable
from largescale.data.clip_facts import ClipFacts
from largescale.data.corpora import Corpus
from largescale.data.reader import SampleError, ShardReader
from largescale.data.sounds import SoundWindows, decode_window, possible_starts
from shards.clips.clip import ClipSettings
from shards.clips.sound import to_flac
from shards.conversion.convert import Options, convert
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError
from tests.helpers.streams import make_stream
from tests.helpers.videos import write_sound, write_video

RATE, FRAMES, LATE = 8000, 12, 0.75
LEVELS = 20 + 20 * np.arange(FRAMES)
"""Grey of the frames of every clip, six a second: a view tells which one it is of."""
RAMP = np.arange(2 * RATE, dtype=np.int16)
"""Sound whose samples say where they are: the first one of a window is its place."""
WANTED = SoundConfig(seconds=0.5, rate=RATE, loudness=0.0)
LOUD, SILENT, SHORT, BEGINS_LATE, PAIR = range(14), 14, 15, 16, 17


def cut(source: Path) -> Path:
    clips = ClipSettings(frame_rate=6.0, clip_seconds=4.0, sound_rate=RATE)
    convert(source, source.parent / "shards", Options("clips", samples_per_shard=5, clips=clips))
    return source.parent / "shards"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of two seconds: 14 with sound, one without, one with too little, one whose sound begins late; and a pair
    of an image and a sound.
    """
    source = tmp_path_factory.mktemp("sounds") / "in"
    frames = [np.full((32, 32, 3), level, np.uint8) for level in LEVELS]
    for number in range(17):
        sound = {SILENT: None, SHORT: RAMP[: RATE // 4], BEGINS_LATE: RAMP[: RATE + RATE // 4]}.get(number, RAMP)
        start = LATE if number == BEGINS_LATE else 0.0
        path = source / f"{number:02d}.mkv"
        write_video(path, frames, rate=6, sound=sound, sound_rate=RATE, sound_start=start)
    write_video(tmp_path_factory.mktemp("image") / "17.gif", frames[3:4], rate=6).rename(source / "17.gif")
    (source / "17.gif").rename(source / "17.png")  # what a file is, its content says
    write_sound(source / "17.wav", RAMP, "pcm_s16le", rate=RATE)
    return cut(source)


@pytest.fixture
def ask(monkeypatch):
    """Let the method ask for sound."""

    def asking(**other: object) -> SoundConfig:
        wanted = replace(WANTED, **other)
        monkeypatch.setattr(MethodConfig, "sounds", lambda self: wanted)
        return wanted

    return asking


def frame_of(pixels: torch.Tensor) -> int:
    return int(np.abs(LEVELS - float(pixels.double().mean())).argmin())


def test_a_window_overlaps_the_frame_that_is_seen_and_starts_on_the_grid(folder, ask):
    wanted = ask()
    reader = ShardReader([Corpus(read_manifest(folder))])
    windows = SoundWindows(wanted, reader, 0)
    for sample_id in (*LOUD, BEGINS_LATE, PAIR):
        key, facts = int(reader.key(sample_id).split("/")[0]), reader.clip(sample_id)
        assert key == sample_id
        begin = round(LATE * RATE) if sample_id == BEGINS_LATE else 0
        seen = set()
        for epoch in range(60):
            heard = windows.hear(sample_id, epoch)
            start = begin + int(heard.window[0])
            assert (heard.window == RAMP[start - begin :][: wanted.num_samples]).all()
            assert start % 320 == 0 and start >= begin
            if sample_id != PAIR:
                assert 0 <= facts.times[heard.frame] * RATE - start + 8 < wanted.num_samples + 16
            seen.add((heard.frame, start))
        assert len(seen) > 20
        if sample_id == BEGINS_LATE:
            assert min(frame for frame, _ in seen) == 5  # the first one at or after three quarters of a second
        if sample_id == PAIR:
            assert {start for _, start in seen} <= set(range(0, 3 * RATE // 2 + 1, 320))


def test_starts_are_those_of_the_naive_loop():
    generator = np.random.default_rng(0)
    for _ in range(50):
        times = np.sort(generator.uniform(0, 2, 5)).astype(np.float32)
        begin, length = int(generator.integers(0, 9000)), int(generator.integers(3000, 16000))
        facts = ClipFacts(0.0, times, times, RATE, begin / RATE, length)
        wanted = replace(WANTED, grid_s=float(generator.choice([0.04, 0.11])))
        expected = [
            [
                start
                for start in range(0, 40_000, wanted.grid)
                if begin <= start and start + wanted.num_samples <= begin + length
                if start <= round(float(time) * RATE) < start + wanted.num_samples
            ]
            for time in times
        ]
        if not any(expected):
            with pytest.raises(SampleError, match=r"no window of 0\.5 s"):
                possible_starts(facts, wanted)
            continue
        found = possible_starts(facts, wanted)
        for first, last, own in zip(found.first, found.last, expected, strict=True):
            assert list(range(first * wanted.grid, (last + 1) * wanted.grid, wanted.grid)) == own


def heard_by_id(stream, steps: range) -> dict[tuple[int, int], torch.Tensor]:
    """Views and sound of every sample, in one row."""
    return {
        (batch.step, sample_id): torch.cat([*batch.views[0][row :: len(batch.ids)].flatten(1), batch.sounds[row]])
        for batch in stream(steps)
        for row, sample_id in enumerate(batch.ids.tolist())
    }


PLAIN = ["train.global_batch=8", "data.crops=[{num: 2, size: 16}]"]


def test_ranks_and_workers_change_no_window(folder, ask):
    ask(loudness=0.5)
    whole = heard_by_id(make_stream(folder, *PLAIN), range(2))
    found: dict[tuple[int, int], torch.Tensor] = {}
    for rank, workers in ((0, 2), (1, 0)):
        stream = make_stream(folder, *PLAIN, f"data.workers={workers}", rank=rank, ranks=2)
        found |= heard_by_id(stream, range(2))
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)


def test_the_stream_gives_the_window_of_its_frame_and_lists_what_cannot_be_heard(folder, ask):
    wanted = ask()
    stream = make_stream(folder, *PLAIN)
    windows = SoundWindows(wanted, stream.batches.reader, 0)
    skipped = {}
    for batch in stream(range(2 * stream.order.steps_per_epoch)):
        assert batch.sounds.dtype == torch.int16 and batch.sounds.shape == (8, wanted.num_samples)
        _, epochs = stream.batches.samples(batch.step, slice(None))
        for row, (sample_id, epoch) in enumerate(zip(batch.ids.tolist(), epochs.tolist(), strict=True)):
            assert (batch.sounds[row].numpy() == windows.hear(sample_id, epoch).window).all()
        assert not {SILENT, SHORT} & set(batch.ids.tolist())
        skipped |= {row["key"][:2]: row["reason"] for row in batch.skipped}
    assert skipped == {
        "14": "has no sound",
        "15": "has 0.25 s of sound, in which no window of 0.5 s starts on the grid",
    }


def test_loudness_is_drawn_between_its_bounds(folder, ask):
    reader = ShardReader([Corpus(read_manifest(folder))])
    plain, loud = (SoundWindows(ask(loudness=share), reader, 0) for share in (0.0, 0.5))
    factors = [
        loud.hear(sample_id, epoch).window[-1] / plain.hear(sample_id, epoch).window[-1]
        for sample_id in LOUD
        for epoch in range(10)
    ]
    assert 0.5 <= min(factors) < 0.55 and 0.95 < max(factors) <= 1.0
    assert np.std(factors) == pytest.approx(0.5 / 12**0.5, rel=0.15)


def test_a_window_is_cut_out_of_flac_exactly_and_damage_is_named():
    sound = np.random.default_rng(0).integers(-(2**15), 2**15, 48_000).astype(np.int16)
    payload = to_flac(sound, 48_000)
    for start in (0, 1, 4095, 4096, 30_001, 47_000):
        assert (decode_window(payload, start, 1000) == sound[start : start + 1000]).all()
    for broken, start in ((payload[:2000], 40_000), (b"no FLAC at all", 0), (payload, 47_500)):
        with pytest.raises(SampleError, match="its sound is damaged"):
            decode_window(broken, start, 1000)


def test_folders_without_sound_or_at_another_rate_are_refused(folder, shard_folder, ask, tmp_path):
    ask(rate=16_000)
    with pytest.raises(InputError, match=r"8000 samples per second; set method.sound.rate=8000"):
        make_stream(folder)
    ask()
    with pytest.raises(InputError, match="no sample has sound"):
        make_stream(shard_folder)
    write_video(tmp_path / "in" / "0.mkv", [np.zeros((32, 32, 3), np.uint8)] * 6, rate=6)
    with pytest.raises(InputError, match="no sample has sound"):
        make_stream(cut(tmp_path / "in"))


def test_clips_that_cannot_be_heard_are_not_blamed_on_their_files(folder):
    reader = ShardReader([Corpus(read_manifest(folder))])
    windows = {seconds: SoundWindows(replace(WANTED, seconds=seconds), reader, 0) for seconds in (0.5, 4.0)}
    other_rate = SoundWindows(replace(WANTED, rate=16_000), reader, 0)
    for number, heard, remedy in (
        (SILENT, windows[0.5], "data.subset"),
        (SHORT, windows[0.5], "lower method.sound.seconds"),
        (0, windows[4.0], "lower method.sound.seconds"),
        (0, other_rate, "set method.sound.rate"),
    ):
        unreadable = Unreadable(reader)
        with pytest.raises(SampleError) as raised:
            heard.hear(number, 0)
        unreadable.reasons[number] = str(raised.value)
        line = unreadable.all_of([number])
        assert remedy in line and "shards verify" not in line


def test_evaluation_hears_what_is_around_the_frame_in_the_middle(folder, ask):
    wanted = ask()
    windows = SoundWindows(wanted, ShardReader([Corpus(read_manifest(folder))]), 0)
    middle = 19 * wanted.grid  # 0.76 s: 0.25 s before the frame of the first second, on the grid
    for sample_id, start in ((0, middle), (BEGINS_LATE, middle - round(LATE * RATE)), (PAIR, 18 * wanted.grid)):
        found = windows.in_the_middle(sample_id)
        assert (found == np.arange(start, start + wanted.num_samples)).all()
    for sample_id, why in ((SILENT, "has no sound"), (SHORT, "no window of")):
        with pytest.raises(SampleError, match=why):
            windows.in_the_middle(sample_id)
