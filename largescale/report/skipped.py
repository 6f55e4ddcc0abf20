"""What a run could not read, why, and pictures of it where something can still be made of the bytes."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from largescale.config import corpus_settings
from largescale.report.gallery import data_url
from largescale.report.html_parts import escape, section, table
from largescale.report.reported_run import ReportedRun

_PICTURES, _REASONS = 12, 20
_MOST_BYTES = 64 << 20
"""Of an image that is tried."""


def section_of(run: ReportedRun) -> str:
    """Reasons with counts and an example, and pictures; empty if nothing was skipped."""
    rows = list(_rows(run.path))
    if not rows:
        return ""
    counts = Counter(str(row.get("reason", "?")) for row in rows)
    examples = {str(row.get("reason", "?")): row for row in reversed(rows)}
    lines = [
        [reason, f"{count:,}", f"{examples[reason].get('shard', '?')}: {examples[reason].get('key', '?')}"]
        for reason, count in counts.most_common(_REASONS)
    ]
    different = {(row.get("shard"), row.get("key")): row for row in rows}
    text = (
        f"{len(different):,} images could not be read, {len(rows):,} times in all; others stood in for them. "
        f"{run.path.name}/skipped lists each; `shards verify` on the shards says how to mend them."
    )
    pictures = "".join(_picture(run, row) for row in list(different.values())[:_PICTURES])
    reasons = table("Reasons", ["reason", "times", "for example"], lines, numbers_from=3)
    return section("What was skipped", text, f'{reasons}<div class="wall">{pictures}</div>')


def _rows(run_dir: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(run_dir.glob("skipped/*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # cut by a crash
                continue
            if isinstance(row, dict):
                yield row


def _picture(run: ReportedRun, row: dict[str, Any]) -> str:
    caption = f"{row.get('key', '?')}: {row.get('reason', '?')}"
    image = next(filter(None, (_salvaged(folder, row) for folder in _folders(run))), None)
    shown = (
        f'<img src="{data_url(image)}" alt="what is left of {escape(str(row.get("key")))}">'
        if image
        else '<div class="nothing">no picture</div>'
    )
    return (
        f'<figure class="failure">{shown}<figcaption title="{escape(caption)}">{escape(caption)}</figcaption></figure>'
    )


def _folders(run: ReportedRun) -> Sequence[Path]:
    """Shard folders on disk; what is in a store is not fetched for a picture."""
    return [Path(location) for location, _, _ in corpus_settings(run.config.data) if "://" not in location]


def _salvaged(folder: Path, row: dict[str, Any]) -> Image.Image | None:
    """What Pillow makes of the bytes that lie where the image should, even if they end early; None if nothing."""
    shard, offset = row.get("shard"), row.get("offset")
    path = folder / str(shard)
    if not isinstance(offset, int) or Path(str(shard)).name != shard or not path.is_file():
        return None
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        with path.open("rb") as file:
            image = Image.open(io.BytesIO(_payload(file, offset)))
            image.draft("RGB", (256, 256))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, tarfile.TarError, Image.DecompressionBombError):
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _payload(file: io.BufferedReader, offset: int) -> bytes:
    """The bytes of an image from its offset on: up to the size in the tar header in front of it, if that is whole."""
    file.seek(max(0, offset - tarfile.BLOCKSIZE))
    try:
        size = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "replace").size
    except tarfile.HeaderError:
        size = _MOST_BYTES
    file.seek(offset)
    return file.read(min(size, _MOST_BYTES))
