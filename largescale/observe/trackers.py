"""Experiment trackers: Weights & Biases and MLflow get what metrics.jsonl gets.

metrics.jsonl is the truth, trackers are sinks: a thread sends to them, and whatever goes wrong there (no server, no
login, a full disk) is one warning, never the end of a run or a wait. Where they send to is up to their own environment
variables: WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on. A resumed run goes on
in the tracker's run that `trackers.json` in its folder names.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from shards.ground.errors import InputError, line_of
from shards.ground.files import atomic_write

FILE = "trackers.json"
MAX_WAITING = 1000
"""Logged steps that may wait for a slow tracker; those beyond are left out of it."""
END_S = 20.0
"""Seconds that a run waits at its end for a tracker to take what it has not yet sent."""
STOP_S = 5.0
"""The same where it stops or fails, whose time may be short."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()


class Session(Protocol):
    """A run in a tracker; `run_id` finds it again."""

    run_id: str

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Send the scalars of a step."""

    def close(self, *, whole: bool) -> None:
        """Send what is left, and say whether the run came to its end."""


class WandbSession:
    """A run of Weights & Biases, in `RUN/wandb` first; with WANDB_MODE=offline only there, for `wandb sync`."""

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], run_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else "largescale",
            dir=str(run_dir),
            name=name,
            config=config,
            id=run_id or None,
            resume="allow" if run_id else None,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        self.run_id = str(self._run.id)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Send the scalars of a step; those that the tracker has from before a resume stay as they are there."""
        self._run.log(scalars, step=step)

    def close(self, *, whole: bool) -> None:
        """Send what is left; a run that stopped is marked as failed until it goes on."""
        self._run.finish(exit_code=0 if whole else 1)


class MlflowSession:
    """A run of MLflow, on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], run_id: str) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        self.run_id = run_id or self._new(name)
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
        else:
            params = [Param(key, str(value)[:500]) for key, value in config.items()]
            for first in range(0, len(params), 100):  # the most that a call takes
                self._client.log_batch(self.run_id, params=params[first : first + 100])

    def _new(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "largescale")
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        return str(self._client.create_run(number, run_name=name).info.run_id)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Send the scalars of a step."""
        now = int(1000 * time.time())
        metrics = [self._metric(key, value, now, step) for key, value in scalars.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, *, whole: bool) -> None:
        """Say that the run has ended; one that stopped is marked as killed until it goes on."""
        self._client.set_terminated(self.run_id, status="FINISHED" if whole else "KILLED")


SESSIONS: dict[str, Callable[[Path, str, dict[str, Any], str], Session]] = {
    "wandb": WandbSession,
    "mlflow": MlflowSession,
}
"""Each takes the run's folder, its name, its settings by key, and the id of an earlier session (or nothing)."""


def require(names: Sequence[str]) -> None:
    """Check that trackers can be used at all.

    Raises:
        InputError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"run.trackers={name}: not installed; run `pip install 'largescale[{name}]'`")


class Tracker:
    """Sends to one tracker, in a thread.

    Args:
        name: of SESSIONS.
        run_dir: folder of the run.
        run_name: what the run is called there.
        config: settings by key.
    """

    def __init__(self, name: str, run_dir: Path, run_name: str, config: dict[str, Any]) -> None:
        self._name, self._run_dir, self._open = name, run_dir, (run_name, config)
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._failed, self._whole = False, True
        # A daemon: one that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Send the scalars of one step, soon; returns at once."""
        row = {key: value for key, value in scalars.items() if math.isfinite(value)}
        if self._failed:
            return
        try:
            self._rows.put_nowait((step, row))
        except queue.Full:
            self._give_up(f"{MAX_WAITING} logged steps wait to be sent")

    def close(self, *, whole: bool = True) -> None:
        """Wait until everything is sent, for at most END_S; for STOP_S where the run has not come to its end."""
        limit = END_S if whole else STOP_S
        ends, self._whole = time.monotonic() + limit, whole
        if not self._failed:
            self._put_end(limit)
        self._thread.join(max(0.0, ends - time.monotonic()) if not self._failed else 0)
        if self._thread.is_alive() and not self._failed:
            self._give_up(f"did not take everything within {limit:.0f} s of the end")

    def _put_end(self, limit: float) -> None:
        try:
            self._rows.put(None, timeout=limit)
        except queue.Full:
            self._give_up("does not take what waits for it")

    def _work(self) -> None:
        try:
            session = SESSIONS[self._name](self._run_dir, *self._open, self._known_id())
            self._keep_id(session.run_id)
            while (row := self._rows.get()) is not None:
                session.log(*row)
            session.close(whole=self._whole)
        except BaseException as error:  # SystemExit too: a client must not end a thread without a word
            self._give_up(line_of(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            first = " ".join(why.split())[:300]
            _log.warning("%s: %s; nothing more is sent there, metrics.jsonl has everything", self._name, first)

    def _known_id(self) -> str:
        return str(_ids(self._run_dir).get(self._name, ""))

    def _keep_id(self, run_id: str) -> None:
        with _lock:
            ids = {**_ids(self._run_dir), self._name: run_id}
            with atomic_write(self._run_dir / FILE) as file:
                file.write((json.dumps(ids) + "\n").encode())


def _ids(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / FILE).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
