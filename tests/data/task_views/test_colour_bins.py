from __future__ import annotations

import math

import pytest
import torch

from largescale.data.task_views.colour_bins import (
    annealed_mean,
    coloured,
    counts_of,
    distances,
    gamut,
    rebalancing,
    soft_bins,
)
from largescale.data.task_views.lab import lab_of

ROWS = {
    -90: (50, 90),
    -80: (20, 90),
    -70: (0, 90),
    -60: (-20, 90),
    -50: (-30, 100),
    -40: (-40, 100),
    -30: (-50, 100),
    -20: (-50, 100),
    -10: (-60, 100),
    0: (-70, 100),
    10: (-80, 90),
    20: (-80, 90),
    30: (-90, 90),
    40: (-100, 90),
    50: (-100, 80),
    60: (-110, 80),
    70: (-110, 80),
    80: (-110, 70),
    90: (-110, 70),
    100: (-90, 0),
}
"""The published table: for each a, from which b to which."""

BINS = torch.tensor(gamut(10))


def some_colours(*shape: int) -> torch.Tensor:
    draws = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 160 * draws - 80


def nearest_by_hand(colour: list[float], bins: torch.Tensor) -> list[int]:
    """All bins, from the nearest to the farthest."""
    a, b = colour
    distances = [(a - p) ** 2 + (b - q) ** 2 for p, q in bins.tolist()]
    return sorted(range(len(bins)), key=distances.__getitem__)


def test_with_steps_of_10_bins_are_the_published_ones():
    expected = [[a, b] for a, (first, last) in ROWS.items() for b in range(first, last + 1, 10)]
    assert gamut(10).tolist() == expected and len(expected) == 313


@pytest.mark.parametrize("step", [5, 10, 17, 50])
def test_every_colour_is_nearest_to_a_bin_of_its_own_square(step):
    """Of the grid's points, of which bins are some: what is outside the gamut is nobody's."""
    ramp = torch.linspace(0, 1, 18, dtype=torch.float64)
    colours = lab_of(torch.cartesian_prod(ramp, ramp, ramp).T[:, None])[1:, 0].T
    nearest = distances(colours, torch.tensor(gamut(step))).min(-1)
    assert float(nearest.values.max()) <= math.sqrt(2) * step / 2
    assert not gamut(step).flags.writeable


def test_shares_of_the_nearest_bins_are_those_of_a_loop():
    colours = some_colours(4, 6)
    nearest, shares = soft_bins(colours, BINS, 5, 5.0)
    for row, colour in enumerate(colours.flatten(0, 1).tolist()):
        order = nearest_by_hand(colour, BINS)[:5]
        weights = [math.exp(-(math.dist(colour, BINS[place].tolist()) ** 2) / 50) for place in order]
        assert nearest.flatten(0, 1)[row].tolist() == order
        assert shares.flatten(0, 1)[row].tolist() == pytest.approx([weight / sum(weights) for weight in weights])


def test_a_colour_far_from_all_bins_is_still_shared():
    _, shares = soft_bins(torch.tensor([[1000.0, 1000.0]]), BINS.float(), 5, 5.0)
    assert float(shares.sum()) == pytest.approx(1)


def test_counts_are_those_of_a_loop_and_of_each_image():
    colours = some_colours(3, 4, 2)
    found = counts_of(colours, BINS)
    expected = torch.zeros(3, len(BINS))
    for image in range(3):
        for colour in colours[image].flatten(0, 1).tolist():
            expected[image, nearest_by_hand(colour, BINS)[0]] += 1
    assert torch.equal(found, expected)


def test_weights_are_those_of_a_loop_and_1_on_average():
    bins = torch.tensor(gamut(25))
    shares = torch.rand(len(bins), generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    shares /= shares.sum()
    smooth = []
    for one in bins.tolist():
        near = [math.exp(-(math.dist(one, other) ** 2) / (2 * 15**2)) for other in bins.tolist()]
        smooth.append(sum(k * p for k, p in zip(near, shares.tolist(), strict=True)) / sum(near))
    rough = [1 / (0.7 * one / sum(smooth) + 0.3 / len(bins)) for one in smooth]
    mean = sum(p * w for p, w in zip(shares.tolist(), rough, strict=True))
    found = rebalancing(shares, bins, 15.0, 0.3)
    assert found.tolist() == pytest.approx([one / mean for one in rough])
    assert float((found * shares).sum()) == pytest.approx(1)
    assert found[shares.argmin()] > 1 > found[shares.argmax()]


def test_a_uniform_prior_and_one_that_is_made_uniform_weigh_all_alike():
    uniform = torch.full((len(BINS),), 1 / len(BINS), dtype=torch.float64)
    torch.testing.assert_close(rebalancing(uniform, BINS, 5.0, 0.5), torch.ones_like(uniform))
    single = torch.zeros_like(uniform).index_fill_(0, torch.tensor([7]), 1)
    torch.testing.assert_close(rebalancing(single, BINS, 5.0, 1.0), torch.ones_like(uniform))


def test_the_annealed_mean_is_that_of_a_loop_between_mode_and_mean():
    logits = torch.randn(4, len(BINS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, found in zip(logits.tolist(), annealed_mean(logits, BINS, 0.38).tolist(), strict=True):
        weights = [math.exp(one / 0.38) for one in row]
        places = list(zip(*BINS.tolist(), strict=True))
        assert found == pytest.approx(
            [sum(w * v for w, v in zip(weights, axis, strict=True)) / sum(weights) for axis in places]
        )
    torch.testing.assert_close(annealed_mean(logits, BINS, 1.0), logits.softmax(-1) @ BINS)
    torch.testing.assert_close(annealed_mean(logits, BINS, 1e-5), BINS[logits.argmax(-1)])


def test_an_image_is_coloured_where_one_place_of_it_is():
    colours = torch.zeros(4, 3, 3, 2)
    colours[1, 2, 1] = torch.tensor([-5.0, 5.0])
    colours[2, 0, 0, 0] = -5.1
    colours[3, 1, 2, 1] = 5.1
    assert coloured(colours).tolist() == [False, False, True, True]
