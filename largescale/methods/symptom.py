"""What a method calls sick: a sign, the values that alarm, and the words; the doctor judges how the sign moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
"""A line of metrics.jsonl."""

_CLEARLY = 0.05
"""Share by which a sign must differ from that of the first line."""


@dataclass(frozen=True)
class Symptom:
    """One way in which a run looks sick.

    Attributes:
        diagnosis: its name, a few words.
        sign: the value of a line that tells; None where the line lacks it, or other values of it say that all is well.
        sick: smallest and largest value that alarm.
        recovery: the way that the sign goes when a run gets better by itself.
        seen: what a line shows, as a clause.
        remedy: what to do about it, as sentences that name settings.
        meaning: what that looks like, as a clause.
        in_settings: whether the settings alone explain it, so that there is no need to look for a cause.
        by_rate: whether too high a learning rate can bring it about.
        than_first: whether it counts only where the sign is worse than in the run's first line.
        since_epoch: before it, every run looks so, as while a last layer is fixed.
    """

    diagnosis: str
    sign: Callable[[Row], float | None]
    sick: tuple[float, float]
    recovery: Literal["up", "down"]
    seen: Callable[[Row], str]
    remedy: str
    meaning: str = "this looks like collapse"
    in_settings: bool = False
    by_rate: bool = False
    than_first: bool = False
    since_epoch: float = 0.0

    def shows(self, row: Row) -> bool:
        """Whether a line looks sick."""
        value = self.sign(row) if row.get("epoch", math.inf) >= self.since_epoch else None
        return value is not None and self.sick[0] <= value <= self.sick[1]

    def worse(self, row: Row, first: Row) -> bool:
        """Whether the sign of a line is clearly worse than that of the run's first one; also if that one lacks it."""
        value, start = self.sign(row), self.sign(first)
        if value is None or start is None:
            return value is not None
        return value > (1 + _CLEARLY) * start if self.recovery == "down" else value < (1 - _CLEARLY) * start

    def words(self, row: Row) -> str:
        """What a sick line shows, what it means, and what to do."""
        return f"{self.seen(row)}: {self.meaning}. {self.remedy}"
