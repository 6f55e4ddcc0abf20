"""The training step of two versions of this code, in turns: whether a change has made it slower.

    git worktree add /tmp/before COMMIT
    python benchmarks/step_paired.py /tmp/before [--rounds 15] [--batch 8]

Each version runs in a process of its own, from its own tree, and takes a step when it is its turn; so whatever else the
machine does affects both alike. What is measured is the CPU time of the process, on one thread, which other processes
change less than the clock's; and how many of torch's operators a step calls, which they do not change. The step is
"ours" of `step.py` as each version has it. Writes benchmarks/results/step_paired.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "bf16")
WARM_UP = 2
_SERVER = """
import sys, tempfile, time
sys.path.insert(0, "benchmarks")
import torch, torch.distributed as dist
import step
from torch.utils._python_dispatch import TorchDispatchMode

class Operators(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **(options or {}))

with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}/store")
    device = torch.device("cpu")
    steps = {name: step.ours(step.configuration(step.SETTINGS["cpu"], int(sys.argv[1]), name), device)
             for name in sys.argv[2:]}
    for one in steps.values():
        one()  # what is made once is not counted
        with Operators() as operators:
            one()
        print(operators.count, flush=True)
    for line in sys.stdin:
        started = time.process_time()
        loss = steps[line.strip()]()
        print(time.process_time() - started, loss, flush=True)
"""


class Version:
    """A tree of the code, and the process that takes steps with it."""

    def __init__(self, tree: Path, batch: int) -> None:
        git = ["git", "-C", str(tree), "log", "-1", "--format=%h"]
        self.commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(batch), *PRECISIONS],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.operators = {precision: int(self._answer()) for precision in PRECISIONS}

    def step(self, precision: str) -> tuple[float, float]:
        """CPU seconds and the loss."""
        self.process.stdin.write(f"{precision}\n")
        self.process.stdin.flush()
        seconds, loss = map(float, self._answer().split())
        return seconds, loss

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{self.commit}: its process ended")
        return line


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    before, after = Version(arguments.before, arguments.batch), Version(ROOT, arguments.batch)
    versions = (before.commit, after.commit)
    lines = [
        "| precision | operators of {} | of {} | {}, ms | {}, ms | after / before |".format(*versions, *versions),
        "|---|---|---|---|---|---|",
    ]
    for precision in PRECISIONS:
        rows: list[tuple[float, float]] = []
        for number in range(arguments.rounds + WARM_UP):
            order = (before, after) if number % 2 else (after, before)
            found = {version.commit: version.step(precision) for version in order}
            (old, old_loss), (new, new_loss) = found[before.commit], found[after.commit]
            if number == 0 and abs(old_loss - new_loss) > 1e-3 * abs(old_loss):
                raise SystemExit(f"the versions do not compute the same: losses {old_loss}, {new_loss}")
            if number >= WARM_UP:
                rows.append((old, new))
        ratios = sorted(new / old for old, new in rows)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        medians = " | ".join(f"{1000 * statistics.median(column):.0f}" for column in zip(*rows, strict=True))
        operators = f"{before.operators[precision]} | {after.operators[precision]}"
        ratio = f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {precision} | {operators} | {medians} | {ratio} |")
        print(lines[-1], flush=True)
    (ROOT / "benchmarks/results/step_paired.md").write_text(
        "# A training step before and after\n\n"
        f"`python benchmarks/step_paired.py` on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}; ResNet-18, SwAV, batch {arguments.batch}, 2 x 96 + "
        f"4 x 48 px; {arguments.rounds} rounds in turns. Operators of torch in a step; CPU time on one thread, "
        "medians, and the median of the ratios "
        "of the same round with the middle half of them.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
