"""Real runs of tests/tiny.yaml: disturb one in the background, read what a run has left, compare how two ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import find_latest
from largescale.run.owner import owner_path, parse_owner
from tests.helpers.commands import TINY, environment

TIMES = {
    "images_per_s",
    "data_wait_s",
    "step_s",
    "save_s",
    "peak_memory_bytes",
    "read_ms",
    "decode_ms",
    "crop_ms",
    "augment_s",
    "queue_depth",
    "cache_hit_rate",
    "fetched_bytes",
    "online_s",
    "phase_s",
    "phase_embedding_s",
}
"""Metrics that two equal runs need not share."""


@contextmanager
def started(
    overrides: list[str], run: Path, *, ranks: int = 2, launcher: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun with some ranks in the background, its output in RUN.log; killed at the end if it still runs."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        *launcher,
        "-m",
        "largescale",
        "pretrain",
        str(TINY),
        *overrides,
    ]
    with (
        log_of(run).open("ab") as log,
        subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                for victim in [process.pid, *rank_processes(process.pid).values()]:
                    os.kill(victim, 9)


def log_of(run: Path) -> Path:
    """The file that the output of a started run goes to."""
    return run.parent / f"{run.name}.log"


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """Return once rank 1 has trained on data step `step`; fail if the run ends before."""
    audit = run / "audit" / "rank-00001.jsonl"
    deadline = time.monotonic() + 600
    while not audit.exists() or len(audit.read_text().splitlines()) <= step:
        assert process.poll() is None and time.monotonic() < deadline, log_of(run).read_text()[-3000:]
        time.sleep(0.01)


def move_elsewhere(run: Path, number: int = 1) -> None:
    """As if a run folder's owner had run on another machine, whose processes cannot be seen from here."""
    path = owner_path(run, number)
    path.write_bytes(replace(parse_owner(path.read_bytes()), machine="elsewhere", host="n7").to_bytes())


def rank_processes(launcher: int) -> dict[int, int]:
    """Process id by rank."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for child in (task / "children").read_text().split():
            environ = Path(f"/proc/{child}/environ").read_text().split("\0")
            ranks = [entry.removeprefix("RANK=") for entry in environ if entry.startswith("RANK=")]
            if ranks:
                found[int(ranks[0])] = int(child)
    return found


def losses(run: Path) -> list[float]:
    """The loss of every logged step, in the order of the steps."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_saved(run: Path) -> set[int]:
    """Of a run's checkpoints that are there."""
    return {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}


def sample_sets(run: Path) -> dict[int, list[str]]:
    """Keys of every global step, sorted, from all ranks' audits."""
    steps = defaultdict(list)
    for path in sorted(run.glob("audit/rank-*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            steps[row["step"]] += row["keys"]
    return {step: sorted(keys) for step, keys in steps.items()}


def metrics(run: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the machine's speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint is not None
    state = {name: torch.zeros(shape) for name, shape in sharded.shapes(checkpoint).items()}
    sharded.load(checkpoint, state, no_dist=True)
    return state


def assert_same_end(run: Path, expected: Path) -> None:
    """Metrics and audits equal line by line, final weights bit by bit, and nothing is left lying about."""
    assert metrics(run) == metrics(expected)
    for path in sorted(expected.glob("audit/*.jsonl")):
        assert (run / "audit" / path.name).read_text() == path.read_text()
    mine, theirs = final_state(run), final_state(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert any(name.startswith("optimizer.") for name in mine) and "extra.queue" in mine
    names = {str(path.relative_to(run)) for path in run.rglob("*") if "events.out" not in path.name}
    assert names == {str(path.relative_to(expected)) for path in expected.rglob("*") if "events.out" not in path.name}
