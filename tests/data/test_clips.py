"""Image methods on clips: one frame of each, another one every epoch, whoever reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.data.batches import Buffers
from largescale.data.corpora import Corpus
from largescale.data.decode import decode
from largescale.data.random import uniform
from largescale.data.reader import SampleError, ShardReader
from shards.clips.clip import ClipSettings
from shards.conversion.convert import Options, convert
from shards.format.manifest import read_manifest
from tests.helpers.streams import make_stream
from tests.helpers.videos import tone, write_video

FRAMES = 6
LEVELS = 20 + 40 * np.arange(FRAMES)
"""Grey of the frames of every clip: a view tells which one it is of."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 clips of six frames, two of each video, and of one of them the sound."""
    source = tmp_path_factory.mktemp("clips")
    for number in range(18):
        frames = [np.full((40, 40, 3), level, np.uint8) for level in (*LEVELS, *LEVELS)]
        write_video(source / f"{number:02d}.mkv", frames, rate=6, sound=tone(1.5) if number == 0 else None)
    clips = ClipSettings(frame_rate=6.0, clip_seconds=1.0, sound_rate=8000)
    convert(source, source / "../out", Options("clips", samples_per_shard=5, clips=clips))
    return source / "../out"


def frame_of(pixels: torch.Tensor) -> int:
    return int(np.abs(LEVELS - float(pixels.double().mean())).argmin())


def test_every_view_of_a_step_shows_the_frame_that_the_hash_names(folder):
    stream = make_stream(folder, "data.audit=false")
    size = Buffers.num_bytes(stream.data, 16)
    buffers = Buffers.carve(torch.zeros(size, dtype=torch.uint8), stream.data, 16)
    seen: dict[int, list[int]] = {}
    for step in range(2 * stream.order.steps_per_epoch):
        part = stream.batches.make(step, slice(None), buffers, None)
        _, epochs = stream.batches.samples(step, slice(None))
        for row, (sample_id, epoch) in enumerate(zip(part.ids, epochs.tolist(), strict=True)):
            expected = int(FRAMES * uniform(0, epoch, sample_id, 0, 3, num=1)[0])
            views = [view for group in buffers.views for view in group[:, row]]
            assert {frame_of(view) for view in views} == {expected}
            seen.setdefault(sample_id, []).append(expected)
    assert sum(frames[0] != frames[-1] for frames in seen.values()) > 15, "an epoch is to show other frames"
    counts = np.bincount([frame for frames in seen.values() for frame in frames], minlength=FRAMES)
    assert counts.min() > 0


def views_by_id(stream, steps: range) -> dict[tuple[int, int], torch.Tensor]:
    found = {}
    for batch in stream(steps):
        groups = [views.unflatten(0, (-1, len(batch.ids))) for views in batch.views]
        for row, sample_id in enumerate(batch.ids.tolist()):
            found[batch.step, sample_id] = torch.cat([views[:, row].flatten() for views in groups])
    return found


def test_ranks_and_workers_change_no_view(folder):
    whole = views_by_id(make_stream(folder), range(3))
    for parts in ([(0, 1)], [(0, 2), (1, 2)]):
        found: dict[tuple[int, int], torch.Tensor] = {}
        for rank, ranks in parts:
            found |= views_by_id(make_stream(folder, "data.workers=2", rank=rank, ranks=ranks), range(3))
        assert found.keys() == whole.keys() and all((found[key] == whole[key]).all() for key in whole)


def test_evaluation_sees_the_frame_in_the_middle_and_whoever_asks_the_columns(folder):
    reader = ShardReader([Corpus(read_manifest(folder))])
    for sample_id in (0, 1, 35):
        assert frame_of(decode(reader.read(sample_id), max_pixels=10**6)) == FRAMES // 2
        for frame in range(FRAMES):
            image = decode(reader.read(sample_id, lambda num_frames, frame=frame: frame), max_pixels=10**6)
            assert frame_of(image) == frame
        facts = reader.clip(sample_id)
        assert np.allclose(facts.times, np.arange(FRAMES) / 6, atol=2e-3) and facts.start == sample_id % 2
        assert np.abs(facts.motion[1:] - 40).max() < 4 and len(facts.motion) == FRAMES
    rates, starts, lengths = zip(*(reader.clip(sample_id)[3:] for sample_id in (0, 1, 2)), strict=True)
    assert rates == (8000, 8000, 0) and max(starts) < 2e-3  # Matroska counts milliseconds
    assert np.abs(np.array(lengths) - (8000, 4000, 0)).max() <= 16


def test_a_damaged_frame_is_a_sample_that_cannot_be_used(folder, tmp_path):
    manifest = read_manifest(folder)
    reader = ShardReader([Corpus(manifest)])
    tar = manifest.tar_path(0)
    whole, (_, index) = tar.read_bytes(), reader._shard(0)
    place = int(index.clips.offset[2]) + 40
    tar.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    try:
        with pytest.raises(SampleError, match="checksum differs"):
            ShardReader([Corpus(manifest)]).read(0, lambda num_frames: 2)
        ShardReader([Corpus(manifest)]).read(0, lambda num_frames: 1)
    finally:
        tar.write_bytes(whole)
