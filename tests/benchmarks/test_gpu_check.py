"""The check of a GPU, where there is none: every case runs here, and whatever a case does, the next one runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, run_python

sys.path.append(str(ROOT / "benchmarks"))

from gpu import harness
from gpu.cases import CASES, CORRECTNESS
from gpu.harness import Case, Context, Progress, Row
from gpu.page import Page, markdown

from tests.benchmarks.interrupted import FACTS


def case(name: str, limit_s: float = 60.0, **options: float) -> Case:
    return Case("One", name, f"tests.benchmarks.cases:{name}", limit_s, **options)


def run(cases: list[Case], folder: Path, minutes: float = 1.0) -> tuple[list[Row], list[Progress]]:
    published: list[Progress] = []
    rows = harness.run(
        cases,
        Context("cpu", False, str(folder), str(folder)),
        minutes,
        lambda progress: published.append(
            Progress(list(progress.rows), dict(progress.seconds), list(progress.to_come))
        ),
        lambda line: None,
    )
    return rows, published


def gone(pid: int) -> bool:
    """A process that has ended; one that nobody has waited for yet has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def nothing_preloaded(monkeypatch):
    monkeypatch.setattr(harness, "PRELOAD", [])


def test_whatever_a_case_does_the_next_one_runs(tmp_path):
    cases = [
        case("raises"),
        case("aborts"),
        case("killed"),
        case("hangs", 1.5),
        case("lacks_a_library"),
        case("silent"),
        Case("One", "missing", "gpu.no_such_module:x", 60),
        case("fine"),
    ]
    rows, published = run(cases, tmp_path)
    found = {(row.table, row.what): (row.status, row.reason) for row in rows}
    assert found["raises", "raises"] == ("failed", "ValueError: a wrong value")
    status, reason = found["aborts", "aborts"]
    assert status == "failed" and reason.startswith("ended by SIGABRT: Fatal")
    assert found["killed", "killed"] == ("failed", "ended by SIGKILL: it said nothing")
    assert found["hangs", "hangs"] == ("failed", "ended at its limit of 2 s")
    assert found["lacks_a_library", "lacks_a_library"] == ("not installed", "no_such_library")
    assert found["silent", "silent"] == ("failed", "it reported nothing")
    assert found["missing", "missing"][0] == "failed" and "no_such_module" in found["missing", "missing"][1]
    assert found["fine", "a number"] == ("measured", "") and found["fine", "a truth"] == ("ok", "")
    assert all(found[name, "what came before"][0] == "measured" for name in ("raises", "aborts", "hangs"))
    pid = int((tmp_path / "child").read_text())
    wait_for(lambda: gone(pid))
    assert [len(progress.to_come) for progress in published] == list(range(len(cases), -1, -1))
    assert [len(progress.seconds) for progress in published] == list(range(len(cases) + 1))


def test_what_does_not_fit_into_the_time_is_left_out_and_what_is_short_still_runs(tmp_path):
    cases = [case("hangs", 600, worth_s=0.5), case("fine", 600), case("fine", 600, worth_s=1e-9)]
    rows, _ = run(cases, tmp_path, minutes=2 / 60)
    assert [(row.what, row.status) for row in rows] == [
        ("what came before", "measured"),
        ("hangs", "failed"),
        ("fine", "left out"),
        ("fine", "left out"),
    ]
    assert rows[1].reason == "ended at its limit of 2 s" and rows[2].reason == "no time left"


def test_the_page_is_whole_when_the_run_is_killed(tmp_path):
    driver = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.interrupted", str(tmp_path)], cwd=ROOT)
    try:
        wait_for((tmp_path / "child").exists)
        wait_for(lambda: (tmp_path / "child").read_text() != "")
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    content = json.loads((tmp_path / "gpu_check_x.json").read_text())
    assert [row["what"] for row in content["rows"]] == ["a number", "a truth"]
    page = (tmp_path / "gpu_check_x.md").read_text()
    assert "**Not all of it**: 2 cases had not run when this was written: One: hangs; One: silent." in page
    assert "| a number | 0.5 | measured |" in page
    assert not list(tmp_path.glob(".*.writing"))
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_the_page_says_what_failed_and_breaks_no_table(tmp_path):
    cells = {"first_column": 1e-7, "n": 12345}
    rows = [Row("One", "T", "T", "a|b", "failed", "c | d", cells), Row("One", "T", "T", "e", "ok")]
    Page(tmp_path, FACTS, ["x"], 8.0).write(Progress(rows, {"One: T": 1.0}, []))
    page = (tmp_path / "gpu_check_x.md").read_text()
    assert "1 ok, 1 failed" in page and "- One, T, a|b: c | d" in page
    assert "| what | first column | n | result |" in page
    assert "| a/b | 1.00e-07 | 12,345 | failed: c / d |" in page and "| e |  |  | ok |" in page
    assert "Not all of it" not in page


def test_what_an_earlier_run_found_of_other_cases_stays(tmp_path):
    def write(command: str, names: str, keep: str) -> str:
        rows = [Row("One", name, "T", f"{name} of {command}", "ok") for name in names]
        kept = [Case("One", name, "x:y", 60) for name in keep]
        page = Page(tmp_path, {**FACTS, "revision": command}, [command], 8.0, keep=kept)
        page.write(Progress(rows, {f"One: {name}": 1.0 for name in names}, []))
        return (tmp_path / "gpu_check_x.md").read_text()

    write("first", "abc", "")
    write("second", "b", "acd")
    page = write("third", "c", "abd")
    assert [line for line in page.splitlines() if line.startswith("| ")][1:] == [
        "| c of third | ok |",
        "| a of first | ok |",
        "| b of second | ok |",
    ]
    assert "revision first): a.\n" in page and "revision second): b.\n" in page
    assert "of first" not in write("fourth", "abc", "")


def test_what_failed_has_said_is_kept(tmp_path):
    run([case("fine"), case("raises")], tmp_path)
    said = (tmp_path / harness.FAILURES).read_text()
    assert "=== One: raises\n" in said and "One: fine" not in said and "Traceback" in said
    run([case("fine")], tmp_path)
    assert not (tmp_path / harness.FAILURES).exists()


@pytest.mark.slow
def test_every_case_runs_on_a_cpu(tmp_path):
    result = run_python(
        ROOT / "benchmarks" / "gpu_check.py",
        "--device",
        "cpu",
        "--small",
        "--out",
        tmp_path,
        "--minutes",
        25,
        timeout_s=1500,
    )
    content = json.loads((tmp_path / "gpu_check_cpu.json").read_text())
    rows = [Row(**row) for row in content["rows"]]
    assert [
        f"{row.table}, {row.what}: {row.reason}"
        for row in rows
        if row.status in ("failed", "left out") and "compile" not in row.what
    ] == []
    assert content["to_come"] == [] and list(content["seconds_of_cases"]) == [f"{c.section}: {c.name}" for c in CASES]
    assert len([row for row in rows if row.status == "needs a GPU"]) <= 8
    assert len([row for row in rows if row.section == CORRECTNESS and row.status == "ok"]) >= 40
    assert (tmp_path / "gpu_check_cpu.md").read_text() == markdown(content, rows)
    assert (tmp_path / "gpu_check_cpu.trace.json.gz").stat().st_size > 1000
    assert "0 of Correctness failed" in result.stdout
