"""Covers: largescale/data/corpora.py, largescale/data/reader.py"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.config import Config, DataConfig, MethodConfig, SupportConfig
from largescale.data.cache import ShardLost
from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from largescale.data.stream import num_loading
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index, write_index
from shards.ground.errors import InputError
from tests.helpers.streams import make_stream, overwrite


@pytest.fixture
def damaged(shard_folder: Path, tmp_path: Path) -> tuple[Path, set[str]]:
    folder = Path(shutil.copytree(shard_folder, tmp_path / "damaged"))
    return folder, {overwrite(folder, 1, 5), overwrite(folder, 1, 6), overwrite(folder, 3, 39)}


def test_views_have_their_shapes_and_start_anywhere(shard_folder):
    stream = make_stream(shard_folder)
    steps = list(stream(range(14)))
    assert [batch.step for batch in steps] == list(range(14))
    assert [tuple(view.shape) for view in steps[0].views] == [(32, 3, 28, 28), (16, 3, 20, 20), (16, 3, 16, 16)]
    again = next(iter(stream(range(9, 14))))
    assert again.keys == steps[9].keys
    assert all(torch.equal(a, b) for a, b in zip(again.views, steps[9].views, strict=True))


def test_ranks_and_workers_do_not_change_a_sample(shard_folder):
    whole = next(iter(make_stream(shard_folder)(range(3, 14))))
    streams = [make_stream(shard_folder, f"data.workers={rank}", rank=rank, ranks=4) for rank in range(4)]
    parts = [next(iter(stream(range(3, 14)))) for stream in streams]
    assert [key for part in parts for key in part.keys] == whole.keys
    for group, views in enumerate(whole.views):
        num = views.shape[0] // 16
        joined = torch.cat([part.views[group].unflatten(0, (num, 4)) for part in parts], dim=1).flatten(0, 1)
        torch.testing.assert_close(joined, views, rtol=0, atol=1e-12)


def test_a_crop_group_is_augmented_in_its_own_way(shard_folder):
    """Its views are those that the same settings for all would give it; the others' stay as they were, bit for bit."""
    stream = make_stream(shard_folder, "data.crops.1.augment={blur: 1, solarise: 0.5, flip: 0}")
    own = next(iter(stream(range(1)))).views
    plain = next(iter(make_stream(shard_folder)(range(1)))).views
    everywhere = next(iter(make_stream(shard_folder, "data.augment={blur: 1, solarise: 0.5, flip: 0}")(range(1)))).views
    assert torch.equal(own[0], plain[0]) and torch.equal(own[2], plain[2])
    assert torch.equal(own[1], everywhere[1]) and not torch.equal(own[1], plain[1])
    assert stream.loaded.augments[0] is stream.loaded.augments[2] is not stream.loaded.augments[1]


def test_views_differ_between_epochs_views_and_seeds(shard_folder):
    batch = next(iter(make_stream(shard_folder)(range(14))))
    assert not torch.equal(batch.views[0][:16], batch.views[0][16:])
    other = next(iter(make_stream(shard_folder, "run.seed=1")(range(14))))
    assert other.keys != batch.keys


def test_an_unreadable_image_is_listed_and_replaced_by_its_neighbour(damaged):
    folder, bad = damaged
    batches = list(make_stream(folder)(range(14)))
    skipped = [row for batch in batches[:12] for row in batch.skipped]
    assert {row["key"] for row in skipped} <= bad and skipped
    assert all(row["reason"] == "checksum differs from the index" and row["shard"].endswith(".tar") for row in skipped)
    used = [key for batch in batches[:12] for key in batch.keys]
    assert len(used) == 192 and not set(used) & bad
    again = list(make_stream(folder, "data.workers=2")(range(14)))
    assert [batch.keys for batch in again] == [batch.keys for batch in batches]


@pytest.fixture
def garbage(shard_folder: Path, tmp_path: Path) -> Path:
    """Shards of which one holds nothing but garbage, of its old size."""
    folder = Path(shutil.copytree(shard_folder, tmp_path / "garbage"))
    tar = folder / "train-000002.tar"
    tar.write_bytes(b"\x01" * tar.stat().st_size)
    return folder


def test_a_shard_of_garbage_stops_the_stream_with_its_name(garbage):
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"train-000002\.tar: 6 consecutive samples cannot be read"):
            list(make_stream(garbage, f"data.workers={workers}", "data.max_skipped_in_row=6")(range(12)))


def test_the_next_shard_stands_in_for_one_of_garbage(garbage):
    stream = make_stream(garbage, "data.max_skipped_in_row=9")
    batches = list(stream(range(12)))
    assert {row["shard"] for batch in batches for row in batch.skipped} == {"train-000002.tar"}
    wanted = np.concatenate([stream.order.samples(step)[0] for step in range(12)])
    used = np.concatenate([batch.ids for batch in batches])
    lost = (wanted >= 80) & (wanted < 120)
    assert (used[~lost] == wanted[~lost]).all()
    assert (used[lost] == wanted[lost] + 40).all()  # spread over the next shard as they were over theirs


def test_what_is_unreadable_counts_a_position_once_and_a_sample_once(garbage):
    """Every neighbour of a bad stretch meets the same images: that is no reason to count or to list them again."""
    stream = make_stream(garbage)
    for batch in stream(range(12)):
        wanted = stream.order.samples(batch.step)[0]
        assert batch.substituted == wanted[(wanted >= 80) & (wanted < 120)].tolist()
        assert len({row["key"] for row in batch.skipped}) == len(batch.skipped)


def test_a_bad_stretch_is_the_same_on_any_number_of_ranks_and_workers(garbage):
    whole = list(make_stream(garbage)(range(12)))
    streams = [make_stream(garbage, f"data.workers={rank}", rank=rank, ranks=4)(range(12)) for rank in range(4)]
    for batch, *parts in zip(whole, *streams, strict=True):
        assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
        assert [one for part in parts for one in part.substituted] == batch.substituted
        assert {row["key"] for part in parts for row in part.skipped} == {row["key"] for row in batch.skipped}


def test_the_line_names_the_right_corpus_and_what_to_change(shard_folder, garbage, tmp_path):
    both = f"data.shards=[{shard_folder}, {garbage}]"
    says = rf"train-000002\.tar: 3 consecutive samples cannot .*; run `shards verify {garbage}`, or raise"
    with pytest.raises(InputError, match=says):
        list(make_stream(shard_folder, both, "data.max_skipped_in_row=3")(range(12)))


def test_a_shard_that_is_lost_on_the_way_is_replaced_and_listed(shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder = Path(shutil.copytree(shard_folder, tmp_path / "lost"))
    stream = make_stream(folder)
    (folder / "train-000002.tar").unlink()
    batches = list(stream(range(12)))
    rows = [row for batch in batches for row in batch.skipped]
    wanted = np.concatenate([stream.order.samples(step)[0] for step in range(12)])
    assert len(rows) == ((wanted >= 80) & (wanted < 120)).sum() > 30
    assert all("cannot be opened" in row["reason"] and row["shard"] == "train-000002.tar" for row in rows)
    assert not any(row["key"].startswith("row ") for row in rows)  # its index is there
    used = np.concatenate([batch.ids for batch in batches])
    kept = (wanted < 80) | (wanted >= 120)
    assert (used[kept] == wanted[kept]).all() and not ((used >= 80) & (used < 120)).any()


def test_decompression_bombs_are_not_decoded(shard_folder):
    with pytest.raises(InputError, match=r"28 x 28 pixels, more than data\.max_pixels=100; raise it$"):
        list(make_stream(shard_folder, "data.max_pixels=100")(range(14)))


def test_reader_finds_every_sample(shard_folder):
    reader = ShardReader([Corpus(read_manifest(shard_folder))])
    assert len(reader) == 200
    keys = [reader.key(i) for i in range(200)]
    assert len(set(keys)) == 200
    names = reader.corpora[0].manifest.classes
    assert all(names[reader.label(i)] == keys[i].split("/")[0] for i in range(200))


def test_reader_refuses_a_tar_of_another_size(shard_folder, tmp_path):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "short"))
    tar = folder / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2048])
    with pytest.raises(ShardLost, match=r"000000\.tar: is 2,048 bytes, the manifest says .* run `shards verify"):
        ShardReader([Corpus(read_manifest(folder))]).read(39)


def test_reader_refuses_a_shard_that_was_replaced_with_its_index(shard_folder, tmp_path):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "replaced"))
    manifest = read_manifest(folder)
    index = read_index(manifest.index_path(2))
    write_index(replace(index, keys=[f"other-{row}" for row in range(len(index))]), manifest.index_path(2))
    with pytest.raises(ShardLost, match=r"000002\.index\.safetensors: is not the index .* run `shards"):
        ShardReader([Corpus(manifest)]).read(85)


@pytest.mark.parametrize("workers, threads, num", [(2, 3, 2 * (1 + 3 + 2)), (0, 4, 4)])
def test_what_loads_is_counted_before_it_starts(workers, threads, num, monkeypatch):
    config = Config(data=DataConfig(workers=workers, threads=threads))
    assert num_loading(config) == num
    monkeypatch.setattr(MethodConfig, "supports", lambda self: SupportConfig())
    assert num_loading(config) == 2 * num
