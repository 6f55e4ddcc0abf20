"""Measures without labels against their definitions, written out with other tools."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from largescale.evaluate.spectrum import (
    Settings,
    alignment,
    alpha,
    effective_rank,
    lidar,
    measure,
    spectrum,
    uniformity,
)
from tests.helpers.features import features as feature_set


def features(num: int = 300, width: int = 120, mean: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Correlated ones whose eigenvalues fall, around a common vector."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, width + 1).float() ** -0.6
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return (torch.randn(num, width, generator=generator) * scales) @ rotation + mean


def entropy_rank(values: np.ndarray) -> float:
    shares = values / values.sum() + 1e-7
    return math.exp(-sum(share * math.log(share) for share in shares))


def test_the_spectrum_is_that_of_its_definitions():
    x = features()
    found, plain = spectrum(x), x.double().numpy()
    centred = plain - plain.mean(0)
    assert found["effective_rank"] == pytest.approx(entropy_rank(np.linalg.svd(plain, compute_uv=False)), rel=1e-6)
    assert found["effective_rank_centred"] == pytest.approx(
        entropy_rank(np.linalg.svd(centred, compute_uv=False)), rel=1e-6
    )
    assert found["mean_share"] == pytest.approx(
        np.linalg.norm(plain.mean(0)) ** 2 / np.mean([np.linalg.norm(row) ** 2 for row in plain]), rel=1e-9
    )
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(plain.T)))[::-1]
    slope = np.polyfit(np.log(np.arange(10, 101)), np.log(eigenvalues[9:100]), 1)[0]
    assert found["alpha"] == pytest.approx(-slope, rel=1e-6)
    units = [row / np.linalg.norm(row) for row in plain]
    pairs = [np.exp(-2 * np.sum((units[i] - units[j]) ** 2)) for i in range(300) for j in range(i)]
    assert found["uniformity"] == pytest.approx(math.log(np.mean(pairs)), rel=1e-6)


def test_known_values():
    assert effective_rank(torch.ones(64, dtype=torch.float64)) == pytest.approx(64, rel=1e-4)
    assert effective_rank(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(1, abs=1e-4)
    assert alpha(torch.arange(1, 200).double() ** -1.3) == pytest.approx(1.3, rel=1e-9)
    assert math.isnan(alpha(torch.ones(15)))
    assert uniformity(torch.tensor([[2.0, 0], [0, 3.0]])) == pytest.approx(-4)


def test_a_common_vector_is_seen_by_one_rank_and_not_by_the_other():
    spread, collapsed = spectrum(features(mean=0)), spectrum(features(mean=50))
    assert collapsed["effective_rank"] < 0.2 * spread["effective_rank"]
    assert collapsed["effective_rank_centred"] == pytest.approx(spread["effective_rank_centred"], rel=1e-3)
    assert spread["mean_share"] < 0.05 and collapsed["mean_share"] > 0.99


def test_what_is_not_defined_is_left_out():
    assert spectrum(torch.ones(1, 4)) == {} and spectrum(torch.full((9, 4), float("nan"))) == {}
    assert spectrum(torch.zeros(9, 4)) == {}
    assert "alpha" not in spectrum(features(num=12))


def test_views_of_an_image():
    images = features(num=40, width=12)
    generator = torch.Generator().manual_seed(1)
    views = torch.stack([images + 0.1 * torch.randn(40, 12, generator=generator) for _ in range(3)])
    plain = views.double().numpy()
    units = plain / np.linalg.norm(plain, axis=2, keepdims=True)
    distances = [np.sum((units[a, i] - units[b, i]) ** 2) for i in range(40) for a in range(3) for b in range(a)]
    assert alignment(views) == pytest.approx(np.mean(distances), rel=1e-9)
    means = plain.mean(0)
    between = sum(np.outer(m - means.mean(0), m - means.mean(0)) for m in means) / 40
    within = sum(np.outer(v - m, v - m) for view in plain for v, m in zip(view, means, strict=True)) / 120
    within += 1e-4 * np.eye(12)
    whitened = np.linalg.eigvals(np.linalg.inv(within) @ between)  # similar to the symmetric form
    assert lidar(views) == pytest.approx(entropy_rank(np.maximum(whitened.real, 0)), rel=1e-4)
    assert lidar(torch.stack([images, images])) > lidar(views)  # all that varies between views is noise


def test_the_command_measures_the_training_images_evenly_spread():
    train = feature_set(500, 0)
    assert measure(train, None, Settings(spectrum_images=0)) == {**spectrum(train.features), "num_images": 500}
    assert measure(train, None, Settings(spectrum_images=100))["effective_rank"] == pytest.approx(
        spectrum(train.features[::5])["effective_rank"]
    )
