"""The views have the distribution of the published SwAV augmentation, as torchvision's transforms on Pillow make it."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from benchmarks.images import dead_leaves
from largescale.config import AugmentConfig
from largescale.data.augment import Augment
from largescale.data.augment_draws import DRAWS
from largescale.data.crops import BOX_DRAWS, BoxSampler, crop, on_grid, reduction
from largescale.data.decode import EncodedImage
from largescale.data.random import uniform
from largescale.data.reader import RawSample

SIZE, SCALE, COUNT = 64, (0.14, 1.0), 3000


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return dead_leaves(220, 300, np.random.default_rng(5))


class PublishedBlur:
    """SwAV's: half of the views, sigma uniform in [0.1, 2]."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))) if random.random() < 0.5 else image


def published_views(picture: np.ndarray) -> torch.Tensor:
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            transforms.RandomGrayscale(0.2),
            PublishedBlur(),
            transforms.ToTensor(),
        ]
    )
    random.seed(0)
    torch.manual_seed(0)
    image = Image.fromarray(picture)
    return torch.stack([chain(image) for _ in range(COUNT)])


def our_views(picture: np.ndarray) -> torch.Tensor:
    image = torch.from_numpy(picture).permute(2, 0, 1)
    draw_boxes = BoxSampler([SCALE] * COUNT, [(3 / 4, 4 / 3)] * COUNT)
    boxes = draw_boxes(uniform(0, np.arange(COUNT), 1, num=BOX_DRAWS), 220, 300)
    views = torch.empty(COUNT, 3, SIZE, SIZE, dtype=torch.uint8)
    for number, box in enumerate(boxes.tolist()):
        crop(image, box, SIZE, views[number : number + 1])
    draws = torch.from_numpy(uniform(0, np.arange(COUNT), 2, num=DRAWS))
    return Augment(AugmentConfig(), [0.0] * 3, [1.0] * 3, torch.float32)(views, draws)


def statistics(views: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each view: channel means and deviations, how colourful and how sharp it is."""
    grey = views.mean(1)
    return {
        "channel means": views.mean((2, 3)),
        "channel deviations": views.std((2, 3)),
        "colourfulness": views.std(1).mean((1, 2))[:, None],
        "sharpness": (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2))[:, None],
        "left minus right": (grey[:, :, : SIZE // 2].mean((1, 2)) - grey[:, :, SIZE // 2 :].mean((1, 2)))[:, None],
    }


@pytest.mark.slow
def test_views_are_distributed_as_the_published_ones(picture):
    views = our_views(picture)
    ours, published = statistics(views), statistics(published_views(picture))
    for name in ours:
        for one, other in zip(ours[name].T, published[name].T, strict=True):
            # The error of a mean of COUNT views, of both: 4 of them are not met by chance.
            noise = float(((one.var() + other.var()) / COUNT).sqrt())
            assert abs(float(one.mean() - other.mean())) < 4 * noise + 0.003, name
            assert abs(float(one.std() / other.std()) - 1) < 0.08, name
            # Largest distance of the two distribution functions (Kolmogorov-Smirnov), at a level of 1e-4.
            together = torch.cat([one, other]).sort().values
            distance = (
                torch.searchsorted(one.sort().values, together, right=True)
                - torch.searchsorted(other.sort().values, together, right=True)
            ).abs().max() / COUNT
            assert float(distance) < 2.23 * (2 / COUNT) ** 0.5 + 0.015, f"{name}: {float(distance)}"
    grey = (views.std(1).amax((1, 2)) < 1e-4).float().mean()
    assert abs(float(grey) - 0.2) < 0.03


@pytest.mark.slow
def test_the_compiled_chain_gives_the_same_views(picture):
    views = torch.from_numpy(np.stack([picture[i : i + 32, i : i + 32] for i in range(8)])).permute(0, 3, 1, 2)
    draws = torch.rand(8, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    everything = AugmentConfig(rotate_degrees=15, gamma=0.3, gain=0.2, noise=0.1, erase=0.5)
    options = (everything, [0.4] * 3, [0.2] * 3, torch.float32)
    eager, compiled = Augment(*options)(views, draws), Augment(*options, compiled=True)(views, draws)
    assert compiled.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)
    half = Augment(*options, torch.bfloat16)(views, draws)
    torch.testing.assert_close(half, eager.bfloat16(), rtol=0, atol=0)


def large_jpeg(side: int) -> RawSample:
    stored = io.BytesIO()
    Image.fromarray(dead_leaves(side, side + 40, np.random.default_rng(1))).save(stored, "JPEG", quality=90)
    return RawSample(memoryview(stored.getvalue()), side + 40, side)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_reduced_decode_cannot_be_told_from_a_whole_one(factor):
    """docs/data.md states the bound: 40 dB, and 1.6 of 255 on average."""
    size, margin = 48, 2.0
    sample = large_jpeg(int(size * margin * factor * 1.3) // 8 * 8)
    whole = EncodedImage(sample, max_pixels=10**8).decode()
    reduced = EncodedImage(sample, max_pixels=10**8).decode(factor)
    height, width = whole.shape[1:]
    assert reduced.shape[1:] == (-(-height // factor), -(-width // factor))
    side = int(size * margin * factor)
    boxes = np.array([[3, 5, side, side], [height - side, width - side, side, side], [7, 1, side + 9, side + 3]])
    assert reduction(boxes, np.full(3, size), margin) == factor
    views = torch.empty(2, 3, size, size, dtype=torch.uint8)
    for box in on_grid(boxes, factor, height, width):
        crop(whole, (box * factor).tolist(), size, views[:1])
        crop(reduced, box.tolist(), size, views[1:])
        difference = views[0].double() - views[1].double()
        assert 10 * torch.log10(255**2 / difference.square().mean()) > 40
        assert difference.abs().mean() < 1.6


@pytest.mark.parametrize(
    "smallest, margin, factor",
    [(383, 2.0, 1), (384, 2.0, 2), (768, 2.0, 4), (1536, 2.0, 8), (4000, 2.0, 8), (4000, 0.0, 1), (192, 1.0, 2)],
)
def test_the_smallest_crop_decides(smallest, margin, factor):
    boxes = np.array([[0, 0, 5000, 5000], [0, 0, 5000, smallest]])
    assert reduction(boxes, np.array([224, 96]), margin) == factor


def test_boxes_on_the_grid_stay_inside_and_near():
    rng = np.random.default_rng(0)
    for height, width, factor in [(301, 407, 2), (1001, 999, 8), (640, 480, 4)]:
        boxes = BoxSampler([(0.2, 1.0)] * 200, [(0.75, 4 / 3)] * 200)(rng.random((200, BOX_DRAWS)), height, width)
        moved = on_grid(boxes, factor, height, width)
        assert (moved[:, :2] >= 0).all() and (moved[:, 2:] >= 1).all()
        assert (moved[:, 0] + moved[:, 2] <= -(-height // factor)).all()
        assert (moved[:, 1] + moved[:, 3] <= -(-width // factor)).all()
        assert np.abs(moved * factor - boxes).max() <= factor
