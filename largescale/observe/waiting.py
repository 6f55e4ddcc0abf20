"""One line on what holds up the training, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from largescale.config import DataConfig

TOLERATED = 0.1
"""Fraction of a step's time that may be spent waiting for data before it is worth a line."""


def advice(row: Mapping[str, Any], data: DataConfig, counts: tuple[int, int], *, starting: bool = False) -> str:
    """What to change if the training waits for its data; empty if it does not.

    Args:
        row: a line of metrics.jsonl.
        data: the stream's configuration.
        counts: loader processes of a rank, and threads of each.
        starting: it is the first line since the start, whose wait is mostly for loaders to come up.
    """
    share = (row["data_wait_s"] - row["augment_s"]) / row["step_s"]
    processes, threads = counts
    if starting or share <= TOLERATED or processes == 0:  # 0: the training process loads, as configured
        return ""
    says = f"the training waits for data {share:.0%} of the time"
    parts = {name: row[f"{name}_ms"] for name in ("read", "decode", "crop")}
    slowest = max(parts, key=lambda name: parts[name])
    spent = ", ".join(f"{name} {value:.1f} ms" for name, value in parts.items())
    if row.get("cache_hit_rate", 1.0) < 0.9 and slowest == "read":
        what = f"shards come too late from the store (data.fetches={data.fetches}); raise data.fetches or data.cache_gb"
    elif slowest == "read":
        what = "reading is slowest; move the shards to a faster disk, or to a store, whose shards are cached"
    else:
        what = f"{processes} x {threads} threads per rank are too few; raise data.workers, or shrink the stored images"
    return f"{says}; per image and thread: {spent}; {what}"
