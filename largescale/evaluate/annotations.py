"""Images with annotated objects: a `json` member of each, one field of which lists them as COCO does.

    {"annotations": [{"bbox": [x, y, width, height], "category_id": 3, "segmentation": ..., "iscrowd": 0, "area": 81}]}

`bbox` is in px of the upright image. `segmentation` is a list of polygons, or run lengths ({"size": [height, width],
"counts": ...}, compressed or not), for masks alone. `iscrowd` and `area` may be left out; other keys are not read. An
empty list is an image without objects. Format: cocodataset.org, "Data format", object detection.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from largescale.config import Config
from largescale.data.corpora import Corpus
from largescale.evaluate.annotated_masks import is_number, is_shape, mask_of
from largescale.evaluate.members import MemberReader
from largescale.evaluate.shares import from_all_ranks, own_rows
from largescale.processes import rank, together
from shards.ground.errors import InputError

LARGEST_CATEGORY = 65_535

_BEYOND_PX = 1.0
"""By how much a box or polygon may reach beyond its image: published annotations are rounded."""


@dataclass(frozen=True)
class Annotation:
    """One object.

    Attributes:
        box: left, top, right and bottom, in px.
        category: its number in the annotations.
        crowd: whether it stands for a group, in which nothing that is found is wrong.
        area: in px, as annotated; 0 if it is not.
        shape: polygons or run lengths; None where masks are not wanted.
    """

    box: tuple[float, float, float, float]
    category: int
    crowd: bool
    area: float
    shape: Any = None


@dataclass(frozen=True)
class Scene:
    """An image and its objects.

    Attributes:
        image: uint8 [3, H, W].
        boxes: left, top, right and bottom, in px, float32 [N, 4].
        categories: numbers as annotated, int64 [N].
        crowds: bool [N].
        areas: as annotated, in px, float32 [N]; 0 where they are not.
        masks: uint8 [N, H, W]; None if they are not wanted.
    """

    image: Tensor
    boxes: Tensor
    categories: Tensor
    crowds: Tensor
    areas: Tensor
    masks: Tensor | None = None


class AnnotatedImages:
    """The samples of a corpus that are annotated, whether or not there are objects in them.

    Args:
        corpus: of images and their members.
        config: how images are read.
        source: `json:FIELD`.
        masks: whether objects must have masks.

    Attributes:
        ids: of annotated samples, ascending.
        counts: objects by category, without crowds.
        num_flat: objects that are left out, since their box has no area.
        unreadable: images that this rank could not read; see `MemberReader`.
        masks: whether scenes have masks.

    Raises:
        InputError: another source, no sample is annotated, or an annotation is not as it must be; names it.

    Collectives: every rank must make it; those of `together`, and an all-gather of objects.
    """

    def __init__(self, corpus: Corpus, config: Config, source: str, *, masks: bool) -> None:
        member, _, self._field = source.partition(":")
        if member != "json" or not self._field:
            raise InputError(f"evaluate.detection_annotations={source}: expected json:FIELD, such as json:annotations")
        self._members, self._source, self.masks = MemberReader(corpus, member), source, masks
        self._max_pixels, self.num_samples = config.data.max_pixels, corpus.manifest.num_samples
        self.unreadable = self._members.unreadable
        found: dict[str, tuple[list[int], dict[int, int], int]] = {}
        together(lambda: found.update({str(rank()): self._scanned(corpus)}))
        parts = from_all_ranks(found).values()
        self.ids = np.sort(np.concatenate([np.array(ids, np.int64) for ids, _, _ in parts]))
        self.counts = {key: sum(one.get(key, 0) for _, one, _ in parts) for _, one, _ in parts for key in one}
        self.num_flat = sum(flat for _, _, flat in parts)
        if not len(self.ids):
            raise InputError(
                f"{corpus.where}: no sample has a field {self._field} in a member {member}; name another one, "
                f"evaluate.detection_annotations=json:FIELD, or convert a list that has it (docs/evaluating.md)"
            )

    def _scanned(self, corpus: Corpus) -> tuple[list[int], dict[int, int], int]:
        """Annotated samples of this rank's share, their objects by category, and how many have no area."""
        ids: list[int] = []
        counts: dict[int, int] = {}
        flat, (widths, heights), said = 0, _sizes(corpus), f"annotations of {corpus.manifest.name}"
        rows = own_rows(self.num_samples).tolist()
        for number in tqdm(rows, desc=said, unit="image", leave=False, mininterval=1, disable=rank() > 0):
            annotations = self._annotations(number)
            if annotations is None:
                continue
            ids.append(number)
            sides = widths.item(number), heights.item(number)
            # The header's size may be that of an image which is stored on its side; `scene` knows it upright.
            self._check(number, annotations, *(sides if _reach(annotations, *sides[::-1]) else sides[::-1]))
            for one in annotations:
                flat += _is_flat(one)
                if not one.crowd and not _is_flat(one):
                    counts[one.category] = counts.get(one.category, 0) + 1
        return ids, counts, flat

    def _annotations(self, number: int) -> list[Annotation] | None:
        payload = self._members.read(number)
        if payload is None:
            return None
        try:
            return annotations_of(payload, self._field, masks=self.masks)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._members.name(number)}: {self._source}: {error}") from error

    def _check(self, number: int, annotations: Sequence[Annotation], width: int, height: int) -> None:
        if trouble := _reach(annotations, width, height):
            raise InputError(f"{self._members.name(number)}: {self._source}: {trouble}")

    def scene(self, number: int) -> Scene | None:
        """Image and objects of a sample; None if the image cannot be read.

        Raises:
            InputError: an annotation does not fit the image, or the shards are away.
        """
        annotations = self._annotations(number)
        if annotations is None:
            raise InputError(f"{self._members.name(number)}: has no {self._source} any more; do not change the shards")
        image = self._members.image(number, self._max_pixels)
        if image is None:
            return None
        height, width = image.shape[1:]
        self._check(number, annotations, width, height)
        kept = [one for one in annotations if not _is_flat(one)]
        boxes = torch.tensor([one.box for one in kept]).view(-1, 4)
        return Scene(
            image,
            torch.minimum(boxes.clamp_min(0), torch.tensor([width, height] * 2)),
            torch.tensor([one.category for one in kept], dtype=torch.int64),
            torch.tensor([one.crowd for one in kept], dtype=torch.bool),
            torch.tensor([one.area for one in kept]),
            self._drawn(number, kept, height, width) if self.masks else None,
        )

    def _drawn(self, number: int, annotations: Sequence[Annotation], height: int, width: int) -> Tensor:
        try:
            masks = [mask_of(one.shape, height, width) for one in annotations]
        except ValueError as error:
            raise InputError(f"{self._members.name(number)}: {self._source}: {error}") from error
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)


def annotations_of(payload: bytes, field: str, *, masks: bool) -> list[Annotation] | None:
    """The objects that a JSON member lists in a field; None if it has none of that name.

    Args:
        masks: whether each must have a `segmentation`.

    Raises:
        ValueError: it is not as COCO has it.
    """
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected an object with a field {field}, got {_short(content)}")
    if content.get(field) is None:
        return None
    if not isinstance(content[field], list):
        raise ValueError(f"expected a list of objects, got {_short(content[field])}")
    found = []
    for place, one in enumerate(content[field]):
        try:
            found.append(_annotation(one, masks))
        except ValueError as error:
            raise ValueError(f"object {place}: {error}") from error
    return found


def _annotation(one: Any, masks: bool) -> Annotation:
    if not isinstance(one, dict):
        raise ValueError(f"expected bbox and category_id, got {_short(one)}")
    box, category = one.get("bbox"), one.get("category_id")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)) or min(box[2:]) < 0:
        raise ValueError(f"bbox={_short(box)}: expected [x, y, width, height] in px")
    if type(category) is not int or not 0 <= category <= LARGEST_CATEGORY:
        raise ValueError(f"category_id={_short(category)}: expected a whole number from 0 to {LARGEST_CATEGORY}")
    crowd, area = one.get("iscrowd", 0), one.get("area", 0)
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd={_short(crowd)}: expected 0 or 1")
    if not is_number(area) or area < 0:
        raise ValueError(f"area={_short(area)}: expected a number of px")
    shape = one.get("segmentation") if masks else None
    if masks and not shape:
        raise ValueError("has no segmentation; Mask R-CNN needs one, evaluate.detection_model=faster_rcnn does not")
    if masks and not is_shape(shape):
        raise ValueError(f"segmentation={_short(shape)}: expected polygons or run lengths")
    x, y, width, height = map(float, box)
    return Annotation((x, y, x + width, y + height), category, bool(crowd), float(area), shape)


def _reach(annotations: Sequence[Annotation], width: int, height: int) -> str:
    """What lies outside of an image, in words; empty if nothing does."""
    for place, one in enumerate(annotations):
        points = [one.box, *(one.shape if isinstance(one.shape, list) else [])]
        for point in points:
            across, down = point[0::2], point[1::2]
            beyond = max(max(across) - width, max(down) - height, -min(across), -min(down))
            if beyond > _BEYOND_PX:
                what = "bbox" if point is one.box else "segmentation"
                return f"object {place}: its {what} is outside of the image, which is of {width} x {height} px"
    return ""


def _is_flat(one: Annotation) -> bool:
    left, top, right, bottom = one.box
    return right <= left or bottom <= top


def _sizes(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    indexes = [corpus.index(number) for number in range(len(corpus.manifest.shards))]
    return np.concatenate([one.width for one in indexes]), np.concatenate([one.height for one in indexes])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
