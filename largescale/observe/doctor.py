"""Says in words when a run looks wrong; for the console and the report alike."""

from __future__ import annotations

from largescale.methods.method import Method, Row

WARMUP_SHARE = 0.1
"""Share of the run during which every run looks collapsed."""


class Doctor:
    """Judges the lines of metrics.jsonl, one after the other, by what the method knows.

    Args:
        method: its class, or one of it.
    """

    def __init__(self, method: type[Method] | Method) -> None:
        self._method = method
        self._before: Row = {}

    def look(self, row: Row) -> str:
        """What looks wrong and what to try, or an empty string.

        Args:
            row: a line of metrics.jsonl. One without `progress` (the share of the run that is done) was written by
                another version; nothing is said of it.
        """
        before, self._before = self._before, row
        return "" if row.get("progress", 0.0) < WARMUP_SHARE else self._method.diagnose(before, row)
