"""The folder of a run: what is written where, and how a run finds itself again.

    config.yaml          fully resolved; running it again repeats the run
    environment.json     versions, git revision, devices
    metrics.jsonl        one object a logged step
    tensorboard/         the same scalars
    audit/rank-*.jsonl   with data.audit=true: the keys that each rank trained on, step by step
    skipped/rank-*.jsonl unreadable images: step, shard, key, offset, reason
    init.json            with init_from: the checkpoint that it started from
    checkpoints/         see checkpoint/folder.py
    status.json          running, stopped, failed (and why) or complete, and the steps done; run/status.py reads it
    owner-*.json         while a training runs: which process it is, see run/lease.py
    rollbacks.jsonl      when the run went back to a checkpoint, and what data it left out
    trouble/step-*/      of a step that could not be used: keys and evidence, a file a rank
    stacks/              where every rank stood when the run hung
    former-1/            what a former run left here, whose checkpoints are gone
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from largescale.checkpoint import sharded
from largescale.checkpoint.copier import Copier
from largescale.checkpoint.folder import Checkpoint, clear_leftovers, newest_first
from largescale.checkpoint.mirror import Mirror, MirrorAway, OfAnotherRun
from largescale.checkpoint.saver import SaveFailed, Saver
from largescale.config import Config, flatten, to_yaml, with_present_names
from largescale.data import order
from largescale.data.stream import Batch
from largescale.methods.method import Output
from largescale.observe.metrics import JsonLines, MetricsLog, forget_from
from largescale.parallel.batchnorm import batchnorm_images
from largescale.parallel.engine import Engine
from largescale.processes import barrier, on_rank_0, rank, world_size
from largescale.run import init_from
from largescale.run.advice import after_bad_step, after_failed_saves, instead_of_changing, new_run
from largescale.run.environment import environment
from largescale.run.failures import TrainingStopped, told
from largescale.run.former import set_aside_former
from largescale.run.lease import Lease
from largescale.run.rollback import Rollbacks
from largescale.run.same_run import changed_setting, other_run
from largescale.run.status import COMPLETE, read_status, write_status
from largescale.run.watchdog import Watchdog
from shards.ground.errors import InputError
from shards.ground.files import atomic_write, remove_partial_files

_log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Saves that fail in a row before the run stops: without checkpoints it would work for nothing."""


class RunFolder:
    """Reads and writes the folder of one run, on all ranks. Collectives: every rank must make one; a gloo group."""

    def __init__(self, config: Config, fingerprint: str, device: torch.device, lease: Lease) -> None:
        self.config, self.path, self._device = config, Path(config.run.dir), device
        self.checkpoints = self.path / "checkpoints"
        self.rollbacks = Rollbacks(self.path)
        url, is_other = config.checkpoint.mirror, partial(other_run, config=config, fingerprint=fingerprint)
        self._mirror = Mirror(url, other_run=is_other) if url else None
        self.saver = Saver(
            self.checkpoints, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every,
            background=config.checkpoint.background, device=device, owner=lease.number, verify=lease.verify,
            published=self._published,
        )
        self._copier = Copier(self._mirror, self.checkpoints, lease.verify) if self._mirror else None
        self._fingerprint, self._lease = fingerprint, lease
        self._failed_saves, self._done = 0, 0
        self._init: dict[str, Any] = {}
        self._resumed: Checkpoint | None = None
        self._status: dict[str, Any] = {}
        self._status_lock = threading.RLock()
        self._metrics: MetricsLog | None = None
        self._audit: JsonLines | None = None
        self._skipped: JsonLines | None = None

    def resume(self, engine: Engine) -> tuple[int, int, list[float] | None]:
        """Load the newest whole checkpoint into the engine, or for a new run the weights that `init_from` names.

        Returns:
            The first step to do, the number of unreadable images so far, the state of the spike watch; zeros and
            None for a new run.

        Raises:
            InputError: the checkpoint belongs to another configuration or other shards, or all are damaged.

        Collectives: every rank must call it.
        """
        if rank() == 0:
            clear_leftovers(self.checkpoints)
        if self._mirror is not None:
            on_rank_0(partial(self._fetch_newer, self._mirror))
        checkpoint = self._resumed = sharded.agree_on_latest(self.checkpoints, self._device)
        if checkpoint is None:
            self._init = init_from.take_weights(engine, self.config, self._device) if self.config.init_from else {}
            return 0, 0, None
        self._check_same_run(checkpoint)
        self._init = checkpoint.progress.get("init", {})
        if rank() == 0 and checkpoint.progress.get("order", 1) != order.VERSION:
            _log.warning("%s: saved by a version with another order of the samples; unless train.global_batch divides "
                         "them, the epoch under way may use some twice and others not; later epochs are exact",
                         self.path)
        self._warn_of_batchnorm(checkpoint)
        engine.prepare_optimizer_state(sharded.shapes(checkpoint))
        state = engine.state()
        sharded.load(checkpoint, state)
        engine.take_state(state)
        return checkpoint.step, int(checkpoint.progress["skipped"]), checkpoint.progress["spikes"]

    def _fetch_newer(self, mirror: Mirror) -> None:
        try:
            mirror.fetch_newer(self.checkpoints)
        except OfAnotherRun as error:
            raise InputError(f"checkpoint.mirror={mirror.url}: {error}") from error
        except MirrorAway as error:
            away = f"checkpoint.mirror={mirror.url}: cannot be asked ({error})"
            if not newest_first(self.checkpoints):
                raise InputError(
                    f"{away}, and {self.checkpoints} has nothing: if there are copies of this run, it would begin "
                    f"without them; check the URL, the network and the credentials, or pass checkpoint.mirror=''"
                ) from error
            # At worst another machine had come further, and those steps are done again, with the same result.
            _log.warning("%s; going on from the newest checkpoint in %s", away, self.checkpoints)

    def open_logs(self, first_step: int) -> None:
        """Drop what a dead process logged beyond the checkpoint, and open the logs. Collectives: two barriers."""
        barrier()  # all ranks have compared their configuration with that of the checkpoint
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
            _write_or_remove(self.path / init_from.FILE, json.dumps(self._init, indent=1) + "\n" if self._init else "")
            _write_text(self.path / "environment.json", json.dumps(environment(), indent=1) + "\n")
            self._metrics = MetricsLog(self.path, first_step)
        barrier()
        if self._copier is not None and self._resumed is not None:
            self._copier.begin()  # what former starts could not copy
        if self.config.data.audit:
            self._audit = JsonLines(self.path / "audit" / f"rank-{rank():05d}.jsonl")

    def record_configuration(self) -> None:
        """Write `config.yaml`, on rank 0; for a run that is complete what may still change (say `data.eval_shards`)."""
        if rank() == 0:
            _write_text(self.path / "config.yaml", to_yaml(self.config))

    @contextmanager
    def watched(self) -> Iterator[Watchdog]:
        """A watchdog over the training thread."""
        watchdog = Watchdog(self.path / "stacks", self.config.run.hang_timeout_s)
        try:
            yield watchdog
        finally:
            watchdog.close()

    def record_batch(self, step: int, batch: Batch) -> None:
        """Write what this rank trained on (with data.audit) and what it could not read."""
        self._lease.check()
        self._done = self._lease.step = step + 1
        if self._audit is not None:
            self._audit.write({"step": step, "keys": batch.keys})
        for row in batch.skipped:
            if self._skipped is None:
                self._skipped = JsonLines(self.path / "skipped" / f"rank-{rank():05d}.jsonl")
            self._skipped.write({"step": step, **row})

    def record_metrics(self, row: dict[str, Any]) -> None:
        """Write one logged step, on rank 0."""
        self._lease.check()
        if self._metrics is not None:
            self._metrics.write(row)

    def save(self, engine: Engine, done: int, num_skipped: int, spikes: list[float], *, final: bool) -> None:
        """Begin to save a checkpoint after `done` steps; with `final` also end it.

        A save that fails is warned of, and the next one tries again.

        Raises:
            TrainingStopped: with `final`, or after MAX_FAILED_SAVES in a row.

        Collectives: every rank must call it.
        """
        progress = {
            "step": done, "skipped": num_skipped, "spikes": spikes, "data": self._fingerprint, "order": order.VERSION,
            "rollbacks": self.rollbacks.rows(), "world_size": world_size(), "config": flatten(self.config),
            "strategy": self.config.parallel.strategy, "init": self._init,
        }
        self.settle_save()
        self._lease.check()
        state = engine.state()
        try:
            self.saver.save(state, progress, until_update=engine.until_update(state))
        except SaveFailed as error:
            self._count_failure(error, final)
        if final:
            self.settle_save(final=True)

    def settle_save(self, *, final: bool = False) -> None:
        """Return when what is being saved is published, or has failed. Collectives: none."""
        try:
            self.saver.wait()
        except SaveFailed as error:
            self._count_failure(error, final)
        else:
            self._failed_saves = 0

    def _count_failure(self, error: SaveFailed, final: bool) -> None:
        self._lease.check()  # a save may have failed because the folder is another training's
        self._failed_saves += 1
        line = f"{self.checkpoints}: could not save: {error}. Earlier checkpoints are as they were"
        if final or self._failed_saves == MAX_FAILED_SAVES:
            raise TrainingStopped(f"{line}; {after_failed_saves(str(error))}") from error
        _log.warning("%s; the next one is tried in %d steps", line, self.config.checkpoint.every_steps)

    def dump_trouble(self, step: int, batch: Batch, output: Output, trouble: str) -> None:
        """Write what it takes to look into a bad step: keys and evidence of this rank. Views follow from the keys."""
        folder = self.path / "trouble" / f"step-{step:08d}"
        keys = batch.keys or [str(sample_id) for sample_id in batch.ids.tolist()]
        row = {"step": step, "data_step": batch.step, "trouble": trouble, "loss": float(output.loss), "keys": keys}
        _write_text(folder / f"rank-{rank():05d}.json", json.dumps(row) + "\n")
        evidence = {name: value.contiguous().cpu() for name, value in output.evidence.items()}
        with atomic_write(folder / f"rank-{rank():05d}.safetensors") as file:
            file.write(safetensors.torch.save(evidence))

    def way_on(self, step: int, trouble: str, rates: Sequence[float]) -> str:
        """What works from here, after a step that cannot be used."""
        return after_bad_step(self.config, step=step, trouble=trouble, rates=rates, checkpoints=self.checkpoints,
                              num_rollbacks=len(self.rollbacks.rows()))

    def roll_back(self, step: int, batch: Batch, trouble: str) -> bool:
        """Leave out the data that led to a bad step, if the run may still do so; True if the run is to go back.

        Collectives: every rank must call it; the agreement on a checkpoint, and a barrier.
        """
        number = len(self.rollbacks.rows()) + 1
        if number > self.config.train.max_rollbacks:
            return False
        checkpoint = sharded.agree_on_latest(self.checkpoints, self._device)
        if checkpoint is None:
            return False
        _log.warning("step %d: %s; going back to step %d, %d of at most %d times", step, trouble, checkpoint.step,
                     number, self.config.train.max_rollbacks)
        barrier()  # all ranks have counted
        if rank() == 0:
            self._lease.verify()
            self.rollbacks.record(checkpoint, step=step, data_step=batch.step, why=trouble,
                                  window=self.config.train.rollback_window)
        barrier()
        if self._copier is not None:
            self._copier.begin(insist=True)
            if complaint := self._copier.wait():
                _log.warning("%s; going back without a copy of what is left out", complaint)
        self.close_logs()
        return True

    def set_status(self, state: str, step: int, num_steps: int) -> None:
        """Write `status.json`, on rank 0: running, stopped or complete, and the steps done."""
        if rank() == 0:
            self._write_status(state, step, num_steps)

    def end(self, state: str, step: int, num_steps: int) -> None:
        """Say in `status.json` that the run is stopped or complete, and bring its mirror up to date.

        Raises:
            TrainingStopped: it is complete, but the mirror lacks a checkpoint.

        Collectives: every rank must call it; the copier's.
        """
        if self._copier is None or state != COMPLETE:
            self.set_status(state, step, num_steps)
        if self._copier is None:
            return
        if state != COMPLETE:  # there may be little time left; the next start makes up for what is missing
            self._copier.wait()
            return
        self._copier.begin(insist=True)
        if complaint := self._copier.wait():
            if rank() == 0:
                self._write_status("not copied", step, num_steps, reason=complaint)
            raise TrainingStopped(
                f"{self.path}: all {num_steps} steps are done and saved, but not copied to the mirror. {complaint}. "
                f"Mend that and give the same command again, it copies what is missing"
            )
        self.set_status(state, step, num_steps)

    @contextmanager
    def failure_in_status(self, first_step: int, num_steps: int) -> Iterator[None]:
        """However the steps end, `status.json` says so and why; from any rank, as others may not know."""
        self._done = first_step

        def write(state: str, why: str) -> None:
            with suppress(OSError):  # what happened first must not be hidden
                self._write_status(state, self._done, num_steps, reason=why)

        def state() -> str:
            with suppress(OSError, InputError):
                return (read_status(self.path) or {"state": ""})["state"]
            return ""

        with told(write, state):
            yield

    def _published(self, step: int) -> None:
        """A checkpoint stands: note it in the status, and begin to copy it. In the saver's thread, on every rank."""
        with self._status_lock:
            self._status["saved"] = step
            if rank() == 0 and self._status.get("state") == "running":
                with suppress(OSError):
                    self._write_status("running", self._done, self._status["num_steps"])
        if self._copier is not None:
            self._copier.begin()

    def _write_status(self, state: str, step: int, num_steps: int, **more: str) -> None:
        with self._status_lock:
            self._status |= {"state": state, "num_steps": num_steps}
            saved = self._status.get("saved", self._resumed.step if self._resumed else None)
            if self._lease.still_ours():
                write_status(self.path, state, step, num_steps, saved=saved, **more)

    def close_logs(self) -> None:
        """Close the logs."""
        for log in (self._metrics, self._audit, self._skipped):
            if log is not None:
                log.close()

    def _warn_of_batchnorm(self, checkpoint: Checkpoint) -> None:
        """Say where batch statistics are of another number of images than before: other ranks, or other groups."""
        def images(settings: dict[str, Any], ranks: int) -> float:
            group = settings["parallel.batchnorm_group_size"] if settings["parallel.sync_batchnorm"] else 1
            return batchnorm_images(self.config, group, ranks)

        ranks = checkpoint.progress["world_size"]
        was, now = images(checkpoint.progress["config"], ranks), images(flatten(self.config), world_size())
        if rank() == 0 and was != now:
            _log.warning("%s: BatchNorm's statistics were of %g images and are of %g from here on (%d ranks, now %d); "
                         "the loss may shift a little", self.path, was, now, ranks, world_size())

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        if checkpoint.progress["data"] != self._fingerprint:
            raise InputError(
                f"{self.path}: its checkpoint was trained on other shards than {self.config.data.shards}; "
                f"use those, or start a new run from its weights: {new_run(self.path)}"
            )
        before = with_present_names(checkpoint.progress["config"], self.config)
        init_from.require_unchanged(self.config, before)
        if key := changed_setting(before, self.config):
            raise InputError(
                f"{self.path}: cannot continue, {key} was {before[key]} and is now {flatten(self.config)[key]}; "
                f"set it back, or {instead_of_changing(self.path, key)}"
            )


def _write_or_remove(path: Path, text: str) -> None:
    if text:
        _write_text(path, text)
    else:
        path.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
