"""The results as JSON, and as one page of Markdown; both are whole whenever they are there."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu.harness import FAILED, LEFT_OUT, MEASURED, NEEDS_GPU, NOT_INSTALLED, OK, Case, Progress, Row, shown

from shards.ground.files import atomic_write


class Page:
    """Writes the results.

    Args:
        folder: where to.
        facts: of the machine: device, slug, torch and so on, see `gpu.facts`.
        command: as it was given.
        minutes: that the run may take.
        rows: of the machine itself, which come first.
        keep: cases that do not run now; what an earlier run has found of them stays.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        command: Sequence[str],
        minutes: float,
        rows: Sequence[Row] = (),
        keep: Sequence[Case] = (),
    ) -> None:
        self.folder, self.facts, self.command, self.minutes = folder, facts, shlex.join(command), minutes
        self.rows = list(rows)
        self.name = f"gpu_check_{facts['slug']}"
        self._started, self._date = time.monotonic(), time.strftime("%Y-%m-%d")
        self._earlier = self._read_earlier({f"{case.section}: {case.name}" for case in keep})

    def _read_earlier(self, keep: set[str]) -> list[dict[str, Any]]:
        """Earlier runs of the page that is there, each with the rows that stay."""
        path = self.folder / f"{self.name}.json"
        if not keep or not path.exists():
            return []
        found = json.loads(path.read_text())
        if "earlier" not in found:
            return []  # of a version that did not say which row is of which case
        last = {name: found[name] for name in ("date", "command", "seconds_of_cases", "rows")}
        runs = [*found["earlier"], {**last, "revision": found["facts"]["revision"], "torch": found["facts"]["torch"]}]
        for run in runs:
            run["rows"] = [row for row in run["rows"] if _case_of(row) in keep]
            run["seconds_of_cases"] = {name: s for name, s in run["seconds_of_cases"].items() if name in keep}
        return [run for run in runs if run["rows"]]

    def write(self, progress: Progress) -> None:
        """Write both files again, each at once."""
        rows = [*self.rows, *progress.rows]
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = round(time.monotonic() - self._started, 1)
        content = {
            "date": self._date,
            "command": self.command,
            "minutes": self.minutes,
            "seconds": seconds,
            "facts": self.facts,
            "seconds_of_cases": progress.seconds,
            "rows": [asdict(row) for row in rows],
            "earlier": self._earlier,
            "to_come": [f"{case.section}: {case.name}" for case in progress.to_come],
        }
        texts = {"json": json.dumps(content, indent=1) + "\n", "md": markdown(content, rows)}
        for suffix, text in texts.items():
            with atomic_write(self.folder / f"{self.name}.{suffix}") as file:
                file.write(text.encode())


def _case_of(row: dict[str, Any]) -> str:
    return f"{row['section']}: {row['case']}"


def markdown(content: dict[str, Any], rows: list[Row]) -> str:
    """The page of results in Markdown: facts of the machine, then a table of the checks, then those of earlier runs."""
    facts, to_come, earlier = content["facts"], content["to_come"], content["earlier"]
    rows = rows + [Row(**row) for run in earlier for row in run["rows"]]
    counts = {
        status: sum(row.status == status for row in rows)
        for status in (OK, MEASURED, FAILED, NOT_INSTALLED, NEEDS_GPU, LEFT_OUT)
    }
    lines = [
        f"# GPU check: {facts['device']}",
        "",
        f"`{content['command']}` on {content['date']}: {facts['hardware']}, torch {facts['torch']}, torchvision "
        f"{facts['torchvision']}, Python {facts['python']}, revision {facts['revision']}. {content['seconds']:.0f} s "
        f"of at most {60 * content['minutes']:.0f} s.",
        "",
        ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "nothing yet",
    ]
    if to_come:
        lines += [
            "",
            f"**Not all of it**: {len(to_come)} cases had not run when this was written: {'; '.join(to_come)}.",
        ]
    for run in earlier:
        names = dict.fromkeys(row["case"] for row in run["rows"])
        lines += [
            "",
            f"Of an earlier run (`{run['command']}` on {run['date']}, torch {run['torch']}, revision "
            f"{run['revision']}): {', '.join(names)}.",
        ]
    lines += _failures(rows)
    for section in sorted(dict.fromkeys(row.section for row in rows), key=_place):
        lines += ["", f"## {section}"]
        for name in dict.fromkeys(row.table for row in rows if row.section == section):
            lines += ["", f"### {name}", "", *_table([r for r in rows if r.section == section and r.table == name])]
    lines += [
        "",
        "## Seconds of the cases",
        "",
        ", ".join(
            f"{name} {seconds:.0f}" for run in (content, *earlier) for name, seconds in run["seconds_of_cases"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _place(section: str) -> int:
    order = ("Machine", "Correctness", "Speed", "Planner against reality")
    return order.index(section) if section in order else len(order)


def _failures(rows: list[Row]) -> list[str]:
    troubles = [row for row in rows if row.status == FAILED]
    if not troubles:
        return []
    return ["", "## What failed", "", *(f"- {row.section}, {row.table}, {row.what}: {row.reason}" for row in troubles)]


def _table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row.cells))
    head = ["what", *(name.replace("_", " ") for name in columns), "result"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        result = row.status + (f": {row.reason}" if row.reason else "")
        cells = [row.what, *(shown(row.cells.get(name, "")) for name in columns), result]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return lines


def slug(name: str) -> str:
    """A device's name for a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
