"""Images with a mask each: a member such as `mask.png`, grey or with a palette, whose pixels are numbers of classes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from tqdm import tqdm

from largescale.config import Config
from largescale.data.corpora import Corpus
from largescale.evaluate.members import MemberReader
from largescale.evaluate.read_ahead import read_ahead
from largescale.evaluate.shares import from_all_ranks, own_rows
from largescale.processes import rank, together
from shards.ground.errors import InputError

IGNORED = 255
"""Pixels of this number say nothing."""

_KINDS = ("L", "P", "1", "I;16")


@dataclass(frozen=True)
class Pair:
    """An image, uint8 [3, H, W], and its mask, uint8 [H, W]."""

    image: Tensor
    mask: Tensor


class MaskedImages:
    """The samples of a corpus that have a mask.

    Args:
        corpus: of images and masks.
        config: how images are read.
        member: suffix of the masks.

    Attributes:
        ids: of the samples with a mask, ascending.
        num_classes: one more than the largest number in a mask.
        unreadable: images that this rank could not read; see `MemberReader`.

    Raises:
        InputError: no sample has a mask, or one is not as it must be; names it.

    Collectives: every rank must make it; those of `together`, and an all-gather of objects.
    """

    def __init__(self, corpus: Corpus, config: Config, member: str) -> None:
        self._members, self._member, self._max_pixels = MemberReader(corpus, member), member, config.data.max_pixels
        self.num_samples, self.unreadable = corpus.manifest.num_samples, self._members.unreadable
        found: dict[str, tuple[list[int], int]] = {}
        together(lambda: found.update({str(rank()): self._scanned(corpus)}))
        parts = from_all_ranks(found).values()
        self.ids = np.sort(np.concatenate([np.array(ids, np.int64) for ids, _ in parts]))
        self.num_classes = 1 + max(largest for _, largest in parts)
        if not len(self.ids):
            raise InputError(
                f"{corpus.where}: no sample has a member {member}; name another one, "
                f"evaluate.segmentation_masks=MEMBER, or pack masks beside the images (docs/evaluating.md)"
            )

    def _scanned(self, corpus: Corpus) -> tuple[list[int], int]:
        """Samples of this rank's share with a mask, and the largest number there."""
        ids, largest, said = [], -1, f"masks of {corpus.manifest.name}"
        rows = own_rows(self.num_samples).tolist()
        for number in tqdm(rows, desc=said, unit="mask", leave=False, mininterval=1, disable=rank() > 0):
            payload = self._members.read(number)
            if payload is not None:
                values = self._mask(number, payload)
                ids.append(number)
                largest = max(largest, int(np.where(values == IGNORED, 0, values).max()))
        return ids, largest

    def _mask(self, number: int, payload: bytes) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(payload)) as image:
                kind, values = image.mode, np.asarray(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self._members.name(number)}: {self._member} is not an image ({error})") from error
        if kind not in _KINDS or values.ndim != 2 or values.max(initial=0) > IGNORED:
            raise InputError(
                f"{self._members.name(number)}: {self._member} is of kind {kind}; expected grey or a palette, with "
                f"numbers of classes from 0 to 254 (255: ignored)"
            )
        return values.astype(np.uint8)

    def pair(self, number: int) -> Pair | None:
        """Image and mask of a sample; None if the image cannot be read.

        Raises:
            InputError: they differ in size, or the shards are away.
        """
        payload = self._members.read(number)
        if payload is None:
            raise InputError(f"{self._members.name(number)}: has no {self._member} any more; do not change the shards")
        image = self._members.image(number, self._max_pixels)
        if image is None:
            return None
        mask = torch.from_numpy(self._mask(number, payload))
        if mask.shape != image.shape[1:]:
            raise InputError(
                f"{self._members.name(number)}: {self._member} is of {mask.shape[1]} x {mask.shape[0]} px, its image "
                f"of {image.shape[2]} x {image.shape[1]}"
            )
        return Pair(image, mask)

    def batches(self, wanted: Iterable[tuple[np.ndarray, Sequence[Cut]]]) -> Iterator[Pair]:
        """Batches: images [B, 3, S, S] and masks [B, S, S]; what cannot be read is black and ignored.

        The next batch is read while the network works on one.

        Args:
            wanted: sample ids of each batch, and how each of them is cut, all to one size.
        """
        for pairs in read_ahead(self._cut, wanted):
            yield _stacked(pairs)

    def _cut(self, number: int, cut: Cut) -> Pair:
        pair = self.pair(number)
        if pair is None:
            side = cut.size
            return Pair(
                torch.zeros(3, side, side, dtype=torch.uint8), torch.full((side, side), IGNORED, dtype=torch.uint8)
            )
        return cut(pair)


@dataclass(frozen=True)
class Cut:
    """A square of an image and of its mask.

    Attributes:
        resize: shorter side of the whole image before it, in px.
        size: side of the square; what lies beyond the image is black, and ignored.
        place: from 0 to 1, where it lies vertically and horizontally.
        flip: whether left and right are exchanged.
    """

    resize: int
    size: int
    place: tuple[float, float] = (0.5, 0.5)
    flip: bool = False

    def __call__(self, pair: Pair) -> Pair:
        height, width = pair.mask.shape
        scale = self.resize / min(height, width)
        target = max(1, round(height * scale)), max(1, round(width * scale))
        image, mask = pair.image, pair.mask[None]
        if target != (height, width):
            image = interpolate(image[None], target, mode="bilinear", antialias=True)[0]
            mask = interpolate(mask[None], target, mode="nearest-exact")[0]
        below, right = max(0, self.size - target[0]), max(0, self.size - target[1])
        if below or right:
            image, mask = pad(image, (0, right, 0, below)), pad(mask, (0, right, 0, below), value=IGNORED)
        top, left = (
            int(share * (side - self.size + 1)) if share < 1 else side - self.size
            for share, side in zip(self.place, image.shape[1:], strict=True)
        )
        rows, columns = slice(top, top + self.size), slice(left, left + self.size)
        image, mask = image[:, rows, columns], mask[0, rows, columns]
        return Pair(image.flip(2), mask.flip(1)) if self.flip else Pair(image, mask)


def centre(config: Config) -> Cut:
    """What evaluation cuts."""
    return Cut(config.evaluate.resize, config.evaluate.size)


def random_cut(config: Config, random: np.random.Generator) -> Cut:
    """Half to twice as large as evaluation sees it, anywhere, flipped or not."""
    resize = max(1, round(config.evaluate.resize * 2 ** random.uniform(-1, 1)))
    return Cut(resize, config.evaluate.size, (random.random(), random.random()), random.random() < 0.5)


def _stacked(pairs: list[Pair]) -> Pair:
    return Pair(torch.stack([pair.image for pair in pairs]), torch.stack([pair.mask for pair in pairs]))
