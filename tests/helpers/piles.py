"""Folders of features as `largescale features` writes them, of embeddings that are made up."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from largescale.evaluate import feature_files
from largescale.evaluate.feature_files import ShardFeatures


def long_tail(num: int, seed: int = 0, width: int = 8, blobs: int = 12) -> np.ndarray:
    """Embeddings [num, width] of blobs whose sizes fall as 1, 1/2, 1/3, ...; a sixth are near copies of others."""
    generator = np.random.default_rng(seed)
    sizes = 1 / np.arange(1, blobs + 1)
    of = generator.choice(blobs, num, p=sizes / sizes.sum())
    rows = 3 * generator.normal(size=(blobs, width))[of] + generator.normal(size=(num, width))
    copies = generator.choice(num, num // 6, replace=False)
    rows[copies] = rows[generator.permutation(num)[: len(copies)]] + 1e-3 * generator.normal(size=(len(copies), width))
    return rows


def write_features(
    folder: Path,
    rows: np.ndarray,
    *,
    of_shard: int = 100,
    form: str = "parquet",
    dtype: str = "fp16",
    name: str = "pile",
    missing: Sequence[int] = (),
    thumbnails: int = 0,
    checksums: dict[str, str] | None = None,
    assignments: bool = False,
    **entries: Any,
) -> Path:
    """Write rows [N, D] as the features of samples 0 to N - 1; returns the folder.

    Args:
        folder: to write to.
        rows: embeddings.
        of_shard: samples in a shard.
        form, dtype: of `feature_files`.
        name: of the shards.
        missing: samples that could not be read.
        thumbnails: side of the images.
        checksums: of tars, by name.
        assignments: write these in place of embeddings.
        entries: other metadata.
    """
    for shard, start in enumerate(range(0, len(rows), of_shard)):
        at = np.setdiff1d(np.arange(start, min(start + of_shard, len(rows))), np.array(missing, int))
        tar = f"{name}-{shard:06d}.tar"
        found = ShardFeatures(
            tar,
            [f"key{one}" for one in at],
            at - start,
            None if assignments else rows[at].astype(feature_files.DTYPES[dtype]),
            assigned={"cluster": pa.array(at % 7)} if assignments else {},
            images=[_jpeg(int(one), thumbnails) for one in at] if thumbnails else None,
        )
        about = {
            "weights": {"step": 1, "hash": "abc"},
            "shard": {"tar": (checksums or {}).get(tar, f"sum of {tar}"), "samples": min(of_shard, len(rows) - start)},
            "format": form,
            "dtype": dtype,
            "thumbnails": thumbnails,
            **entries,
        }
        feature_files.write(folder, form, found, about)
    return folder


def _jpeg(number: int, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number * 7 % 256, 80)).save(buffer, "JPEG")
    return buffer.getvalue()
