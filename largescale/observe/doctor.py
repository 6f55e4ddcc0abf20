"""Warns in words when a run looks wrong; for the console and the report alike."""

from __future__ import annotations

from largescale.config import Config
from largescale.methods import method_class
from largescale.methods.method import Row

WARMUP_SHARE = 0.1
"""Fraction at the start of a run during which every run looks collapsed."""


class Doctor:
    """Judges the lines of metrics.jsonl one by one, using what the method knows.

    Args:
        config: of the run; advice starts from its settings.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._method = config, method_class(config)
        self._before: Row = {}

    def look(self, row: Row) -> str:
        """What looks wrong and what to try, or an empty string.

        Args:
            row: a line of metrics.jsonl. One without `progress` (the fraction of the run done) was written by
                another version and is not judged.
        """
        before, self._before = self._before, row
        return "" if row.get("progress", 0.0) < WARMUP_SHARE else self._method.diagnose(self._config, before, row)
