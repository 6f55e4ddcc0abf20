"""Lines for people: where the run is, how fast, and how long it will take."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from largescale.methods.method import Row


def configure_logging(rank: int, world_size: int) -> None:
    """Send the logs of this process to stderr: everything on rank 0, warnings on the others, each with its rank."""
    prefix = f"[rank {rank}] " if world_size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("largescale").setLevel(logging.INFO if rank == 0 else logging.WARNING)


class Progress:
    """Formats one console line per logged step, with the time left at the run's own pace."""

    def __init__(self, first_step: int, num_steps: int, brief: Callable[[Row], str]) -> None:
        """`brief` returns what the method adds after the loss."""
        self._brief = brief
        self._first, self._num_steps, self._started = first_step, num_steps, time.perf_counter()

    def line(self, row: dict[str, Any]) -> str:
        """`row` is a line of metrics.jsonl."""
        done = row["step"] + 1
        pace = (time.perf_counter() - self._started) / (done - self._first)
        skipped = f"  {row['updates_skipped']} updates skipped (fp16)" if row.get("updates_skipped") else ""
        left = format_seconds(pace * (self._num_steps - done))
        return (
            f"step {done}/{self._num_steps} ({done / self._num_steps:.0%})  epoch {row['epoch']:.2f}  "
            f"loss {row['loss']:.4f}{self._brief(row)}  lr {row['lr']:.2e}  "
            f"{row['images_per_s']:.0f} images/s  waiting {row['data_wait_s'] / row['step_s']:.0%}  left {left}"
            f"{skipped}"
        )


def format_seconds(seconds: float) -> str:
    """Seconds as `1 h 02 min`, `3 min 20 s` or `45 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
