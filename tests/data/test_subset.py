"""A subset file restricts the stream to the samples that it lists."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from shards.errors import InputError
from shards.manifest import read_manifest
from tests.data.test_stream import make_stream, overwrite


@pytest.fixture
def chosen() -> np.ndarray:
    """A third of the 200 samples; none of the second shard of 40."""
    rng = np.random.default_rng(0)
    numbers = rng.choice(200, 80, replace=False)
    return np.sort(numbers[(numbers < 40) | (numbers >= 80)])


def write(folder: Path, chosen: np.ndarray, kind: str, keys: list[str]) -> Path:
    path = folder / ("subset.npy" if "npy" in kind else "subset.txt")
    if kind == "npy":
        np.save(path, chosen)
    elif kind == "npy, any order":
        np.save(path, np.concatenate([chosen[::-1], chosen[:3]]).astype(np.int32))
    else:
        rows = chosen if kind == "numbers" else [keys[number] for number in chosen]
        path.write_text("\n".join(map(str, rows)) + "\n\n")
    return path


@pytest.mark.parametrize("kind", ["npy", "npy, any order", "numbers", "keys"])
def test_the_stream_has_the_samples_of_the_file_alone(shard_folder, tmp_path, chosen, kind):
    whole = ShardReader([Corpus(read_manifest(shard_folder))])
    keys = [whole.key(number) for number in range(200)]
    stream = make_stream(shard_folder, f"data.subset={write(tmp_path, chosen, kind, keys)}", "data.workers=1")
    assert stream.order.num_samples == len(chosen)
    epoch = stream.order.steps_per_epoch
    used = [key for batch in stream(range(epoch)) for key in batch.keys]
    assert len(set(used)) == len(used) == epoch * 16
    assert set(used) <= {keys[number] for number in chosen}


def test_a_subset_is_part_of_what_a_run_is_trained_on(shard_folder, tmp_path, chosen):
    plain = make_stream(shard_folder)
    first = make_stream(shard_folder, f"data.subset={write(tmp_path, chosen, 'npy', [])}").fingerprint
    other = make_stream(shard_folder, f"data.subset={write(tmp_path, chosen[1:], 'npy', [])}").fingerprint
    assert len({plain.fingerprint, first, other}) == 3


def test_substitutes_come_from_the_subset(shard_folder, tmp_path, chosen):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "damaged"))
    bad = overwrite(folder, 0, int(chosen[0]))
    keys = [ShardReader([Corpus(read_manifest(folder))]).key(number) for number in range(200)]
    stream = make_stream(folder, f"data.subset={write(tmp_path, chosen, 'npy', keys)}")
    batches = list(stream(range(3 * stream.order.steps_per_epoch)))
    assert {row["key"] for batch in batches for row in batch.skipped} == {bad}
    used = {key for batch in batches for key in batch.keys}
    assert bad not in used and used <= {keys[number] for number in chosen}


@pytest.mark.parametrize("content, says", [
    (None, "no such subset file"), ("", "lists no sample"),
    ("3\n200\n", "lists sample 200, the corpus train has 0 to 199"),
    ("no/such-key\n", "1 keys are not in train, such as no/such-key")])
def test_a_wrong_subset_is_refused(shard_folder, tmp_path, content, says):
    path = tmp_path / "subset.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=says):
        make_stream(shard_folder, f"data.subset={path}")


def test_arrays_that_hold_objects_are_not_unpickled(shard_folder, tmp_path):
    path = tmp_path / "subset.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"not a \.npy array"):
        make_stream(shard_folder, f"data.subset={path}")


def test_a_list_of_corpora_takes_its_subsets_in_the_list(shard_folder, tmp_path, chosen):
    path = write(tmp_path, chosen, "npy", [])
    stream = make_stream(shard_folder, f"data.shards=[{{path: {shard_folder}, subset: {path}}}, {shard_folder}]")
    assert stream.order.num_samples == len(chosen) + 200
    with pytest.raises(InputError, match=r"data\.subset=.*set it in the list"):
        make_stream(shard_folder, f"data.shards=[{shard_folder}]", f"data.subset={path}")
