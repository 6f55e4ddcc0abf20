"""Photometric changes on a CPU: images a second and core, and how much faster than doing them plainly.

    python benchmarks/views.py [--batch 64] [--rounds 9]

For each recipe of views: the chain that runs on CPUs, and a plain form of it, which makes one change after the other
over the whole batch, each by its definition in `largescale/data/changes.py`, of the views that it applies to. One
process, one thread; both take turns in every round, and the clock is the process's CPU time, which is less disturbed
by what else the machine does. Before that, their views are compared. Writes benchmarks/results/views.json and views.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from largescale.config import AugmentConfig
from largescale.data import augment_draws as draw
from largescale.data import changes
from largescale.data.augment import Augment
from largescale.data.augment_draws import DRAWS
from largescale.data.changes import per_sample
from largescale.data.jitter import orders, parts
from largescale.run.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RECIPES = {
    "published: 2 x 224 + 6 x 96 px": (AugmentConfig(), [(2, 224), (6, 96)]),
    "small: 2 x 96 + 4 x 48 px": (AugmentConfig(), [(2, 96), (4, 48)]),
    "tiny: 2 x 32 + 4 x 16 px": (AugmentConfig(), [(2, 32), (4, 16)]),
}


def plain(config: AugmentConfig, views: Tensor, draws: Tensor) -> Tensor:
    """One change after the other over the whole batch."""
    uniforms = draws.float()
    x = views.to(torch.float32, memory_format=torch.contiguous_format).div(255)
    change_where(draws[:, draw.FLIP] < config.flip, x, lambda x: x.flip(-1))
    active = parts(config)
    jittered, order = draws[:, draw.JITTER] < config.jitter, orders(draws, len(active))
    for slot in range(len(active)):
        for number, part in enumerate(active):
            amounts = per_sample(part.amounts(uniforms))
            change_where(jittered & (order[:, slot] == number), x, getattr(changes, part.name), amounts)
    change_where(draws[:, draw.GRAY] < config.grayscale, x, lambda x: changes.luma(x).expand_as(x))
    low, high = config.blur_sigma
    sigma = low + uniforms[:, draw.SIGMA] * (high - low)
    blurred = draws[:, draw.BLUR] < config.blur
    change_where(blurred, x, lambda x, sigma: changes.gaussian_blur(x, sigma, high), sigma)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def change_where(mask: Tensor, x: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Change the views of a mask [N] in place; parameters have one row per view."""
    rows = mask.nonzero()[:, 0]
    if len(rows) > 0:
        x[rows] = change(x[rows], *(values[rows] for values in parameters))


def measure(config: AugmentConfig, groups: list[tuple[int, int]], batch: int, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds per image of both, one of each per round after one that warms up."""
    random = torch.Generator().manual_seed(0)
    data = []
    for num, side in groups:
        views = torch.randint(0, 256, (num * batch, side, side, 3), dtype=torch.uint8, generator=random)
        draws = torch.rand(num * batch, DRAWS, dtype=torch.float64, generator=random)
        data.append((views.permute(0, 3, 1, 2), draws))
    chain = Augment(config, MEAN, STD, torch.float32)
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain": lambda views, draws: plain(config, views, draws),
        "chain": chain,
    }
    for views, draws in data:
        off = (chain(views, draws) - plain(config, views, draws)).abs() * torch.tensor(STD)[:, None, None]
        if float(off.max()) > 1 / 255:
            raise SystemExit(f"views of {views.shape[-1]} px differ by {float(off.max())}")
    costs: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name in list(forms)[:: 1 if number % 2 else -1]:
            started = time.process_time()
            for views, draws in data:
                forms[name](views, draws)
            if number > 0:
                costs[name].append(1000 * (time.process_time() - started) / batch)
    return costs


def row(name: str, costs: dict[str, list[float]]) -> str:
    """Of the table: medians, and the median of the rounds' ratios with the middle half of them."""
    ratios = sorted(one / other for one, other in zip(costs["plain"], costs["chain"], strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    before, after = (statistics.median(costs[form]) for form in ("plain", "chain"))
    return (
        f"| {name} | {before:.2f} | {after:.2f} | {1000 / after:,.0f} | "
        f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) |"
    )


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| views | plain, ms per image | chain, ms per image | images/s and core | times as fast |",
        "|---|---|---|---|---|",
    ]
    costs = {}
    for name, (config, groups) in RECIPES.items():
        costs[name] = measure(config, groups, arguments.batch, arguments.rounds)
        lines.append(row(name, costs[name]))
        print(lines[-1], flush=True)
    machine = environment()
    machine.pop("command")
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"batch": arguments.batch, "ms_per_image": costs, "environment": machine}
    (RESULTS / "views.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "views.md").write_text(
        "# Photometric changes on a CPU\n\n"
        f"`python benchmarks/views.py` on {time.strftime('%Y-%m-%d')}: {machine['processor']}, one thread, torch "
        f"{machine['torch']}; flip, colour jitter (0.8), grey (0.2), blur (0.5) and normalisation of batches of "
        f"{arguments.batch} images; CPU time, medians of {arguments.rounds} rounds in which both forms take turns, and "
        "the median of the ratios of the same round with the middle half of them. Both give the same views to 1/255.\n"
        "\n" + "\n".join(lines) + "\n\n"
        "Plain: each change by its definition over the whole batch. Chain: a few views at a time, in the cache, in "
        "place (`largescale/data/augment_on_cpu.py`).\n"
    )


if __name__ == "__main__":
    main()
