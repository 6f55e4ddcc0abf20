from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import largescale
from largescale.config import to_yaml
from largescale.data.stream import Stream
from largescale.evaluate import support_neighbours
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.splits import stratified
from largescale.evaluate.support_neighbours import Settings, hits_by, measure, through
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.features import features
from tests.methods.harness import mini


def naive(train: FeatureSet, test: FeatureSet, rows: list[int], temperature: float) -> list[bool]:
    """A test image and a vote at a time."""
    unit = {name: normalize(one.features.double(), dim=1) for name, one in (("train", train), ("test", test))}
    found = []
    for query, label in zip(unit["test"], test.labels.tolist(), strict=True):
        votes = dict.fromkeys(range(len(train.classes)), 0.0)
        for row in rows:
            votes[int(train.labels[row])] += math.exp(float(query @ unit["train"][row]) / temperature)
        found.append(max(votes, key=votes.__getitem__) == label)
    return found


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_votes_equal_the_naive_loop(temperature):
    train, test = features(200, 0), features(60, 1)
    rows = stratified(train.ids, train.labels, 0.1, 0)
    expected = naive(train, test, rows.tolist(), temperature)
    assert hits_by(rows, (train, test), temperature).tolist() == expected and 0 < sum(expected) < 60
    settings = Settings(
        support_neighbours_shares=[0.1], support_neighbours_splits=1, support_neighbours_temperature=temperature
    )
    found = measure(train, test, settings)
    assert found["top1"] == pytest.approx(sum(expected) / 60) == found["by_share"]["0.1"]["top1"]
    assert found["by_share"]["0.1"]["num_train"] == len(rows) and "hits" not in found


def test_a_small_temperature_is_the_nearest_image():
    train, test = features(200, 0), features(60, 1)
    nearest = (normalize(test.features, dim=1) @ normalize(train.features, dim=1).T).argmax(1)
    found = hits_by(torch.arange(200), (train, test), 1e-5)
    assert torch.equal(found, train.labels[nearest] == test.labels)


def test_own_labels_and_the_heads_embeddings_come_first():
    """Of the run's own labels alone, and of what the head makes of features; splits stay beside."""
    train, test = features(200, 0), features(60, 1)
    head = torch.nn.Linear(6, 3, bias=False)
    device = torch.device("cpu")
    pair = through(head, train, device), through(head, test, device)
    torch.testing.assert_close(pair[0].features, head(train.features).detach())
    own = torch.tensor([0, 3, 8, 20, 100, 101, 102])
    found = measure(train, test, Settings(support_neighbours_splits=2), pair, own)
    hits = naive(*pair, own.tolist(), 0.1)
    assert found["hits"] == hits and found["top1"] == pytest.approx(sum(hits) / 60) and found["num_own_labels"] == 7
    assert found["top1_of_features"] == pytest.approx(sum(naive(train, test, own.tolist(), 0.1)) / 60)
    assert found["by_share"] == measure(*pair, Settings(support_neighbours_splits=2))["by_share"]


@pytest.fixture
def run(shard_folder: Path, held_out_shards: Path, tmp_path: Path) -> Path:
    """Of a method that was trained with a tenth of the labels."""
    words = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}", "train.precision=fp32"]
    words += ["method.support.share=0.1", "method.support.seed=3", "data.workers=0"]
    config = mini("paws", *words)
    stream = Stream(config, rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
    save_checkpoint(tmp_path / "run", config, 1, data=stream.fingerprint)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    return tmp_path / "run"


def test_a_run_is_measured_by_the_labels_it_was_trained_with(run, held_out_shards, caplog, monkeypatch):
    made: list[int] = []
    monkeypatch.setattr(support_neighbours, "stratified", lambda *split: made.append(split[-1]) or stratified(*split))
    settings = ["evaluate.resize=28", "evaluate.size=28", "evaluate.support_neighbours_shares=[0.1]"]
    settings += ["evaluate.support_neighbours_splits=4"]
    [record] = largescale.evaluate("support-neighbours", run, overrides=settings)
    found = record["results"]
    assert set(found) == {"pretrained", "untrained", "pixels"} and made == [0, 1, 2, 3]  # once for all of them
    for name, result in found.items():
        assert result["num_own_labels"] == 20 and ("top1_of_features" in result) == (name != "pixels")
        assert result["top1"] == pytest.approx(result["by_share"]["0.1"]["splits"][3])  # the split of its seed
    assert "p" in found["pixels"]["against_pretrained"]
    elsewhere = [*settings, "evaluate.baselines=false", f"evaluate.train_shards={held_out_shards}"]
    [record] = largescale.evaluate("support-neighbours", run, overrides=elsewhere)
    assert "num_own_labels" not in record["results"]["pretrained"]
    line = f"the labels of {held_out_shards} are not those of the run"
    assert [one.levelname for one in caplog.records if one.getMessage().startswith(line)] == ["WARNING"]


def test_the_runs_labels_are_known_where_its_shards_have_moved(run, shard_folder, tmp_path):
    moved = shutil.copytree(shard_folder, tmp_path / "moved")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(shard_folder), str(tmp_path / "gone")))
    settings = ["evaluate.resize=28", "evaluate.size=28", "evaluate.baselines=false", f"evaluate.train_shards={moved}"]
    [record] = largescale.evaluate("support-neighbours", run, overrides=settings)
    assert record["results"]["pretrained"]["num_own_labels"] == 20
