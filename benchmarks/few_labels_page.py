"""The page of `benchmarks.few_labels`: what was measured, as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.accuracies import RESULTS

OUT = RESULTS / "few_labels.md"
_BY_HAND = "<!-- read -->\n"

Found = list[dict[str, Any]]
"""Rows of few_labels.json: `row`, `share`, `seed`, `rates`, `held_out` and `test` in percent, `machine`, `cpu_s`."""


def found_before() -> Found:
    """What was measured."""
    path = OUT.with_suffix(".json")
    found: Found = json.loads(path.read_text()) if path.is_file() else []
    return found


def page(found: Found, names: Sequence[str]) -> str:
    """The results: a table of rows and seeds per share, then what the rates were chosen by.

    Args:
        found: what was measured.
        names: of rows, in their order.
    """
    machines = "; ".join(dict.fromkeys(row["machine"] for row in found))
    lines = [
        "# Few labels",
        "",
        f"`python -m benchmarks.few_labels` on {machines}, 1 rank, 1 thread. Top-1 in percent on 2,000 test images "
        "(sampling error about 0.9), which choose nothing. All rows of a seed use the labels of the same images; all "
        "but training from scratch see all 10,000 training images besides. Networks, views and length of pretraining, "
        "6.5 epochs, are those of configs/small. Fine-tuning is `low-shot-finetune`, 50 epochs with 1% of the labels "
        "and 20 with 10%, on the crops of pretraining, not mirrored, from a classifier that begins as logistic "
        "regression; training from scratch is the same for twice the epochs, from a classifier near 0. Rates of all "
        "these are chosen by the mean over seeds on 2,000 held-out training images. SimCLR has a temperature of 0.2, "
        "chosen on them too. A quarter is the network of half the width.",
    ]
    for share in sorted({row["share"] for row in found}):
        own = [row for row in found if row["share"] == share]
        lines += ["", f"## {100 * share:g}% of the labels", "", *_table(own, names)]
    lines += ["", "## What rates were chosen by", "", *_choices(found, names)]
    _, mark, text = OUT.read_text().partition(_BY_HAND) if OUT.is_file() else ("", "", "")
    return "\n".join(lines) + "\n" + (f"\n{mark}{text}" if mark else "")


def chosen(own: Found) -> list[float]:
    """Of a row's measurements, the rates that are best on held-out images: by the mean over seeds that have all."""
    tried = {seed: {tuple(row["rates"]) for row in own if row["seed"] == seed} for seed in {row["seed"] for row in own}}
    most = max(map(len, tried.values()))
    whole = [row for row in own if len(tried[row["seed"]]) == most]
    return max((row["rates"] for row in whole), key=lambda rates: _mean(whole, rates, "held_out"))


def _mean(own: Found, rates: list[float], part: str) -> float:
    return statistics.mean(row[part] for row in own if row["rates"] == rates)


def _table(own: Found, names: Sequence[str]) -> list[str]:
    seeds = sorted({row["seed"] for row in own})
    lines = [f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |", "|---" * (len(seeds) + 2) + "|"]
    for name in names:
        of_row = [row for row in own if row["row"] == name]
        rates = chosen(of_row) if of_row else []
        by_seed = {row["seed"]: row["test"] for row in of_row if row["rates"] == rates}
        if by_seed:
            cells = [f"{by_seed[seed]:.2f}" if seed in by_seed else "-" for seed in seeds]
            lines.append(f"| {name} | {' | '.join(cells)} | **{statistics.mean(by_seed.values()):.2f}** |")
    return lines


def _choices(found: Found, names: Sequence[str]) -> list[str]:
    """Top-1 on held-out images and on test images for all rates that were tried, means over seeds."""
    lines = ["| | labels | rates of trunk and classifier: held-out, test |", "|---|---|---|"]
    for share in sorted({row["share"] for row in found}):
        for name in names:
            own = [row for row in found if (row["row"], row["share"]) == (name, share)]
            tried = list(dict.fromkeys(tuple(row["rates"]) for row in own))
            if len(tried) > 1:
                best = chosen(own)
                said = "; ".join(_try(own, [*rates], best) for rates in tried)
                lines.append(f"| {name} | {100 * share:g}% | {said} |")
    return lines


def _try(own: Found, rates: list[float], best: list[float]) -> str:
    mark = "**" if rates == best else ""
    held, test = _mean(own, rates, "held_out"), _mean(own, rates, "test")
    return f"{mark}{rates[0]:g}, {rates[1]:g}: {held:.2f}, {test:.2f}{mark}"
