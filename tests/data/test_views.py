"""Covers: largescale/config/group_augment.py, largescale/data/augment.py, largescale/data/augment_draws.py,
largescale/data/changes.py, largescale/data/crops.py, largescale/data/jitter.py
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from largescale.config import AugmentConfig, augment_of_group, load_config
from largescale.data import changes
from largescale.data.augment import Augment
from largescale.data.augment_draws import DRAWS
from largescale.data.crops import BOX_DRAWS, BoxSampler, crop
from tests.helpers.commands import ROOT


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), low=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_boxes_lie_inside_the_image(height, width, low, seed):
    draws = np.random.default_rng(seed).random((20, BOX_DRAWS))
    boxes = BoxSampler([[low, 1.0]] * 20, [[0.75, 4 / 3]] * 20)(draws, height, width)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_boxes_have_the_distribution_of_torchvisions_random_resized_crop():
    draws = np.random.default_rng(0).random((4000, BOX_DRAWS))
    boxes = BoxSampler([[0.14, 1.0]] * 4000, [[0.75, 4 / 3]] * 4000)(draws, 300, 400)
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.14, 1.0], [0.75, 4 / 3]) for _ in range(4000)])
    np.testing.assert_allclose(boxes.mean(0), theirs.mean(0), atol=6)
    np.testing.assert_allclose(boxes.std(0), theirs.std(0), atol=6)


def test_crop_equals_torchvisions_antialiased_resized_crop():
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = torch.empty(3, 24, 24, dtype=torch.uint8)
    crop(image, [10, 20, 70, 80], 24, out[None])
    expected = reference.resized_crop(image, 10, 20, 70, 80, [24, 24], antialias=True)
    assert (out.int() - expected.int()).abs().max() <= 1


def images(count: int = 6, side: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "ours, theirs, amounts",
    [
        (changes.brightness, reference.adjust_brightness, [0.2, 1.0, 1.7]),
        (changes.contrast, reference.adjust_contrast, [0.2, 1.0, 1.7]),
        (changes.saturation, reference.adjust_saturation, [0.2, 1.0, 1.7]),
        (changes.hue, reference.adjust_hue, [-0.2, 0.0, 0.1]),
    ],
)
def test_colour_changes_equal_torchvisions(ours, theirs, amounts):
    batch = images()
    for amount in amounts:
        changed = ours(batch, torch.full((6, 1, 1, 1), amount, dtype=torch.float64))
        torch.testing.assert_close(changed, theirs(batch, amount), rtol=0, atol=2e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_solarisation_equals_torchvisions(threshold):
    batch = images().round(decimals=1)  # some intensities are the threshold itself
    torch.testing.assert_close(changes.solarise(batch, threshold), reference.solarize(batch, threshold), rtol=0, atol=0)


def test_a_share_of_views_is_solarised_by_a_draw_of_its_own():
    """Whatever else is drawn: what switches it on leaves the other views as they were, bit for bit."""
    off = AugmentConfig(rotate_degrees=15, gamma=0.3, gain=0.2, noise=0.0, erase=0.5)
    views = torch.randint(0, 256, (500, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(500, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, some = (
        Augment(config, [0.0] * 3, [1.0] * 3, torch.float64)(views, draws)
        for config in (off, replace(off, solarise=0.2, solarise_threshold=0.0))
    )
    changed = (plain != some).flatten(1).any(1)
    assert abs(float(changed.double().mean()) - 0.2) < 0.05 and not changed[draws[:, 24] >= 0.2].any()


def test_blur_equals_torchvisions():
    batch = images(side=20)
    blurred = changes.gaussian_blur(batch, torch.full((6,), 1.3, dtype=torch.float64), 2.0)
    torch.testing.assert_close(blurred, reference.gaussian_blur(batch, [13, 13], [1.3, 1.3]), rtol=0, atol=1e-6)


def test_rotation_equals_torchvisions():
    batch = images(side=16)
    turned = changes.rotate(batch, torch.full((6,), 0.3, dtype=torch.float64))
    degrees = float(np.degrees(0.3))
    expected = reference.rotate(batch, degrees, interpolation=reference.InterpolationMode.BILINEAR)
    other_way = reference.rotate(batch, -degrees, interpolation=reference.InterpolationMode.BILINEAR)
    assert min((turned - expected).abs().max(), (turned - other_way).abs().max()) < 1e-6


def test_noise_is_standard_normal_and_differs_between_keys():
    counters = changes.noise_counters(torch.Size([40, 40]), torch.device("cpu"))
    noise = changes.gaussian_noise(torch.rand(50, dtype=torch.float64), counters, torch.Size([40, 40]), torch.float32)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    flat = noise.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(50)).abs().max() < 0.12


EVERYTHING = AugmentConfig(rotate_degrees=15, gamma=0.3, gain=0.2, noise=0.1, erase=0.5, solarise=0.3)


def test_a_view_does_not_depend_on_its_batch():
    apply = Augment(EVERYTHING, [0.5] * 3, [0.2] * 3, torch.float32)
    views = torch.randint(0, 256, (16, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(16, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = apply(views, draws)
    for start, stop in [(0, 5), (5, 6), (6, 16)]:
        torch.testing.assert_close(apply(views[start:stop], draws[start:stop]), whole[start:stop], rtol=0, atol=1e-6)


def test_switched_off_augmentation_only_normalises():
    off = AugmentConfig(flip=0, jitter=0, grayscale=0, blur=0)
    views = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    result = Augment(off, [0.4, 0.5, 0.6], [0.1, 0.2, 0.3], torch.float32)(views, torch.rand(4, DRAWS))
    expected = reference.normalize(views.float() / 255, [0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    torch.testing.assert_close(result, expected)


def test_probabilities_are_kept():
    only_flip = AugmentConfig(flip=0.3, jitter=0, grayscale=0, blur=0)
    views = torch.randint(0, 256, (1, 3, 6, 6), dtype=torch.uint8).expand(4000, -1, -1, -1)
    draws = torch.rand(4000, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = Augment(only_flip, [0.0] * 3, [1.0] * 3, torch.float32)(views, draws)
    flipped = (result != views / 255).flatten(1).any(1).double().mean()
    assert abs(float(flipped) - 0.3) < 0.03


def test_jitter_uses_all_orders():
    apply = Augment(AugmentConfig(flip=0, jitter=1, grayscale=0, blur=0), [0.0] * 3, [1.0] * 3, torch.float64)
    view = torch.randint(0, 256, (1, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = torch.full((24, DRAWS), 0.9, dtype=torch.float64)
    orders = torch.tensor(list(__import__("itertools").permutations(range(4))), dtype=torch.float64)
    draws[:, 7:11] = (orders + 0.5) / 4
    results = apply(view.expand(24, -1, -1, -1), draws)
    assert len({tuple(result.flatten().tolist()) for result in results.round(decimals=6)}) > 8


def test_the_recipe_of_the_docs_has_two_kinds_of_view(tmp_path):
    [recipe] = re.findall(r"```yaml\n(data:\n  crops:.*?)```", (ROOT / "docs/data.md").read_text(), re.S)
    (tmp_path / "recipe.yaml").write_text(f"name: x\nmethod: {{name: simclr}}\n{recipe}")
    data = load_config(tmp_path / "recipe.yaml", ["data.shards=x"]).data
    first, second = (augment_of_group(data, place) for place in range(2))
    assert (first.blur, first.solarise, second.blur, second.solarise) == (1.0, 0.0, 0.1, 0.2)
    assert first.hue == second.hue == data.augment.hue == 0.1


def test_more_crop_groups_than_torch_compiles_by_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    views = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    draws = torch.rand(4, DRAWS, dtype=torch.float64)
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would leave it deleted
        for group in range(10):
            config = AugmentConfig(jitter=0.0, blur=0.0, grayscale=0.1 * group + 0.05)
            whole, rows = (
                Augment(config, [0.5] * 3, [0.2] * 3, torch.float32, compiled=compiled) for compiled in (True, False)
            )
            torch.testing.assert_close(whole(views, draws), rows(views, draws))
    assert counters["stats"]["unique_graphs"] == before + 10
