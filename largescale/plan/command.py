"""`largescale plan`: from the command's arguments to its text."""

from __future__ import annotations

import argparse
import json
import sys

from largescale.config import Config, corpus_settings, load_config
from largescale.plan.planner import IMAGENET, Request, compare, emulated, other_precision, plan
from largescale.plan.table import side_by_side, table
from shards.ground.errors import InputError
from shards.stores.locate import manifest_at


def run(arguments: argparse.Namespace) -> str:
    """The plan that the arguments ask for, as text.

    Raises:
        InputError: the recipe or a name in the arguments cannot be used.
    """
    strategy = [f"parallel.strategy={arguments.strategy}"] if arguments.strategy else []
    if arguments.strategy not in (None, "fsdp"):  # what fsdp alone has, and a recipe may set for it
        strategy += ["parallel.sharded_init=false", "parallel.replicate=1"]
    config = load_config(arguments.config, [*arguments.overrides, *strategy], default_shards="unset")
    images = arguments.images if arguments.images is not None else _num_images(config)
    if not images and arguments.images is None:
        images = IMAGENET
        sys.stderr.write(
            f"data.shards={config.data.shards}: cannot be counted here, so ImageNet's {IMAGENET:,} images "
            f"are assumed; pass --images N\n"
        )
    request = Request(arguments.gpus, arguments.gpu, arguments.gpus_per_node, images, arguments.price)
    if said := other_precision(config, request):
        sys.stderr.write(f"{said}\n")
    plans = compare(config, request) if arguments.compare else [plan(config, request)]
    if said := emulated(plans, request):
        sys.stderr.write(f"{said}\n")
    if arguments.json:
        return json.dumps(plans if arguments.compare else plans[0], indent=1)
    return side_by_side(plans) if arguments.compare else table(plans[0])


def _num_images(config: Config) -> int:
    """Images in a recipe's shards; 0 if these are not here, or only a subset of them is used."""
    settings = corpus_settings(config.data)
    try:
        counts = [manifest_at(location).num_samples for location, _, _ in settings if location != "unset"]
    except InputError:
        return 0
    return 0 if any(subset for _, _, subset in settings) else sum(counts)
