"""`shards verify --repair`: rewrite the damaged shards from the source, and only those."""

from __future__ import annotations

from shards.conversion.convert import rewrite
from shards.format.manifest import Manifest
from shards.format.shard_index import how_to_mend
from shards.ground.errors import InputError
from shards.inspection.verify import Problem
from shards.stores.locate import manifest_at
from shards.stores.store import is_url

_IN_A_STORE = (
    "remove the manifest and the damaged shards, and run the same conversion again, which writes what is missing"
)


def advice(location: str, problems: list[Problem]) -> str:
    """What mends these problems of a shard folder: `repair` only where it can."""
    if is_url(location):
        return f"upload the files again, or {_IN_A_STORE}"
    manifest = manifest_at(location)
    if strangers := _strangers(manifest, problems):
        return f"move away what is not in the manifest, such as {strangers[0]}"
    mend = how_to_mend(manifest.root)
    return f"restore the files, or run {mend}" + ("" if "--repair" in mend else ", which leaves out what is damaged")


def repair(location: str, problems: list[Problem], source: str | None) -> list[str]:
    """Rewrite the shards that have problems, from the plan of their conversion.

    Args:
        location: path of the folder.
        problems: what `verify` found there.
        source: where the images are now; None is where they were.

    Returns:
        Names of the shards that were written; each has the checksum that the manifest names.

    Raises:
        InputError: a store, a folder without a plan, a problem that is not a shard's, or a source that has changed.
    """
    if not problems:
        return []
    if is_url(location):
        raise InputError(f"{location}: --repair fixes local folders; here, {_IN_A_STORE}")
    manifest = manifest_at(location)
    if strangers := _strangers(manifest, problems):
        raise InputError(f"{manifest.root / strangers[0]}: not one of its shards; move it away")
    damaged = sorted({problem.shard for problem in problems})
    for name in damaged:
        rewrite(manifest, name, source)
    return damaged


def _strangers(manifest: Manifest, problems: list[Problem]) -> list[str]:
    return sorted({problem.shard for problem in problems} - {shard.name for shard in manifest.shards})
