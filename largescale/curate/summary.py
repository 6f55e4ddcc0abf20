"""What is said of a finished curation: its record, and a line."""

from __future__ import annotations

from typing import Any

import numpy as np

from largescale.curate.embeddings import Embeddings
from largescale.curate.result import LevelSizes, Outcome


def record_of(stamp: dict[str, Any], outcome: Outcome, embeddings: Embeddings, epsilon: float) -> dict[str, Any]:
    """What curation.json says beside times and memory."""
    lowest = outcome.levels[0]
    num_unique = int(lowest.unique.sum())
    return {
        **stamp,
        "epsilon": epsilon,
        "num_samples": embeddings.files[-1].first_sample + embeddings.files[-1].num_samples,
        "num_images": embeddings.num_images,
        "num_duplicates": embeddings.num_images - num_unique,
        "num_kept": outcome.num_taken,
        "num_available": outcome.num_available,
        "levels": [_counts(level) for level in outcome.levels],
    }


def _counts(level: LevelSizes) -> dict[str, Any]:
    return {
        "name": level.name,
        "clusters": len(level.before),
        "empty": int((level.before == 0).sum()),
        "before": _quantiles(level.before),
        "after": _quantiles(level.after),
        "largest_tenth_before": _share_of_largest(level.before, level.before),
        "largest_tenth_after": _share_of_largest(level.before, level.after),
    }


def _quantiles(sizes: np.ndarray) -> dict[str, int]:
    return {"smallest": int(sizes.min()), "median": int(np.median(sizes)), "largest": int(sizes.max())}


def _share_of_largest(by: np.ndarray, sizes: np.ndarray) -> float:
    """Share of images in the tenth of the clusters that were largest."""
    order = np.argsort(-by, kind="stable")[: -(-len(by) // 10)]
    return round(float(sizes[order].sum() / max(1, sizes.sum())), 4)


def sentence(record: dict[str, Any]) -> str:
    """A curation in a line."""
    dropped, target = record["num_duplicates"], record["settings"]["target"]
    words = f"{record['num_kept']:,} of {record['num_images']:,} images kept"
    if record["epsilon"]:
        words += f", {dropped:,} of them duplicates (epsilon {record['epsilon']:.3g})".replace("of them", "dropped as")
    top = record["levels"][-1]
    if record["settings"]["levels"]:
        words += (
            f"; the largest tenth of {top['clusters']:,} clusters had {top['largest_tenth_before']:.0%} of the images "
            f"and has {top['largest_tenth_after']:.0%}"
        )
    if without := record["settings"].get("without"):
        words += f"; without clusters {', '.join(map(str, without))} of the top level"
    left = record.get("num_available", record["num_images"] - dropped)
    if target > left * record["settings"]["repeat"]:
        words += f"; {left:,} images were left for a target of {target:,}"
    return words
