"""`shards info`: what a shard folder holds, in words (and as a page, see page.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.manifest import IMAGE_FORMATS, Manifest, check_files, index_path, read_index
from shards.remote import fetched, manifest_at
from shards.stores import is_url


@dataclass(frozen=True)
class Facts:
    """A shard folder, and columns of all its samples: place in the tar, pixels, bytes, format codes, labels."""

    location: str
    manifest: Manifest
    offset: np.ndarray
    width: np.ndarray
    height: np.ndarray
    size: np.ndarray
    format: np.ndarray
    label: np.ndarray

    def formats(self) -> dict[str, int]:
        """Samples by format."""
        counts = np.bincount(self.format, minlength=len(IMAGE_FORMATS))
        return {IMAGE_FORMATS[code]: int(count) for code, count in enumerate(counts) if count}

    def classes(self) -> dict[str, int]:
        """Samples by class."""
        names = self.manifest.classes
        counts = np.bincount(self.label[self.label >= 0], minlength=len(names))
        return dict(zip(names, counts.tolist(), strict=True))


def gather(location: str | Path) -> Facts:
    """Read what the indexes say.

    Raises:
        InputError: no readable manifest, or files that are not as it says.
    """
    location = str(location)
    manifest = manifest_at(location)
    if not is_url(location):
        check_files(manifest)
    names = [index_path(Path(shard.name)).name for shard in manifest.shards]
    with fetched(location, names) as folder:
        indexes = [read_index(folder / name) for name in names]
    columns = (np.concatenate([getattr(index, name) for index in indexes])
               for name in ("offset", "width", "height", "size", "format", "label"))
    return Facts(location, manifest, *columns)


def describe(facts: Facts) -> str:
    """Counts, sizes, formats, resolutions, classes and what was skipped."""
    manifest = facts.manifest
    lines = [
        facts.location,
        f"  samples   {manifest.num_samples:,} in {len(manifest.shards):,} shards, {manifest.num_bytes:,} bytes",
        f"  source    {manifest.source}",
        f"  settings  {', '.join(f'{key}={value}' for key, value in manifest.settings.items())}",
        f"  formats   {', '.join(f'{name} {count:,}' for name, count in facts.formats().items())}",
        f"  pixels    {_spread(facts.width)} wide, {_spread(facts.height)} high (smallest / median / largest)",
        *_classes(facts),
        *(f"  skipped   {count:,}: {reason}" for reason, count in manifest.skipped.items()),
    ]
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return f"{values.min()} / {int(np.median(values))} / {values.max()}"


def _classes(facts: Facts) -> list[str]:
    if not facts.manifest.classes:
        return ["  classes   none"]
    shown = [f"{name} {count:,}" for name, count in facts.classes().items()]
    more = len(shown) - 20
    return [f"  classes   {len(shown):,}: {', '.join(shown[:20])}{f', and {more:,} more' if more > 0 else ''}"]
