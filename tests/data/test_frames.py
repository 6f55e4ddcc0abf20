"""Tuples of frames as the views of a sample: which ones, in what order, whoever reads them, and clips that have none.

Covers: largescale/config/frame_settings.py
"""

from __future__ import annotations

import shutil
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.config import FrameConfig, MethodConfig, WantedFrames
from largescale.data.batches import Buffers
from largescale.data.clip_facts import ClipFacts
from largescale.data.frames import FrameSampler
from largescale.data.random import uniform
from largescale.data.reader import SampleError
from shards.clips.clip import ClipSettings
from shards.conversion.convert import Options, convert
from shards.ground.errors import InputError
from shards.ground.open_file import OpenFile
from tests.helpers.servers import web_server
from tests.helpers.streams import make_stream, overwrite
from tests.helpers.videos import write_video

ORDERS = ((1, 2, 3), (1, 0, 3), (1, 4, 3))
FRAMES, RATE = 24, 8
LEVELS = 16 + 9 * np.arange(FRAMES)
"""Grey of the frames of a clip: a view tells which one it is of."""
GAPS = {"least_gap_s": 0.25, "most_gap_s": 0.5}
PLAIN = [
    "data.crops=[{num: 3, size: 16, scale: [0.4, 1.0]}]",
    "data.augment={flip: 0, rotate_degrees: 0, jitter: 0, gamma: 0, gain: 0, grayscale: 0, blur: 0, noise: 0}",
    "data.augment.erase=0",
    "data.mean=[0,0,0]",
    "data.std=[1,1,1]",
]


def wanted(drawn: int = 5, orders=ORDERS, chances=(0.25, 0.375, 0.375), **settings) -> WantedFrames:
    return WantedFrames(drawn, orders, chances, FrameConfig(**{**GAPS, **settings}))


def clip_of(times, motion) -> ClipFacts:
    return ClipFacts(0.0, np.array(times, np.float32), np.array(motion, np.float16), 0, 0.0, 0)


def all_tuples(clip: ClipFacts, drawn: int, config: FrameConfig) -> set[tuple[int, ...]]:
    """By trying all."""

    def fits(one: int, two: int) -> bool:
        gap = float(clip.times[two]) - float(clip.times[one])
        moved = clip.motion[one + 1 : two + 1].astype(float).sum()
        return config.least_gap_s - 0.002 <= gap <= config.most_gap_s + 0.002 and moved >= config.least_motion

    found = combinations(range(len(clip.times)), drawn)
    return {one for one in found if all(fits(*pair) for pair in pairwise(one))}


@pytest.mark.parametrize("start", ["motion", "uniform"])
def test_every_tuple_that_fits_is_drawn_and_no_other(start):
    random = np.random.default_rng(0)
    for least_motion in (0.0, 0.5, 2.0):
        times = np.cumsum(random.choice([0.08, 0.12, 0.3], 16))  # a variable rate
        clip = clip_of(times - times[0], random.choice([0, 0.5, 2], 16))
        ask = wanted(3, ((0, 1, 2),), (1.0,), least_motion=least_motion, start=start)
        expected = all_tuples(clip, 3, ask.config)
        sampler = FrameSampler(ask)
        draws = random.random((4000, sampler.num_draws))
        draws[0], draws[1] = 0, 1 - 2.0**-53
        found = {tuple(sampler(clip, own).tolist()) for own in draws}
        assert len(expected) > 5 and found <= expected
        assert found == expected or (start == "motion" and least_motion == 0), "some are rare there"


def test_orders_come_as_often_as_they_should_and_say_so_in_time():
    sampler, random = FrameSampler(wanted()), np.random.default_rng(0)
    clip = clip_of(np.arange(40) / 8, np.full(40, 3))
    found = np.array([sampler(clip, own) for own in random.random((4000, sampler.num_draws))])
    b, x, d = found.T
    assert (b < d).all()
    inside, before, behind = (b < x) & (x < d), x < b, x > d
    shares = [one.mean() for one in (inside, before, behind)]
    assert shares == pytest.approx([0.25, 0.375, 0.375], abs=0.03)


def test_the_first_frame_is_drawn_by_the_motion_after_it():
    motion = np.full(80, 0.5)
    motion[40:60] = 10
    clip, random = clip_of(np.arange(80) / 8, motion), np.random.default_rng(0)
    ask = wanted(3, ((0, 1, 2),), (1.0,), least_motion=0.0)
    sampler = FrameSampler(ask)
    firsts = np.array([sampler(clip, own)[0] for own in random.random((5000, sampler.num_draws))])
    counts = np.bincount(firsts, minlength=80) / len(firsts)
    possible = {one[0] for one in all_tuples(clip, 3, ask.config)}
    weights = np.array([motion[one + 1 : one + 9].sum() if one in possible else 0 for one in range(80)])
    assert np.abs(counts - weights / weights.sum()).max() < 0.012


@pytest.mark.parametrize(
    "times, motion, says",
    [
        (np.arange(8) / 8, np.full(8, 3), "too short for 5 frames with method.frames.least_gap_s=0.25"),
        (np.arange(1) / 8, np.zeros(1), "too short for 5 frames"),
        (np.arange(40) / 8, np.zeros(40), "too still for 5 frames with method.frames.least_motion=1"),
        (np.arange(40) / 8, np.arange(40) < 3, "too still for 5 frames"),
        (np.arange(5) * 2, np.full(5, 3), "no 5 of its frames fit method.frames.most_gap_s=0.5"),
    ],
)
def test_a_clip_that_has_no_tuple_says_why(times, motion, says):
    sampler = FrameSampler(wanted())
    with pytest.raises(SampleError, match=says):
        sampler(clip_of(times, motion), np.full(sampler.num_draws, 0.5))


def solid(path: Path, levels) -> None:
    write_video(path, [np.full((40, 40, 3), level, np.uint8) for level in levels], rate=RATE)


def converted(source: Path) -> Path:
    settings = ClipSettings(frame_rate=float(RATE), clip_seconds=FRAMES / RATE)
    convert(source, source / "../out", Options("clips", samples_per_shard=5, clips=settings))
    return source / "../out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 clips that move, two that do not, and two that are too short."""
    source = tmp_path_factory.mktemp("frames") / "videos"
    for number in range(36):
        levels = LEVELS if number % 9 else LEVELS[:6] if number % 2 else [120] * FRAMES
        solid(source / f"{number:02d}.mkv", levels)
    return converted(source)


@pytest.fixture
def asking(monkeypatch) -> None:
    monkeypatch.setattr(MethodConfig, "facts", ("times_us",))
    monkeypatch.setattr(MethodConfig, "frame_tuples", lambda self: wanted())


def frame_of(view: torch.Tensor) -> int:
    return int(np.abs(LEVELS - float(view.double().mean())).argmin())


@pytest.mark.usefixtures("asking")
def test_views_are_the_frames_that_the_hash_names_and_times_say_which(folder, monkeypatch):
    stream = make_stream(folder, *PLAIN, "data.audit=false")
    memory = torch.zeros(Buffers.num_bytes(stream.data, 16, ["times_us"]), dtype=torch.uint8)
    buffers = Buffers.carve(memory, stream.data, 16, ["times_us"])
    sampler, reads, read = FrameSampler(wanted()), [], OpenFile.read
    monkeypatch.setattr(
        OpenFile, "read", lambda self, start, size: reads.append((start, size)) or read(self, start, size)
    )
    seen: dict[int, set[tuple[int, ...]]] = {}
    for step in range(3 * stream.order.steps_per_epoch):
        reads.clear()
        part = stream.batches.make(step, slice(None), buffers, None)
        assert len(reads) == 3 * 16, "a read per frame that is shown"
        _, epochs = stream.batches.samples(step, slice(None))
        for row, (sample_id, epoch) in enumerate(zip(part.ids, epochs.tolist(), strict=True)):
            draws = uniform(0, epoch, sample_id, 0, 4, num=sampler.num_draws)
            expected = sampler(stream.batches.reader.clip(sample_id), draws).tolist()
            assert [frame_of(view) for view in buffers.views[0][:, row]] == expected
            microseconds = buffers.facts["times_us"][:, row]
            assert microseconds.dtype == torch.int64
            assert microseconds.tolist() == pytest.approx([1e6 * one / RATE for one in expected], abs=2e3)
            seen.setdefault(sample_id, set()).add(tuple(expected))
    assert len(seen) == 32 and sum(len(tuples) > 1 for tuples in seen.values()) > 25, "an epoch is to show others"


@pytest.mark.usefixtures("asking")
def test_a_clip_without_a_tuple_is_counted_listed_and_replaced(folder):
    stream = make_stream(folder, *PLAIN)
    batches = list(stream(range(2 * stream.order.steps_per_epoch)))
    reasons = {row["key"]: row["reason"] for batch in batches for row in batch.skipped}
    assert set(reasons) == {"00/00000", "09/00000", "18/00000", "27/00000"}
    assert reasons["00/00000"] == "too still for 5 frames with method.frames.least_motion=1"
    assert reasons["09/00000"] == "too short for 5 frames with method.frames.least_gap_s=0.25"
    taken = [sample_id for batch in batches for sample_id in batch.ids.tolist()]
    assert sum(len(batch.substituted) for batch in batches) >= 4 and len(set(taken)) == 32


def seen_by_id(stream, steps) -> dict[tuple[int, int], torch.Tensor]:
    found = {}
    for batch in stream(steps):
        views = batch.views[0].unflatten(0, (3, -1))
        for row, sample_id in enumerate(batch.ids.tolist()):
            found[batch.step, sample_id] = torch.cat([views[:, row].flatten(), batch.facts["times_us"][:, row]])
    return found


@pytest.mark.usefixtures("asking")
def test_each_clip_once_an_epoch_whoever_reads_it_wherever_it_starts(folder, monkeypatch):
    """Clips without a tuple are left to the test above: here each has one."""
    monkeypatch.setattr(MethodConfig, "frame_tuples", lambda self: wanted(least_gap_s=0.12, least_motion=0.0))
    stream = make_stream(folder, *PLAIN)
    steps = range(2 * stream.order.steps_per_epoch)
    whole = seen_by_id(stream, steps)
    per_epoch = [[key[1] for key in whole if key[0] // stream.order.steps_per_epoch == epoch] for epoch in (0, 1)]
    assert all(len(ids) == len(set(ids)) == 16 * stream.order.steps_per_epoch for ids in per_epoch)
    for ways in ([(0, 2), (1, 2)], [(rank, 4) for rank in range(4)]):
        found: dict[tuple[int, int], torch.Tensor] = {}
        for rank, ranks in ways:
            workers = "data.workers=2" if (rank, ranks) == (0, 2) else "data.workers=0"
            found |= seen_by_id(make_stream(folder, *PLAIN, workers, rank=rank, ranks=ranks), steps)
        assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
    later = seen_by_id(make_stream(folder, *PLAIN), steps[3:])
    assert all(torch.equal(value, whole[key]) for key, value in later.items()) and len(later) == 16 * len(steps[3:])


@pytest.mark.usefixtures("asking")
def test_a_damaged_frame_makes_its_clip_unreadable_and_the_run_goes_on(folder):
    stream = make_stream(folder, *PLAIN)
    before = seen_by_id(stream, range(2))
    shard = stream.corpora[0].manifest.tar_path(1)
    content = shard.read_bytes()
    try:
        for row in range(4):
            overwrite(folder, 1, row)
        damaged = make_stream(folder, *PLAIN)
        batches = list(damaged(range(6)))
        assert any("checksum differs" in row["reason"] for batch in batches for row in batch.skipped)
        assert all(len(batch.ids) == 16 for batch in batches)
    finally:
        shard.write_bytes(content)
    assert all(
        torch.equal(value, before[key]) for key, value in seen_by_id(make_stream(folder, *PLAIN), range(2)).items()
    )


@pytest.mark.usefixtures("asking")
def test_clips_of_a_shard_that_its_store_has_lost_are_listed_and_replaced(folder, tmp_path):
    served = Path(shutil.copytree(folder, tmp_path / "served"))
    with web_server(served) as server:
        stream = make_stream(server.url, *PLAIN, f"data.cache={tmp_path / 'cache'}")
        lost = stream.corpora[0].manifest.shards[1].name
        (served / lost).unlink()
        batches = list(stream(range(stream.order.steps_per_epoch)))
    rows = [row for batch in batches for row in batch.skipped if row["shard"] == lost]
    assert rows and all(lost in row["reason"] for row in rows)
    assert not {*range(5, 10)} & {sample_id for batch in batches for sample_id in batch.ids.tolist()}
    assert all(len(batch.ids) == 16 for batch in batches)


@pytest.mark.parametrize("shared", [True, False])
def test_frames_of_a_sample_share_their_box_and_changes_or_have_their_own(folder, monkeypatch, shared):
    monkeypatch.setattr(MethodConfig, "facts", ("boxes", "flips", "times_us"))
    ask = wanted(shared_boxes=shared, shared_augment=shared)
    monkeypatch.setattr(MethodConfig, "frame_tuples", lambda self: ask)
    batch = next(iter(make_stream(folder, PLAIN[0])(range(1))))
    same = [bool((batch.facts[name] == batch.facts[name][:1]).all()) for name in ("boxes", "flips")]
    assert same == [shared, shared]
    assert len(batch.facts["boxes"][0].unique(dim=0)) > 8, "samples have their own"


@pytest.mark.usefixtures("asking")
def test_images_are_refused_with_what_makes_clips(shard_folder):
    with pytest.raises(
        InputError, match=r"holds images, but method.name=\w+ sees .* `shards convert VIDEOS OUT --clips`"
    ):
        make_stream(shard_folder, *PLAIN)


@pytest.mark.usefixtures("asking")
def test_a_folder_in_which_no_clip_has_a_tuple_ends_with_one_line(tmp_path):
    for number in range(16):
        solid(tmp_path / "in" / f"{number:02d}.mkv", [100] * FRAMES)
    stream = make_stream(converted(tmp_path / "in"), *PLAIN)
    expected = r"16 consecutive samples cannot be read: too still for 5 .*least_motion=1; lower it$"
    with pytest.raises(InputError, match=expected):
        next(iter(stream(range(1))))


@pytest.mark.usefixtures("asking")
@pytest.mark.parametrize(
    "override, says",
    [
        ("data.crops=[{num: 2, size: 16}]", r"data.crops=\[2\]: expected one group of 3 views, the frames of a sample"),
        ("data.crops=[{num: 3, size: 16}, {num: 1, size: 16}]", r"data.crops=\[3, 1\]: expected one group"),
    ],
)
def test_views_are_as_many_as_frames(folder, override, says):
    with pytest.raises(InputError, match=says):
        make_stream(folder, override)


def test_gaps_are_in_order(folder, monkeypatch):
    monkeypatch.setattr(MethodConfig, "frame_tuples", lambda self: wanted(least_gap_s=0.7))
    with pytest.raises(
        InputError, match=r"method.frames.most_gap_s=0.5: expected at least method.frames.least_gap_s=0.7"
    ):
        make_stream(folder, *PLAIN)
