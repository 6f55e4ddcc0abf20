"""Sound localisation: whether the place of an image that best fits what is heard lies in the box of what sounds.

As Arandjelovic and Zisserman measure it (arXiv 1712.06651, section 4.2): the frame in the middle of each clip that has
a box, and the sound around it. The middle of the best place of the map counts; where several are equally good, the
share of them in the box. A second figure forgives a place's side, since maps are coarse. The middle of the image, which
needs no network, is what to beat.

A box is a field of the sample's `json` member, as shares of the frame's width and height, so that it fits at any size:

    {"box": [left, top, width, height]}         of the frame in the middle
    {"box": [[...], null, ...]}                 of each frame of the clip; null for none
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

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
        "frame's sides, or a list of one, or null, for each frame of the clip.",
        free=True,
    )


def by_sound_maps(measure: Measure, subject: Subject) -> Measured:
    """`measure(maps, boxes, settings)` of maps [N, h, w] and boxes [N, 4] as shares of what is seen: left, top, right
    and bottom.

    Raises:
        InputError: the method makes no such maps, no sample has a box that is seen, one is not as it must be, or as
            `extract`.

    Collectives: every rank must call it; those of `heard_by`, and broadcasts of an object.
    """
    settings, corpus = cast(Settings, subject.config.evaluate), subject.shards[1]
    found = Boxes({}, [])
    on_rank_0(lambda: found.read(corpus, settings.sound_localisation_boxes, subject.config))
    boxes, doubts = from_rank_0(found)
    ids = np.array(sorted(boxes), np.int64)
    heard = heard_by(subject, "sound_maps", "does not say where it sounds", lambda one: partial(_flat, one), ids=ids)
    sides = heard.sets["pretrained"]
    wanted = torch.stack([boxes[number] for number in sides.ids.tolist()])
    results = {name: measure(_square(one.features), wanted, settings) for name, one in heard.sets.items()}
    results["centre"] = measure(torch.zeros(len(wanted), 1, 1), wanted, settings)
    results["centre"].pop("near_rate")  # it has no places
    on_rank_0(lambda: keep_pictures(subject, sides.ids))
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


class Boxes(NamedTuple):
    """Boxes of the clips that have one of which something is seen.

    Attributes:
        seen: by sample, the box of the frame in the middle as shares of what is seen of it: left, top, right, bottom.
        doubts: sentences about those that are left out, or may be of another frame.
    """

    seen: dict[int, Tensor]
    doubts: list[str]

    def read(self, corpus: Corpus, source: str, config: Config) -> None:
        """Fill both. InputError: as of `by_sound_maps`."""
        member, _, field = source.partition(":")
        if member != "json" or not field:
            raise InputError(f"evaluate.sound_localisation_boxes={source}: expected json:FIELD, such as json:box")
        members, total, outside, late = MemberReader(corpus, member), corpus.manifest.num_samples, 0, 0
        for number in range(total):
            if (payload := members.read(number)) is None:
                continue
            facts = members.reader.clip(number)
            try:
                box, is_single = _box_in(payload, field, 1 if facts is None else len(facts.times))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{members.name(number)}: {source}: {error}") from error
            if box is None:
                continue
            seen = _as_seen(box, members.reader.size(number), config)
            if not bool((seen[:2] < 1).all() and (seen[2:] > 0).all()):
                outside += 1
                continue
            self.seen[number] = seen
            late += is_single and facts is not None and facts.start > 0
        if not self.seen:
            what = "has a box there" if not outside else f"has a box there that is seen: {outside:,} are cropped away"
            raise InputError(
                f"evaluate.sound_localisation_boxes={source}: none of the {total:,} clips of {corpus.manifest.name} "
                f"{what}"
            )
        if missing := total - len(self.seen) - outside:
            self.doubts.append(f"{missing:,} of {total:,} clips have no box")
        if outside:
            self.doubts.append(f"{outside:,} of {total:,} clips are left out: their box is outside of the centre crop")
        if late:
            self.doubts.append(
                f"{late:,} of {total:,} clips start later than their video and have a single box, perhaps that of "
                "another clip; give a list of boxes for each clip"
            )


def _box_in(payload: bytes, field: str, num_frames: int) -> tuple[tuple[float, ...] | None, bool]:
    """The box of the frame in the middle, None for none, and whether it is one for the whole clip."""
    content = json.loads(payload)
    value = content.get(field) if isinstance(content, dict) else None
    of_frames = isinstance(value, list) and bool(value) and all(one is None or isinstance(one, list) for one in value)
    if isinstance(value, list) and of_frames:
        if len(value) != num_frames:
            raise ValueError(
                f"a list of {len(value)} for a clip of {num_frames} frames; a video that was cut into several clips "
                "has the same list in each: give each clip its own, or convert with a longer --clip-seconds"
            )
        value = value[num_frames // 2]
    if value is None:
        return None, False
    numbers = isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    if not numbers or len(value) != 4 or not all(0 <= one <= 1 for one in value) or not min(value[2:]) > 0:
        raise ValueError(
            f"expected left, top, width and height as shares from 0 to 1 of the frame, got {json.dumps(value)[:60]}"
        )
    return tuple(map(float, value)), not of_frames


def _as_seen(box: tuple[float, ...], size: tuple[int, int], config: Config) -> Tensor:
    """Of the centre crop: left, top, right, bottom."""
    side = config.evaluate.size
    height, width, top, left = crop_place(size[1], size[0], config.evaluate.resize, side)
    x, y, wide, high = box
    edges = (x * width - left, y * height - top, (x + wide) * width - left, (y + high) * height - top)
    return torch.tensor(edges, dtype=torch.float64) / side
