from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from largescale.run.watchdog import blame, position
from tests.helpers.commands import ROOT


def report(waits: bool, place: str = "data/reader.py:88 in read") -> dict:
    return {"host": "n1", "doing": "step 7: waiting for data", "place": place, "waits": waits}


def test_a_rank_that_does_not_answer_is_named():
    assert blame([report(True), None, None], 60) == (
        "no progress for 60 s: ranks 1, 2 do not answer (stopped, or its machine is gone)"
    )


def test_the_rank_that_others_wait_for_is_named_with_its_place():
    assert blame([report(True), report(False), report(True)], 60) == (
        "no progress for 60 s: the others wait for rank 1 on n1 (step 7: waiting for data, data/reader.py:88 in read)"
    )


def test_all_waiting_alike_are_all_shown():
    assert "no rank is behind: rank 0 on n1" in blame([report(True), report(True)], 5)


def test_a_thread_is_found_at_its_line_outside_of_torch():
    release = threading.Event()

    def stands_here() -> None:
        release.wait()

    thread = threading.Thread(target=stands_here)
    thread.start()
    found = position(thread.ident)
    release.set()
    thread.join()
    assert not found["waits"] and "threading.py" in found["place"]


HANGS = """
import sys, time
from pathlib import Path
from largescale.distributed.stopping import in_steps
from largescale.processes import process_group
from largescale.run.watchdog import Watchdog
folder = Path(sys.argv[1])
with process_group(), in_steps(lambda *_: (folder / "status").open("w")):
    Watchdog(folder, 1.0)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    "answers, why", [(True, "Not a directory"), pytest.param(False, "no answer for 5 s", marks=pytest.mark.slow)]
)
def test_a_run_that_hangs_ends_though_nothing_can_be_written(tmp_path, answers, why):
    folder = tmp_path / "stacks"
    if answers:
        folder.touch()
        folder /= "hangs"
    else:  # to open a pipe that nobody reads is to wait
        folder.mkdir()
        for name in ("rank-00000.txt", "status"):
            os.mkfifo(folder / name)
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, folder], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 86, ended.stderr
    assert "no progress for 1 s" in ended.stderr and f"stacks could not be written to {folder} ({why})" in ended.stderr
