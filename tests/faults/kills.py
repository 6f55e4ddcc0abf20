"""Kills ranks of a run at random moments, starts it again, and compares its end with that of a run left in peace.

    python -m tests.faults.kills --kills 100 --out benchmarks/results/kills.json

A checkpoint is saved after every step and all but one are removed, so that many kills meet a save; half of the kills
wait for a moment that is hard to hit: a checkpoint about to be published, an old one half removed. An epoch turns every
12 steps of the short form, every 125 of the long one.
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

from tests.conftest import SAMPLE, run_python
from tests.distributed.test_pretrain_parity import pretrain
from tests.faults.runs import assert_same_end, rank_processes, started

_RUN = ["checkpoint.every_steps=1", "checkpoint.keep=1", "checkpoint.keep_every=50", "train.precision=fp32",
        "parallel.strategy=fsdp", "data.workers=1"]
_LONGEST_S = 4.0
"""Kills fall into the first seconds of training after a start."""
_MOMENTS = {
    "publishing": ".step-*.writing/*progress.json*",
    "removing": ".step-*.removing",
}
"""What is in the folder of checkpoints at moments that chance seldom meets."""


def kill_again_and_again(data: list[str], folder: Path, *, num_kills: int, seed: int,
                         steps: int) -> dict[str, int]:
    """Run to the end under kills, as many runs as it takes; asserts that each ends as the undisturbed one.

    Returns:
        Counts: kills, of whom, what they interrupted, runs compared.
    """
    chance, counts = random.Random(seed), Counter()
    overrides = [*data, *_RUN, f"train.steps={steps}"]
    expected = folder / "undisturbed"
    pretrain([*overrides, f"run.dir={expected}"], 2)
    while counts["kills"] < num_kills:
        run = folder / f"run-{counts['runs']}"
        while counts["kills"] < num_kills and not _complete(run):
            _start_and_kill([*overrides, f"run.dir={run}"], run, chance, counts)
        pretrain([*overrides, f"run.dir={run}"], 2)
        assert_same_end(run, expected)
        counts["runs"] += 1
        sys.stderr.write(f"{counts['kills']} of {num_kills} kills, run {counts['runs']} ends as the undisturbed one\n")
    return dict(counts)


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
            whom = chance.choice(["rank 0", "rank 1", "all"])
            victims = [*ranks.values(), process.pid] if whom == "all" else [ranks[int(whom[-1])]]
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            counts.update(["kills", f"of {whom}"])
        process.wait(90)
    left = list((run / "checkpoints").glob(".step-*"))
    counts["while saving"] += any(path.name.endswith(".writing") for path in left)
    counts["while publishing"] += any((path / "progress.json").exists() for path in left
                                      if path.name.endswith(".writing"))
    counts["while removing"] += any(path.name.endswith(".removing") for path in left)


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
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_python("-m", "zipfile", "-e", SAMPLE, folder)
        images = folder / "fashion-mnist" / "test"
        run_python("-m", "shards", "convert", images, folder / "shards", "--shuffle", "0", "--samples-per-shard", "200")
        data = [f"data.shards={folder / 'shards'}", "evaluate.baselines=false"]
        started_at = time.monotonic()
        counts = kill_again_and_again(data, folder, num_kills=arguments.kills, seed=arguments.seed, steps=400)
    counts["minutes"] = round((time.monotonic() - started_at) / 60)
    sys.stdout.write(json.dumps(counts, indent=1) + "\n")
    if arguments.out:
        arguments.out.write_text(json.dumps({"torch_ranks": 2, "seed": arguments.seed, **counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
