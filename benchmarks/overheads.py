"""What each method costs beyond forward and backward passes of networks: its loss, its teachers, its memories.

    python benchmarks/overheads.py [--rounds 7] [--batch 32] [--methods simclr ...]

A ResNet-18 on one process and on the CPU, fp32, under each method's published recipe: its head, queue, bank, clusters
and views, but views of 224 pixels have 96 and smaller ones 48 here. Measured apart, each on what a real step has left:

- task views: what the method cuts out of views or does to them on the device, such as tiles;
- loss: the loss of embeddings, and its gradient at them (Sinkhorn, softmax over a queue, Gram matrices);
- teachers: their running averages, once per step;
- memories: what else is moved after an update, such as a queue.

A step is all of a step, with the update and with every objective if there are several, on views that are there
already. The loss of a method whose decoders and discriminators are part of it is not apart. A round measures a step
and its parts in turns: seconds of the processor on one thread, which other processes change little. Shares are those
of medians. Writes benchmarks/results/overheads.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import views
from tqdm import tqdm

from largescale.config import Config, load_config
from largescale.config.value_types import types_of
from largescale.data.views import Views
from largescale.methods import METHODS, build_method
from largescale.methods.embedding_method import Embedded, EmbeddingMethod
from largescale.parallel.strategies import build_engine
from largescale.run.environment import environment

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "overheads.md"
RANKS = 64
"""Of the published runs in which labelled images join a step."""
LARGE, SMALL, SMALL_BELOW = 96, 48, 160
"""Sides of views here, and the published side below which a view is a small one."""
CPU = torch.device("cpu")
COLUMNS = ("step", "task views", "loss", "teachers", "memories")
RECIPES = {"swav": "swav/resnet50_800ep"}
"""Instead of the one that `largescale init` starts from."""
OTHERWISE = {
    "pcl": ["method.warmup_epochs=0"],
    "pirl": ["method.patch=24"],
    "jigsaw": ["method.tile=24"],
    "patches": ["method.tile=21", "method.gap=7"],
    "cpc": ["method.window=24", "method.stride=12", "method.tile=22"],
}
"""Settings other than the published ones: clusters take part at once, patches fit into smaller views."""
TASK_VIEWS: dict[str, Callable[[Any, Views], object]] = {
    "context_encoder": lambda method, views: method.hole(views.ids, LARGE, 0).hidden_in(views.images[0]),
    "artifacts": lambda method, views: method.dropped(views.ids, 0),
}
"""Of methods that do not say by `task_views` what they do to views."""


def comes_alone(name: str) -> bool:
    """Whether a method has a published recipe, and a step of it needs no file of a teacher."""
    return bool(METHODS[name].reference) and "teacher" not in types_of(METHODS[name].Settings)


def published(name: str, batch: int, *, small: bool) -> tuple[str, Config]:
    """A method's published recipe, and what it says for one process without shards.

    Args:
        name: of the method.
        batch: images a step.
        small: a ResNet-18 on smaller views.
    """
    recipe, unread = RECIPES.get(name, METHODS[name].reference), "data.shards=none"
    settings = [unread, f"train.global_batch={batch}", "train.precision=fp32", "parallel.strategy=ddp"]
    whole = load_config(recipe, [unread])
    if (support := whole.method.supports()) is not None:  # those of one rank
        settings.append(f"method.support.classes={-(-support.classes // RANKS)}")
    if small:
        sizes = [group.size for group in whole.data.crops]
        settings += [
            "model.backbone=resnet18",
            *(f"data.crops.{i}.size={SMALL if size < SMALL_BELOW else LARGE}" for i, size in enumerate(sizes)),
            *OTHERWISE.get(name, []),
        ]
    return recipe, load_config(recipe, settings)


class Measured:
    """A method under its published recipe, of which a step and its parts can be timed."""

    def __init__(self, name: str, batch: int) -> None:
        self.recipe, config = published(name, batch, small=True)
        torch.manual_seed(0)
        method = build_method(config)
        self.name, self.method, self.engine = name, method, build_engine(method, config, CPU)
        # Of a method in stages, the last one.
        self.step = method.length.num_steps - 1 if len(method.objectives) > 1 else 0
        self.views, self.lr = views(config, CPU), config.optim.lr

    def __call__(self) -> dict[str, float]:
        """Seconds of a step, and of its parts."""
        found = {"step": _seconds(self._step)}
        micro_batch = self.engine.micro_batches(self.views)[0]
        with torch.no_grad():
            found |= self._of_views_and_loss(micro_batch)
        followed = bool(self.method.averages())
        found["teachers"] = _seconds(lambda: self.engine.follow(0.99)) if followed else 0.0
        found["memories"] = _seconds(lambda: self.method.after_update(0))
        return found

    def _of_views_and_loss(self, micro_batch: Views) -> dict[str, float]:
        if not isinstance(self.method, EmbeddingMethod):
            return {"task views": _seconds(lambda: TASK_VIEWS[self.name](self.method, micro_batch)), "loss": 0.0}
        method = self.method
        made = _seconds(lambda: method.task_views(micro_batch, 0))
        whole = Embedded([method(micro_batch, 0, "inputs")], self.views.ids)
        return {"task views": made, "loss": _seconds(lambda: method(whole, 0, "loss"))}

    def _step(self) -> None:
        for objective in self.method.objectives_of(self.step):
            check = self.engine.check(self.views, self.engine.forward_backward(self.views, self.step, objective).loss)
            self.engine.update(check, step=self.step, lr=self.lr, clip=0.0)


def _seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(names: list[str], batch: int, rounds: int) -> dict[str, tuple[str, dict[str, float]]]:
    """Recipe and medians in seconds, by method."""
    found = {}
    for name in tqdm(names, desc="overheads", unit="method", leave=False):
        subject = Measured(name, batch)
        subject()
        rows = [subject() for _ in range(rounds)]
        found[name] = subject.recipe, {key: statistics.median(row[key] for row in rows) for key in COLUMNS}
    return found


def write(found: dict[str, tuple[str, dict[str, float]]], batch: int, rounds: int) -> None:
    """The table."""
    about = environment()
    lines = [
        "# What methods cost beyond their networks",
        "",
        f"`python benchmarks/overheads.py --rounds {rounds} --batch {batch}` on {time.strftime('%Y-%m-%d')}, "
        f"{about['processor']}, "
        f"one thread, torch {about['torch']}: ResNet-18, batch {batch}, fp32, "
        f"views of {LARGE} and {SMALL} pixels, heads and memories of the published recipe. Medians, in ms of the"
        " processor.",
        "",
        "| method | recipe | step | task views | loss | teachers | memories | share of the step | task views, "
        "images/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (recipe, row) in sorted(found.items()):
        own = sum(row[key] for key in COLUMNS[1:])
        numbers = " | ".join(f"{1000 * row[key]:.1f}" for key in COLUMNS)
        rate = f"{batch / row['task views']:,.0f}" if row["task views"] > 0.0001 else "-"
        lines.append(f"| {name} | {recipe} | {numbers} | {own / row['step']:.1%} | {rate} |")
    OUT.write_text("\n".join(lines) + "\n")


def main() -> None:
    """See above."""
    with_recipes = list(filter(comes_alone, METHODS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--methods", nargs="+", choices=with_recipes, default=with_recipes, metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}/store")
        found = measure(arguments.methods, arguments.batch, arguments.rounds)
        dist.destroy_process_group()
    write(found, arguments.batch, arguments.rounds)
    print(OUT.read_text())


if __name__ == "__main__":
    main()
