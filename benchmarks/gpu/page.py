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

from gpu.harness import FAILED, LEFT_OUT, MEASURED, NEEDS_GPU, NOT_INSTALLED, OK, Progress, Row, shown

from shards.ground.files import atomic_write


class Page:
    """Writes the results.

    Args:
        folder: where to.
        facts: of the machine: device, slug, torch and so on, see `gpu.facts`.
        command: as it was given.
        minutes: that the run may take.
        rows: of the machine itself, which come first.
    """

    def __init__(
        self, folder: Path, facts: dict[str, Any], command: Sequence[str], minutes: float, rows: Sequence[Row] = ()
    ) -> None:
        self.folder, self.facts, self.command, self.minutes = folder, facts, shlex.join(command), minutes
        self.rows = list(rows)
        self.name = f"gpu_check_{facts['slug']}"
        self._started, self._date = time.monotonic(), time.strftime("%Y-%m-%d")

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
            "to_come": [f"{case.section}: {case.name}" for case in progress.to_come],
        }
        texts = {"json": json.dumps(content, indent=1) + "\n", "md": markdown(content, rows)}
        for suffix, text in texts.items():
            with atomic_write(self.folder / f"{self.name}.{suffix}") as file:
                file.write(text.encode())


def markdown(content: dict[str, Any], rows: list[Row]) -> str:
    """The page."""
    facts, to_come = content["facts"], content["to_come"]
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
            f"**Not at its end**: {len(to_come)} cases had not run when this was written: {'; '.join(to_come)}.",
        ]
    lines += _failures(rows)
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", f"## {section}"]
        for name in dict.fromkeys(row.table for row in rows if row.section == section):
            lines += ["", f"### {name}", "", *_table([r for r in rows if r.section == section and r.table == name])]
    lines += [
        "",
        "## Seconds of the cases",
        "",
        ", ".join(f"{name} {seconds:.0f}" for name, seconds in content["seconds_of_cases"].items()),
    ]
    return "\n".join(lines) + "\n"


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
