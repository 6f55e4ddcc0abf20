"""What a method calls sick: a sign, the values that alarm, and the words; the doctor judges how the sign moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        remedy: what to do about it, as sentences that name settings; of a line, where it depends on how far the run is.
        meaning: what that looks like, as a clause.
        in_settings: whether the settings alone explain it, so that there is no need to look for a cause.
        by_rate: whether too high a learning rate can bring it about.
        besides_rate: what to try if it was not the rate, as a clause; empty for nothing.
        than_before: whether it counts only where the sign is clearly worse than in some line before.
        too_early: lines at which every run looks so, as while a last layer is fixed.
    """

    diagnosis: str
    sign: Callable[[Row], float | None]
    sick: tuple[float, float]
    recovery: Literal["up", "down"]
    seen: Callable[[Row], str]
    remedy: str | Callable[[Row], str]
    meaning: str = "this looks like collapse"
    in_settings: bool = False
    by_rate: bool = False
    besides_rate: str = ""
    than_before: bool = False
    too_early: Callable[[Row], bool] = lambda row: False

    def shows(self, row: Row) -> bool:
        """Whether a line looks sick."""
        value = None if self.too_early(row) else self.sign(row)
        return value is not None and self.sick[0] <= value <= self.sick[1]

    def worse(self, row: Row, before: Row) -> bool:
        """Whether the sign of a line is clearly worse than that of an earlier one; also if that one lacks it."""
        value, start = self.sign(row), self.sign(before)
        if value is None or start is None:
            return value is not None
        rise = value - start if self.recovery == "down" else start - value
        return rise > _CLEARLY * abs(start)

    def healthiest(self, rows: Sequence[Row]) -> Row:
        """The line whose sign is farthest on the way of recovery; the first one, where no line has it."""
        signs = [(value, row) for row in rows if (value := self.sign(row)) is not None]
        best = min if self.recovery == "down" else max
        return best(signs, key=lambda one: one[0])[1] if signs else rows[0]

    def words(self, row: Row) -> str:
        """What a sick line shows, what it means, and what to do."""
        remedy = self.remedy if isinstance(self.remedy, str) else self.remedy(row)
        return f"{self.seen(row)}: {self.meaning}. {remedy}"
