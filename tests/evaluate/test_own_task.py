from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from math import log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from largescale.cli import main
from largescale.config import Config, load_config
from largescale.data.corpora import open_corpus
from largescale.evaluate import own_task
from largescale.evaluate.own_task import _Batches, _Rounds, in_batches, measure
from largescale.evaluate.targets import target_at
from largescale.evaluate.ways import Measure, Measured
from largescale.methods import Method, build_method
from largescale.processes import rank
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
SMALL = ["model.width=4", "method.turns=one", "train.steps=2", "train.global_batch=32", "data.crops.0.size=16"]
EVALUATION = ["evaluate.resize=16", "evaluate.size=16", "evaluate.own_task_draws=3", "evaluate.baselines=false"]


def config_of(run: Path) -> Config:
    return target_at(run).read(EVALUATION, lambda weights, config, lines: config)


def _batches(config: Config, folder: Path) -> _Batches:
    corpus = open_corpus(str(folder), config.data)
    return _Batches(corpus, in_batches(config, corpus), CPU)


@pytest.fixture(scope="module")
def run(tmp_path_factory, shard_folder, held_out_shards) -> Path:
    folder = tmp_path_factory.mktemp("own-task") / "run"
    shards = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}", f"run.dir={folder}"]
    assert main(["pretrain", str(ROOT / "configs/small/rotation.yaml"), *shards, *SMALL, "data.workers=0"]) == 0
    return folder


def test_what_is_stored_side_by_side_is_asked_apart_in_the_same_order_in_every_round():
    rounds, places = _Rounds(1000, 50, 0), np.arange(50)
    ids = np.concatenate([rounds.samples(step, places)[0] for step in range(40)]).reshape(2, 1000)
    assert (ids[0] == ids[1]).all() and (np.sort(ids[0]) == np.arange(1000)).all()
    together = ids[0].reshape(20, 50) // 5  # five clips of each video
    met = [(own[:, None] == own).sum() - 50 for own in together]
    assert np.mean(met) / 50 < 0.4  # others of its video that a clip meets: 0.2 by chance, 4 as they are stored
    assert (ids[0] != np.concatenate([_Rounds(1000, 50, 1).samples(step, places)[0] for step in range(20)])).any()


def test_every_sample_is_asked_as_often_as_set_about_other_views(run, held_out_shards):
    config = config_of(run)
    found = list(_batches(config, held_out_shards))
    assert [len(batch.ids) for batch in found] == [30] * 10
    times = Counter(sample for batch in found for sample in batch.ids.tolist())
    assert set(times.values()) == {3} and set(times) == set(range(100))
    first, again = (
        {sample: view for batch in part for sample, view in zip(batch.ids.tolist(), batch.views[0], strict=True)}
        for part in (found[:3], found[4:6])
    )
    assert not any(torch.equal(first[sample], again[sample]) for sample in first.keys() & again.keys())


@pytest.mark.parametrize("ranks, batch, samples, draws", [*product((1, 2, 3), (5, 32), (6, 7, 100), (1, 4))])
def test_all_are_asked_as_often_as_set_in_equal_batches_without_one_that_comes_twice(
    monkeypatch, run, ranks, batch, samples, draws
):
    monkeypatch.setattr(own_task, "world_size", lambda: ranks)
    config = config_of(run)
    config = replace(config, evaluate=replace(config.evaluate, batch=batch, own_task_draws=draws))
    corpus = SimpleNamespace(manifest=SimpleNamespace(num_samples=samples, root="shards"))
    chosen = in_batches(config, corpus).train
    own = chosen.global_batch
    assert 0 < own <= min(batch, samples) and own % ranks == 0 and chosen.accumulate == 1
    steps = -(-samples * draws // own)
    assert 0 <= steps * own - samples * draws < steps * ranks, "hardly any is asked once more"


def test_fewer_samples_than_ranks_are_refused(monkeypatch, run):
    monkeypatch.setattr(own_task, "world_size", lambda: 3)
    corpus = SimpleNamespace(manifest=SimpleNamespace(num_samples=2), where="shards")
    with pytest.raises(InputError, match="shards: 2 samples are too few for 3 ranks"):
        in_batches(config_of(run), corpus)


def asked_of(monkeypatch, config: Config, folder: Path, how: Measure = measure) -> Measured:
    """What is measured of networks that have learnt nothing."""
    corpus = open_corpus(str(folder), config.data)
    monkeypatch.setattr(own_task, "method_of", lambda config, weights, trained: build_method(config).eval())
    return own_task.by_own_task(how, SimpleNamespace(config=config, shards=(corpus, corpus), weights=None))


def other_run(name: str, run: Path, *overrides: str) -> Config:
    config = load_config(ROOT / f"configs/small/{name}.yaml", ["model.width=4", "data.workers=0", *overrides])
    return replace(config, evaluate=replace(config_of(run).evaluate, own_task_draws=1))


def test_chance_is_that_of_the_batches_that_are_asked_where_a_task_has_as_many_choices(
    monkeypatch, run, held_out_shards
):
    config = other_run("cpc", run, "train.global_batch=128", "train.accumulate=2")
    results = asked_of(monkeypatch, config, held_out_shards).results["pretrained"]
    assert results["task_chance"] == pytest.approx(1 / (50 * 5 * 5))
    assert results["loss_over_ln_k"] == pytest.approx(results["loss"] / log(50 * 5 * 5))


def test_answers_that_are_weighed_are_right_or_wrong_too(monkeypatch, run, held_out_shards):
    """For both networks by the prior that the trained one has."""
    config = other_run("colorization", run, "train.global_batch=32", "data.crops.0.size=24", "method.bin_step=20")
    config = replace(config, evaluate=replace(config.evaluate, baselines=True))
    corpus = open_corpus(str(held_out_shards), config.data)

    def method_of(config: Config, weights: None, *, trained: bool) -> Method:
        method = build_method(config).eval()
        if trained:
            method.begin()
        return method

    monkeypatch.setattr(own_task, "method_of", method_of)
    subject = SimpleNamespace(config=config, shards=(corpus, corpus), weights=None)
    for found in own_task.by_own_task(measure, subject).results.values():
        assert found["task_chance"] == pytest.approx(1 / 101) and 0 <= found["task_accuracy"] <= 1


def test_the_untrained_network_is_asked_by_what_the_trained_one_knows_of_the_corpus(monkeypatch, run, held_out_shards):
    config = other_run("colour_tracking", run)
    config = replace(config, evaluate=replace(config.evaluate, baselines=True))
    corpus = open_corpus(str(held_out_shards), config.data)

    def method_of(config: Config, weights: None, *, trained: bool) -> Method:
        method = build_method(config).eval()
        method.shares.fill_(0.25 if trained else 0.0)
        return method

    monkeypatch.setattr(own_task, "method_of", method_of)
    monkeypatch.setattr(own_task, "require_clips", lambda config, corpora: None)  # none is read
    subject = SimpleNamespace(config=config, shards=(corpus, corpus), weights=None)
    found = own_task.by_own_task(lambda method, batches: {"share": float(method.shares[0])}, subject).results
    assert found == {"pretrained": {"share": 0.25}, "untrained": {"share": 0.25}}


def test_shards_without_sound_are_refused_where_a_method_hears(monkeypatch, run, held_out_shards):
    with pytest.raises(InputError, match="no sample has sound"):
        asked_of(monkeypatch, other_run("avc", run), held_out_shards)


def skipped_of_ranks(config: Config, folder: Path) -> list[str]:
    """Doubts where each rank meets a sample of its own that cannot be read."""
    mine = [{"shard": "00000.tar", "key": str(rank()), "reason": "damaged"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Batches, "__iter__", lambda self: iter([SimpleNamespace(skipped=mine)]))
        return asked_of(patch, config, folder, lambda method, batches: {"batches": len(list(batches))}).doubts


@pytest.mark.distributed
def test_samples_that_any_rank_cannot_read_are_counted_on_all(run, held_out_shards):
    found = run_ranks(skipped_of_ranks, 2, config_of(run), held_out_shards, timeout_s=300)
    assert found == [["2 test samples cannot be asked; others stand in for them"]] * 2


def of_ranks(config: Config, folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    return measure(build_method(config).eval(), _batches(config, folder))


@pytest.mark.distributed
def test_the_share_is_that_of_a_loop_over_answers_on_any_number_of_ranks(run, held_out_shards):
    config = config_of(run)
    alone, pair = (run_ranks(of_ranks, ranks, config, held_out_shards, timeout_s=300) for ranks in (1, 2))
    torch.manual_seed(0)
    method, right, losses = build_method(config).eval(), [], []
    for batch in _batches(config, held_out_shards):
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


@pytest.mark.parametrize(
    "objectives, why",
    [(("main",), "has no task whose answers are right or wrong"), (("repair", "main"), "has several losses and no")],
)
def test_methods_without_right_answers_are_refused(monkeypatch, run, objectives, why):
    config = config_of(run)
    method = SimpleNamespace(has_answers=False, objectives=objectives, to=lambda device: method)
    monkeypatch.setattr(own_task, "method_of", lambda *_, **__: method)
    corpus = open_corpus(str(config.data.eval_shards), config.data)
    subject = SimpleNamespace(config=config, shards=(corpus, corpus), weights=None)
    with pytest.raises(Exception, match=f"own-task: a Rotation run {why}"):
        own_task.by_own_task(measure, subject)
