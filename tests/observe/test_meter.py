from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from largescale.methods.method import Method, Output, Sign
from largescale.observe.meter import Meter
from largescale.processes import rank
from tests.helpers.ranks import run_ranks


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def meter_of(known: list[int | str]) -> Meter:
    method = SimpleNamespace(signs={}, measures=lambda loss, signs, num_images: {})
    return Meter(method, 4, 40, torch.device("cpu"), unread=known)


def counted(meter: Meter, *met: list[int | str], in_phases: Sequence[int] = ()) -> tuple[int, float]:
    """Unreadable images of an interval, and their share, whose steps met these samples and supports."""
    for of_step in met:
        samples, supports = ([one for one in of_step if isinstance(one, kind)] for kind in (int, str))
        batch = SimpleNamespace(substituted=samples, unread_supports=supports, ids=range(4), costs={})
        meter.add(SimpleNamespace(signs={}), SimpleNamespace(loss=0.0, overflow=False), 0.0, batch)
    row = meter.summary(in_phases)
    meter.reset()
    return row["skipped_in_interval"], row["skipped_rate"]


def test_what_is_unreadable_counts_once_and_samples_of_batches_in_every_rate(tmp_path):
    with one_rank(tmp_path):
        found = of_one_rank()
    assert found == [(2, 0), (0, 0), (2, 0.125), (1, 0.5), (1, 0.25)]


def of_one_rank() -> list[tuple[int, float]]:
    meter = meter_of(["a"])
    found = [
        counted(meter, ["a", "b"], ["b"], ["b", "c"]),
        counted(meter, ["a"], ["c"]),
        counted(meter, ["d"], [5]),
        counted(meter, [5, 6], [5, 5]),
        counted(meter, [7], in_phases=[5, 7, 7]),
    ]
    assert meter.unread == {"a", "b", "c", "d", 5, 6, 7}
    return found


def of_a_rank() -> tuple[list[tuple[int, float]], set[int | str]]:
    meter = meter_of([])
    found = [counted(meter, ["a", str(rank())]), counted(meter, [str(1 - rank())]), counted(meter, ["b"][: rank()])]
    found.append(counted(meter, [5], in_phases=[6]))
    return found, meter.unread


@pytest.mark.distributed
def test_what_several_ranks_meet_counts_once():
    for found, known in run_ranks(of_a_rank, 2, timeout_s=600):
        assert found == [(3, 0), (0, 0), (1, 0), (2, 0.25)] and known == {"a", "0", "1", "b", 5, 6}


def summary_of(monkeypatch: pytest.MonkeyPatch, steps: list[dict[str, float]]) -> dict[str, Any]:
    """What is logged of steps that report signs."""
    method = Method()
    method.signs = {"always": Sign(), "late": Sign(), "never": Sign()}
    monkeypatch.setattr("largescale.observe.meter.sum_over_ranks", lambda sums: sums)
    monkeypatch.setattr("largescale.observe.meter.world_size", lambda: 1)
    meter = Meter(method, 16, 200, torch.device("cpu"))
    for signs in steps:
        output = Output(torch.zeros(()), {name: torch.tensor(value) for name, value in signs.items()}, {})
        batch: Any = SimpleNamespace(substituted=[], unread_supports=[], ids=range(16), costs={})
        check: Any = SimpleNamespace(loss=1.0, overflow=False)
        meter.add(output, check, 0.0, batch)
    return meter.summary()


def test_a_sign_is_the_mean_over_the_steps_that_report_it(monkeypatch):
    row = summary_of(monkeypatch, [{"always": 1.0}, {"always": 2.0, "late": 5.0}, {"always": 6.0, "late": 6.0}])
    assert row["always"] == pytest.approx(3) and row["late"] == pytest.approx(5.5) and row["interval_steps"] == 3
    assert "never" not in row
