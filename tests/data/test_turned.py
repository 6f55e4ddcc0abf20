"""Camera photographs: decoded at a reduced size whatever their metadata, turned after cropping, cut as if before."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from largescale.config import Config
from largescale.data.batches import BatchMaker, Buffers, Unreadable
from largescale.data.crops import as_stored, crop, turn
from largescale.data.decode import EncodedImage
from largescale.data.reader import RawSample
from shards.images.orientation import SIDEWAYS, TAG, turned

HEIGHT, WIDTH = 203, 298  # of no factor of a reduction


def photograph(orientation: int) -> bytes:
    """A JPEG whose upright picture is the same whatever its orientation, without a symmetry."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    waves = np.stack([np.sin(rows / 37 + columns / 61), np.cos(columns / 45), np.sin(rows * columns / 60000)], 2)
    upright = (127.5 + 120 * waves).astype(np.uint8)
    back = {6: 8, 8: 6}.get(orientation, orientation)
    exif, stored = Image.Exif(), io.BytesIO()
    exif[TAG], exif[0x10F] = orientation, "Maker"
    image = Image.fromarray(np.ascontiguousarray(turned(upright, back)))
    image.save(stored, "JPEG", quality=97, subsampling=0, exif=exif)
    return stored.getvalue()


class OneImage:
    """A reader of a single photograph."""

    def __init__(self, payload: bytes) -> None:
        with Image.open(io.BytesIO(payload)) as image:
            self._sample = RawSample(memoryview(payload), *image.size)

    def read(self, sample_id: int, frame: object = None) -> RawSample:
        return self._sample

    def candidates(self, sample_id: int) -> list[int]:
        return [sample_id]


def views(payload: bytes, scaled_decode: float, scale: tuple[float, float]) -> list[torch.Tensor]:
    """What the stream cuts of a photograph."""
    config = Config(name="turned")
    config.data.scaled_decode = scaled_decode
    config.data.crops = [type(config.data.crops[0])(num=4, size=12, scale=list(scale))]
    config.train.global_batch = 1
    maker = BatchMaker(OneImage(payload), None, config, rank=0, world_size=1)
    buffers = Buffers.carve(torch.zeros(Buffers.num_bytes(config.data, 1), dtype=torch.uint8), config.data, 1)
    draws = np.random.default_rng(0).random((4, 22))
    maker._fill(0, 0, draws, 0, buffers, Unreadable(maker.reader))
    return [view.int() for view in buffers.views[0][:, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_views_are_those_of_the_picture_turned_first(orientation):
    payload = photograph(orientation)
    sample = RawSample(memoryview(payload), *Image.open(io.BytesIO(payload)).size)
    image = EncodedImage(sample, max_pixels=10**9)
    assert image.reducible and (image.height, image.width) == (HEIGHT, WIDTH)
    whole = image.decode()
    assert whole.shape == (3, HEIGHT, WIDTH) and image.stored == (
        (WIDTH, HEIGHT) if orientation in SIDEWAYS else (HEIGHT, WIDTH)
    )
    exact, reduced = views(payload, 0, (0.2, 1.0)), views(payload, 2, (0.2, 1.0))
    straight = io.BytesIO()
    Image.fromarray(whole.permute(1, 2, 0).numpy()).save(straight, "PNG")
    for view, expected in zip(exact, views(straight.getvalue(), 0, (0.2, 1.0)), strict=True):
        assert torch.equal(view, expected)
    error = (torch.stack(exact) - torch.stack(reduced)).abs().float().mean()
    assert 0 < error < 1.6, "docs/data.md says that of reduced decoding"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_cut_the_same_from_what_is_stored(orientation):
    stored = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    upright = np.ascontiguousarray(turned(stored, orientation))
    height, width = upright.shape[:2]
    boxes = np.array([[0, 0, 7, 7], [height - 9, width - 9, 9, 9], [3, 5, 12, 12]])
    for (top, left, h, w), (t, le, hh, ww) in zip(boxes, as_stored(boxes, orientation, height, width), strict=True):
        cut = turned(stored[t : t + hh, le : le + ww], orientation)
        np.testing.assert_array_equal(cut, upright[top : top + h, left : left + w])
        view = torch.empty(1, 3, 8, 8, dtype=torch.uint8)
        crop(torch.from_numpy(stored).permute(2, 0, 1), [t, le, hh, ww], 8, view)
        turn(view, orientation)
        expected = torch.empty_like(view)
        crop(torch.from_numpy(upright).permute(2, 0, 1), [top, left, h, w], 8, expected)
        assert (view.int() - expected.int()).abs().max() <= 1
