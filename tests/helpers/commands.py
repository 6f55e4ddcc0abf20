"""Commands as a user starts them, by interpreters and a launcher of their own; and where the tests' files lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "shards" / "sample" / "fashion-mnist.zip"
TINY = ROOT / "tests" / "tiny.yaml"
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where small files that are made by the thousand cost nothing to make; None, as `tempfile` has it, for any place."""


def run_python(
    *arguments: object, ranks: int = 1, cwd: Path | None = None, timeout_s: float = 900, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, or torchrun with several ranks, as a user would."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*launch, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return checked(result) if check else result


def environment() -> dict[str, str]:
    """Of a command in a process of its own: this checkout, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def checked(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The result of a command, which must not have failed."""
    if result.returncode != 0:
        pytest.fail(f"{result.args} exited with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    return result
