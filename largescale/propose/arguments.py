"""What `largescale init` takes on the command line; imports nothing slow, since `--help` shows it."""

from __future__ import annotations

import argparse


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    command.add_argument("shards", metavar="SHARDS", help="folder or URL of shards, labelled or not")
    command.add_argument("--method", metavar="NAME", help="method.name of the recipe; a wrong name lists all")
    command.add_argument(
        "--hours", type=float, default=12.0, metavar="H", help="how long the training may take (default 12)"
    )
    command.add_argument(
        "--gpu", metavar="KIND", help="for GPUs of another machine; a wrong name lists all kinds (default: those here)"
    )
    command.add_argument("--gpus", type=int, metavar="N", help="number of GPUs; 0: none (default: all here)")
