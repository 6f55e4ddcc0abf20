"""What the console says of a run that is not as it should be: as soon as it is so, and then seldom, so that the log
stays readable.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from largescale.config import Config
from largescale.methods.method import Row
from largescale.observe import waiting
from largescale.observe.doctor import Doctor
from largescale.processes import rank

_log = logging.getLogger(__name__)

_AGAIN = 0.1
"""Share of the run's steps after which what still holds is said once more."""


class Warnings:
    """Looks at each line of metrics.jsonl.

    Args:
        config: of the run.
        rows: lines logged so far, if it continues.
    """

    def __init__(self, config: Config, rows: Iterable[Row] = ()) -> None:
        self._config, self._doctor = config, Doctor(config, rows)
        self._said: dict[str, float] = {}

    def say(self, row: Row, counts: tuple[int, int], *, starting: bool) -> None:
        """Log, on rank 0, what is wrong now that a line is added.

        Args:
            row: the line.
            counts, starting: as of `waiting.advice`.
        """
        if rank() > 0:
            return
        waits = waiting.advice(row, self._config.data, counts, starting=starting)
        found = self._doctor.look(row)
        said = {"waiting": waits} if waits else {}
        if found:
            said[found.name] = str(found)
        for name, words in said.items():
            if self._due(name, row["progress"]):
                _log.warning("step %d: %s", row["step"], words)

    def _due(self, name: str, progress: float) -> bool:
        """Whether to say a warning now: a new one, one said long ago, and at the end of the run all that hold."""
        if progress < 1 and name in self._said and progress - self._said[name] < _AGAIN:
            return False
        self._said[name] = progress
        return True
