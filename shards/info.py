"""`shards info`: what a shard folder holds, in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.manifest import IMAGE_FORMATS, Manifest, check_files, read_index, read_manifest


def describe(folder: Path) -> str:
    """Counts, sizes, formats, resolutions, classes and what was skipped.

    Raises:
        InputError: no readable manifest, or files that are not as it says.
    """
    manifest = read_manifest(folder)
    check_files(manifest)
    indexes = [read_index(manifest.index_path(number)) for number in range(len(manifest.shards))]
    widths = np.concatenate([index.width for index in indexes])
    heights = np.concatenate([index.height for index in indexes])
    formats = np.bincount(np.concatenate([index.format for index in indexes]), minlength=len(IMAGE_FORMATS))
    labels = np.concatenate([index.label for index in indexes])
    lines = [
        f"{manifest.root}",
        f"  samples   {manifest.num_samples:,} in {len(manifest.shards):,} shards, {manifest.num_bytes:,} bytes",
        f"  source    {manifest.source}",
        f"  settings  {', '.join(f'{key}={value}' for key, value in manifest.settings.items())}",
        f"  formats   {', '.join(f'{IMAGE_FORMATS[code]} {count:,}' for code, count in enumerate(formats) if count)}",
        f"  pixels    {_spread(widths)} wide, {_spread(heights)} high (smallest / median / largest)",
        *_classes(manifest, labels),
        *(f"  skipped   {count:,}: {reason}" for reason, count in manifest.skipped.items()),
    ]
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return f"{values.min()} / {int(np.median(values))} / {values.max()}"


def _classes(manifest: Manifest, labels: np.ndarray) -> list[str]:
    if not manifest.classes:
        return ["  classes   none"]
    counts = np.bincount(labels[labels >= 0], minlength=len(manifest.classes))
    shown = [f"{name} {count:,}" for name, count in zip(manifest.classes, counts, strict=True)][:20]
    more = len(manifest.classes) - len(shown)
    return [f"  classes   {len(manifest.classes):,}: {', '.join(shown)}{f', and {more:,} more' if more else ''}"]
