"""What a GPU does with this product, in at most eight minutes: is it right, how fast is it, does the planner know it.

    make gpu-check                                                 # or, with other options:
    python benchmarks/gpu_check.py [--out DIR] [--only NAME ...] [--minutes 8] [--small] [--device cpu]

On a machine without a GPU the same cases run with small sizes. Every case has a process and a time of its own; whatever
happens in it, the next one runs. Writes gpu_check_DEVICE.json and .md, again after every case, to benchmarks/results.
Exit code 1 where a case of the section Correctness failed. With --only, what an earlier run found of the other cases
stays on the page. What the page says: docs/gpu-check.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's library, installed or not

from gpu.cases import CASES, CORRECTNESS, SECTIONS
from gpu.harness import FACTS, FAILED, Case, Context, Row, run, run_case
from gpu.page import Page

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MACHINE = Case("Machine", "Ceilings", "gpu.facts:find", 90)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def find_machine(context: Context) -> tuple[dict[str, Any], list[Row]]:
    """What is measured on, looked up in a process of its own; the driver touches no device."""
    rows = run_case(MACHINE, context, MACHINE.limit_s)
    path = Path(context.folder) / FACTS
    return (json.loads(path.read_text()) if path.exists() else {}), rows


def check(arguments: argparse.Namespace, cases: list[Case], folder: str) -> int:
    """Run the cases; returns the exit code."""
    asked = Context("cpu" if arguments.device == "cpu" else "cuda", arguments.small, folder, str(arguments.out))
    facts, rows = find_machine(asked)
    if not facts:
        say(f"the machine cannot be used: {rows[-1].reason}")
        return 1
    say(f"{facts['hardware']}, torch {facts['torch']}")
    context = Context(facts["kind"], arguments.small or facts["kind"] == "cpu", folder, str(arguments.out))
    others = [case for case in CASES if case not in cases] if arguments.only else []
    page = Page(arguments.out, facts, ["python", *sys.orig_argv[1:]], arguments.minutes, rows, keep=others)
    found = run(cases, context, arguments.minutes, page.write, say)
    failed = [row for row in found if row.status == FAILED and row.section == CORRECTNESS]
    say(f"{page.folder / page.name}.md: {len(found)} rows, {len(failed)} of {CORRECTNESS} failed")
    return 1 if failed else 0


def main(cases: list[Case] = CASES) -> int:
    """Run the cases that the command line asks for and write the page; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the page goes")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"sections ({', '.join(SECTIONS)}) or cases, by the first letters of what they are called on the page",
    )
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="for all of it (default 8)")
    parser.add_argument("--small", action="store_true", help="sizes for two CPU cores, as where there is no GPU")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu: do not use a GPU")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    # Of loaders whose case was ended: the tracker frees what they leave, and need not say so.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the case that runs is ended
    asked = cases if arguments.only is None else [case for case in cases if _asked_for(case, arguments.only)]
    chosen = [case for case in cases if case in asked or case.name in {other.after for other in asked}]
    if not chosen:
        parser.error(f"--only {' '.join(arguments.only)}: no section and no case is called so")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        return check(arguments, chosen, folder)


def _asked_for(case: Case, names: list[str]) -> bool:
    return any(
        SECTIONS.get(name) == case.section or case.name.lower().startswith(name.lower()) for name in names if name
    )


if __name__ == "__main__":
    sys.exit(main())
