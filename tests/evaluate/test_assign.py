"""`largescale assign`: every head's clusters of every image, and what the summary says of them.

Covers: largescale/evaluate/assignments.py, largescale/evaluate/arguments.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

import largescale
from largescale.cli import main
from largescale.config import load_config
from largescale.config.values import to_yaml
from largescale.evaluate import assign as module
from largescale.methods import build_method
from shards.ground.errors import InputError
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.commands import ROOT, TINY
from tests.helpers.launcher import run_largescale

pytestmark = pytest.mark.slow

RUNS = {
    "prototype": (TINY, [12, 12], ["train.precision=fp32", "train.steps=2"]),
    "cluster": (ROOT / "tests/methods/mini/deepclusterv2.yaml", [5, 9, 4], ["train.steps=2"]),
}

NOTHING = "has no lasting clusters to assign images to; use a run of swav, "


@pytest.fixture(scope="module", params=RUNS)
def assigned(request, tmp_path_factory, shard_folder, held_out_shards) -> tuple[str, list[int], Path, Path]:
    """What one of the clusters is called, how many heads have, the run, and the folder of assignments."""
    recipe, counts, overrides = RUNS[request.param]
    folder = tmp_path_factory.mktemp("assigned")
    data = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}", f"run.dir={folder / 'run'}"]
    assert main(["pretrain", str(recipe), *data, *overrides]) == 0
    assert main(["assign", str(folder / "run"), str(shard_folder), str(folder / "out")]) == 0
    return request.param, counts, folder / "run", folder / "out"


def test_heads_assign_as_scores_of_features_say_and_the_summary_counts(assigned, shard_folder, tmp_path):
    name, counts, run, out = assigned
    method, table = largescale.load(run).method, pq.read_table(out)
    assert main(["features", str(run), str(shard_folder), str(tmp_path), "--dtype", "fp32"]) == 0
    features = pq.read_table(tmp_path)
    assert table["key"].equals(features["key"]) and "embedding" not in table.column_names
    with torch.no_grad():
        heads = method.exemplar_scores(torch.tensor(features["embedding"].to_pylist()))
    assert [scores.shape[1] for scores in heads] == counts
    summary = json.loads((out / "_summary.json").read_text())
    assert (summary["num_images"], list(summary["heads"])) == (200, [f"{name}_{n}" for n in range(1, len(counts) + 1)])
    classes = table["class"].to_pylist()
    for head, scores in zip(summary["heads"], heads, strict=True):
        rows = np.arange(len(scores))
        best, second = np.asarray(table[head]), np.asarray(table[f"{head}_second"])
        top = np.sort(scores.numpy(), axis=1)[:, ::-1]
        np.testing.assert_allclose(scores.numpy()[rows, best], top[:, 0], atol=1e-6)
        np.testing.assert_allclose(scores.numpy()[rows, second], top[:, 1], atol=1e-6)
        np.testing.assert_allclose(table[f"{head}_score"], top[:, 0], atol=1e-6)
        np.testing.assert_allclose(table[f"{head}_margin"], top[:, 0] - top[:, 1], atol=1e-6)
        assert (best != second).all()
        found, sizes = summary["heads"][head], np.bincount(best, minlength=scores.shape[1])
        assert (found["clusters"], found["used"]) == (len(sizes), np.count_nonzero(sizes))
        assert (found["sizes"]["0"], found["sizes"]["100"]) == (sizes.min(), sizes.max())
        of_cluster = [Counter(one for one, number in zip(classes, best, strict=True) if number == c) for c in set(best)]
        assert found["purity"] == sum(max(one.values()) for one in of_cluster) / 200
        assert found["nmi"] == pytest.approx(normalized_mutual_info_score(classes, best))
        assert found["ari"] == pytest.approx(adjusted_rand_score(classes, best))


@pytest.mark.distributed
def test_two_ranks_make_what_is_missing_again(assigned, shard_folder, tmp_path, capsys):
    _, _, run, out = assigned
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "train-000001.parquet").unlink()
    (out / "train-000003.parquet").write_bytes(before["train-000003.parquet"][:-50])
    result = run_largescale("assign", run, shard_folder, out, ranks=2)
    assert "assignments of 200 images in 5 files, 3 of them kept from before; every head" in result.stdout
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main(["features", str(run), str(shard_folder), str(out)]) == 2
    assert "holds assignments; choose another folder for features" in capsys.readouterr().err


def test_networks_without_clusters_are_a_line(shard_folder, tmp_path, capsys):
    for name, says in (
        ("simclr", f"method.name=simclr {NOTHING}"),
        ("deepercluster", f"method.name=deepercluster {NOTHING}"),
        ("pcl", "this checkpoint has no clusters yet: train on, or take a later one"),
    ):
        config = load_config(ROOT / f"tests/methods/mini/{name}.yaml", [f"data.shards={shard_folder}"])
        assert build_method(config).has_exemplars() == (name != "pcl")
        checkpoint = save_checkpoint(tmp_path / name, config, 1)
        (tmp_path / name / "config.yaml").write_text(to_yaml(config))
        assert main(["assign", str(checkpoint), str(shard_folder), str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err
        assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_damaged_page_is_named(tmp_path):
    path = tmp_path / "pile-000000.parquet"
    table = pa.table({"prototype": pa.array(range(3000), pa.int64())})
    pq.write_table(table, path, write_page_checksum=True, compression="NONE", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1  # of a page; the footer is as it was
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"pile-000000.parquet: is damaged \(.*\); remove it, and run this again"):
        module._read(path, ["prototype"])


def test_a_large_table_is_compared_without_matching_it(monkeypatch):
    labels, numbers = np.arange(60) % 5, np.arange(60) % 7
    whole = module._compared(labels, numbers)
    monkeypatch.setattr(module, "_MOST_CELLS", 34)
    assert module._compared(labels, numbers) == pytest.approx({key: whole[key] for key in ("nmi", "ari")})
    assert {"matched", "purity"} <= set(whole)
