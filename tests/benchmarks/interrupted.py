"""A run of the harness whose second case never ends: `python -m tests.benchmarks.interrupted FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu import harness
from gpu.harness import Case, Context, run
from gpu.page import Page

FACTS = dict.fromkeys(("device", "hardware", "torch", "torchvision", "python", "revision"), "x") | {"slug": "x"}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    harness.PRELOAD = []
    cases = [Case("One", name, f"tests.benchmarks.cases:{name}", 600) for name in ("fine", "hangs", "silent")]
    run(cases, Context("cpu", False, str(folder), str(folder)), 10.0, Page(folder, FACTS, ["x"], 10.0).write, print)
