"""Folders of features: which samples they are of, what is read of them, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from largescale.curate import embeddings
from largescale.curate.embeddings import read_embeddings, unit_rows
from shards.format.manifest import Manifest, ShardEntry
from shards.ground.errors import InputError
from tests.helpers.piles import long_tail, write_features

ROWS = long_tail(250)


def manifest(*names: str) -> Manifest:
    entries = tuple(
        ShardEntry(name, size, 1, f"sum of {name}") for name, size in zip(names, (100, 100, 50), strict=True)
    )
    return Manifest(Path("shards"), "pile", entries, (), "", {}, {})


NAMES = tuple(f"pile-{number:06d}.tar" for number in range(3))


@pytest.mark.parametrize("form, dtype", [("parquet", "fp16"), ("npy", "fp16"), ("parquet", "fp32"), ("npy", "fp32")])
def test_rows_are_read_as_they_are_in_blocks_with_their_numbers(tmp_path, monkeypatch, form, dtype):
    monkeypatch.setattr(embeddings, "_BLOCK", 30)
    found = read_embeddings(write_features(tmp_path, ROWS, form=form, dtype=dtype, missing=(7, 100, 249)))
    assert (found.num_images, found.width, found.dtype.itemsize) == (247, 8, {"fp16": 2, "fp32": 4}[dtype])
    there = np.delete(np.arange(250), [7, 100, 249])
    assert np.concatenate([file.samples() for file in found.files]).tolist() == there.tolist()
    blocks = [block for file in found.files for block in file.blocks()]
    assert max(map(len, blocks)) == 30 and all(block.dtype == found.dtype for block in blocks)
    assert np.array_equal(np.concatenate(blocks), ROWS[there].astype(found.dtype))


def test_rows_have_length_one_and_none_stays_none():
    found = unit_rows(np.array([[3, 4], [0, 0], [6e-8, 0], [60_000, 60_000]], np.float16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0, 0], [1, 0], [0.5**0.5, 0.5**0.5]]))


def test_the_manifest_gives_the_order(tmp_path):
    write_features(tmp_path, ROWS)
    turned = replace(manifest(*NAMES), shards=manifest(*NAMES).shards[::-1])
    assert [file.first_sample for file in read_embeddings(tmp_path, turned).files] == [0, 50, 150]
    assert read_embeddings(tmp_path, turned).fingerprint() != read_embeddings(tmp_path).fingerprint()
    assert read_embeddings(tmp_path, manifest(*NAMES)).fingerprint() == read_embeddings(tmp_path).fingerprint()


@pytest.mark.parametrize("form", ["parquet", "npy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(tmp_path, form, value):
    rows = ROWS.copy()
    rows[123, 2] = value
    found = read_embeddings(write_features(tmp_path, rows, form=form))
    with pytest.raises(InputError, match=r"pile-000001.parquet: holds embeddings that are not finite"):
        list(found.files[1].blocks())


def refusal(folder: Path, shards: Manifest | None = None) -> str:
    with pytest.raises(InputError) as error:
        read_embeddings(folder, shards)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_used_is_one_line(tmp_path):
    assert "no such folder; write features with" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no features" in refusal(tmp_path / "empty")
    other = write_features(tmp_path / "width", ROWS)
    write_features(other, ROWS[:50, :4], name="zile")
    assert "num_features was 8 and is now 4" in refusal(other)
    weights = write_features(tmp_path / "weights", ROWS)
    write_features(weights, ROWS[:100], weights={"hash": "other"})
    assert "weights.hash was other and is now abc" in refusal(weights)
    several = write_features(tmp_path / "several", ROWS)
    write_features(several, ROWS, name="other")
    assert "holds features of several shard folders (other-, pile-)" in refusal(several)
    gap = write_features(tmp_path / "gap", ROWS)
    (gap / "pile-000001.parquet").unlink()
    assert "has no features of shard number 1; run `largescale features` again, or pass --shards" in refusal(gap)
    assert "has no features of pile-000001.tar of shards" in refusal(gap, manifest(*NAMES))
    half = write_features(tmp_path / "half", ROWS[:200], num_shards=3)
    assert "has features of 2 of 3 shards; run `largescale features` again" in refusal(half)
    assert len(read_embeddings(write_features(half, ROWS, num_shards=3)).files) == 3
    foreign = write_features(tmp_path / "foreign", ROWS, checksums={"pile-000002.tar": "other"})
    assert "pile-000002.parquet was made of another pile-000002.tar than that in shards" in refusal(
        foreign, manifest(*NAMES)
    )
    write_features(foreign, ROWS[:9], name="more")
    assert "more-000000.parquet is of none of the shards" in refusal(foreign, manifest(*NAMES))
    table = pq.read_table(gap / "pile-000000.parquet")
    pq.write_table(table.replace_schema_metadata({}), gap / "pile-000000.parquet")
    assert "not features that largescale wrote (its metadata has no entry largescale); pass a folder" in refusal(gap)
    (gap / "manifest.json").write_text("{}")
    assert "holds shards, not features; write them with `largescale features RUN" in refusal(gap)
    assigned = write_features(tmp_path / "assigned", ROWS, assignments=True)
    assert "assigned: holds assignments, not features; write features with `largescale features" in refusal(assigned)
    assert "holds features of no image" in refusal(
        write_features(tmp_path / "none", ROWS[:3], of_shard=9, missing=(0, 1, 2))
    )
