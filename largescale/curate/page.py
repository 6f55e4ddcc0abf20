"""The page about a curation: one self-contained file, for light and dark screens, wide and narrow ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from largescale.curate.pictures import Pictures
from largescale.curate.result import LevelSizes, Outcome
from largescale.curate.sizes_plot import sizes_figure
from largescale.curate.summary import sentence
from largescale.report import plots
from largescale.report.html_parts import document, escape, missing, section, table
from shards.ground.files import atomic_write

_CLUSTERS, _SHOWN, _LEAST = 8, 8, 10
"""Clusters shown of each kind, images of each, and images that a cluster must have had to be called cut."""


def write_page(path: Path, record: dict[str, Any], outcome: Outcome, pictures: Pictures) -> None:
    """Write the page.

    Args:
        path: the file.
        record: as in curation.json.
        outcome: sizes and examples, of rank 0.
        pictures: of images.
    """
    parts = [
        _levels(record, outcome),
        _clusters("The largest clusters", "Of the top level, by images before.", _largest(outcome), outcome, pictures),
        _clusters(
            "The most cut of the others",
            "Those of which the smallest part is left.",
            _most_cut(outcome),
            outcome,
            pictures,
        ),
        _pairs(outcome, pictures),
        _settings(record),
    ]
    says = f"{sentence(record)}. Made {time.strftime('%Y-%m-%d %H:%M:%S')}."
    page = document("Curation", f"<h1>Curation</h1><p>{escape(says)}</p>", "".join(parts))
    with atomic_write(path) as file:
        file.write(page.encode())


def _title(level: LevelSizes) -> str:
    return "coarse clusters" if level.name == "coarse" else f"level {level.name.removeprefix('cluster_')}"


def _levels(record: dict[str, Any], outcome: Outcome) -> str:
    rows = [
        (
            _title(level),
            f"{told['clusters']:,}",
            *(f"{told[when][key]:,}" for key in ("median", "largest") for when in ("before", "after")),
            f"{told['largest_tenth_before']:.1%}",
            f"{told['largest_tenth_after']:.1%}",
        )
        for level, told in zip(outcome.levels, record["levels"], strict=True)
    ]
    heads = ("", "clusters", "median before", "after", "largest before", "after", "largest tenth before", "after")
    figures = "".join(
        f"<div>{plots.in_page(sizes_figure(_title(level), level), level.name, _alt(level))}</div>"
        for level in outcome.levels
    )
    text = (
        "Images in each cluster before and after, sorted by size. The largest tenth: the share of all images in those "
        "clusters that had most before. A duplicate counts to the cluster of what it is a duplicate of."
    )
    body = f'<div class="grid">{figures}</div>{table("Sizes of clusters", heads, rows, numbers_from=1)}'
    return section("Clusters before and after", text, body)


def _alt(level: LevelSizes) -> str:
    return (
        f"{_title(level)}: the largest of {len(level.before):,} clusters had {int(level.before.max()):,} images "
        f"and has {int(level.after.max()):,}"
    )


def _largest(outcome: Outcome) -> list[int]:
    return [int(one) for one in np.argsort(-outcome.levels[-1].before, kind="stable")[:_CLUSTERS]]


def _most_cut(outcome: Outcome) -> list[int]:
    top = outcome.levels[-1]
    left = np.where(top.before >= _LEAST, top.after / np.maximum(top.before, 1), 1.0)
    order = np.argsort(left, kind="stable")
    shown = set(_largest(outcome))
    return [int(one) for one in order if left[one] < 1 and int(one) not in shown][:_CLUSTERS]


def _clusters(title: str, text: str, which: list[int], outcome: Outcome, pictures: Pictures) -> str:
    top, examples = outcome.levels[-1], outcome.examples
    assert examples is not None, "rank 0 has them"
    if not which:
        return section(title, "", missing("None was cut."))
    rows = []
    for cluster in which:
        before, after = int(top.before[cluster]), int(top.after[cluster])
        name = f'<div class="name">#{cluster}<br>{before:,} → {after:,}</div>'
        kept, left_out = examples.of(cluster)
        kept = kept[: _SHOWN if not left_out else _SHOWN // 2 + max(0, _SHOWN // 2 - len(left_out))]
        cells = [(sample, "same", "kept") for sample in kept]
        cells += [(sample, "other", "left out") for sample in left_out[: _SHOWN - len(kept)]]
        shown = "".join(_figure(pictures, *cell) for cell in cells) if pictures.are_there else ""
        rows.append(_strip(name + shown, f"cluster {cluster}: {before:,} images before, {after:,} after"))
    if pictures.are_there:
        text += " Some images of each: solid green frame kept, dashed red frame left out."
    return section(title, text, "".join(rows) + ("" if pictures.are_there else _no_pictures()))


def _pairs(outcome: Outcome, pictures: Pictures) -> str:
    title, examples = "Duplicates", outcome.examples
    assert examples is not None, "rank 0 has them"
    if not len(examples.pairs):
        return section(title, "", missing("None were dropped."))
    text = "Some that were dropped (dashed red frame), each beside the kept image nearest to it, and their cosine."
    if not pictures.are_there:
        return section(title, text, _no_pictures())
    pairs = examples.pairs[np.argsort(-examples.pairs[:, 2], kind="stable")]
    cells = "".join(
        f'<div class="strip" role="group" aria-label="a duplicate and the kept image">'
        f"{_figure(pictures, int(dropped), 'other', 'dropped')}"
        f"{_figure(pictures, int(kept), 'same', f'cosine {cosine:.4f}')}</div>"
        for dropped, kept, cosine in pairs.tolist()
    )
    wide = "grid-template-columns: repeat(auto-fill, minmax(200px, 1fr))"
    return section(title, text, f'<div class="wall" style="{wide}">{cells}</div>')


def _no_pictures() -> str:
    return missing(
        "No pictures: to have them, remove this folder, and run the command again with --shards DIR, or on features "
        "that were written with --thumbnails PX."
    )


def _strip(cells: str, says: str) -> str:
    return f'<div class="strip" tabindex="0" role="group" aria-label="{escape(says)}">{cells}</div>'


def _figure(pictures: Pictures, sample: int, kind: str, caption: str) -> str:
    return (
        f'<figure class="{kind}"><img src="{pictures.url(sample)}" alt="sample {sample}, {escape(caption)}" '
        f'loading="lazy"><figcaption title="sample {sample}">{escape(caption)}</figcaption></figure>'
    )


def _settings(record: dict[str, Any]) -> str:
    told = record["settings"] | {"epsilon": f"{record['epsilon']:.3g}", "features": record["features"]}
    told |= {f"seconds, {stage}": f"{value:,.1f}" for stage, value in record["seconds"].items()}
    told |= {"ranks": record["num_ranks"], "peak memory of rank 0": f"{record['peak_memory_bytes'] / 1e9:.2f} GB"}
    rows = [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)) for name, value in told.items()
    ]
    return section("Settings", "", table("Settings, times and memory", ("", ""), rows, numbers_from=9))
