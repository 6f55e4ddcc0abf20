from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from largescale.methods.method import Method, Output, Sign
from largescale.observe.meter import Meter


def summary_of(monkeypatch: pytest.MonkeyPatch, steps: list[dict[str, float]]) -> dict[str, Any]:
    """What is logged of steps that report signs."""
    method = Method()
    method.signs = {"always": Sign(), "late": Sign(), "never": Sign()}
    monkeypatch.setattr("largescale.observe.meter.sum_over_ranks", lambda sums: sums)
    monkeypatch.setattr("largescale.observe.meter.world_size", lambda: 1)
    meter = Meter(method, 16, 200, torch.device("cpu"))
    for signs in steps:
        output = Output(torch.zeros(()), {name: torch.tensor(value) for name, value in signs.items()}, {})
        batch: Any = SimpleNamespace(substituted=0, ids=range(16), costs={})
        check: Any = SimpleNamespace(loss=1.0, overflow=False)
        meter.add(output, check, 0.0, batch)
    return meter.summary()


def test_a_sign_is_the_mean_over_the_steps_that_report_it(monkeypatch):
    row = summary_of(monkeypatch, [{"always": 1.0}, {"always": 2.0, "late": 5.0}, {"always": 6.0, "late": 6.0}])
    assert row["always"] == pytest.approx(3) and row["late"] == pytest.approx(5.5)
    assert "never" not in row
