from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from largescale.cli import main
from largescale.config import Config
from largescale.data.corpora import open_corpus
from largescale.evaluate import own_task
from largescale.evaluate.own_task import _Batches, measure
from largescale.evaluate.targets import target_at
from largescale.methods import build_method
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
SMALL = ["model.width=4", "method.turns=one", "train.steps=2", "train.global_batch=32", "data.crops.0.size=16"]
EVALUATION = ["evaluate.resize=16", "evaluate.size=16", "evaluate.own_task_draws=3", "evaluate.baselines=false"]


def config_of(run: Path) -> Config:
    return target_at(run).read(EVALUATION, lambda weights, config, lines: config)


@pytest.fixture(scope="module")
def run(tmp_path_factory, shard_folder, held_out_shards) -> Path:
    folder = tmp_path_factory.mktemp("own-task") / "run"
    shards = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}", f"run.dir={folder}"]
    assert main(["pretrain", str(ROOT / "configs/small/rotation.yaml"), *shards, *SMALL, "data.workers=0"]) == 0
    return folder


def test_every_sample_is_asked_as_often_as_set_about_other_views(run, held_out_shards):
    config = config_of(run)
    batches = _Batches(open_corpus(str(held_out_shards), config.data), config, CPU)
    found = list(batches)
    assert [len(batch.ids) for batch in found] == [32] * 9 and batches.num_answers == 288
    times = Counter(sample for batch in found for sample in batch.ids.tolist())
    assert sorted(times.values()) == [2] * 12 + [3] * 88 and set(times) == set(range(100))
    first, again = (
        {sample: view for batch in part for sample, view in zip(batch.ids.tolist(), batch.views[0], strict=True)}
        for part in (found[:3], found[4:6])
    )
    assert not any(torch.equal(first[sample], again[sample]) for sample in first.keys() & again.keys())


def of_ranks(config: Config, folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    return measure(build_method(config).eval(), _Batches(open_corpus(str(folder), config.data), config, CPU))


@pytest.mark.distributed
def test_the_share_is_that_of_a_loop_over_answers_on_any_number_of_ranks(run, held_out_shards):
    config = config_of(run)
    alone, pair = (run_ranks(of_ranks, ranks, config, held_out_shards, timeout_s=300) for ranks in (1, 2))
    torch.manual_seed(0)
    method, right, losses = build_method(config).eval(), [], []
    for batch in _Batches(open_corpus(str(held_out_shards), config.data), config, CPU):
        views = method.task_views(batch.inputs(), batch.step)
        answers = method.head(method.backbone(views.images[0])).detach().double()
        turns = views.facts["turns"].flatten()
        right += (answers.argmax(1) == turns).tolist()
        losses += [-float(torch.log_softmax(own, 0)[turn]) for own, turn in zip(answers, turns, strict=True)]
    for found in (alone[0], *pair):
        assert found["task_accuracy"] == pytest.approx(sum(right) / len(right))
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found["task_chance"] == 0.25


def test_a_run_is_measured(run, capsys):
    assert main(["evaluate", "own-task", str(run), *EVALUATION[:3], "data.workers=0"]) == 0
    assert "share of its own task told right" in capsys.readouterr().out
    record = json.loads((run / "eval/own-task.json").read_text())
    assert (record["num_train"], record["num_test"], record["warnings"]) == (0, 100, [])
    assert set(record["results"]) == {"pretrained", "untrained"}
    assert 0 <= record["results"]["pretrained"]["task_accuracy"] <= 1


def test_methods_without_right_answers_are_refused(monkeypatch, run):
    config = config_of(run)
    method = SimpleNamespace(signs={}, objectives=("main",), to=lambda device: method)
    monkeypatch.setattr(own_task, "method_of", lambda *_, **__: method)
    corpus = open_corpus(str(config.data.eval_shards), config.data)
    subject = SimpleNamespace(config=config, shards=(corpus, corpus), weights=None)
    with pytest.raises(Exception, match="own-task: a Rotation run has no task whose answers are right or wrong"):
        own_task.by_own_task(measure, subject)
