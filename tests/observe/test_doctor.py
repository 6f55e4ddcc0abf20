"""The doctor on recorded runs, at every moment of each: `benchmarks/doctor.py` trained those of
`benchmarks/doctor_cases.py`.

Covers: largescale/observe/common_symptoms.py, largescale/methods/symptom.py
"""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.doctor import healthy, not_recorded, recording
from benchmarks.doctor_cases import FULL_LENGTH, HEALTHY, SICK
from largescale.methods.symptom import Symptom
from largescale.observe.doctor import Diagnosis, Doctor, judge


@cache
def said(name: str) -> list[Diagnosis | None]:
    """What the doctor says after each line of a recorded run."""
    config, rows = recording(name)
    return [judge(config, rows[: number + 1]) for number in range(len(rows))]


@pytest.mark.parametrize("name", healthy())
def test_no_false_alarm_at_any_moment_of_a_run_that_goes_well(name):
    assert not any(said(name))


@pytest.mark.parametrize("name", [name for name, case in SICK.items() if not case.missed])
def test_a_sick_run_is_diagnosed_and_nothing_else_is_said_of_it(name):
    case, found = SICK[name], [one for one in said(name) if one]
    assert case.diagnosis in {one.name for one in found}
    assert {one.name for one in found} <= {case.diagnosis, *case.also}
    words = next(one.words for one in found if one.name == case.diagnosis)
    assert case.remedy in words and ("=" in words or "data." in words)


def test_there_are_enough_runs_of_each_kind():
    assert len(SICK) >= 12 and len(healthy()) >= 20
    assert set(healthy()) == {*HEALTHY, *FULL_LENGTH}
    assert not not_recorded()
    assert len({case.diagnosis for case in SICK.values() if case.held_out}) >= 9


def test_a_run_that_continues_is_judged_by_the_lines_of_before():
    config, rows = recording("swav-epsilon-5")
    told = Doctor(config, rows[:-1]).look(rows[-1])
    assert told == said("swav-epsilon-5")[-1] and str(told).startswith("uniform codes: assignments are nearly uniform")
    assert Doctor(config).look(rows[-1]) is None  # a single line says nothing


VALUES = Symptom("low", lambda row: row.get("value"), (0, 1), "up", lambda row: "low", "Try optim.lr=1")


@pytest.mark.parametrize(
    "values, alarm",
    [
        ([0.5] * 10, True),
        ([2.0] * 5 + [0.5] * 5, True),
        ([2.0] * 8 + [0.5] * 2, False),  # two lines may be chance
        ([0.1 * number for number in range(1, 10)], False),  # it recovers, and leaves the range soon
        ([0.5 + 0.001 * number for number in range(10)], True),  # not within the run
        ([0.5, 0.6, 0.4, 0.7, 0.3, 0.6, 0.5, 0.4, 0.6, 0.5], True),  # chance has no slope
        ([0.9 - 0.05 * number for number in range(10)], True),  # it gets worse
        ([0.5] * 9 + [1.5], False),
    ],
)
def test_a_symptom_counts_while_it_lasts_and_does_not_recover(monkeypatch, values, alarm):
    config, _ = recording("swav-epsilon-5")
    monkeypatch.setattr(type(config.method), "counts", property(lambda self: [100]))
    monkeypatch.setattr("largescale.methods.swav.method.SwAV.symptoms", classmethod(lambda cls, config: [VALUES]))
    lines = [{"progress": 0.5 + 0.02 * place, "value": value} for place, value in enumerate(values)]
    assert bool(judge(config, lines)) == alarm
