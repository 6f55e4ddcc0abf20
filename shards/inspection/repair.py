"""`shards verify --repair`: rewrite the damaged shards from the source, and only those."""

from __future__ import annotations

from shards.conversion.convert import rewrite
from shards.format.manifest import Manifest
from shards.ground.errors import InputError
from shards.inspection.verify import Problem


def repair(manifest: Manifest, problems: list[Problem], source: str | None) -> list[str]:
    """Rewrite the shards that have problems, from the plan of their conversion.

    Args:
        manifest: of the folder.
        problems: what `verify` found.
        source: where the images are now; None is where they were.

    Returns:
        Names of the shards that were written; each has the checksum that the manifest names.

    Raises:
        InputError: the folder has no plan, a problem is not a shard's, or the source has changed.
    """
    known = {shard.name for shard in manifest.shards}
    strangers = sorted({problem.shard for problem in problems} - known)
    if strangers:
        raise InputError(f"{manifest.root / strangers[0]}: not one of its shards; move it away")
    damaged = sorted({problem.shard for problem in problems})
    for name in damaged:
        rewrite(manifest, name, source)
    return damaged
