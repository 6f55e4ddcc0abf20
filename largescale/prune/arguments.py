"""What `largescale prune` takes on the command line; imports nothing slow, since `--help` shows it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = command.add_argument
    add("run_dir", type=Path, metavar="RUN", help="folder of a complete run; the same command goes on after a stop")
    add("overrides", nargs="*", metavar="key=value", help="replace values of the run's configuration for all rounds")
    add("--rate", type=float, default=0.2, metavar="F", help="part of the weights left that a round prunes (0.2)")
    add("--rounds", type=int, default=10, metavar="N", help="rounds; more can be added later (default 10)")
    add("--rewind", type=int, default=0, metavar="STEP", help="train each round from this step of RUN (default: 0)")
    add("--one-shot", action="store_true", help="each round prunes RUN's weights, not those of the round before")
    add(
        "--random",
        nargs="?",
        const="weights",
        default="",
        choices=("weights", "masks"),  # else a RUN behind it would be taken for it, and said to be missing
        metavar="WHAT",
        help="a control: `weights` are drawn again under known masks (default), or `masks` are drawn",
    )
    add("--masks", type=Path, metavar="DIR", help="train under the masks of this pruning, of RUN or another run")
    add("--out", type=Path, metavar="DIR", help="folder of the rounds (default: in RUN, named after the way)")
    add(
        "--evaluate",
        action="append",
        default=[],
        metavar="PROTOCOL",
        help="measure RUN and each round so, as `largescale evaluate` does; may be given several times",
    )


def run(arguments: argparse.Namespace) -> None:
    """Prune as the arguments say. Collectives: every rank must call it."""
    from largescale.distributed import stopping, threads

    threads.require(threads.COMMAND + threads.of_math())
    stopping.listen()
    from largescale.distributed.launch import own_launch
    from largescale.observe.console import configure_logging
    from largescale.prune.command import Places, prune
    from largescale.prune.wish import Wish

    launch = own_launch()
    configure_logging(launch.rank if launch else 0, launch.world_size if launch else 1)
    wish = Wish(arguments.rate, arguments.rounds, arguments.rewind, arguments.one_shot, arguments.random)
    run_dir, out, masks = (
        path.expanduser() if path else None for path in (arguments.run_dir, arguments.out, arguments.masks)
    )
    assert run_dir is not None
    places = Places(run_dir, out, masks)
    done = prune(places, wish, protocols=arguments.evaluate, overrides=arguments.overrides)
    if stopping.own_rank() <= 0:
        sys.stdout.write(done + "\n")
