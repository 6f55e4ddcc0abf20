from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from largescale.observe.metrics import MetricsLog, forget_from, read_lines


def write(run: Path, first: int, last: int, shift: float = 0.0) -> None:
    log = MetricsLog(run, first)
    for step in range(first, last):
        log.write({"step": step, "loss": step + shift})
    log.close()


def test_a_resumed_run_has_every_step_once_and_the_later_values(tmp_path):
    write(tmp_path, 0, 8, shift=0.5)
    forget_from(tmp_path, 5)
    write(tmp_path, 5, 10)
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(10))
    assert [row["loss"] for row in rows] == [0.5, 1.5, 2.5, 3.5, 4.5, 5, 6, 7, 8, 9]


def test_tensorboard_has_the_same_scalars(tmp_path):
    write(tmp_path, 0, 8, shift=0.5)
    forget_from(tmp_path, 5)
    write(tmp_path, 5, 10)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == {
        row["step"]: row["loss"] for row in read_lines(tmp_path / "metrics.jsonl")
    }


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "audit" / "rank-00000.jsonl"
    path.parent.mkdir()
    whole = json.dumps({"step": 0, "keys": ["a"]}).encode()
    path.write_bytes(b'7\n{}\n\xff\xfe\n{"step": "a"}\n' + whole + b'\n{"step": 1, "ke')
    forget_from(tmp_path, 5)
    assert read_lines(path) == [{"step": 0, "keys": ["a"]}]
