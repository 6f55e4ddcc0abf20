from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from largescale.config import AugmentConfig
from largescale.data.augment import Augment
from largescale.data.augment_draws import DRAWS
from largescale.data.changes import noise_counters

COUNT = 60
RECIPES = {
    "published": AugmentConfig(),
    "every change": AugmentConfig(
        rotate_degrees=15, gamma=0.3, gain=0.2, noise=0.1, erase=0.5, solarise=0.3, solarise_threshold=0.0
    ),
    "any hue, every view": AugmentConfig(jitter=1, hue=0.5, blur=1, flip=1, grayscale=0),
    "beyond black and white": AugmentConfig(jitter=1, brightness=3, contrast=5, saturation=5, blur_sigma=[2, 9]),
    "two parts of the jitter": AugmentConfig(jitter=0.6, brightness=0, saturation=0),
    "nothing": AugmentConfig(flip=0, jitter=0, grayscale=0, blur=0),
}


def some_views(side: int, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Noise; some views with two or three equal channels, some of one colour, some black or white; and draws."""
    random = torch.Generator().manual_seed(side)
    views = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=random).permute(0, 3, 1, 2)
    for number, (one, other) in enumerate([(0, 1), (1, 2), (2, 0)]):
        views[number::9, one] = views[number::9, other]
    views[3::9] = views[3::9, :1]
    views[4::9] = views[4::9, :, :1, :1]
    views[5::9] = views[5::9] // 128 * 255
    views[6], views[7] = 0, 255
    return views, torch.rand(count, DRAWS, dtype=torch.float64, generator=random)


def plainly(config: AugmentConfig, views: Tensor, draws: Tensor) -> Tensor:
    """The chain that a GPU compiles, as it is written, in float64."""
    counters = noise_counters(views.shape[-2:], views.device) if config.noise > 0 else None
    return Augment(config, [0.0] * 3, [1.0] * 3, torch.float64).change_all(views, draws, counters)


@pytest.mark.parametrize("side", [2, 7, 16, 33])
@pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)
def test_views_are_those_of_the_plain_chain(config, side):
    views, draws = some_views(side)
    expected = plainly(config, views, draws)
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 0.1 / 255)):
        found = Augment(config, [0.0] * 3, [1.0] * 3, dtype)(views, draws)
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


def parts_of(count: int) -> Iterator[list[int]]:
    yield from ([number] for number in range(0, count, 7))
    yield list(range(count))[::-2]
    yield list(range(3, count // 2))


@pytest.mark.parametrize("side", [15, 16, 61])
def test_the_bits_of_a_view_do_not_depend_on_its_batch_nor_on_threads(side):
    views, draws = some_views(side, 24)
    augment = Augment(AugmentConfig(solarise=0.2, erase=0.2, gain=0.1), [0.4] * 3, [0.2] * 3, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = augment(views, draws)
        for some in parts_of(24):
            torch.testing.assert_close(augment(views[some], draws[some]), whole[some], rtol=0, atol=0)
        for number in (2, 3, 5):
            torch.set_num_threads(number)
            torch.testing.assert_close(augment(views, draws), whole, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_layout_precision_and_an_empty_batch():
    views, draws = some_views(12)
    options = (AugmentConfig(), [0.4] * 3, [0.2] * 3, torch.float32)
    expected = Augment(*options)(views, draws)
    torch.testing.assert_close(Augment(*options)(views.contiguous(), draws), expected, rtol=0, atol=0)
    half = Augment(*options, torch.bfloat16)
    torch.testing.assert_close(half(views, draws), expected.bfloat16(), rtol=0, atol=0)
    assert half(views[:0], draws[:0]).shape == (0, 3, 12, 12)
