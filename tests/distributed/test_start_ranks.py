"""Ranks that fail, crash or are stopped end the launcher with their exit code and at most a line, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from largescale.distributed import start_ranks
from largescale.distributed.start_ranks import main


@pytest.fixture
def started(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], tuple[int, str]]]:
    """Runs lines of the shell as two ranks; the exit code, and what was said without torchrun's own log."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def run(script: str) -> tuple[int, str]:
        (tmp_path / "rank.sh").write_text(script)
        code = main(["--standalone", "--nproc-per-node=2", "--no-python", "bash", str(tmp_path / "rank.sh")])
        said = capfd.readouterr().err.splitlines()
        return code, "\n".join(line for line in said if "torch/distributed/elastic" not in line)

    yield run
    for number, handler in before.items():
        if handler is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, handler)


def test_the_code_of_the_rank_that_failed_first_and_nothing_more(started):
    assert started("if [ $RANK = 1 ]; then exit 85; fi; sleep 1000") == (85, "")
    assert started("exit 0") == (0, "")


@pytest.mark.parametrize(
    "name, why",
    [
        ("KILL", "by hand, or by the kernel because memory ran out: lower data.workers"),
        ("SEGV", "a library crashed; PYTHONFAULTHANDLER=1"),
    ],
)
def test_a_rank_that_is_killed_is_named(started, name, why):
    code, said = started(f"if [ $RANK = 1 ]; then kill -{name} $$; fi; sleep 1000")
    assert code == 128 + signal.Signals[f"SIG{name}"] and said.count("\n") == 0
    assert said.startswith("error: rank 1 (pid ") and f"was killed by SIG{name}; {why}" in said


@pytest.mark.parametrize("ups", [1, 2])
def test_a_signal_to_the_launcher_reaches_the_ranks(started, tmp_path, ups):
    """Whenever it comes: torchrun itself does not know of ranks before it is through with starting them."""

    before = start_ranks._children()

    def stop() -> None:
        while len(list(tmp_path.glob("up-*"))) < ups:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    script = (
        f"trap 'touch {tmp_path}/saved-$RANK; exit 85' TERM; touch {tmp_path}/up-$RANK; while :; do sleep 0.02; done"
    )
    code, said = started(script)
    assert code == 143 and "Traceback" not in said
    up, saved = ({path.name[-1] for path in tmp_path.glob(f"{what}-*")} for what in ("up", "saved"))
    assert len(up) >= ups and up <= saved
    assert start_ranks._children() <= before


def test_another_signal_ends_ranks_that_do_not_heed_the_first(started, tmp_path, monkeypatch):
    """Those that torchrun has forgotten; it has a time limit of its own for those it knows."""
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        before = start_ranks._children()
        script = f"trap '' TERM; touch {tmp_path}/up; while :; do sleep 0.02; done"
        with subprocess.Popen(["bash", "-c", script]) as stubborn:
            while not (tmp_path / "up").exists():
                time.sleep(0.01)
            times = iter([signal.SIGTERM])
            monkeypatch.setattr(start_ranks.time, "sleep", lambda _: os.kill(os.getpid(), next(times, 0)))
            start_ranks._end_forgotten(signal.SIGTERM, before)
            stubborn.wait()
        assert bystander.poll() is None
        bystander.kill()
