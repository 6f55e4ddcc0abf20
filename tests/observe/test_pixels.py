"""Signs of images: what views have in common, against planted variances."""

from __future__ import annotations

import pytest
import torch

from largescale.config import CropGroup
from largescale.data.views import Views
from largescale.observe.common_symptoms import closer_than_chance, little_in_common
from largescale.observe.pixels import between_and_within, pixel_signs
from tests.helpers.doctor import said_of
from tests.methods.harness import mini

IMAGES = torch.randn(512, 3, 4, 4, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 512, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("between, within", [(1.0, 1.0), (2.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.1)])
def test_variances_between_images_and_within_one_are_told_apart(between, within):
    first, second = (3 + between * IMAGES + within * noise for noise in NOISE)
    spread, agreement = between_and_within(first, second)
    assert spread == pytest.approx((between**2 + within**2) ** 0.5, rel=0.02)
    assert agreement == pytest.approx(between**2 / (between**2 + within**2), abs=0.02)


def test_equal_images_have_no_spread_and_agree():
    assert between_and_within(torch.ones(8, 3, 4, 4), torch.ones(8, 3, 4, 4)) == (0.0, 1.0)


def test_the_first_two_views_of_the_first_size_are_compared():
    group = [CropGroup(num=3, size=4)]
    views = Views([torch.cat([IMAGES, IMAGES, NOISE[0]])], torch.arange(512))
    assert pixel_signs(views, group)["pixel_agreement"] == pytest.approx(1)
    assert pixel_signs(Views([IMAGES], torch.arange(512)), [CropGroup(num=1, size=4)]) == {}
    assert pixel_signs(Views([IMAGES[:2]], torch.arange(1)), [CropGroup(num=2, size=4)]) == {}


def test_frames_of_a_clip_may_be_alike_which_is_no_alarm():
    views, group = Views([torch.cat([IMAGES, IMAGES])], torch.arange(512)), [CropGroup(num=2, size=4)]
    signs = pixel_signs(views, group, of_frames=True)
    assert set(signs) == {"pixel_spread"} and signs["pixel_spread"] == pytest.approx(1, rel=0.02)
    config = mini("shuffle_learn")
    assert said_of(config, signs) == "" and said_of(config, pixel_signs(views, group)).startswith("views identical")


def test_images_are_called_the_same_by_all_lines_together():
    assert little_in_common([{"pixel_agreement": value} for value in (-0.1, 0.1, 0.05, -0.05, 0.02, 0.0)])
    assert not little_in_common([{"pixel_agreement": value} for value in (0.3, 0.1, 0.2)])
    assert not little_in_common([{"pixel_agreement": 0.0}]) and not little_in_common([{}, {}])


def test_how_much_closer_views_of_an_image_are_is_a_share_of_what_is_possible():
    assert closer_than_chance({"agreement": 0.6, "agreement_of_others": 0.2}) == pytest.approx(0.5)
    assert closer_than_chance({"agreement": 0.99, "agreement_of_others": 0.98}) is None  # all nearly equal
    assert closer_than_chance({"agreement": 0.5}) is closer_than_chance({}) is None


def test_views_of_equal_size_are_compared_though_they_are_of_two_groups():
    small = torch.randn(512, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    own = [CropGroup(num=1, size=4), CropGroup(num=2, size=2), CropGroup(num=1, size=4)]
    equal_large = Views([IMAGES, torch.cat([small, -small]), IMAGES], torch.arange(512))
    assert pixel_signs(equal_large, own)["pixel_agreement"] < 0  # the first two of one size are the small ones
    two = [own[0], own[2]]
    assert pixel_signs(Views([IMAGES, IMAGES], torch.arange(512)), two)["pixel_agreement"] == pytest.approx(1)
    unlike = [CropGroup(num=1, size=4), CropGroup(num=1, size=2)]
    assert pixel_signs(Views([IMAGES, small], torch.arange(512)), unlike) == {}
