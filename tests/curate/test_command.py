"""`largescale curate` from features to a subset: what is found, on how many ranks, when it is killed, what is refused.

Covers: largescale/curate/arguments.py, largescale/curate/buckets.py, largescale/curate/examples.py,
largescale/curate/memory.py, largescale/curate/result.py, largescale/curate/stages.py, largescale/curate/summary.py,
largescale/curate/wish.py, largescale/curate/workshop.py
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from largescale.cli import main
from largescale.curate import buckets, memory, workshop
from largescale.curate.command import Places, curate
from largescale.curate.embeddings import read_embeddings
from largescale.curate.sampling import shares
from largescale.curate.wish import Wish
from largescale.data.corpora import Corpus, read_subset
from largescale.processes import rank
from shards.format.manifest import Manifest, ShardEntry
from shards.ground.errors import InputError
from tests.helpers.piles import long_tail, write_features
from tests.helpers.ranks import run_ranks

NUM, EPSILON, MISSING = 900, 1e-4, (5, 250, 899)
WISH = Wish(levels=(60, 20, 6), target=200, epsilon=EPSILON, rounds=2, iterations=6, coarse=7)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return write_features(tmp_path_factory.mktemp("pile") / "features", long_tail(NUM), missing=MISSING)


@pytest.fixture(scope="module")
def curated(features, tmp_path_factory) -> Path:
    return make(features, tmp_path_factory.mktemp("curated") / "out", WISH)


def make(features: Path, out: Path, wish: Wish, memory_gb: float = 0) -> Path:
    curate(Places(features, out, memory_gb=memory_gb), wish, torch.device("cpu"))
    return out


def found_in(out: Path) -> dict[str, bytes]:
    """All that must not depend on how it was made."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.[np]*[yt]"))}


def unit() -> np.ndarray:
    rows = long_tail(NUM).astype(np.float16).astype(float)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def columns(out: Path) -> dict[str, np.ndarray]:
    """The table; numbers that are missing are NaN."""
    table = pq.read_table(out / "images")
    return {name: table[name].to_numpy() for name in table.column_names}


def test_the_subset_is_what_the_table_says_and_a_run_takes_it(curated):
    subset, table = np.load(curated / "subset.npy"), columns(curated)
    assert len(subset) == 200 and subset.dtype == np.int64 and (np.diff(subset) > 0).all()
    assert table["sample"].tolist() == [one for one in range(NUM) if one not in MISSING]
    assert table["sample"][table["kept"]].tolist() == subset.tolist()
    for key, shard, row, sample in zip(*(table[name] for name in ("key", "shard", "row", "sample")), strict=True):
        assert key == f"key{sample}" and sample == 100 * int(shard[5:11]) + row
    shards = tuple(ShardEntry(f"pile-{one:06d}.tar", 100, 1, "sum") for one in range(9))
    manifest = Manifest(curated, "pile", shards, (), "", {}, {})
    assert read_subset(str(curated / "subset.npy"), Corpus(manifest)).tolist() == subset.tolist()


def test_duplicates_are_those_of_a_loop_over_each_coarse_cluster(curated):
    table, rows = columns(curated), unit()
    sample, coarse = table["sample"], table["coarse"]
    dropped = ~np.isnan(table["duplicate_of"])
    assert 60 < dropped.sum() < 200 and not table["kept"][dropped].any()
    for at in np.flatnonzero(dropped):
        near = sample[(coarse == coarse[at]) & ~dropped]
        best, other = (rows[near] @ rows[sample[at]]).max(), int(table["duplicate_of"][at])
        assert table["cosine"][at] == pytest.approx(best, abs=1e-6) and best >= 1 - EPSILON - 1e-6
        assert other in near and rows[other] @ rows[sample[at]] == pytest.approx(best, abs=1e-6)
        assert table["cluster_1"][sample == other] == table["cluster_1"][at]
    for bucket in range(7):
        some = rows[sample[(coarse == bucket) & ~dropped]]
        assert np.triu(some @ some.T, 1).max() < 1 - EPSILON + 1e-6


def test_clusters_are_a_tree_and_give_what_their_caps_are(curated):
    table = columns(curated)
    parents = []
    for below, above, count in (("cluster_1", "cluster_2", 60), ("cluster_2", "cluster_3", 20)):
        found = np.zeros(count, np.int64)
        found[table[below]] = table[above]
        assert (found[table[below]] == table[above]).all()
        parents.append(found)
    assert len(np.unique(table["cluster_1"])) == 60 and table["cluster_3"].max() < 6
    unique = np.bincount(table["cluster_1"][np.isnan(table["duplicate_of"])], minlength=60)
    given = np.bincount(table["cluster_1"][table["kept"]], minlength=60)
    assert given.tolist() == shares(unique, parents, 200, WISH.seed).tolist()
    before, after = np.bincount(table["cluster_3"]), np.bincount(table["cluster_3"][table["kept"]], minlength=6)
    assert after.max() / after.sum() < 0.8 * before.max() / before.sum()


def test_the_record_counts_what_the_table_holds(curated):
    record, table = json.loads((curated / "curation.json").read_text()), columns(curated)
    assert (record["num_samples"], record["num_images"], record["num_kept"]) == (NUM, NUM - 3, 200)
    assert record["num_duplicates"] == (~np.isnan(table["duplicate_of"])).sum()
    for level in record["levels"]:
        clusters = table[level["name"]]
        assert level["before"]["largest"] == np.bincount(clusters).max()
        assert level["after"]["largest"] == np.bincount(clusters[table["kept"]]).max()
    assert set(record["seconds"]) == {"coarse clusters", "sorting", "duplicates", "levels", "result"}


def test_npy_features_give_the_same(curated, tmp_path):
    features = write_features(tmp_path / "features", long_tail(NUM), missing=MISSING, form="npy")
    assert found_in(make(features, tmp_path / "out", WISH)) == found_in(curated)


def of_ranks(features: Path, out: Path) -> None:
    """The disk of one rank fails here and there, which ends all of them; then the same command goes on."""
    for what in ("command.read_embeddings", "stages.Pile._is_kept", "stages.Pile.share_out", "result._write_table"):
        broken = patch(f"largescale.curate.{what}", side_effect=OSError("no space left"))
        failing = broken if rank() == 1 else nullcontext()
        with failing, pytest.raises(InputError, match="no space left"):
            make(features, out, WISH)
    make(features, out, WISH)


def test_a_damaged_file_of_a_killed_command_is_named(features, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("largescale.curate.command.write_page", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(features, tmp_path / "out", WISH)
    folder = tmp_path / "out.unfinished"
    for name in ("sorted-000000.npy", "coarse.npz"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    words = r"cannot be read .*; if it is damaged, remove .*out\.unfinished"
    with pytest.raises(InputError, match=rf"coarse.npz: {words}"):
        make(features, tmp_path / "out", WISH)
    with pytest.raises(InputError, match=rf"sorted-000000.npy: {words}"):
        workshop.Workshop(folder).rows("sorted-000000", 3, 5)


@pytest.mark.distributed
def test_any_number_of_ranks_finds_the_same_bytes(features, curated, tmp_path):
    run_ranks(of_ranks, 3, features, tmp_path / "out")
    assert found_in(tmp_path / "out") == found_in(curated) and len(found_in(curated)) == 10


@pytest.mark.parametrize("after", [0, 1, 4, 9, 12, 16, 17, 18])
def test_a_killed_command_goes_on_where_it_was(features, curated, tmp_path, monkeypatch, after):
    done: Counter[str] = Counter()
    keep = workshop.Workshop.keep

    def killed(self: workshop.Workshop, name: str, **arrays: np.ndarray) -> None:
        if sum(done.values()) == after:
            raise KeyboardInterrupt
        done[name] += 1
        keep(self, name, **arrays)

    monkeypatch.setattr(workshop.Workshop, "keep", killed)
    if after < 18:
        with pytest.raises(KeyboardInterrupt):
            make(features, tmp_path / "out", WISH)
        assert not (tmp_path / "out").exists()
        after = -1
    make(features, tmp_path / "out", WISH)
    assert set(done.values()) == {1}, "nothing is done twice"
    assert found_in(tmp_path / "out") == found_in(curated)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_wish_begins_again_and_the_same_one_is_done(features, curated, tmp_path, monkeypatch, caplog, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("largescale.curate.command.write_page", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(features, tmp_path / "out", Wish(levels=(50, 5), target=100))
    make(features, tmp_path / "out", WISH)
    assert "begins again: settings.levels was [50, 5] and is now [60, 20, 6]" in caplog.text
    assert found_in(tmp_path / "out") == found_in(curated)
    options = ["--levels", "60,20,6", "--target", "200", "--dedup", "1e-4", "--rounds", "2", "--coarse", "7"]
    options += ["--iterations", "6"]
    assert main(["curate", str(features), str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out.endswith("; nothing to do\n")


def test_no_duplicate_is_missed_in_a_small_pile(features, tmp_path):
    assert [Wish(levels=(1000,)).num_coarse(images) for images in (900, 20_000, 20_001)] == [1, 1, 125]
    out = make(features, tmp_path / "out", Wish(epsilon=EPSILON))
    some = unit()[np.load(out / "subset.npy")]
    assert np.triu(some @ some.T, 1).max() < 1 - EPSILON + 1e-6


def test_only_duplicates(features, tmp_path):
    out = make(features, tmp_path / "out", Wish(epsilon=EPSILON, coarse=7))
    table = columns(out)
    assert (table["kept"] == np.isnan(table["duplicate_of"])).all() and "cluster_1" not in table
    assert len(np.load(out / "subset.npy")) == table["kept"].sum() < 850


def test_what_a_killed_command_left_behind_a_result_is_removed(features, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(workshop.Workshop, "remove", lambda _: None)
        out = make(features, tmp_path / "out", WISH)
    assert (tmp_path / "out.unfinished" / "coarse.npz").exists()
    make(features, out, WISH)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("shard", [0, 4, 8])
def test_a_shard_without_a_readable_image_is_no_obstacle(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "_LEAST_ROWS", 50)  # each shard is sorted by itself
    missing = range(100 * shard, 100 * shard + 100)
    some = write_features(tmp_path / "features", long_tail(NUM), missing=missing)
    out = make(some, tmp_path / "out", WISH)
    table = columns(out)
    assert table["sample"].tolist() == [one for one in range(NUM) if one not in missing]
    assert table["sample"][table["kept"]].tolist() == np.load(out / "subset.npy").tolist()


@pytest.mark.parametrize("missing", [range(100), range(250), range(100, 300), range(800, 900)])
def test_every_file_is_of_one_rank_whichever_cannot_be_read(missing, tmp_path, monkeypatch):
    embeddings = read_embeddings(write_features(tmp_path, long_tail(NUM), missing=missing))
    for ranks in (1, 3, 20):
        monkeypatch.setattr(buckets, "world_size", lambda count=ranks: count)
        owned = []
        for number in range(ranks):
            monkeypatch.setattr(buckets, "rank", lambda number=number: number)
            owned += buckets.own_files(embeddings)
        assert owned == list(embeddings.files)


def test_epsilon_is_found_for_a_fraction(features, tmp_path):
    out = make(features, tmp_path / "out", Wish(fraction=0.5, coarse=3))
    record = json.loads((out / "curation.json").read_text())
    assert record["epsilon"] > 1e-3 and record["num_duplicates"] / record["num_images"] == pytest.approx(0.5, abs=0.01)


def test_small_clusters_repeat_when_asked(features, tmp_path):
    out = make(features, tmp_path / "out", Wish(levels=(20,), target=2500, repeat=4, coarse=1))
    subset, repeats = np.load(out / "subset.npy"), np.load(out / "repeats.npy")
    assert repeats.sum() == 2500 and repeats.max() == 4 and len(subset) == len(repeats) <= NUM
    nearest = make(features, tmp_path / "nearest", Wish(levels=(20,), target=20, leaves="nearest", coarse=1))
    assert len(np.load(nearest / "subset.npy")) == 20


def test_what_is_left_may_be_less_than_the_target(features, tmp_path):
    out = tmp_path / "out"
    said = curate(Places(features, out), Wish(levels=(9,), target=890, epsilon=EPSILON), torch.device("cpu"))
    assert "images were left for a target of 890" in said


def test_clusters_that_are_not_wanted_give_nothing_and_others_give_more(features, curated, tmp_path):
    table = columns(curated)
    top, largest = table["cluster_3"], int(np.bincount(table["cluster_3"]).argmax())
    fine = np.flatnonzero((top != largest) & np.isnan(table["duplicate_of"]))
    said = curate(
        Places(features, tmp_path / "out"), replace(WISH, target=len(fine) - 9, without=(largest,)), torch.device("cpu")
    )
    found = columns(tmp_path / "out")
    assert f"; without clusters {largest} of the top level" in said and "were left" not in said
    assert (found["cluster_3"] == top).all() and not found["kept"][top == largest].any()
    assert found["kept"].sum() == len(fine) - 9
    said = curate(Places(features, tmp_path / "all"), replace(WISH, target=0, without=(largest,)), torch.device("cpu"))
    assert np.flatnonzero(columns(tmp_path / "all")["kept"]).tolist() == fine.tolist()
    less = replace(WISH, target=len(fine) + 1, without=(largest,))
    assert f"{len(fine)} images were left" in curate(Places(features, tmp_path / "less"), less, torch.device("cpu"))


@pytest.mark.parametrize(
    "options, words",
    [
        ("--levels 60,6 --without 2,6", "--without: 6 is no cluster of the top level; expected 0 to 5"),
        ("--levels 60,2 --without 0,1", "--without: all 2 clusters of the top level"),
        ("--dedup 0.1 --without 1", "--without: 1 is no cluster of the top level; expected --levels"),
        ("--levels 60,6 --without x", "--without=x: expected numbers"),
        ("", "nothing to do; pass --levels, --dedup, or both"),
        ("--levels 60,6 --target 898", "--target=898: there are 897 images"),
        ("--target 9 --dedup 0.1", "--target=9: needs --levels"),
        ("--levels 60,60", "--levels: 60 clusters of 60; each level must be smaller than the last"),
        ("--levels 898", "--levels: 898 clusters of 897 images; choose fewer"),
        ("--levels 60,x", "--levels=60,x: expected numbers"),
        ("--levels 60,0", "expected numbers of clusters of 1 or more"),
        ("--levels 880 --dedup 0.0001", "that are no duplicates; choose fewer"),
        ("--dedup 1e-8", "--dedup=1e-08: expected 1e-06 or more"),
        ("--levels 9 --seed -1", "--seed=-1: expected 0 to 2^63 - 1"),
        ("--levels 9 --repeat 2", "--repeat=2: needs --target"),
        ("--dedup 0.1 --leaves nearest", "--leaves=nearest: needs --levels"),
        ("--levels 9 --shards s3://bucket/pile", "--shards=s3://bucket/pile: expected a folder"),
        ("--dedup 1.5", "expected 0 or more, below 1"),
        ("--dedup 0.1 --dedup-fraction 0.2", "choose one, the other follows from it"),
        ("--levels 9 --rounds 3", "--rounds=3: needs two --levels or more"),
        ("--dedup 0.1 --nearest 3", "--nearest=3: needs two --levels or more"),
        ("--levels 9 --leaves far", "--leaves=far: expected random or nearest"),
        ("--levels 9 --repeat 0", "--repeat=0: expected 1 or more"),
        ("--levels 9 --coarse 10", "--coarse=10: expected at most as many"),
        ("--levels 9 --memory-gb 0.001", "and 0.00 GB are allowed; "),
        ("--levels 9 --memory-gb -1", "--memory-gb=-1.0: expected 0 or more"),
    ],
)
def test_what_cannot_be_done_is_one_line(features, tmp_path, capsys, options, words):
    assert main(["curate", str(features), str(tmp_path / "out"), *options.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(features, curated, tmp_path):
    for out, words in ((curated, "holds another curation"), (features, "is not empty")):
        with pytest.raises(InputError, match=words):
            make(features, out, Wish(epsilon=0.1))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        make(features, tmp_path / "file", WISH)
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "mine").touch()
    with pytest.raises(InputError, match="holds something else than an unfinished curation"):
        make(features, tmp_path / "out", WISH)
    assert (tmp_path / "out.unfinished" / "mine").exists()


def test_a_coarse_cluster_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    """All images but few are the same, so that one coarse cluster is much larger than it was taken to be."""
    monkeypatch.setattr(memory, "bucket_bytes", lambda images, *_: images * 10**6)
    rows = np.ones((900, 8)) + 3 * np.eye(900, 8)
    features = write_features(tmp_path / "features", rows)
    with pytest.raises(InputError, match=r"a coarse cluster of 89\d images: needs 0.89 GB on each rank, .* --coarse"):
        make(features, tmp_path / "out", Wish(epsilon=0.01, coarse=9), memory_gb=0.5)


def test_what_a_gpu_holds_is_checked_before_it_is_used(features, tmp_path, monkeypatch):
    monkeypatch.setattr("largescale.curate.command.gpu_bytes", lambda: 10_000)
    with pytest.raises(InputError, match=r"needs \S+ GB on each rank, and 0\.00 GB are allowed"):
        curate(Places(features, tmp_path / "out"), WISH, torch.device("cuda"))
