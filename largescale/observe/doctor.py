"""Says in words when a run looks wrong; for the console and the report alike."""

from __future__ import annotations

from largescale.config import Config
from largescale.methods import method_class
from largescale.methods.method import Row

WARMUP_SHARE = 0.1
"""Share of the run during which every run looks collapsed."""


class Doctor:
    """Judges the lines of metrics.jsonl, one after the other, by what the method knows.

    Args:
        config: of the run; advice starts from its settings.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._method = config, method_class(config)
        self._before: Row = {}

    def look(self, row: Row) -> str:
        """What looks wrong and what to try, or an empty string.

        Args:
            row: a line of metrics.jsonl. One without `progress` (the share of the run that is done) was written by
                another version; nothing is said of it.
        """
        before, self._before = self._before, row
        return "" if row.get("progress", 0.0) < WARMUP_SHARE else self._method.diagnose(self._config, before, row)
