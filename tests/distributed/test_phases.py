"""Offline phases in real runs: what comes of them is in checkpoints, on any number of ranks.

Covers: largescale/run/phases.py, largescale/methods/phase.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from largescale.__main__ import main
from largescale.config import load_config
from largescale.data.stream import Stream
from largescale.methods import build_method
from largescale.parallel.engine import Engine
from largescale.parallel.strategies import build_engine
from largescale.run.failures import TrainingStopped
from largescale.run.phases import Phases
from largescale.run.status import read_status
from tests.helpers.commands import ROOT
from tests.helpers.launcher import run_largescale
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import losses, steps_saved

pytestmark = pytest.mark.distributed

MINI = ROOT / "tests/methods/mini/pcl.yaml"
STEPS = 26
"""12 are an epoch of 200 images; with an epoch of warm-up, phases come before steps 12 and 24."""


class Expected(NamedTuple):
    """Steps that phases come before, and those of them in which images are embedded."""

    phases: list[int]
    embeds: list[int]


BETWEEN_EPOCHS = {
    "deepclusterv2": Expected([0, 12, 24], [0]),
    "sela": Expected([2, 11], [2, 11]),
    "odc": Expected([0], [0]),
    "deepcluster": Expected([0, 12, 24], [0, 12, 24]),
    "deepercluster": Expected([0, 12, 24], [0, 12, 24]),
}


HALFWAY = {"deepercluster": "k-means of 3 ", "deepclusterv2": "k-means of 4 ", "sela": "4 equal clusters"}
"""What phases of several solves say where the last one, or that of a part of the images, begins."""


def test_a_run_is_stopped_within_an_epoch_or_a_phase_and_goes_on_with_other_ranks(shard_folder, tmp_path):
    run = tmp_path / "run"
    shared = [
        "pretrain",
        str(MINI),
        f"data.shards={shard_folder}",
        f"run.dir={run}",
        "run.log_every=1",
        f"train.steps={STEPS}",
        "method.warmup_epochs=1",
        "method.recluster_epochs=1",
        "optim.lr=0.02",
        "evaluate.batch=32",
        "checkpoint.every_steps=9",
        "checkpoint.keep=9",
    ]
    run_largescale(*shared, "parallel.strategy=fsdp", ranks=2)
    before = losses(run)
    assert steps_saved(run) == {9, 12, 18, 24, 26}  # also before each phase
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "phase_s" in row] == [12, 24]
    assert all(0 < row["clusters_used_9"] <= 1 for row in rows if "phase_s" in row)
    assert all(row["phase_skipped"] == row["skipped_samples"] == 0 for row in rows if "phase_s" in row)

    def go_back_to(last: int) -> None:
        for step in steps_saved(run):
            if step > last:
                shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")

    go_back_to(18)  # phases see the same images whatever evaluation is to see
    run_largescale(*shared, "parallel.strategy=ddp", "evaluate.size=16", "evaluate.resize=40")
    assert losses(run) == pytest.approx(before, rel=1e-8)
    go_back_to(24)
    ddp = [*shared, "parallel.strategy=ddp"]
    stopped = run_largescale(*ddp, ranks=2, check=False, entry=main_that_is_stopped_in_a_phase)
    assert stopped.returncode == 85, stopped.stderr
    assert "stopped in the phase before step 24" in stopped.stderr
    status = read_status(run)
    assert status is not None and (status["state"], status["step"], status["saved"]) == ("stopped", 24, 24)
    assert steps_saved(run) == {9, 12, 18, 24}
    run_largescale(*ddp, ranks=2)
    assert losses(run) == pytest.approx(before, rel=1e-8)

    go_back_to(9)  # killed in a phase; on one rank, killed in the middle of the next epoch; on two to the end
    saved_first = "checkpoint.background=false"  # else the kill may come before what the phase begins with is written
    killed = run_largescale(*ddp, saved_first, ranks=2, check=False, entry=main_that_is_killed_in_a_phase)
    assert killed.returncode != 0 and steps_saved(run) == {9, 12}, killed.stderr
    killed = run_largescale(*ddp, check=False, entry=main_that_is_killed_in_an_epoch)
    assert killed.returncode != 0 and steps_saved(run) == {9, 12}, killed.stderr
    assert 13 < len(losses(run)) <= 17, "not killed in the middle of an epoch"
    run_largescale(*ddp, ranks=2)
    assert losses(run) == pytest.approx(before, rel=1e-8)


@pytest.mark.parametrize("method", BETWEEN_EPOCHS)
def test_a_run_goes_on_between_two_phases_with_other_ranks(method, shard_folder, tmp_path):
    run = tmp_path / "run"
    shared = [
        "pretrain",
        str(MINI.with_name(f"{method}.yaml")),
        f"data.shards={shard_folder}",
        f"run.dir={run}",
        "run.log_every=1",
        f"train.steps={STEPS}",
        "optim.lr=0.02",
        "evaluate.batch=32",
        "checkpoint.every_steps=9",
        "checkpoint.keep=9",
    ]
    run_largescale(*shared, "parallel.strategy=fsdp", ranks=2)
    before = losses(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "phase_s" in row] == BETWEEN_EPOCHS[method].phases
    assert [row["step"] for row in rows if "phase_skipped" in row] == BETWEEN_EPOCHS[method].embeds
    for step in steps_saved(run) - {9}:
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    run_largescale(*shared, "parallel.strategy=ddp")
    assert losses(run) == pytest.approx(before, rel=1e-8)


def main_that_is_stopped_in_a_phase() -> int:
    """The command, whose last rank gets a signal while it embeds its second batch of four."""
    embed, calls = Engine.embed, []

    def embed_and_be_told(self: Engine, images: torch.Tensor, step: int) -> torch.Tensor:
        calls.append(step)
        if len(calls) == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(self, images, step)

    Engine.embed = embed_and_be_told  # type: ignore[method-assign]  # of a process that is about to end
    code = main()
    return code if len(calls) == 2 else 1


def main_that_is_killed_in_a_phase() -> int:
    """The command, whose last rank is killed when it is to embed its second batch of four."""
    embed, calls = Engine.embed, []

    def embed_or_die(self: Engine, images: torch.Tensor, step: int) -> torch.Tensor:
        calls.append(step)
        if len(calls) == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return embed(self, images, step)

    Engine.embed = embed_or_die  # type: ignore[method-assign]  # of a process that is about to end
    return main()


def main_that_is_killed_in_an_epoch() -> int:
    """The command, killed when it is to train on step 17."""
    forward_backward = Engine.forward_backward

    def train_or_die(self: Engine, views: Any, step: int, objective: str) -> Any:
        if step == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward_backward(self, views, step, objective)

    Engine.forward_backward = train_or_die  # type: ignore[method-assign]  # of a process that is about to end
    return main()


def phases_of(folder: Path, *overrides: str, recipe: Path = MINI) -> tuple[Engine, Phases, list[tuple[int, str]]]:
    """A network, its phases, and what they say was skipped."""
    config = load_config(recipe, [f"data.shards={folder}", "evaluate.batch=32", *overrides])
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    stream = Stream(config, **ranks, device=torch.device("cpu"), dtype=torch.float64)
    torch.manual_seed(0)
    engine = build_engine(build_method(config, stream.length), config, torch.device("cpu"))
    skipped: list[tuple[int, str]] = []
    return (
        engine,
        Phases(
            config,
            stream,
            engine,
            torch.device("cpu"),
            lambda step, rows: skipped.extend((step, r["key"]) for r in rows),
        ),
        skipped,
    )


def asked_at(number: int) -> Any:
    """Rank 1 is asked to stop from its call of this number on."""
    calls: list[int] = []

    def asked() -> str:
        calls.append(1)
        return "SIGTERM" if len(calls) >= number and dist.get_rank() == 1 else ""

    return asked


def nobody() -> str:
    return ""


def whatever_may_happen(good: Path, bad: Path) -> dict[str, Any]:
    """Phases on each rank that are left, that meet an unreadable image, and one that diverged."""
    found: dict[str, Any] = {}
    engine, phases, skipped = phases_of(good)
    beats: list[str] = []
    whole = phases.before(0, beats.append, nobody)
    found["whole"], found["beats"] = whole, len(beats)
    state = engine.method.assignments.own.clone()
    for place in (3, len(beats) - 2):  # among the batches; within k-means
        again = phases_of(good)
        found[f"left at {place}"] = again[1].before(0, lambda what: None, asked_at(place))
        assert again[1].before(0, lambda what: None, nobody) == ""
        assert torch.equal(again[0].method.assignments.own, state)
    assert skipped == [] and phases.measures()["phase_skipped"] == 0
    engine, phases, skipped = phases_of(bad)
    assert phases.before(0, lambda what: None, nobody) == ""
    found["skipped"], found["measures"] = list(skipped), phases.measures()
    found["without"] = int((engine.method.assignments.own[:, 0] < 0).sum())
    with torch.no_grad():
        engine.method.teacher["projection"][-1].bias.fill_(torch.nan)
    with pytest.raises(TrainingStopped) as stopped:
        phases.before(0, lambda what: None, nobody)
    found["diverged"] = str(stopped.value)
    return found


def test_a_lost_shard_costs_a_phase_its_images(one_process, shard_folder, tmp_path):
    bad = Path(shutil.copytree(shard_folder, tmp_path / "bad"))
    sorted(bad.glob("*.tar"))[1].write_bytes(b"")
    _, phases, skipped = phases_of(bad)
    assert phases.before(0, lambda what: None, nobody) == ""
    assert len(skipped) == phases.measures()["phase_skipped"] == 40
    assert phases.unread() == [*range(40, 80)] and phases.unread() == []


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.to_local().clone() for name, value in engine.method.state(engine.all_ranks).items()}


def left_between_heads(folder: Path) -> dict[str, Any]:
    """Phases of methods with several heads, left where the last one is solved, and done again by the next start."""
    found: dict[str, Any] = {}
    for name, begins in HALFWAY.items():
        recipe, beats = MINI.with_name(f"{name}.yaml"), list[str]()
        engine, phases, _ = phases_of(folder, recipe=recipe)
        step = next(step for step in range(engine.method.length.num_steps) if phases.due(step))
        assert phases.before(step, beats.append, nobody) == ""
        state = state_of(engine)
        place = next(number for number, what in enumerate(beats) if what.startswith(begins))
        engine, phases, _ = phases_of(folder, recipe=recipe)
        before = state_of(engine)
        found[name] = phases.before(step, lambda what: None, asked_at(place))
        for key, value in before.items():  # as from the checkpoint before the phase
            engine.method.state(engine.all_ranks)[key].to_local().copy_(value)
        assert phases.before(step, lambda what: None, nobody) == ""
        assert all(torch.equal(value, state[key]) for key, value in state_of(engine).items())
    with torch.no_grad():
        engine.method.heads[1].bias.fill_(torch.nan)
    engine.method.after_update(step)
    with pytest.raises(TrainingStopped) as stopped:
        phases.before(step, lambda what: None, nobody)
    found["diverged"] = str(stopped.value)
    return found


def test_phases_are_left_between_heads_and_scores_that_are_not_finite_end_the_run(shard_folder):
    first, second = run_ranks(left_between_heads, 2, shard_folder)
    for name in HALFWAY:
        assert (first[name], second[name]) == ("at another rank's request", "by SIGTERM")
    for one in (first, second):
        assert "scores are not finite: weights or BatchNorm's statistics have diverged" in one["diverged"]


def test_phases_are_left_on_all_ranks_and_count_what_they_cannot_use(shard_folder, tmp_path):
    bad = Path(shutil.copytree(shard_folder, tmp_path / "bad"))
    tar = sorted(bad.glob("*.tar"))[-1]
    content = bytearray(tar.read_bytes())
    content[content.index(b"IDAT") + 9] ^= 1
    tar.write_bytes(content)
    first, second = run_ranks(whatever_may_happen, 2, shard_folder, bad)
    assert first["whole"] == second["whole"] == "" and first["beats"] == second["beats"] > 8
    for place in (3, first["beats"] - 2):
        assert first[f"left at {place}"] == "at another rank's request"
        assert second[f"left at {place}"] == "by SIGTERM"
    [(step, key)] = second["skipped"]
    assert first["skipped"] == [] and step == 0 and key
    assert (first["without"], second["without"]) == (0, 1)
    for one in (first, second):
        assert (one["measures"]["phase_skipped"], one["measures"]["phase_skipped_rate"]) == (1, 1 / 200)
        assert one["diverged"].startswith(
            "phase before step 0: embeddings of 199 of 200 images are not finite: weights"
        )
