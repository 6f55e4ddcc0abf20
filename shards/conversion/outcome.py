"""What a conversion came to, in words."""

from __future__ import annotations

from collections.abc import Iterator

from shards.format.ledger import SKIPPED_NAME, read_ledger
from shards.format.manifest import Manifest
from shards.ground.errors import InputError
from shards.sources.found import NAMED
from shards.stores.locate import fetched

_SHOWN_PROBLEMS = 50


def costly_reasons(manifest: Manifest, location: str) -> Iterator[str]:
    """A line for each reason that may have cost many images at once, naming the first few of what it cost."""
    reasons = manifest.skipped.keys() & NAMED.keys()
    if not reasons:
        return
    first: dict[str, list[str]] = {reason: [] for reason in reasons}
    try:
        with fetched(location, [SKIPPED_NAME]) as folder:
            for row in read_ledger(folder / SKIPPED_NAME):  # it may have more rows than there is memory for
                if (names := first.get(row["reason"])) is not None and len(names) < _SHOWN_PROBLEMS:
                    names.append(row["source"])
    except InputError:  # the shards are finished all the same
        for reason in sorted(reasons):
            yield f"{location}: {reason}: {manifest.skipped[reason]} of them; {NAMED[reason]}"
        return
    for reason in sorted(reasons):
        left = manifest.skipped[reason] - len(first[reason])
        more = f" and {left} more" if left else ""
        yield f"{location}: {reason}: {', '.join(first[reason])}{more}; {NAMED[reason]}"


def summary(manifest: Manifest, location: str) -> str:
    """Images or clips, shards, bytes and classes of a folder, and how many files it left out."""
    what = "clips" if manifest.settings.get("clips") else "images"
    text = (
        f"{location}: {manifest.num_samples:,} {what} in {len(manifest.shards):,} shards, "
        f"{manifest.num_bytes:,} bytes, {len(manifest.classes)} classes"
    )
    skipped = sum(manifest.skipped.values())
    return f"{text}, {skipped:,} files skipped (see {location.rstrip('/')}/{SKIPPED_NAME})" if skipped else text
