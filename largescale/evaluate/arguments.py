"""Arguments of `largescale features`, `assign` and `finetune`; imports nothing slow, since `--help` shows them."""

from __future__ import annotations

import argparse


def add_features_arguments(command: argparse.ArgumentParser) -> None:
    """Add those of `largescale features`."""
    command.add_argument("place", metavar="RUN", help="folder of a run, RUN/checkpoints/step-..., or a file of weights")
    command.add_argument("shards", metavar="SHARDS", help="folder or URL of shards, labelled or not")
    command.add_argument("out", metavar="OUT", help="folder to write to, one file per shard")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the run's configuration")
    command.add_argument("--format", default="parquet", metavar="NAME", help="parquet (default) or npy")
    command.add_argument("--dtype", default="fp16", metavar="TYPE", help="fp16 (default) or fp32")
    command.add_argument("--assign", action="store_true", help="add what each image is assigned to, with its score")
    command.add_argument(
        "--thumbnails", type=int, default=0, metavar="PX", help="add a JPEG of each image, for viewers"
    )
    command.add_argument(
        "--dim", type=int, default=0, metavar="N", help="write N principal components instead of all numbers"
    )
    command.add_argument(
        "--whiten",
        type=float,
        default=0.0,
        metavar="P",
        help="divide each component by the P-th power of its standard deviation: 1 makes all equal, 0.5 half way",
    )


def add_assign_arguments(command: argparse.ArgumentParser) -> None:
    """Add those of `largescale assign`."""
    command.add_argument("place", metavar="RUN", help="folder of a run, or RUN/checkpoints/step-...")
    command.add_argument("shards", metavar="SHARDS", help="folder or URL of shards, labelled or not")
    command.add_argument("out", metavar="OUT", help="folder to write to, one file per shard and _summary.json")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the run's configuration")


def add_finetune_arguments(command: argparse.ArgumentParser) -> None:
    """Add those of `largescale finetune`."""
    command.add_argument("place", metavar="RUN", help="folder of a run, RUN/checkpoints/step-..., or a file of weights")
    command.add_argument("out", metavar="OUT", help="file to write, ending in .safetensors")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the run's configuration")
    command.add_argument(
        "--protocol",
        default="low-shot-finetune",
        metavar="NAME",
        help="whose training and settings: low-shot-finetune (default; a share of the labels) or finetune (all labels)",
    )
