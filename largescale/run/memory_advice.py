"""A training that ran out of memory: finds the setting that would have fitted, by planning a step with it.

What the step held is freed first, and what is free then counts. The planner runs in a separate process, which
has a time limit, and whose failures are ignored. Of several ranks the first that runs out asks it, and the others wait
meanwhile: a launcher ends all ranks once one has gone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from largescale.checkpoint.folder import newest_first
from largescale.config import Config, free_keys, to_yaml
from largescale.distributed import stopping
from largescale.distributed.launch import Launch, own_launch, start_id
from largescale.distributed.out_of_memory import MORE_THREADS, OutOfMemory, is_out_of_memory, line_of_memory
from largescale.distributed.rendezvous import connect
from largescale.parallel import auto_precision
from largescale.run.advice import new_run
from largescale.run.failures import is_lost_rank
from largescale.run.memory import Footprint, footprint, gpu_bytes, host_bytes
from largescale.run.owner import newest_owner
from largescale.run.status import read_status, write_status
from shards.ground.errors import InputError

LIMIT_S = 120.0
"""For the whole search, which takes some seconds on an idle machine; half of it may be time of a processor."""

_AFTER_SIGNAL_S = 20.0
"""What is left of it once a signal asks this rank to end; launchers kill it 30 s after that."""

_POLL_S = 0.2
_RUNS_OUT_WITHIN_S = 3.0
"""A rank that lost another waits so long to hear whether that one is short of memory."""

_ASKING_S = 5.0
_RAN_OUT, _SAID = "ran out", "said what to do"

_OTHERWISE = (
    "lower train.global_batch, raise train.accumulate or set model.recompute_stages; `largescale plan` says "
    "what a step needs with each"
)


@contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Wrap a training, outside its process group: if memory runs out, one rank says what would fit.

    Raises:
        OutOfMemory: it did.
    """
    start = footprint()
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            if is_lost_rank(error) and (launch := own_launch()) is not None:
                with suppress(Exception):
                    _let_first_speak(_store(launch))
            raise
        line = line_of_memory(error)
        _give_back(error)
        try:
            advice = _advice(config, start, on_gpu="cuda" in line.lower(), threads="thread" in line)
        except (Exception, KeyboardInterrupt):
            advice = _OTHERWISE  # the original error must be reported, whatever happens here
        line = f"{line}{'; ' * bool(advice)}{advice}"
        _write_down(Path(config.run.dir), line)
        if advice and (launch := own_launch()) is not None:
            with suppress(Exception):
                _store(launch).set(_SAID, "1")
        raise OutOfMemory(line) from error


def _give_back(error: BaseException | None) -> None:
    """Drop what the failed functions held; their frames live as long as the error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _advice(config: Config, start: Footprint, *, on_gpu: bool, threads: bool) -> str:
    """What to do, in one line; empty on a rank that leaves this to another."""
    launch = own_launch()
    if launch is not None and not _is_first(launch):
        with suppress(Exception):
            _let_first_speak(_store(launch))
        return ""
    ranks, local_ranks = (launch.world_size, launch.local_ranks or launch.world_size) if launch else (1, 1)
    gpus = torch.cuda.is_available()
    if threads:
        return MORE_THREADS
    if gpus and not on_gpu:
        return "this is the host's memory: lower data.workers, data.threads or data.prefetch"
    available = gpu_bytes() if on_gpu else host_bytes(local_ranks, start)
    config = auto_precision.of_device(config, torch.device("cuda" if gpus else "cpu"))
    rows = _search({"config": to_yaml(config), "ranks": ranks, "available": available, "on_gpu": on_gpu})
    return _worded(config, rows, available)


def _is_first(launch: Launch) -> bool:
    """Whether this is the first rank of this start to run out of memory, or none can be asked."""
    try:
        return _store(launch).add(_RAN_OUT, 1) == 1
    except Exception:  # the store is gone, or a signal came meanwhile
        return launch.rank == 0


def _store(launch: Launch) -> dist.Store:
    """Where the ranks of this start tell each other that they ran out, and that one of them has said what to do."""
    return dist.PrefixStore(f"memory/{start_id()}", connect(launch, time.monotonic() + _ASKING_S))


def _let_first_speak(store: dist.Store) -> None:
    """Wait for the rank that ran out first to find its advice, if one has run out and no signal comes."""
    began = time.monotonic()
    while not stopping.asked_for_s() and not store.check([_SAID]):
        limit = LIMIT_S if store.check([_RAN_OUT]) else _RUNS_OUT_WITHIN_S
        if time.monotonic() - began > limit:
            return
        time.sleep(_POLL_S)


def _search(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What the planner wrote in its time (see `plan/what_fits.py`)."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "largescale.plan.what_fits"]
    request = {**request, "cpu_s": int(LIMIT_S / 2)}
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, env=environment) as planner:
        try:
            said = _answer(planner, json.dumps(request).encode())
        finally:
            planner.kill()
    return [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith(b"\n")]


def _answer(planner: subprocess.Popen[bytes], request: bytes) -> bytes:
    """What it has written when it ends, or when its time does."""
    began = time.monotonic()
    given: bytes | None = request
    while True:
        try:
            return planner.communicate(given, timeout=_POLL_S)[0]
        except subprocess.TimeoutExpired as late:
            given = None  # communicate keeps what it has not yet passed on
            if time.monotonic() - began > LIMIT_S or stopping.asked_for_s() > _AFTER_SIGNAL_S:
                return late.stdout or b""


def _worded(config: Config, rows: list[dict[str, Any]], available: int) -> str:
    tried = [row for row in rows if "fits" in row and not row.get("guessed")]
    # A guess is as good as its change is simple, and is there before a step with it is planned.
    guessed = [row for row in rows if row.get("guessed") and all(row["overrides"] != one["overrides"] for one in tried)]
    found = [row for row in tried if row["fits"]] or guessed or tried
    if not found:
        return _OTHERWISE
    best = min(found, key=lambda row: row["needed"])
    overrides = " ".join(best["overrides"])
    about = "about " * bool(best.get("guessed"))
    there = (
        f"`largescale plan` says {about}{_gigabytes(best['needed'])} instead of {_gigabytes(rows[0]['needed'])} GB, "
        f"{_gigabytes(available)} GB are available"
    )
    if not best["fits"]:
        return (
            f"no change tried fits, not even {overrides} ({there}); use more memory, or more ranks with "
            f"parallel.strategy=fsdp"
        )
    may_change = {override.partition("=")[0] for override in best["overrides"]} <= free_keys(config)
    if not may_change and newest_first(Path(config.run.dir) / "checkpoints"):
        overrides = f"{new_run(config)} {overrides}"  # what the saved run computes may not change
    fits = "should fit" if about else "fits"
    return f"run the same command with {overrides}, which {fits} ({there})"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.{1 if size < 1e11 else 0}f}"


def _write_down(run_dir: Path, line: str) -> None:
    """Update the reason in the run's status, which was written before there was advice."""
    with suppress(OSError, InputError):
        row = read_status(run_dir)
        if row and row["state"] == "failed" and line.startswith(str(row.get("reason"))) and not newest_owner(run_dir):
            write_status(run_dir, "failed", row["step"], row["steps"], saved=row.get("saved"), reason=line)
