"""A subset file restricts the stream to the samples that it lists."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index, write_index
from shards.format.tar import file_checksum
from shards.ground.errors import InputError
from tests.helpers.streams import make_stream, overwrite


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
        mark = "# numbers\n" if kind == "numbers" else ""
        path.write_text(mark + "\n".join(map(str, rows)) + "\n\n")
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


def test_over_many_epochs_each_sample_of_a_subset_is_used_equally_often(shard_folder, tmp_path, chosen):
    chosen = chosen[:45]
    order = make_stream(shard_folder, f"data.subset={write(tmp_path, chosen, 'npy', [])}").order
    ids, _ = order.samples(np.arange(40 * order.steps_per_epoch)[:, None])
    uses = np.bincount(ids.reshape(-1), minlength=45)
    assert order.left_out == 13 and len(uses) == 45 and uses.max() - uses.min() <= 1


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


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no such subset file"),
        ("", "lists no sample"),
        ("# numbers\n3\n200\n", "lists sample 200, the corpus train has 0 to 199"),
        ("# numbers\n-1\n3\n", "lists sample -1, the corpus train has 0 to 199"),
        (f"# numbers\n{10**30}\n", f"lists sample {10**30}, the corpus"),
        ("# numbers\n3\n\nx/7\n", r"subset\.txt:4: 'x/7' is not a sample number"),
        (
            "3\n-1\n",
            "2 keys are not in train, such as -1; if these are sample numbers, make the first line '# numbers'",
        ),
        ("no/such-key\n", "1 keys are not in train, such as no/such-key"),
    ],
)
def test_a_wrong_subset_is_refused(shard_folder, tmp_path, content, says):
    path = tmp_path / "subset.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=says):
        make_stream(shard_folder, f"data.subset={path}")


@pytest.fixture
def digit_keys(shard_folder: Path, tmp_path: Path) -> Path:
    """Shards whose keys are the numbers 199 to 0, as of a data set with keys of digits."""
    folder = Path(shutil.copytree(shard_folder, tmp_path / "digits"))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for number, entry in enumerate(manifest["shards"]):
        place = read_manifest(folder).index_path(number)
        index = read_index(place)
        write_index(replace(index, keys=[str(199 - 40 * number - row) for row in range(40)]), place)
        entry["index"] = file_checksum(place)
    path.write_text(json.dumps(manifest))
    return folder


def test_lines_of_digits_are_keys_and_never_taken_for_numbers(digit_keys, tmp_path):
    path = tmp_path / "subset.txt"
    path.write_text("".join(f"{key}\n" for key in range(180, 200)))
    assert make_stream(digit_keys, f"data.subset={path}").corpora[0].subset.tolist() == list(range(20))
    path.write_text("".join(f"{key:09d}\n" for key in range(180, 200)))
    with pytest.raises(InputError, match="20 keys are not in train, such as 000000180"):
        make_stream(digit_keys, f"data.subset={path}")


def test_a_key_that_several_shards_have_names_no_sample(digit_keys, tmp_path):
    path, second = tmp_path / "subset.txt", read_manifest(digit_keys).index_path(1)
    write_index(replace(read_index(second), keys=[str(number) for number in range(199, 159, -1)]), second)
    path.write_text("\n".join(map(str, range(100, 120))) + "\n")
    assert make_stream(digit_keys, f"data.subset={path}").order.num_samples == 20
    path.write_text(path.read_text() + "170\n")
    with pytest.raises(
        InputError, match=r"key 170 is in train-000000\.tar and in train-000001\.tar of train; list sample"
    ):
        make_stream(digit_keys, f"data.subset={path}")


@pytest.mark.parametrize(
    "array, says",
    [
        (np.array([1, 2**63 + 7], np.uint64), f"lists sample {2**63 + 7}"),
        (np.array([-1, 3]), "lists sample -1"),
        (np.array([1.0, 2.0]), "expected a one-dimensional .npy of integers.*, not float64"),
    ],
)
def test_a_wrong_array_is_refused(shard_folder, tmp_path, array, says):
    np.save(tmp_path / "subset.npy", array)
    with pytest.raises(InputError, match=says):
        make_stream(shard_folder, f"data.subset={tmp_path / 'subset.npy'}")


def test_what_is_no_array_is_refused_without_advice_of_numpy(shard_folder, tmp_path):
    path = tmp_path / "subset.npy"
    path.write_text("3\n4\n")
    with pytest.raises(InputError, match=r"not a \.npy array .*; expected a one-dimensional \.npy") as error:
        make_stream(shard_folder, f"data.subset={path}")
    assert "allow_pickle" not in str(error.value)


def test_weights_count_by_their_ratio(shard_folder, held_out_shards):
    def fingerprint(first: float, second: float) -> str:
        rows = f"[{{path: {shard_folder}, weight: {first}}}, {{path: {held_out_shards}, weight: {second}}}]"
        return make_stream(shard_folder, f"data.shards={rows}").fingerprint

    assert fingerprint(1, 1) == fingerprint(2, 2) != fingerprint(2, 1)
    assert fingerprint(3, 1) == fingerprint(0.3, 0.1)


def test_arrays_that_hold_objects_are_not_unpickled(shard_folder, tmp_path):
    path = tmp_path / "subset.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"not a \.npy array"):
        make_stream(shard_folder, f"data.subset={path}")


def test_a_list_of_corpora_takes_its_subsets_in_the_list(shard_folder, held_out_shards, tmp_path, chosen):
    path = write(tmp_path, chosen, "npy", [])
    stream = make_stream(shard_folder, f"data.shards=[{{path: {shard_folder}, subset: {path}}}, {held_out_shards}]")
    assert stream.order.num_samples == len(chosen) + 100
    with pytest.raises(InputError, match=r"data\.subset=.*set it in the list"):
        make_stream(shard_folder, f"data.shards=[{shard_folder}]", f"data.subset={path}")
