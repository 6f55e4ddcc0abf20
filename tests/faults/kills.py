"""Kills ranks of a run at random moments, starts it again, and compares its end with that of a run left in peace.

    python -m tests.faults.kills --kills 200 --out benchmarks/results/kills.json

A checkpoint is saved after every step and all but one are removed, so that many kills meet a save; half of the kills
wait for a moment that is hard to hit: a checkpoint about to be published, an old one half removed. After a tenth of
them the killed owner's lease is made another machine's, as when a node is lost with all its processes: the next start
cannot see that they are gone, and takes the folder over once the lease has run out. An epoch turns every 12 steps of
the short form, every 125 of the long one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from largescale.run.owner import newest_owner, parse_owner
from tests.helpers.commands import SAMPLE, run_python
from tests.helpers.runs import assert_same_end, log_of, move_elsewhere, rank_processes, started

_RUN = [
    "checkpoint.every_steps=1",
    "checkpoint.keep=1",
    "checkpoint.keep_every=50",
    "train.precision=fp32",
    "parallel.strategy=fsdp",
    "data.workers=1",
    "run.lease_s=4",
]
_LONGEST_S = 2.5
"""Kills fall into the first seconds of training after a start."""
_KILLS_A_LOST_MACHINE = 10
"""Of so many kills one leaves the lease of a machine that nobody can look into."""
_MOMENTS = {"publishing": ".step-*.writing/*progress.json*", "removing": ".step-*.removing"}
"""What is in the folder of checkpoints at moments that chance seldom meets."""


def kill_again_and_again(data: list[str], folder: Path, *, num_kills: int, seed: int, steps: int) -> dict[str, int]:
    """Run to the end under kills, as many runs as it takes; asserts that each ends as the undisturbed one.

    Returns:
        Counts: kills, of whom, what they interrupted, runs compared.
    """
    chance, counts = random.Random(seed), Counter()
    overrides = [*data, *_RUN, f"train.steps={steps}"]
    expected = folder / "undisturbed"
    _run_through(overrides, expected)
    while counts["kills"] < num_kills:
        run = folder / f"run-{counts['runs']}"
        while counts["kills"] < num_kills and not _complete(run):
            _start_and_kill([*overrides, f"run.dir={run}"], run, chance, counts)
        _run_through(overrides, run)
        assert_same_end(run, expected)
        counts["runs"] += 1
        counts.update(_taken_over(log_of(run)))
        assert counts["leases that ran out"] == counts["lost machines"]
        sys.stderr.write(f"{counts['kills']} of {num_kills} kills, run {counts['runs']} ends as the undisturbed one\n")
    return dict(counts)


def _run_through(overrides: list[str], run: Path) -> None:
    with started([*overrides, f"run.dir={run}"], run) as process:
        assert process.wait(3600) == 0, log_of(run).read_text()[-3000:]


def _start_and_kill(overrides: list[str], run: Path, chance: random.Random, counts: Counter[str]) -> None:
    before = _metrics_size(run)
    with started(overrides, run) as process:
        while process.poll() is None and _metrics_size(run) == before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, _LONGEST_S))
        moment = chance.choice([*_MOMENTS, "", ""])
        deadline = time.monotonic() + _LONGEST_S
        while moment and process.poll() is None and time.monotonic() < deadline:
            if _is_there(run / "checkpoints", _MOMENTS[moment]):
                break
        ranks = rank_processes(process.pid) if process.poll() is None else {}
        if len(ranks) == 2:
            loses_machine = counts["kills"] >= counts["lost machines"] * _KILLS_A_LOST_MACHINE
            whom = chance.choice(["rank 0", "all"] if loses_machine else ["rank 0", "rank 1", "all"])
            victims = [*ranks.values(), process.pid] if whom == "all" else [ranks[int(whom[-1])]]
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            counts.update(["kills", f"of {whom}"])
            if loses_machine:
                _move_lease(run)
                counts["lost machines"] += 1
        process.wait(90)
    left = list((run / "checkpoints").glob(".step-*"))
    counts["while saving"] += any(path.name.endswith(".writing") for path in left)
    counts["while publishing"] += any(
        (path / "progress.json").exists() for path in left if path.name.endswith(".writing")
    )
    counts["while removing"] += any(path.name.endswith(".removing") for path in left)


def _move_lease(run: Path) -> None:
    """Once its owner is dead, make the lease another machine's."""
    deadline = time.monotonic() + 600
    while not (found := newest_owner(run)) or not parse_owner(found[1]).is_dead():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    move_elsewhere(run, found[0])


def _taken_over(log: Path) -> Counter[str]:
    """How the starts of a run came by its folder."""
    text = log.read_text()
    return Counter(
        {
            "leases of dead processes": text.count("(its process is gone)"),
            "leases that ran out": text.count("(silent for "),
        }
    )


def _is_there(folder: Path, pattern: str) -> bool:
    with suppress(FileNotFoundError):  # a folder that was renamed while it was looked into
        return next(folder.glob(pattern), None) is not None
    return False


def _metrics_size(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def _complete(run: Path) -> bool:
    status = run / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "complete"


def main() -> None:
    """Make shards of the bundled images, kill, write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_python("-m", "zipfile", "-e", SAMPLE, folder)
        images = folder / "fashion-mnist" / "test"
        run_python("-m", "shards", "convert", images, folder / "shards", "--shuffle", "0", "--samples-per-shard", "200")
        data = [f"data.shards={folder / 'shards'}", "evaluate.baselines=false"]
        started_at = time.monotonic()
        counts = kill_again_and_again(
            data, folder, num_kills=arguments.kills, seed=arguments.seed, steps=arguments.steps
        )
    counts["minutes"] = round((time.monotonic() - started_at) / 60)
    sys.stdout.write(json.dumps(counts, indent=1) + "\n")
    if arguments.out:
        arguments.out.write_text(json.dumps({"torch_ranks": 2, "seed": arguments.seed, **counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
