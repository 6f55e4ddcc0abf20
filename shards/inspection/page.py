"""`shards info --html`: one self-contained page of what a shard folder holds, with a look at its images."""

from __future__ import annotations

import html
import io
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from shards.conversion.conversion_plan import open_plan
from shards.format.ledger import SKIPPED_NAME, read_ledger
from shards.ground.errors import InputError
from shards.ground.files import atomic_write
from shards.inspection.films import FILM_STYLE, FILMS, films
from shards.inspection.info import EXAMPLES, Facts, Tally
from shards.inspection.thumbnail import thumbnail
from shards.stores.folders import open_folder
from shards.stores.store import is_url

SHOWN_SKIPPED, SHOWN_CLASSES = 24, 30
"""Skipped images and classes that the page shows."""

_SHOWN_BYTES = 2**26
"""Larger files are not shown."""

_STYLE = """
body { margin: 0; background: #f5f7fa; color: #1f2933; font: 16px/1.5 system-ui, "Segoe UI", Roboto, Arial, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 64px }
h1 { font-size: 30px; margin: 0 } h2 { font-size: 19px; margin: 0 0 8px } p { color: #52606d; margin: 4px 0 12px }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 12px; padding: 20px 26px; margin-top: 20px }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 8px 24px }
.grid svg { width: 100%; height: auto }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 10px }
figure { margin: 0; min-width: 0 } figure img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #e4e7eb }
figcaption { font-size: 11px; color: #52606d; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: 5px 10px 5px 0;
border-bottom: 1px solid #e4e7eb } td.number { text-align: right; font-variant-numeric: tabular-nums }
"""


def write_page(facts: Facts, path: Path) -> None:
    """Write the page: counts, histograms, classes, random images, and what was skipped and why."""
    manifest, is_clips = facts.manifest, bool(len(facts.frames.values))
    panels = [
        _histogram("Resolution", facts.megapixels, "megapixels"),
        _histogram("Shape", facts.shape, "width / height"),
        _histogram("Stored bytes", facts.kilobytes, "KB per middle frame" if is_clips else "KB per image"),
        _bars("Formats", facts.formats),
        *_clip_panels(facts),
    ]
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards):,} shards"
    what, style = ("clips", _STYLE + FILM_STYLE) if is_clips else ("images", _STYLE)
    intro = f"{manifest.num_samples:,} {what} in {shards}, {_size(manifest.num_bytes)}, from {manifest.source}"
    shown = min(len(facts.examples), FILMS if is_clips else EXAMPLES)
    sections = [
        _section("What is there", f'<div class="grid">{"".join(panels)}</div>'),
        _classes(facts),
        _section(f"{shown} {what}, at random", films(facts) if is_clips else _sheet(_examples(facts))),
        _skipped(facts),
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(manifest.name)}</title>'
        f"<style>{style}</style><main><h1>{html.escape(manifest.name)}</h1><p>{html.escape(intro)}</p>"
        f"{''.join(sections)}</main></html>\n"
    )
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def _clip_panels(facts: Facts) -> list[str]:
    panels = (
        ("Frames", facts.frames, "frames per clip"),
        ("Motion", facts.motion, "change of luma from frame to frame"),
        ("Sound", facts.sound, "seconds of sound, of clips that have one"),
    )
    return [_histogram(title, tally, unit) for title, tally, unit in panels if len(tally.values)]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _histogram(title: str, tally: Tally, unit: str) -> str:
    figure, axes = plt.subplots(figsize=(4.2, 2.3))
    low, high = float(tally.values[0]), float(tally.values[-1])
    if high <= low * 1.001:
        bins = np.array([0.9 * low, 1.1 * high])
    elif high < 8 * low:
        bins = np.linspace(low, high, 40)
    else:
        bins = np.geomspace(low, high * 1.0001, 40)
        axes.set_xscale("log")
        # Powers alone would leave less than a decade without a tick, and matplotlib's ticks between them overlap.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.hist(tally.values, bins=bins.tolist(), weights=tally.counts, color="#2f6fde")
    axes.set_xlabel(f"{unit}; half of them from {tally.quantile(0.25):.3g} to {tally.quantile(0.75):.3g}")
    return _svg(figure, axes, title)


def _bars(title: str, counts: dict[str, int]) -> str:
    figure, axes = plt.subplots(figsize=(4.2, max(2.3, 0.24 * len(counts))))
    names = [name.replace("$", r"\$") for name in counts]  # between two of them would be a formula
    axes.barh(names[::-1], list(counts.values())[::-1], color="#2f6fde")
    return _svg(figure, axes, title)


def _svg(figure: plt.Figure, axes: plt.Axes, title: str) -> str:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    figure.tight_layout()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    plt.close(figure)
    return f"<div>{drawn.getvalue()[drawn.getvalue().index('<svg') :]}</div>"


def _classes(facts: Facts) -> str:
    counts = dict(sorted(facts.classes.items(), key=lambda item: -item[1])[:SHOWN_CLASSES])
    if not counts:
        return ""
    number = len(facts.manifest.classes)
    return _section(f"{number:,} classes" + (", the largest" if number > SHOWN_CLASSES else ""), _bars("", counts))


def _examples(facts: Facts) -> list[tuple[str, bytes]]:
    """Captions and bytes of the images that were chosen at random."""
    folder = open_folder(facts.location)
    return [
        (f"{example.key} ({example.shard}, {example.number})", folder.read_spans(example.shard, [example.span])[0])
        for example in facts.examples
    ]


def _skipped(facts: Facts) -> str:
    counts = facts.manifest.skipped
    if not counts:
        return ""
    rows = "".join(
        f'<tr><td>{html.escape(reason)}</td><td class="number">{count:,}</td></tr>'
        for reason, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    return _section("What was left out", f"<table>{rows}</table>{_sheet(_skipped_images(facts))}")


def _skipped_images(facts: Facts) -> list[tuple[str, bytes]]:
    """Some skipped files, of every reason, if they lie in a local folder that is still there."""
    if is_url(facts.location):
        return []  # its plan is elsewhere
    root = facts.manifest.root
    by_reason: dict[str, list[str]] = defaultdict(list)
    try:
        source = open_plan(root).source
        for row in read_ledger(root / SKIPPED_NAME):
            if len(by_reason[row["reason"]]) < SHOWN_SKIPPED:
                by_reason[row["reason"]].append(row["source"])
    except InputError:
        return []
    share = max(1, SHOWN_SKIPPED // max(1, len(by_reason)))
    return [
        (f"{reason}: {name}", payload)
        for reason, names in by_reason.items()
        for name in names[:share]
        if (payload := _read_small(Path(source.location, name)))
    ]


def _read_small(path: Path) -> bytes:
    """A file's bytes; none if it is gone, larger than is worth showing, or no file but a pipe, say, that never ends."""
    try:
        if not path.is_file() or path.stat().st_size > _SHOWN_BYTES:
            return b""
        return path.read_bytes()
    except (OSError, ValueError):
        return b""


def _sheet(images: list[tuple[str, bytes]]) -> str:
    figures = []
    for caption, payload in images:
        text = html.escape(caption)
        if drawn := thumbnail(payload):
            figures.append(
                f'<figure><img alt="" src="data:image/jpeg;base64,{drawn}">'
                f'<figcaption title="{text}">{text}</figcaption></figure>'
            )
    return f'<div class="sheet">{"".join(figures)}</div>' if figures else ""
