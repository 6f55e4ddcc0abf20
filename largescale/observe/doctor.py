"""Says in words when a run looks sick, and what to try; for the console and the report alike.

A method declares symptoms: a sign, the values of it that alarm, and the way that it goes when a run gets better by
itself. They are judged here by the run's own course, as metrics.jsonl has it, not by single lines:

- A run is young until twice its warm-up and a tenth of its steps are done; nothing but its images is judged before.
- A symptom counts if the last lines all show it, for a twentieth of the steps done so far.
- It does not count while its sign recovers: while the line through those values would leave the range that alarms soon.
- Where it counts, causes are looked for that may explain it: images that are all the same, or a learning rate that
  destroyed what was there at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from largescale.config import Config
from largescale.methods import method_class
from largescale.methods.method import Row
from largescale.methods.symptom import Symptom
from largescale.observe.common_symptoms import (
    BY_IMAGES,
    PERHAPS_SAME,
    SAME,
    little_in_common,
    never_told_apart,
    not_told_apart,
)

_YOUNG = 0.1
"""Share of its steps in which a run is young, at least."""
_MOST_YOUNG_STEPS = 5000
"""In long runs a tenth is too long to wait; whatever does not learn anything in so many steps will not."""
_WARMUPS = 2
"""Warm-ups: the second is for what the full learning rate does to signs."""
_FEWEST_LINES = 3
"""That a symptom must last, so that chance is ruled out and there is a line to be drawn through them."""
_LASTING = 0.05
"""Share of the steps so far that a symptom must last."""
_AHEAD = 4
"""A sign recovers if it leaves the range that alarms within so many times the steps that it has been there."""
_SURE = 2.0
"""Standard errors by which its slope must differ from none."""
_MOST_LINES = 1000
"""That are looked at, so that a line costs the same however long the run is. A twentieth of half of them is still many
times as many lines as a symptom must last.
"""


class Diagnosis(NamedTuple):
    """What looks wrong: a name, and what is seen, what it means and what to try, in words."""

    name: str
    words: str

    def __str__(self) -> str:
        return f"{self.name}: {self.words}"


class Doctor:
    """Judges a run line by line, by at most 1,000 of its lines at equal distances and the newest one.

    Args:
        config: of the run; advice starts from its settings.
        rows: lines logged so far, if it continues.
    """

    def __init__(self, config: Config, rows: Iterable[Row] = ()) -> None:
        self._config = config
        self._rows: list[Row] = []
        self._num_lines, self._distance = 0, 1
        for row in rows:
            self._keep(row)

    def look(self, row: Row) -> Diagnosis | None:
        """What looks wrong now that a line of metrics.jsonl is added; None if nothing does."""
        before = self._rows.copy()
        self._keep(row)
        return judge(self._config, [*before, row])

    def _keep(self, row: Row) -> None:
        if "progress" not in row:
            return
        if self._num_lines % self._distance == 0:
            self._rows.append(row)
        if len(self._rows) > _MOST_LINES:
            self._rows, self._distance = self._rows[::2], 2 * self._distance
        self._num_lines += 1


def judge(config: Config, rows: Sequence[Row]) -> Diagnosis | None:
    """What looks wrong with a run after so many lines; None if nothing does, or if it is too early to say.

    Args:
        config: of the run.
        rows: its lines of metrics.jsonl from the first one on. Those without `progress` (the share of its steps that
            are done) were written by another version, and are passed over.
    """
    rows = [row for row in rows if "progress" in row]
    if not rows:
        return None
    if found := next((one for one in BY_IMAGES if _lasts(one, rows)), None):
        return _diagnosis(found, rows[-1])
    if is_young(config, rows[-1]):
        return None
    symptoms = [*method_class(config).symptoms(config), not_told_apart(config)]
    lasting = [one for one in symptoms if _lasts(one, rows) and not _recovers(one, rows)]
    if not lasting:
        return None
    return _explained(lasting[0], config, rows)


def is_young(config: Config, row: Row) -> bool:
    """Whether a run is too young at a line for its method's signs to mean anything: in its warm-up and as long after,
    in the first tenth of its steps, of at most 5,000, and where its method says so.
    """
    progress, done = row["progress"], row.get("step", -1) + 1
    if progress >= 1:
        return False
    if done <= 0 or progress <= 0:
        return bool(progress < _YOUNG)
    epoch = row.get("epoch", math.inf)
    if epoch < method_class(config).young_epochs(config):
        return True
    warmup = config.optim.warmup_epochs * done / epoch
    return bool(done < max(_WARMUPS * warmup, min(_YOUNG * done / progress, _MOST_YOUNG_STEPS)))


def _tail(symptom: Symptom, rows: Sequence[Row]) -> Sequence[Row]:
    """The last lines, as many as show the symptom in succession."""
    start = len(rows)
    while start and symptom.shows(rows[start - 1]):
        start -= 1
    return rows[start:]


def _lasts(symptom: Symptom, rows: Sequence[Row]) -> bool:
    tail = _tail(symptom, rows)
    if len(tail) < _FEWEST_LINES:
        return False
    if symptom.than_before:
        best = symptom.healthiest(rows[: -len(tail)] or rows[:1])
        if not any(symptom.worse(row, best) for row in tail):
            return False
    before = rows[-len(tail) - 1]["progress"] if len(tail) < len(rows) else 0.0
    return bool(rows[-1]["progress"] - before >= _LASTING * rows[-1]["progress"])


def _recovers(symptom: Symptom, rows: Sequence[Row]) -> bool:
    """Whether the line through the last values leaves the range that alarms, in what is left of the run and soon."""
    tail = _tail(symptom, rows)
    at = np.array([row["progress"] for row in tail])
    values = np.array([symptom.sign(row) for row in tail], dtype=float)
    if len(at) < _FEWEST_LINES or np.ptp(at) == 0 or not np.isfinite(values).all():
        return False
    slope, start = np.polyfit(at - at[-1], values, 1)
    left_over = values - start - slope * (at - at[-1])
    error = np.sqrt((left_over**2).sum() / max(1, len(at) - 2) / ((at - at.mean()) ** 2).sum())
    way = -1 if symptom.recovery == "down" else 1
    ahead = min(1 - at[-1], _AHEAD * np.ptp(at))
    end = start + slope * ahead
    leaves = end < symptom.sick[0] if symptom.recovery == "down" else end > symptom.sick[1]
    return bool(way * slope > _SURE * error and leaves)


def _explained(symptom: Symptom, config: Config, rows: Sequence[Row]) -> Diagnosis:
    """With what may have caused it, where the settings do not say."""
    if symptom.in_settings:
        return _diagnosis(symptom, rows[-1])
    by_itself = _by_rate(symptom, config, rows) or _diagnosis(symptom, rows[-1])
    if not little_in_common(rows):
        return by_itself
    if never_told_apart(rows):
        seen = f"{symptom.seen(rows[-1])}, and {SAME.seen(rows[-1])}"
        return Diagnosis(SAME.diagnosis, f"{seen}: {SAME.meaning}. {SAME.remedy}")
    return by_itself._replace(words=f"{by_itself.words}. {PERHAPS_SAME}")


def _by_rate(symptom: Symptom, config: Config, rows: Sequence[Row]) -> Diagnosis | None:
    """That the learning rate may be the cause, where it can be and the run did not begin so."""
    first = next((row for row in rows if symptom.sign(row) is not None), rows[0])  # later where a method has stages
    came_later = not symptom.shows(first) or any(symptom.worse(row, first) for row in _tail(symptom, rows))
    if not (symptom.by_rate and came_later):
        return None
    slower = f"optim.lr={config.optim.lr / 10:.2g} or a longer optim.warmup_epochs"
    otherwise = f"; if it stays, {symptom.besides_rate}" if symptom.besides_rate else ""
    return Diagnosis(
        "learning rate too high",
        f"{symptom.seen(rows[-1])}, which was not so at first: {symptom.meaning}, which a learning rate of "
        f"{config.optim.lr:g} may have brought about. Try, in another run.dir, {slower}{otherwise}",
    )


def _diagnosis(symptom: Symptom, row: Row) -> Diagnosis:
    return Diagnosis(symptom.diagnosis, symptom.words(row))
