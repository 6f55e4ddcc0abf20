"""What `largescale plan` takes on the command line; imports nothing slow, since `--help` shows it."""

from __future__ import annotations

import argparse


def add_arguments(command: argparse.ArgumentParser, recipe: str) -> None:
    """Declare the arguments; `recipe` explains the first of them."""
    command.add_argument("config", metavar="CONFIG", help=recipe)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    command.add_argument("--gpu", default="h100", metavar="KIND", help="default h100; a wrong name lists all kinds")
    command.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs per node (default 8)")
    command.add_argument("--strategy", metavar="NAME", help="the recipe under another parallel.strategy")
    command.add_argument(
        "--images",
        type=_count,
        metavar="N",
        help="images in the corpus (default: in the recipe's shards, or ImageNet's 1,281,167)",
    )
    command.add_argument("--price", type=float, default=0.0, metavar="P", help="price per GPU-hour")
    command.add_argument("--compare", action="store_true", help="show the strategies side by side")
    command.add_argument("--json", action="store_true", help="print JSON")


def _count(text: str) -> int:
    """A number such as 1e9."""
    number = float(text)
    if not abs(number) < 2**63:
        raise argparse.ArgumentTypeError("expected a number of images, such as 1e9")
    return int(number)
