"""Sound localisation: whether the place of an image that best fits what is heard lies in the box of what sounds.

As Arandjelovic and Zisserman measure it (arXiv 1712.06651, section 4.2): the frame in the middle of each clip that has
a box, and the sound around it. The middle of the best place of the map counts; where several are equally good, the
share of them in the box. A second figure forgives a place's side, since maps are coarse. The middle of the image, which
needs no network, is what to beat.

A box is a field of the sample's `json` member, as shares of the frame's width and height, so that it fits at any size:

    {"box": [left, top, width, height]}         of the frame in the middle
    {"box": [[...], [...], ...]}                of each frame
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from largescale.config import Config, EvaluateConfig
from largescale.config.setting import setting
from largescale.data.centre_crops import crop_place
from largescale.data.corpora import Corpus
from largescale.evaluate.features import keep_pictures
from largescale.evaluate.hearing import heard_by
from largescale.evaluate.members import MemberReader
from largescale.evaluate.subject import Subject
from largescale.evaluate.ways import Measure, Measured
from largescale.methods import Method
from largescale.processes import from_rank_0, on_rank_0
from shards.ground.errors import InputError

CHOSEN_ON = "nothing"


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    sound_localisation_boxes: str = setting(
        "json:box",
        "Field of the samples' json member with the box of what sounds: left, top, width and height as shares of the "
        "frame's sides, or a list of one for each frame.",
        free=True,
    )


def by_sound_maps(measure: Measure, subject: Subject) -> Measured:
    """`measure(maps, boxes, settings)` of maps [N, h, w] and boxes [N, 4] as shares of what is seen: left, top, right
    and bottom.

    Raises:
        InputError: the method makes no such maps, no sample has a box, one is not as it must be, or as `extract`.

    Collectives: every rank must call it; those of `heard_by`, and broadcasts of an object.
    """
    settings, corpus = cast(Settings, subject.config.evaluate), subject.shards[1]
    found: dict[int, Tensor] = {}
    on_rank_0(lambda: found.update(_boxes(corpus, settings.sound_localisation_boxes, subject.config)))
    boxes = from_rank_0(found)
    ids = np.array(sorted(boxes), np.int64)
    heard = heard_by(subject, "sound_maps", "does not say where it sounds", lambda one: partial(_flat, one), ids=ids)
    sides = heard.sets["pretrained"]
    wanted = torch.stack([boxes[number] for number in sides.ids.tolist()])
    results = {name: measure(_square(one.features), wanted, settings) for name, one in heard.sets.items()}
    results["centre"] = measure(torch.zeros(len(wanted), 1, 1), wanted, settings)
    results["centre"].pop("near_rate")  # it has no places
    on_rank_0(lambda: keep_pictures(subject, sides.ids))
    missing = corpus.manifest.num_samples - len(ids)
    doubts = [f"{missing:,} of {corpus.manifest.num_samples:,} clips have no box"] if missing else []
    return Measured(results, 0, len(wanted), [*doubts, *heard.doubts])


def _flat(method: Method, images: Tensor, sounds: Tensor) -> Tensor:
    return method.sound_maps(images, sounds).flatten(1)


def _square(rows: Tensor) -> Tensor:
    """Maps of square images from rows."""
    side = round(rows.shape[1] ** 0.5)
    return rows.view(-1, side, side)


def measure(maps: Tensor, boxes: Tensor, config: Settings) -> dict[str, Any]:
    """The share of maps whose best place is in the box, or within a place's side of it; that of places in boxes."""
    height, width = maps.shape[1:]
    inside = _inside(height, width, boxes)
    side = torch.tensor([-1 / width, -1 / height, 1 / width, 1 / height], dtype=boxes.dtype)
    best = maps == maps.amax((1, 2), keepdim=True)

    def share(within: Tensor) -> float:
        return float(((best & within).sum((1, 2)) / best.sum((1, 2))).double().mean())

    return {
        "hit_rate": share(inside),
        "near_rate": share(_inside(height, width, boxes + side)),
        "places_in_boxes": float(inside.double().mean()),
        "boxes": config.sound_localisation_boxes,
    }


def _inside(height: int, width: int, boxes: Tensor) -> Tensor:
    """Whether the middles of the places of maps are in boxes: bool [N, height, width]."""
    y, x = ((torch.arange(side, dtype=boxes.dtype) + 0.5) / side for side in (height, width))
    left, top, right, bottom = (one[:, None] for one in boxes.unbind(1))
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]


def _boxes(corpus: Corpus, source: str, config: Config) -> dict[int, Tensor]:
    """By sample, the box of the frame in the middle as shares of what is seen of it: left, top, right, bottom."""
    member, _, field = source.partition(":")
    if member != "json" or not field:
        raise InputError(f"evaluate.sound_localisation_boxes={source}: expected json:FIELD, such as json:box")
    members, found = MemberReader(corpus, member), {}
    for number in range(corpus.manifest.num_samples):
        if (payload := members.read(number)) is None:
            continue
        try:
            box = _box_in(payload, field)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{members.name(number)}: {source}: {error}") from error
        if box is not None:
            found[number] = _as_seen(box, members.reader.size(number), config)
    if not found:
        where = f"none of the {corpus.manifest.num_samples:,} clips of {corpus.manifest.name} has a box there"
        raise InputError(f"evaluate.sound_localisation_boxes={source}: {where}")
    return found


def _box_in(payload: bytes, field: str) -> tuple[float, ...] | None:
    content = json.loads(payload)
    value = content.get(field) if isinstance(content, dict) else None
    if value is None:
        return None
    if isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        value = value[len(value) // 2]
    numbers = isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    if not numbers or len(value) != 4 or not all(0 <= one <= 1 for one in value) or not min(value[2:]) > 0:
        raise ValueError(
            f"expected left, top, width and height as shares from 0 to 1 of the frame, got {json.dumps(value)[:60]}"
        )
    return tuple(map(float, value))


def _as_seen(box: tuple[float, ...], size: tuple[int, int], config: Config) -> Tensor:
    """Of the centre crop: left, top, right, bottom."""
    side = config.evaluate.size
    height, width, top, left = crop_place(size[1], size[0], config.evaluate.resize, side)
    x, y, wide, high = box
    edges = (x * width - left, y * height - top, (x + wide) * width - left, (y + high) * height - top)
    return torch.tensor(edges, dtype=torch.float64) / side
