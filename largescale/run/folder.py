"""The folder of a run: what is written where, and how a run finds itself again.

    config.yaml          fully resolved; running it again repeats the run
    environment.json     versions, git revision, devices
    metrics.jsonl        one object per logged step
    tensorboard/         the same scalars
    trackers.json        with run.trackers: ids of the run there; wandb/ is what W&B keeps here
    audit/rank-*.jsonl   with data.audit=true: the keys that each rank trained on, step by step
    skipped/rank-*.jsonl unreadable images: step, shard, key, offset, reason
    init.json            with init_from or model.weights: what it started from
    checkpoints/         see checkpoint/folder.py
    status.json          running, stopped, failed (and why) or complete, and the steps done; run/status.py reads it
    owner-*.json         while a training runs: which process it is, see run/lease.py
    rollbacks.jsonl      when the run went back to a checkpoint, and what data it left out
    trouble/step-*/      of a step that could not be used: keys and evidence, one file per rank
    stacks/              where every rank stood when the run hung
    former-1/            what a former run left here, whose checkpoints are gone

This class knows where things are and in which order a start, a rollback and an end go; what it holds does the work:
`resume` (is the checkpoint ours), `saving` (the protocol of a save), `logs`, `status_file`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from largescale.checkpoint.folder import Checkpoint, clear_leftovers
from largescale.checkpoint.mirror import Mirror
from largescale.config import Config, flatten, to_yaml
from largescale.data import order
from largescale.data.loaded import Batch
from largescale.distributed.stopping import StoppedInOrder
from largescale.methods.method import Output
from largescale.observe import trackers
from largescale.observe.metrics import METRICS, forget_from, read_lines
from largescale.observe.spikes import SpikeState, spike_state
from largescale.parallel.engine import Engine
from largescale.processes import barrier, collective_timeout, on_rank_0, rank, world_size
from largescale.run import init_from, resume
from largescale.run.advice import after_bad_step
from largescale.run.environment import environment
from largescale.run.failures import TrainingStopped
from largescale.run.first_weights import first_weights
from largescale.run.former import set_aside_former
from largescale.run.lease import Lease
from largescale.run.logs import Logs, write_text
from largescale.run.masked import take_mask
from largescale.run.rollback import Rollbacks
from largescale.run.same_run import other_run
from largescale.run.saving import Saving
from largescale.run.status import COMPLETE
from largescale.run.status_file import StatusFile
from largescale.run.watchdog import Watchdog
from shards.ground.files import remove_partial_files

_log = logging.getLogger(__name__)

_LINGER_S = 20.0
"""Time that a save under way has to be published when the steps end with an error."""


class RunFolder:
    """Reads and writes the folder of one run, on all ranks. Collectives: every rank must make one; gloo groups."""

    def __init__(self, config: Config, fingerprint: str, device: torch.device, lease: Lease) -> None:
        self.config, self.path = config, Path(config.run.dir)
        self.checkpoints = self.path / "checkpoints"
        self.rollbacks, self.logs, self.status = Rollbacks(self.path), Logs(self.path), StatusFile(self.path, lease)
        url, is_other = config.checkpoint.mirror, partial(other_run, config=config, fingerprint=fingerprint)
        self._mirror = Mirror(url, other_run=is_other) if url else None
        self.saving = Saving(
            config.checkpoint,
            self.checkpoints,
            lease=lease,
            device=device,
            mirror=self._mirror,
            published=self.status.saved,
            timeout=collective_timeout(config.run.hang_timeout_s),
        )
        self._fingerprint, self._device, self._lease = fingerprint, device, lease
        self._init: dict[str, Any] = {}
        self._mask: dict[str, Any] = {}
        self._resumed: Checkpoint | None = None

    def resume(self, engine: Engine) -> tuple[int, int, SpikeState | None]:
        """Load the newest whole checkpoint into the engine, or for a new run the weights that it starts from.

        Returns:
            The first step to do, the number of unreadable images so far, the state of the spike watch; zeros and
            None for a new run.

        Raises:
            InputError: the checkpoint belongs to another configuration or other shards, or all are damaged.

        Collectives: every rank must call it.
        """
        if rank() == 0:
            clear_leftovers(self.checkpoints)
        checkpoint = self._resumed = resume.newest_checkpoint(self.checkpoints, self._mirror, self._device)
        if checkpoint is None:
            self._init = first_weights(engine, self.config, self._device)
            self._mask = take_mask(engine, self.config, None)
            return 0, 0, None
        resume.check_same_run(checkpoint, self.config, self._fingerprint)
        resume.warn_of_changes(checkpoint, self.config)
        resume.load(checkpoint, engine)
        self.status.resumed(checkpoint.step)
        self._init = checkpoint.progress.get("init", {})
        self._mask = take_mask(engine, self.config, checkpoint.progress.get("mask", {}))
        # Earlier versions counted an unreadable image each time that it was drawn, and kept no list of them.
        skipped = checkpoint.progress["skipped"] if "unread" in checkpoint.progress else len(self.unread)
        return checkpoint.step, int(skipped), spike_state(checkpoint.progress["spikes"])

    @property
    def unread(self) -> list[int | str]:
        """Unreadable samples and supports that the run had counted when its checkpoint was saved, as of `Meter`."""
        progress = self._resumed.progress if self._resumed else {}
        return list(progress.get("unread", progress.get("unread_supports", [])))

    def open_logs(self, first_step: int) -> None:
        """Drop what a dead process logged beyond the checkpoint, and open the logs. Collectives: two barriers."""
        barrier()  # all ranks have compared their configuration with that of the checkpoint
        on_rank_0(partial(trackers.require, self.config.run.trackers))
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.path / "audit", self.path / "skipped"):
                remove_partial_files(folder)
            if self._resumed is None:
                set_aside_former(self.path, self.config)
            else:
                self.rollbacks.settle(self._resumed)
            forget_from(self.path, first_step)
            self.record_configuration()
            write_text(self.path / init_from.FILE, json.dumps(self._init, indent=1) + "\n" if self._init else "")
            write_text(self.path / "environment.json", json.dumps(environment(), indent=1) + "\n")
        barrier()
        if self._resumed is not None:
            self.saving.begin_copies()  # what former starts could not copy
        self.logs.open(first_step, self.config, self.unread)

    def logged(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that former starts left; read on rank 0, none on others."""
        path = self.path / METRICS
        return read_lines(path) if rank() == 0 and path.exists() else []

    def record_configuration(self) -> None:
        """Write `config.yaml`, on rank 0; for a run that is complete what may still change (say `data.eval_shards`)."""
        if rank() == 0:
            write_text(self.path / "config.yaml", to_yaml(self.config))

    @contextmanager
    def watched(self) -> Iterator[Watchdog]:
        """A watchdog over the training thread. However the steps end, the logs are closed behind them."""
        watchdog = Watchdog(self.path / "stacks", self.config.run.hang_timeout_s)
        with self.logs.closed_after():
            try:
                yield watchdog
            except Exception:
                self.saving.linger(_LINGER_S)
                raise
            finally:
                watchdog.close()

    def record_batch(self, step: int, batch: Batch) -> None:
        """Note that a step is done, what this rank trained on in it (with data.audit) and what it could not read."""
        self._lease.check()
        self.status.done = self._lease.step = step + 1
        self.logs.batch(step, batch)

    def record_metrics(self, row: dict[str, Any]) -> None:
        """Write one logged step, on rank 0."""
        self._lease.check()
        self.logs.metrics({**row, "save_s": self.saving.take_seconds()})

    def save(
        self,
        engine: Engine,
        done: int,
        num_skipped: int,
        spikes: SpikeState,
        unread: Iterable[int | str],
        *,
        final: bool,
    ) -> None:
        """Begin to save a checkpoint after `done` steps; with `final` also end it. See saving.py.

        Raises:
            TrainingStopped: with `final`, or after too many failures in a row.

        Collectives: every rank must call it.
        """
        progress = {
            "step": done,
            "skipped": num_skipped,
            "unread": sorted(unread, key=str),
            "spikes": spikes,
            "data": self._fingerprint,
            "order": order.VERSION,
            "rollbacks": self.rollbacks.rows(),
            "world_size": world_size(),
            "config": flatten(self.config),
            "strategy": self.config.parallel.strategy,
            "init": self._init,
            "mask": self._mask,
        }
        self.saving.save(engine, progress, final=final)

    def stop_or_go_back(
        self, step: int, batch: Batch, output: Output, trouble: str, *, rates: np.ndarray, beat: Callable[[str], None]
    ) -> None:
        """After a step that cannot be used: write what it takes to look into it, and leave out its data if possible.

        Returns where the run is to go back to its last checkpoint. `beat` is told while that is copied.

        Raises:
            TrainingStopped: the run may not go back; says what works from here.

        Collectives: every rank must call it; the agreement on a checkpoint, and barriers.
        """
        self.saving.settle()
        self.logs.trouble(step, batch, output, trouble)
        if self._goes_back(step, batch, trouble):
            if complaint := self.saving.insist_on_copies(lambda: beat(f"step {step}: copying what is left out")):
                _log.warning("%s; going back without a copy of what is left out", complaint)
            return
        way_on = after_bad_step(
            self.config,
            step=step,
            trouble=trouble,
            rates=rates,
            checkpoints=self.checkpoints,
            num_rollbacks=len(self.rollbacks.rows()),
        )
        raise TrainingStopped(f"step {step}: {trouble}; stopped before that update. {way_on}")

    def stop_in_phase(self, step: int, num_steps: int, why: str) -> None:
        """End a run in the phase before a step; the checkpoint of that step, if it is not the first, is there.

        Raises:
            StoppedInOrder: always.
            TrainingStopped: that checkpoint could not be saved.

        Collectives: those of `end`.
        """
        self.saving.settle(final=True)
        self.end("stopped", step, num_steps)
        raise StoppedInOrder(f"stopped in the phase before step {step} {why}; the same command begins it again")

    def end(self, state: str, step: int, num_steps: int) -> None:
        """Say in `status.json` that the run is stopped or complete, and bring its mirror up to date.

        Raises:
            TrainingStopped: it is complete, but the mirror lacks a checkpoint.

        Collectives: every rank must call it; the copier's.
        """
        if state != COMPLETE or not self.saving.has_mirror:
            self.status.set(state, step, num_steps)
            self.saving.wait_copies(self.config.run.stop_before_s / 4)  # the save before has had a part of that time
            return
        if complaint := self.saving.insist_on_copies():
            self.status.set("not copied", step, num_steps, reason=complaint)
            raise TrainingStopped(
                f"{self.path}: all {num_steps} steps are done and saved, but not copied to the mirror. {complaint}. "
                f"Fix that and run the same command again to copy what is missing"
            )
        self.status.set(state, step, num_steps)

    def _goes_back(self, step: int, batch: Batch, trouble: str) -> bool:
        """Leave out the data that led to a bad step, if the run may still do so; True if the run is to go back."""
        number = self.rollbacks.number() + 1
        if number > self.config.train.max_rollbacks:
            return False
        checkpoint = resume.newest_checkpoint(self.checkpoints, self._mirror, self._device)
        if checkpoint is None:
            return False
        _log.warning(
            "step %d: %s; going back to step %d, %d of at most %d times",
            step,
            trouble,
            checkpoint.step,
            number,
            self.config.train.max_rollbacks,
        )
        barrier()  # all ranks have counted
        if rank() == 0:
            self._lease.verify()
            self.rollbacks.record(
                checkpoint, step=step, data_step=batch.step, why=trouble, window=self.config.train.rollback_window
            )
        barrier()
        return True
