"""Clips on the page of a shard folder: strips of their frames, and the waves of their sounds."""

from __future__ import annotations

import html

import numpy as np

from shards.clips.sound import from_flac
from shards.ground.errors import InputError
from shards.images.reading import ImageError
from shards.inspection.info import Example, Facts
from shards.inspection.thumbnail import thumbnail
from shards.stores.folders import Folder, open_folder

FILMS = 24
"""Clips that are shown."""

FILM_STYLE = """
.film { margin: 0 0 18px } .film .strip { display: grid; grid-template-columns: repeat(8, 1fr); gap: 2px;
background: #1f2933; padding: 6px 4px } .film img { aspect-ratio: 4 / 3; background: none }
.film svg { display: block; width: 100%; height: 44px; background: #eef2f7 }
"""

_WAVE = 480
"""Columns of a wave."""


def films(facts: Facts) -> str:
    """The clips of a folder that were chosen at random, as HTML."""
    folder = open_folder(facts.location)
    step = max(1, len(facts.examples) / FILMS)
    chosen = [facts.examples[int(place * step)] for place in range(min(FILMS, len(facts.examples)))]
    return "".join(_film(folder, example) for example in chosen)


def _film(folder: Folder, example: Example) -> str:
    sounds = [example.sound] if example.sound else []
    stored = folder.read_spans(example.shard, [*example.frames, *sounds])
    frames = stored[: len(example.frames)]
    shown = "".join(f'<img alt="" src="data:image/jpeg;base64,{thumbnail(frame)}">' for frame in frames)
    text = html.escape(f"{example.key} ({example.shard}, {example.number})")
    wave, note = _wave(stored[-1]) if sounds else ("", ", without sound")
    return (
        f'<figure class="film"><div class="strip">{shown}</div>{wave}'
        f'<figcaption title="{text}">{text}{note}</figcaption></figure>'
    )


def _wave(flac: bytes) -> tuple[str, str]:
    """A drawing of a sound, lowest to highest sample of each column, and a note on it."""
    try:
        samples, rate = from_flac(flac)
    except (ImageError, InputError) as error:  # damaged, or without PyAV
        return "", f", sound not shown: {html.escape(str(error))}"
    columns = np.array_split(samples, min(_WAVE, len(samples)))
    points = [(place, part.max(), part.min()) for place, part in enumerate(columns)]
    path = "".join(f"M{place} {32 - high / 1024:.1f}V{32 - low / 1024 + 0.5:.1f}" for place, high, low in points)
    svg = (
        f'<svg viewBox="0 0 {len(points)} 64" preserveAspectRatio="none">'
        f'<path d="{path}" stroke="#2f6fde" stroke-width="1.2"/></svg>'
    )
    return svg, f", {len(samples) / rate:.1f} s of sound"
