"""`largescale assign`: which cluster each image belongs to, by every head of a run, and a summary of the clusters.

Files are those of `largescale features` (`features_out.py`) without the features, one per shard. `_summary.json`
beside them is made again by every command.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from largescale.evaluate import feature_files
from largescale.evaluate.clusters import agreement, purity
from largescale.evaluate.features_out import Written, write_features
from largescale.evaluate.features_wish import Wish
from largescale.processes import from_rank_0, on_rank_0
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

SUMMARY = "_summary.json"
"""Readers of a folder of Parquet pass over names that begin so."""
_PERCENTILES = (0, 10, 50, 90, 100)
_MOST_CELLS = 10**7
"""Classes times clusters up to which they are matched one to one, while other ranks wait."""


@dataclass(frozen=True)
class Assigned:
    """What is in the output folder.

    Attributes:
        written: its files.
        summary: what `_summary.json` says.
    """

    written: Written
    summary: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.written}\n{_table(self.summary)}"


def assign(run: str | Path, shards: str, out: Path, overrides: Sequence[str] = ()) -> Assigned:
    """Write what each head of a run assigns every image of a shard folder to, and a summary.

    Args:
        run: folder of a run, whose newest whole checkpoint is taken, or RUN/checkpoints/step-...
        shards: folder, or URL, of the shards, labelled or not.
        out: folder to write to; what it has already is kept where it fits.
        overrides: `key=value` replacements of the run's configuration.

    Raises:
        InputError: the method assigns images to nothing, or not yet; or as `write_features`.

    Collectives: every rank must call it; those of `write_features`, and two broadcasts of an object.
    """
    written = write_features(run, shards, out, Wish(assignments=True), overrides)
    found: dict[str, Any] = {}

    def summarise() -> None:
        found.update(step=written.step, num_images=written.num_images, num_unreadable=written.num_unreadable)
        found.update(heads=summary_of(written.paths))
        with atomic_write(out / SUMMARY) as file:
            file.write(json.dumps(found, indent=2).encode() + b"\n")

    on_rank_0(summarise)
    return Assigned(written, from_rank_0(found))


def summary_of(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What the files say of the clusters, by head.

    Args:
        paths: of all shards.

    Returns:
        `clusters`, how many there are; `used`, how many have images; `sizes`, percentiles of images per cluster;
        `mean_score` and `mean_margin`; and, where images have labels, `num_labelled` and, of these, `nmi`, `ami`,
        `ari`, `matched` (as the clusters protocol) and `purity`; `nmi` and `ari` alone for more than ten million
        pairs of a class and a cluster.
    """
    counts = feature_files.about(paths[0])["num_exemplars"] if paths else {}
    return {head: _of_head(paths, head, count) for head, count in counts.items()}


def _of_head(paths: Sequence[Path], head: str, count: int) -> dict[str, Any]:
    labelled = all("label" in pq.read_schema(path).names for path in paths)
    columns = [head, f"{head}_score", f"{head}_margin", *(["label"] if labelled else [])]
    tables = [_read(path, columns) for path in paths]
    numbers, scores, margins = (
        np.concatenate([table[column].to_numpy() for table in tables]) for column in columns[:3]
    )
    sizes = np.bincount(numbers, minlength=count)
    found: dict[str, Any] = {
        "clusters": count,
        "used": int((sizes > 0).sum()),
        "sizes": {str(percent): int(np.percentile(sizes, percent, method="inverted_cdf")) for percent in _PERCENTILES},
    }
    if len(numbers):
        found |= {"mean_score": float(scores.mean(dtype=float)), "mean_margin": float(margins.mean(dtype=float))}
    if labelled:
        labels = np.concatenate([table["label"].fill_null(-1).to_numpy() for table in tables])
        known = labels >= 0
        found["num_labelled"] = int(known.sum())
        if known.any():
            found |= _compared(labels[known], numbers[known])
    return found


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: is damaged ({why}); remove it, and run this again") from error


def _compared(labels: np.ndarray, numbers: np.ndarray) -> dict[str, float]:
    """How clusters agree with labels; of a large table only what takes no time that grows with its cells."""
    cells = len(np.unique(labels)) * len(np.unique(numbers))
    if cells > _MOST_CELLS:
        nmi, ari = normalized_mutual_info_score(labels, numbers), adjusted_rand_score(labels, numbers)
        return {"nmi": float(nmi), "ari": float(ari)}
    alike = agreement(torch.from_numpy(labels), numbers)
    alike.pop("num_clusters")
    return {**alike, "purity": purity(labels, numbers)}


def _table(summary: dict[str, Any]) -> str:
    """The summary for people: a line per head."""
    rows = [["head", "clusters", "used", "sizes at 10, 50, 90%", "largest", "NMI", "ARI", "purity"]]
    for head, one in summary["heads"].items():
        sizes = one["sizes"]
        shares = [f"{one[key]:.3f}" if key in one else "-" for key in ("nmi", "ari", "purity")]
        spread = ", ".join(f"{sizes[key]:,.0f}" for key in ("10", "50", "90"))
        rows.append([head, f"{one['clusters']:,}", f"{one['used']:,}", spread, f"{sizes['100']:,.0f}", *shares])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
