"""What `largescale curate` takes on the command line; imports nothing slow, since `--help` shows it."""

from __future__ import annotations

import argparse
from pathlib import Path

_LONGEST_S = 12 * 3600.0
"""Half of the time after which a rank gives up waiting for others."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = command.add_argument
    add("features", type=Path, metavar="FEATURES", help="folder that `largescale features` wrote")
    add("out", type=Path, metavar="OUT", help="folder to make; the same command goes on after it was killed")
    add("--levels", default="", metavar="K1,K2,...", help="clusters of each level of hierarchical k-means, falling")
    add("--target", type=int, default=0, metavar="N", help="images to keep (default: all that are no duplicates)")
    add("--dedup", type=float, default=0.0, metavar="EPS", help="drop images of cosine 1 - EPS or more to a kept one")
    add("--dedup-fraction", type=float, default=0.0, metavar="F", help="drop about this part; finds EPS")
    add("--shards", metavar="DIR", help="shards that the features are of: compared, and shown on the page")
    add("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (default 0)")
    add("--rounds", type=int, default=10, metavar="N", help="of resampling in each level above the first (default 10)")
    add("--nearest", type=int, default=0, metavar="R", help="points resampled of a cluster (default: half the mean)")
    add("--iterations", type=int, default=20, metavar="N", help="of each k-means, at most (default 20)")
    add("--leaves", default="random", metavar="HOW", help="images taken of a cluster: random (default) or nearest")
    add("--repeat", type=int, default=1, metavar="N", help="times an image may count where there are few (default 1)")
    add("--coarse", type=int, default=0, metavar="K", help="clusters within which duplicates are looked for")
    add("--without", default="", metavar="C1,C2,...", help="top clusters, as the page numbers them, that give nothing")
    add("--memory-gb", type=float, default=0.0, metavar="GB", help="that a rank may use (default: what is there)")


def run(arguments: argparse.Namespace) -> str:
    """Curate as the arguments say; returns what was made in a line. Collectives: every rank must call it."""
    from largescale.curate.command import Places, curate, with_levels
    from largescale.curate.wish import Wish
    from largescale.processes import process_group
    from shards.ground.errors import InputError
    from shards.stores.store import is_url

    wish = with_levels(
        Wish(
            target=arguments.target,
            epsilon=arguments.dedup,
            fraction=arguments.dedup_fraction,
            seed=arguments.seed,
            rounds=arguments.rounds,
            nearest=arguments.nearest,
            iterations=arguments.iterations,
            leaves=arguments.leaves,
            repeat=arguments.repeat,
            coarse=arguments.coarse,
        ),
        arguments.levels,
        arguments.without,
    )
    if arguments.shards and is_url(arguments.shards):
        raise InputError(f"--shards={arguments.shards}: expected a folder; of a store, copy its manifest.json into one")
    shards = Path(arguments.shards).expanduser() if arguments.shards else None
    places = Places(arguments.features.expanduser(), arguments.out.expanduser(), shards, arguments.memory_gb)
    # Ranks that are done wait for those that have the largest coarse clusters.
    with process_group(hang_timeout_s=_LONGEST_S) as device:
        return curate(places, wish, device)
