"""A map of features that shows the image under the pointer, coloured by class, cluster, corpus, or what kNN gets wrong.

Choosing the colours needs no script (radio buttons and CSS); the images under the pointer do (map.js).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch.nn.functional import normalize

from largescale.evaluate.feature_set import FeatureSet
from largescale.report import plots
from largescale.report.evaluated import Part, Predictions
from largescale.report.gallery import picture
from largescale.report.html_parts import escape
from shards.ground.errors import InputError

_DIMENSIONS, _PERPLEXITY = 50, 30
_WIDTH, _HEIGHT, _MARGIN = 900, 620, 14
_RIGHT, _WRONG, _OTHER, _NO_CLASS = "right", "wrong", "not a test image", "no class known"
CLASS, CLUSTER, CORPUS, ERROR = "class", "k-means cluster", "corpus", "kNN right or wrong"
"""What points can be coloured by."""
_ALIKE = 1e-6
"""Spread of unit vectors below which t-SNE has nothing but rounding to go by, and crashes on none at all."""
_SIDE = 40
"""Pixels of a thumbnail's side."""


@dataclass(frozen=True)
class FeatureMap:
    """Points [M, 2] of some images, and what they can be coloured by.

    Attributes:
        images: part and row in it of each point, int64 [M, 2]; part 0 is the test set, others are corpora.
        groups: names of groups and the group of each point, by what they are.
        method: how the points were found, in words.
    """

    points: np.ndarray
    images: np.ndarray
    groups: dict[str, tuple[list[str], np.ndarray]]
    method: str


def feature_map(test: Part, found: Predictions, corpora: Sequence[Part] = ()) -> FeatureMap:
    """The map of the test images that kNN was asked about, and of images of corpora; the same for the same features."""
    features, truth = test.features, test.features.labels.numpy()[found.rows]
    others = [part.features for part in corpora]
    rows = [found.rows, *(np.arange(len(one)) for one in others)]
    images = np.concatenate([np.stack([np.full_like(own, place), own], 1) for place, own in enumerate(rows)])
    shown = [features.features[torch.from_numpy(found.rows)], *(one.features for one in others)]
    values = normalize(torch.cat(shown), dim=1).numpy()
    if not values.std(0).max() > _ALIKE:
        raise InputError("All images have the same features: the network has collapsed. There is nothing to map.")
    dimensions = min(_DIMENSIONS, *values.shape)
    num_clusters = max(2, min(len(features.classes), len(values)))
    with threadpool_limits(1):  # with two threads on two busy cores t-SNE takes five times as long: they spin
        reduced = PCA(dimensions, random_state=0).fit_transform(values)
        if not reduced.std() > _ALIKE:
            raise InputError(
                "All images have the same features: the network has collapsed, and there is nothing to map."
            )
        perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
        points = TSNE(init="pca", random_state=0, perplexity=perplexity, max_iter=500).fit_transform(reduced)
        clusters = KMeans(num_clusters, n_init=1, random_state=0).fit_predict(reduced)
    names = [f"cluster {number}" for number in range(num_clusters)]
    classes = np.concatenate([truth, *(_classes_as(features.classes, one) for one in others)])
    right = np.full(len(points), 2)
    right[: len(truth)] = truth != found.classes
    groups = {CLASS: ([*features.classes, *[_NO_CLASS] * bool(others)], classes), CLUSTER: (names, clusters)}
    if others:
        groups[CORPUS] = ([f"{test.name} (test)", *(part.name for part in corpora)], images[:, 0])
    return FeatureMap(
        points,
        images,
        {**groups, ERROR: ([_RIGHT, _WRONG, *[_OTHER] * bool(others)], right)},
        f"t-SNE of {dimensions} principal components",
    )


def _classes_as(classes: tuple[str, ...], features: FeatureSet) -> np.ndarray:
    """Numbers of an own list of classes, by their names; one beyond it for others."""
    known = {name: number for number, name in enumerate(classes)}
    numbers = [*(known.get(name, len(classes)) for name in features.classes), len(classes)]
    return np.array(numbers, np.int64)[features.labels.numpy()]  # a label of -1 is the last of these


def as_html(found: FeatureMap, parts: Sequence[Part], told: Sequence[str]) -> str:
    """The map for the page.

    Args:
        found: the map.
        parts: the images: the test set and corpora.
        told: what to say of each point [M].
    """
    sprite, columns = _sprite(
        [picture(parts[part].reader, int(parts[part].features.ids[row])) for part, row in found.images.tolist()]
    )
    choices, styles, legends = [], [], []
    for number, (what, (names, _)) in enumerate(found.groups.items()):
        chosen = f"#colour-{number}:checked ~ .map"
        checked = " checked" if number == 0 else ""
        choices.append(
            f'<input type="radio" name="colour" id="colour-{number}"{checked}><label for="colour-{number}">'
            f"{escape(what)}</label>"
        )
        styles += [
            f"{chosen} .g{number}-{group} {{ fill: {_variable(names[group], group)} }}" for group in range(len(names))
        ]
        styles.append(f"{chosen} .legend-{number} {{ display: flex }}")
        shown = "".join(
            f'<li><i style="background:{_variable(name, group)}"></i>{escape(name)}</li>'
            for group, name in enumerate(names[:20])
        )
        more = f"<li>and {len(names) - 20} more</li>" if len(names) > 20 else ""
        legends.append(f'<ul class="legend legend-{number}">{shown}{more}</ul>')
    return (
        f'<fieldset class="map-of"><legend>Colour by</legend>{"".join(choices)}<style>{"".join(styles)}</style>'
        f'<div class="map" data-columns="{columns}" data-sprite="{sprite}">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_alt(found))}">'
        f'{_circles(found, told)}</svg><div class="tip" hidden><div class="image"></div><span></span></div>'
        f"{''.join(legends)}</div></fieldset>"
    )


def _alt(found: FeatureMap) -> str:
    of = (
        f"{len(found.groups[CORPUS][0])} corpora"
        if CORPUS in found.groups
        else f"{len(found.groups[CLASS][0])} classes"
    )
    return f"Map of {len(found.points):,} images of {of}: near points have similar features"


def _variable(name: str, group: int) -> str:
    if name in (_RIGHT, _OTHER, _NO_CLASS):  # what is not asked for is faint, and what is wrong stands out
        return "var(--grid)"
    return f"var(--line-{group % len(plots.PALETTE)})"


def _circles(found: FeatureMap, told: Sequence[str]) -> str:
    low, high = found.points.min(0), found.points.max(0)
    room = np.array([_WIDTH, _HEIGHT]) - 2 * _MARGIN
    places = _MARGIN + (found.points - low) / np.maximum(high - low, 1e-9) * room
    groups = list(found.groups.values())
    return "".join(
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" class="'
        f'{" ".join(f"g{number}-{of[place]}" for number, (_, of) in enumerate(groups))}" data-i="{place}">'
        f"<title>{escape(told[place])}</title></circle>"
        for place, (x, y) in enumerate(places.tolist())
    )


def _sprite(images: Sequence[Image.Image]) -> tuple[str, int]:
    """All thumbnails in one JPEG, row by row, as a data URL; and how many stand in a row."""
    columns = max(1, int(np.ceil(np.sqrt(len(images)))))
    sheet = Image.new("RGB", (columns * _SIDE, -(-len(images) // columns) * _SIDE))
    for place, image in enumerate(images):
        image = image.convert("RGB")
        image.thumbnail((_SIDE, _SIDE))
        left, top = place % columns * _SIDE, place // columns * _SIDE
        sheet.paste(image, (left + (_SIDE - image.width) // 2, top + (_SIDE - image.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", columns
