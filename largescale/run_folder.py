"""The folder of a run: what is written where, and how a run finds itself again.

    config.yaml          fully resolved; running it again repeats the run
    environment.json     versions, git revision, devices
    metrics.jsonl        one object a logged step
    tensorboard/         the same scalars
    audit/rank-*.jsonl   with data.audit=true: the keys that each rank trained on, step by step
    skipped/rank-*.jsonl unreadable images: step, shard, key, offset, reason
    checkpoints/         see checkpoint/sharded.py
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision

from largescale.checkpoint import sharded
from largescale.config import Config, flatten, load_config, to_yaml
from largescale.data.stream import Batch
from largescale.observe.metrics import JsonLines, MetricsLog, forget_from
from largescale.parallel.engine import Engine
from largescale.processes import barrier, rank, world_size
from shards.errors import InputError
from shards.files import atomic_write
from shards.manifest import Manifest

_FREE_TO_CHANGE = (
    "name", "run.dir", "run.log_every", "data.shards", "data.eval_shards", "data.audit", "data.workers",
    "data.prefetch", "data.max_skipped", "parallel.strategy", "parallel.replicate", "parallel.shard",
    "parallel.cpu_offload", "parallel.reshard_after_forward", "parallel.unit_min_parameters",
    "model.recompute_stages", "model.compile_stages", "checkpoint.", "evaluate.",
)
"""Keys (or groups) that may differ when a run is continued: they do not change what it computes."""


class RunFolder:
    """Reads and writes the folder of one run, on all ranks."""

    def __init__(self, config: Config, manifest: Manifest) -> None:
        self.config, self.path = config, Path(config.run.dir)
        self.checkpoints = self.path / "checkpoints"
        self._fingerprint = manifest.fingerprint
        self._metrics: MetricsLog | None = None
        self._audit: JsonLines | None = None
        self._skipped: JsonLines | None = None

    def resume(self, engine: Engine) -> tuple[int, int]:
        """Load the newest whole checkpoint into the engine.

        Returns:
            The first step to do, and the number of unreadable images so far; zeros for a new run.

        Raises:
            InputError: the checkpoint belongs to another configuration or other shards.

        Collectives: every rank must call it.
        """
        checkpoint = sharded.find_latest(self.checkpoints)
        if checkpoint is None:
            return 0, 0
        self._check_same_run(checkpoint)
        engine.prepare_optimizer_state(checkpoint.shapes())
        state = engine.state()
        sharded.load(checkpoint, state)
        engine.take_state(state)
        return checkpoint.step, int(checkpoint.progress["skipped"])

    def open_logs(self, first_step: int) -> None:
        """Drop what a dead process logged beyond the checkpoint, and open the logs. Collectives: two barriers."""
        barrier()  # all ranks have compared their configuration with the one on disk
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            forget_from(self.path, first_step)
            _write_text(self.path / "config.yaml", to_yaml(self.config))
            _write_text(self.path / "environment.json", json.dumps(environment(), indent=1) + "\n")
            self._metrics = MetricsLog(self.path, first_step)
        barrier()
        if self.config.data.audit:
            self._audit = JsonLines(self.path / "audit" / f"rank-{rank():05d}.jsonl")

    def record_batch(self, batch: Batch) -> None:
        """Write what this rank trained on (with data.audit) and what it could not read."""
        if self._audit is not None:
            self._audit.write({"step": batch.step, "keys": batch.keys})
        for row in batch.skipped:
            if self._skipped is None:
                self._skipped = JsonLines(self.path / "skipped" / f"rank-{rank():05d}.jsonl")
            self._skipped.write({"step": batch.step, **row})

    def record_metrics(self, row: dict[str, Any]) -> None:
        """Write one logged step, on rank 0."""
        if self._metrics is not None:
            self._metrics.write(row)

    def save(self, engine: Engine, done: int, num_skipped: int) -> None:
        """Save a checkpoint after `done` steps. Collectives: every rank must call it."""
        progress = {
            "step": done, "skipped": num_skipped, "data": self._fingerprint, "world_size": world_size(),
            "strategy": self.config.parallel.strategy,
        }
        sharded.save(self.checkpoints, engine.state(), progress, keep=self.config.checkpoint.keep)

    def close_logs(self) -> None:
        """Close the logs."""
        for log in (self._metrics, self._audit, self._skipped):
            if log is not None:
                log.close()

    def _check_same_run(self, checkpoint: sharded.Checkpoint) -> None:
        if checkpoint.progress["data"] != self._fingerprint:
            raise InputError(
                f"{self.path}: its checkpoint was trained on other shards than {self.config.data.shards}; "
                f"use those, or another run.dir"
            )
        before, now = flatten(load_config(self.path / "config.yaml")), flatten(self.config)
        for key in sorted(before):
            if not key.startswith(_FREE_TO_CHANGE) and before[key] != now[key]:
                raise InputError(
                    f"{self.path}: cannot continue, {key} was {before[key]} and is now {now[key]}; "
                    f"set it back, or use another run.dir"
                )


def environment() -> dict[str, Any]:
    """What a run depends on besides its configuration."""
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "git_revision": _git_revision(),
        "machine": platform.platform(),
        "processor": _processor(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"],
        "cpu_cores": os.cpu_count(),
        "threads_a_rank": torch.get_num_threads(),
        "world_size": world_size(),
    }


def _git_revision() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )
    return result.stdout.strip() or "not a git checkout"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
