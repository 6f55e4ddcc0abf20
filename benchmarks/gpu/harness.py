"""Runs cases one after the other, each in a process of its own that is ended at its limit.

A case is a function that reports rows. Its process may hang, abort, run out of memory or fail to import something: the
rows it has reported count, what happened to it becomes a row, and the next case runs. Only this file starts processes,
and it imports neither torch nor the library, so that nothing they do can stop it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shards.ground.worker_processes import die_with_parent

OK, FAILED, MEASURED, LEFT_OUT = "ok", "failed", "measured", "left out"
NOT_INSTALLED, NEEDS_GPU = "not installed", "needs a GPU"

FACTS = "facts.json"
"""Where the first case leaves what the machine is, in the folder of the run."""

FAILURES = "gpu_check_failures.log"
"""Beside the page: what the processes of cases that failed have said, tracebacks included."""
_MOST_SAID = 20_000
"""Characters kept of each."""

PRELOAD = ["gpu.preload"]
"""What is imported before the cases' processes are forked."""

_OWN = ("largescale", "shards", "gpu", "benchmarks")
"""Packages whose absence is a fault of this repository, not of the machine."""
_OF_A_DUMP = ("  File", "Thread 0x", "Current thread", "Extension modules")
"""How lines of a fault handler's dump begin, after the one that says what happened."""

_KILL_S = 5.0
"""Time for a killed process to be gone; one that the driver of a GPU holds may never be."""


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        section: of the page.
        name: what a reader calls it.
        function: "module:name" of a function (Report, Context, *arguments).
        limit_s: time after which its process is ended; with small sizes three times that, as CPUs may be busy.
        arguments: picklable.
        worth_s: the least time worth starting it with; 0 is half its limit.
        after: the case whose files it reads.
    """

    section: str
    name: str
    function: str
    limit_s: float
    arguments: tuple[Any, ...] = ()
    worth_s: float = 0.0
    after: str = ""


@dataclass(frozen=True)
class Context:
    """What every case is told.

    Attributes:
        device: "cuda" or "cpu".
        small: sizes for two CPU cores.
        folder: to write to; shared by the cases of a run, removed after it.
        kept: where what is to be kept goes, beside the page.
        ends: time.monotonic() at which the case is ended.
    """

    device: str
    small: bool
    folder: str
    kept: str
    ends: float = 0.0

    def left_s(self) -> float:
        """Seconds until this case is ended."""
        return self.ends - time.monotonic()


@dataclass(frozen=True)
class Row:
    """One line of a table of the page, and the name of its case."""

    section: str
    case: str
    table: str
    what: str
    status: str
    reason: str = ""
    cells: dict[str, Any] = field(default_factory=dict)


@dataclass
class Progress:
    """A run so far: its rows, the seconds that cases took, and the cases that are still to come."""

    rows: list[Row]
    seconds: dict[str, float]
    to_come: list[Case]


class Report:
    """Takes the rows of a case; each is on disk when `row` returns."""

    def __init__(self, path: Path, case: Case) -> None:
        self._path, self._case = path, case

    def row(self, what: str, status: str = MEASURED, reason: str = "", *, table: str = "", **cells: Any) -> None:
        """Report a row.

        Args:
            what: its first column.
            status: one of the constants above.
            reason: in one line, of anything but OK and MEASURED.
            table: heading of its table; the case's name if empty.
            cells: its columns; underscores in a name are spaces on the page.
        """
        row = Row(self._case.section, self._case.name, table or self._case.name, what, status, one_line(reason), cells)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def judge(self, what: str, holds: bool, reason: str, *, table: str = "", **cells: Any) -> None:
        """Report a row that is ok where something holds, and failed for a reason where not."""
        self.row(what, OK if holds else FAILED, "" if holds else reason, table=table, **cells)


def one_line(text: str, most: int = 300) -> str:
    """A text without line breaks, and not too long."""
    joined = " ".join(text.split())
    return joined if len(joined) <= most else joined[: most - 3] + "..."


def run(
    cases: Sequence[Case],
    context: Context,
    minutes: float,
    publish: Callable[[Progress], None],
    say: Callable[[str], None],
) -> list[Row]:
    """Run cases within a time.

    Args:
        cases: in order of their worth: those at the end are left out where the time is over.
        context: of all cases.
        minutes: for all of them.
        publish: called before the first case and after every one.
        say: told what happens.

    Returns:
        All rows.
    """
    ends, progress = time.monotonic() + 60 * minutes, Progress([], {}, list(cases))
    publish(progress)
    (Path(context.kept) / FAILURES).unlink(missing_ok=True)
    for case in cases:
        started, left = time.monotonic(), ends - time.monotonic()
        limit = min(left, case.limit_s * (3 if context.small else 1))
        if left < (case.worth_s or case.limit_s / 2):
            found = [_about(case, LEFT_OUT, "no time left")]
        else:
            say(f"{case.section}: {case.name} (at most {limit:.0f} s)")
            found = run_case(case, context, limit)
        for row in found:
            say(f"  {row.what}: {row.status}{_in_words(row)}")
        progress.rows += found
        progress.seconds[f"{case.section}: {case.name}"] = round(time.monotonic() - started, 1)
        progress.to_come.remove(case)
        publish(progress)
    return progress.rows


def shown(value: Any) -> str:
    """A cell as it is printed."""
    if isinstance(value, float):
        return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _about(case: Case, status: str, reason: str) -> Row:
    """A row about a case as such."""
    return Row(case.section, case.name, case.name, case.name, status, reason)


def _in_words(row: Row) -> str:
    cells = ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in row.cells.items())
    return "".join(f"; {part}" for part in (cells, row.reason) if part)


def run_case(case: Case, context: Context, limit_s: float) -> list[Row]:
    """The rows of one case, and one more where its process did not end well."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    folder = Path(context.folder)
    rows_path, log_path = folder / "rows.jsonl", folder / "log"
    for path in (rows_path, log_path):
        path.unlink(missing_ok=True)
    own = Context(context.device, context.small, context.folder, context.kept, time.monotonic() + limit_s)
    process = processes.Process(target=_in_child, args=(case, own, str(rows_path), str(log_path)))
    process.start()
    try:
        process.join(limit_s)
        ended = process.exitcode
    finally:
        _end(process)
    rows = _read_rows(rows_path)
    if why := _trouble(ended, bool(rows), limit_s, log_path):
        rows.append(_about(case, FAILED, one_line(why)))
    if any(row.status == FAILED for row in rows):
        _keep_log(case, log_path, Path(context.kept) / FAILURES)
    return rows


def _trouble(ended: int | None, reported: bool, limit_s: float, log: Path) -> str:
    """Why the process of a case did not end well; empty if it did."""
    if ended is None:
        return f"ended at its limit of {limit_s:.0f} s"
    if ended != 0:
        how = f"ended by {signal.Signals(-ended).name}" if ended < 0 else f"exit code {ended}"
        return f"{how}: {_last_line(log)}"
    return "" if reported else "it reported nothing"


def _keep_log(case: Case, log: Path, kept: Path) -> None:
    said = log.read_text(errors="replace")[-_MOST_SAID:] if log.exists() else ""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        file.write(f"=== {case.section}: {case.name}\n{said}\n")


def _end(process: Any) -> None:
    """End a process and all that it started."""
    for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill()
    process.join(_KILL_S)


def _read_rows(path: Path) -> list[Row]:
    """Rows that were written whole."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").split("\n")[:-1]
    return [Row(**json.loads(line)) for line in lines]


def _last_line(path: Path) -> str:
    """What a process said last, past the frames of a fault handler's dump."""
    if not path.exists():
        return "it said nothing"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    spoken = [line for line in lines if not line.startswith(_OF_A_DUMP)]
    return spoken[-1] if spoken else "it said nothing"


def _in_child(case: Case, context: Context, rows: str, log: str) -> None:
    """The life of a case's process."""
    os.setsid()  # so that all it starts can be ended with it
    die_with_parent()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    faulthandler.enable()
    if context.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    report = Report(Path(rows), case)
    try:
        module, name = case.function.split(":")
        getattr(importlib.import_module(module), name)(report, context, *case.arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in _OWN:
            raise
        report.row(case.name, NOT_INSTALLED, missing)
    except Exception as error:
        traceback.print_exc()
        report.row(case.name, FAILED, f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of libraries must not hold up what is done
