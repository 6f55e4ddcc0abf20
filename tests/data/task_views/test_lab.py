from __future__ import annotations

import math

import pytest
import torch

from largescale.data.task_views.lab import grey_of, lab_of, srgb_of

PUBLISHED = {
    (0, 0, 0): (0, 0, 0),
    (255, 255, 255): (100, 0, 0),
    (255, 0, 0): (53.2408, 80.0925, 67.2032),
    (0, 255, 0): (87.7347, -86.1827, 83.1793),
    (0, 0, 255): (32.2970, 79.1875, -107.8602),
    (255, 255, 0): (97.1393, -21.5537, 94.4780),
    (0, 255, 255): (91.1132, -48.0875, -14.1312),
    (255, 0, 255): (60.3242, 98.2343, -60.8249),
}
"""L, a and b of sRGB's corners with D65, as calculators and libraries print them."""


def lab_by_hand(red: float, green: float, blue: float) -> tuple[float, float, float]:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue)]
    rows = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
    roots = []
    for row in rows:
        share = sum(weight * value for weight, value in zip(row, linear, strict=True)) / sum(row)
        roots.append(share ** (1 / 3) if share > (6 / 29) ** 3 else share * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = roots
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def colours(count: int = 500) -> torch.Tensor:
    """Random ones, many of them dark: [3, 1, N]."""
    draws = torch.rand(3, 1, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return draws ** torch.linspace(1, 6, count, dtype=torch.float64)


@pytest.mark.parametrize("rgb, expected", PUBLISHED.items())
def test_corners_of_srgb_are_where_they_are_published(rgb, expected):
    found = lab_of(torch.tensor(rgb, dtype=torch.float64)[:, None, None] / 255)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_lab_is_that_of_a_loop(dtype, close):
    some = colours()
    expected = torch.tensor([lab_by_hand(*rgb) for rgb in some[:, 0].T.tolist()], dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = lab_of(some.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found[:, 0].T.double(), expected, rtol=0, atol=close)


def test_images_come_back_and_colours_that_srgb_lacks_are_cut():
    some = colours()
    torch.testing.assert_close(srgb_of(lab_of(some)), some, rtol=0, atol=1e-5)
    vivid = srgb_of(torch.tensor([50.0, 120.0, -120.0])[:, None, None])
    assert float(vivid.min()) == 0 and float(vivid.max()) == pytest.approx(1)


def test_greys_have_no_colour_and_stay_as_they_are():
    greys = torch.linspace(0, 1, 256, dtype=torch.float64).expand(3, 1, 256)
    assert float(lab_of(greys)[1:].abs().max()) < 1e-10
    torch.testing.assert_close(grey_of(greys)[0], greys[0], rtol=0, atol=1e-7)


def test_a_grey_image_has_the_lightness_of_the_coloured_one():
    some = colours()
    torch.testing.assert_close(lab_of(grey_of(some).expand_as(some))[0], lab_of(some)[0], rtol=0, atol=1e-5)


def test_batches_are_converted_image_by_image():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for image, lab, grey in zip(images, lab_of(images), grey_of(images), strict=True):
        assert torch.equal(lab_of(image), lab) and torch.equal(grey_of(image), grey)
        middle = lab[:, 2, 3].tolist()
        assert all(math.isclose(own, there) for own, there in zip(middle, lab_by_hand(*image[:, 2, 3]), strict=True))
