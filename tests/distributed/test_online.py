"""Measures of a network while it trains: they are logged, agree between strategies, and change nothing in the run.

Covers: largescale/evaluate/online.py
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.__main__ import main as command
from largescale.cli import main
from largescale.config import load_config
from largescale.data.corpora import Corpus
from largescale.evaluate import online
from largescale.evaluate.online import choose
from largescale.methods import build_method
from largescale.parallel.strategies import build_engine
from largescale.processes import rank
from shards.format.manifest import read_manifest
from tests.helpers.commands import TINY
from tests.helpers.launcher import pretrain, run_largescale
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import final_state, metrics
from tests.methods.harness import LENGTH, mini

pytestmark = pytest.mark.distributed

ONLINE = ["evaluate.online_every=0.2", "evaluate.online_bank=90", "evaluate.online_queries=40"]
"""Every other step of the 12 of an epoch."""


def online_rows(run: Path) -> list[dict[str, float]]:
    rows = [{key: value for key, value in row.items() if key.startswith("online")} for row in metrics(run)]
    return [row for row in rows if row]


def without_online(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith("online")} for row in metrics(run)]


@pytest.fixture(scope="module")
def data(shard_folder, held_out_shards) -> list[str]:
    return [
        f"data.shards={shard_folder}",
        f"data.eval_shards={held_out_shards}",
        "train.precision=fp32",
        "train.steps=5",
        "data.audit=false",
        "parallel.sync_batchnorm=false",  # each rank has statistics of its own, which a mistake would mix
    ]


def test_the_run_is_the_same_bit_for_bit_under_every_kind_of_strategy(data, tmp_path):
    found = {}
    for strategy in ("ddp", "fsdp", "zero3"):
        runs = tmp_path / f"{strategy}-with", tmp_path / f"{strategy}-without"
        for run, extra in zip(runs, (ONLINE, []), strict=True):
            pretrain([*data, f"run.dir={run}", f"parallel.strategy={strategy}", *extra], 2)
        mine, theirs = map(final_state, runs)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert without_online(runs[0]) == metrics(runs[1])
        found[strategy] = online_rows(runs[0])
        rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row.get("online_s", 0) > 0] == [1, 3]
    for rows in found.values():
        assert set(rows[0]) == {
            f"online_{name}"
            for name in ("knn_top1", "effective_rank", "effective_rank_centred", "mean_share", "uniformity")
        }
        assert 0.1 < rows[0]["online_knn_top1"] < 1 and rows[0] != rows[1]
        for row, expected in zip(rows, found["ddp"], strict=True):
            assert row == pytest.approx(expected, rel=1e-3)


def test_it_measures_what_the_checkpoint_holds_and_a_resumed_run_logs_the_same(data, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["pretrain", str(TINY), *data, f"run.dir={run}", *ONLINE, "train.steps=6", "checkpoint.every_steps=2"]
    assert main(command) == 0
    expected = metrics(run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert main(command) == 0
    assert metrics(run) == expected and len(online_rows(run)) == 3
    capsys.readouterr()
    assert main(["evaluate", "spectrum", str(run), "evaluate.baselines=false"]) == 0
    assert "effective rank" in capsys.readouterr().out
    measured = json.loads((run / "eval/spectrum.json").read_text())["results"]["pretrained"]
    # Of all 200 images there, of 130 of them here.
    assert measured["effective_rank"] == pytest.approx(online_rows(run)[-1]["online_effective_rank"], rel=0.1)


def test_shards_that_go_away_cost_the_measures_and_not_the_run(data, tmp_path, capsys):
    gone = ["evaluate.train_shards=/nowhere/at/all", "evaluate.online_every=0.1", "train.steps=2"]
    assert main(["pretrain", str(TINY), *data, f"run.dir={tmp_path}", *gone]) == 0
    assert online_rows(tmp_path) == [] and len(metrics(tmp_path)) == 2
    assert (
        "evaluate.online_every: measured no more in this run. /nowhere/at/all: no such folder"
        in capsys.readouterr().err
    )


def test_a_run_that_is_to_stop_saves_and_measures_no_more(data, tmp_path):
    command = ["pretrain", str(TINY), *data, f"run.dir={tmp_path}", "evaluate.online_every=0.1", "train.steps=2"]
    assert main([*command, "run.time_limit_s=100", "run.stop_before_s=99.999"]) == 85
    assert (tmp_path / "checkpoints/step-00000001").is_dir() and online_rows(tmp_path) == []
    assert main(command) == 0
    assert len(online_rows(tmp_path)) == 1 and len(metrics(tmp_path)) == 2


def command_that_fails(part: str, where: int, error: type[Exception]) -> int:
    """The command, in which a part of a measurement fails on one of the ranks."""
    owner, name = (online.Online, "_features") if part == "features" else (online, part)
    works = getattr(owner, name)

    def fails(*arguments):
        if rank() == where:
            raise error("no room for it")
        return works(*arguments)

    setattr(owner, name, fails)
    return command()


FAILURES = {
    "_empty_twin": (1, torch.OutOfMemoryError, "out of memory (no room for it)"),
    "features": (1, RuntimeError, "RuntimeError: no room for it"),
    "spectrum": (0, np.linalg.LinAlgError, "LinAlgError: no room for it"),
}
"""By what fails: on which rank, how, and what is said of it."""


def test_a_measurement_that_fails_on_one_rank_costs_the_measures_and_not_the_run(data, tmp_path):
    common = [*data, "train.steps=2", "parallel.strategy=fsdp"]
    pretrain([*common, f"run.dir={tmp_path}/without"], 2)
    expected = final_state(tmp_path / "without")
    for part, (where, error, says) in FAILURES.items():
        overrides = [*common, *ONLINE, "evaluate.online_every=0.1", f"run.dir={tmp_path / part}"]
        entry = partial(command_that_fails, part, where, error)
        said = run_largescale("pretrain", TINY, *overrides, ranks=2, entry=entry).stderr
        (line,) = [line for line in said.splitlines() if "measured no more" in line]
        assert line.endswith(f"evaluate.online_every: measured no more in this run. {says}")
        found = final_state(tmp_path / part)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        assert metrics(tmp_path / part) == metrics(tmp_path / "without")


def test_images_of_bank_and_queries_are_chosen_alike_everywhere(shard_folder, monkeypatch):
    corpus = Corpus(read_manifest(shard_folder))
    chosen, queries = choose([corpus], 90, 40, seed=3)
    assert len(chosen) == 130 and len(queries) == 40 and set(queries) < set(chosen)
    assert np.array_equal(chosen, choose([corpus], 90, 40, seed=3)[0])
    assert not np.array_equal(chosen, choose([corpus], 90, 40, seed=4)[0])
    enormous = np.full(1000, 10**7)  # takes 80 GB if all of them are put into an order
    monkeypatch.setattr(Corpus, "shard_sizes", lambda _: enormous)
    assert choose([corpus], 90, 40, seed=3)[0].max() > 10**9
    monkeypatch.undo()
    everything, some = choose([corpus], 2000, 500, seed=0)  # more than there are
    assert np.array_equal(everything, np.arange(200)) and len(some) == 40
    assert load_config(TINY, ["data.shards=x"]).evaluate.online_every == 0


def copied(_: str) -> float:
    """How far a copy of a network behind Sobel's filters is from that network."""
    config = mini("swav", "model.sobel=true")
    torch.manual_seed(0)
    engine = build_engine(build_method(config, LENGTH), config, torch.device("cpu"))
    copy = online.twin(engine, config, torch.device("cpu"))
    images = torch.randn(4, 3, 32, 32)
    engine.method.eval()
    with torch.no_grad():
        own, theirs = copy.encode(images), engine.method.float().encode(images)
    return float((own - theirs).abs().max() / theirs.abs().max())


def test_filters_that_are_in_no_state_are_in_the_copy():
    assert max(run_ranks(copied, 2, "")) < 1e-5
