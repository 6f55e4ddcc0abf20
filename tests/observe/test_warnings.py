"""A warning that lasts is said when it is new, after each tenth of the run, and at the end."""

from __future__ import annotations

import logging
import re

from largescale.config import load_config
from largescale.observe.warnings import Warnings
from tests.helpers.commands import ROOT

CONFIG = load_config(ROOT / "tests/tiny.yaml", ["data.shards=unused"])
SLOW = {"data_wait_s": 0.05, "step_s": 0.1, "augment_s": 0.0, "read_ms": 0.2, "decode_ms": 3.0, "crop_ms": 1.0}
QUICK = {**SLOW, "data_wait_s": 0.0}
COLLAPSED = {"loss_over_ln_k": 1.0, "assignment_entropy": 1.0}


def said(caplog, rows: list[dict]) -> list[tuple[int, str]]:
    """Steps and first words of what is logged of the rows, which are a whole run."""
    caplog.set_level(logging.WARNING)
    warnings = Warnings(CONFIG)
    for step, row in enumerate(rows):
        line = {"step": step, "progress": (step + 1) / len(rows), "epoch": 100.0, **row}
        warnings.say(line, (2, 4), starting=False)
    found = [re.match(r"step (\d+): (\w+)", message) for message in caplog.messages]
    return [(int(one[1]), one[2]) for one in found]


def test_a_lasting_warning_is_said_about_ten_times_in_a_run_of_any_length(caplog):
    for lines in (50, 1000):
        caplog.clear()
        steps = [step for step, _ in said(caplog, [SLOW] * lines)]
        assert steps[0] == 0 and steps[-1] == lines - 1 and 10 <= len(steps) <= 12


def test_each_warning_goes_by_itself_and_one_that_comes_and_goes_is_not_new_each_time(caplog):
    told = said(caplog, [{**(SLOW if step % 2 else QUICK), **COLLAPSED} for step in range(100)])
    steps = {word: [step for step, one in told if one == word] for word in ("the", "uniform")}
    assert sum(len(one) for one in steps.values()) == len(told)
    assert all(8 <= len(one) <= 12 and one[-1] == 99 for one in steps.values())
