from __future__ import annotations

import errno
import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from largescale.observe.metrics import JsonLines, MetricsLog, read_lines
from largescale.observe.records import MAX_WAITING


@contextmanager
def file_size_limit(num_bytes: int):
    """No file of this process grows beyond, as on a full disk; the interpreter ignores the signal that goes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_has_no_room_for_is_written_when_it_has(tmp_path, caplog):
    log = JsonLines(tmp_path / "audit.jsonl")
    with file_size_limit(1000):
        for step in range(60):
            log.write({"step": step, "keys": ["a" * 20]})
            # Whole lines only, at any moment.
            lines = (tmp_path / "audit.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(min(step + 1, 21)))
    for step in range(60, 62):
        log.write({"step": step, "keys": ["a" * 20]})
    log.close()
    assert [row["step"] for row in read_lines(tmp_path / "audit.jsonl")] == list(range(62))
    assert [record.message.split(";")[0] for record in caplog.records] == [f"{tmp_path}/audit.jsonl: File too large"]


def test_a_file_that_a_full_disk_has_no_room_for_comes_when_it_has(tmp_path, monkeypatch):
    opens, full = Path.open, [True]

    def no_room(path: Path, *arguments: object, **more: object) -> object:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opens(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", no_room)
    log = JsonLines(tmp_path / "skipped" / "rank-0.jsonl")
    log.write({"step": 0})
    full.clear()
    log.write({"step": 1})
    log.close()
    assert read_lines(tmp_path / "skipped" / "rank-0.jsonl") == [{"step": 0}, {"step": 1}]
    full.append(True)
    JsonLines(tmp_path / "other.jsonl").close()  # nothing is lost
    unwritten = JsonLines(tmp_path / "other.jsonl")
    unwritten.write({"step": 0})
    with pytest.raises(OSError, match="No space left") as lost:
        unwritten.close()
    assert lost.value.filename == str(tmp_path / "other.jsonl")


def test_a_disk_that_stays_full_ends_the_run_and_names_the_file(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 0, "loss": 1.0})
    with file_size_limit((tmp_path / "metrics.jsonl").stat().st_size):
        for step in range(1, MAX_WAITING):
            log.write({"step": step, "loss": 1.0})
        with pytest.raises(OSError, match="in a row") as caught:
            log.write({"step": MAX_WAITING, "loss": 1.0})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl") and caught.value.errno == errno.EFBIG
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [0]
