from __future__ import annotations

import pytest
import torch

from largescale.data.task_views import masks

IDS = torch.arange(300)
SIDE = 20


def drawn(kind: str, ids: torch.Tensor = IDS, share: float = 0.25, step: int = 0) -> torch.Tensor:
    if kind == "noise":
        return masks.noise(ids, SIDE, seed=0, step=step)
    return getattr(masks, kind)(ids, share, SIDE, seed=0, step=step)


def test_every_pixel_is_hidden_with_the_probability_and_by_itself():
    found = drawn("pixels").double()
    assert found.shape == (300, 1, SIDE, SIDE)
    assert abs(found.mean() - 0.25) < 0.01
    assert (found.mean(0) - 0.25).abs().max() < 0.12
    neighbours = (found[..., 1:] * found[..., :-1]).mean()
    assert abs(neighbours - 0.25**2) < 0.01


@pytest.mark.parametrize("share, side", [(0.25, 5), (0.1, 3), (0.5, 7)])
def test_blocks_are_four_squares_anywhere_of_at_most_the_share(share, side):
    found = drawn("blocks", share=share)[:, 0]
    assert masks.block_side(share, SIDE) == side
    assert found.flatten(1).sum(1).max() <= 4 * side * side
    assert found.flatten(1).sum(1).min() >= side * side
    assert found.any(0).all() and not found.all(0).any()
    # A pixel at the edge of what is hidden belongs to a square that is hidden as a whole.
    for image in found[:30]:
        squares = image.unfold(0, side, 1).unfold(1, side, 1).flatten(2).all(2)
        covered = torch.zeros_like(image)
        for top, left in squares.nonzero().tolist():
            covered[top : top + side, left : left + side] = True
        assert torch.equal(covered, image)


def test_the_centre_is_one_square_in_the_middle():
    found = masks.centre(IDS[:3], 0.25, SIDE)
    expected = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.bool)
    expected[:, :, 5:15, 5:15] = True
    assert torch.equal(found, expected)


def test_noise_is_normal_and_has_no_neighbours():
    found = drawn("noise")
    assert abs(found.mean()) < 0.01 and abs(found.std() - 1) < 0.01
    assert abs((found.abs() < 1).double().mean() - 0.6827) < 0.005
    assert abs((found[..., 1:] * found[..., :-1]).mean()) < 0.01 and abs((found[:, 0] * found[:, 1]).mean()) < 0.01


@pytest.mark.parametrize("kind", ["pixels", "blocks", "noise"])
def test_they_are_a_function_of_seed_step_and_sample_alone(kind):
    together, alone = drawn(kind, torch.tensor([4, 7, 4])), drawn(kind, torch.tensor([7]))
    assert torch.equal(together[0], together[2]) and torch.equal(together[1], alone[0])
    assert not torch.equal(drawn(kind, torch.tensor([7]), step=1), alone)


def test_what_is_shrunk_is_further_than_the_rim_from_all_that_is_seen():
    hidden = drawn("blocks", IDS[:5], share=0.5)
    assert masks.shrunk(hidden, 0) is hidden
    for rim in (1, 2):
        for whole, left in zip(hidden[:, 0].tolist(), masks.shrunk(hidden, rim)[:, 0].tolist(), strict=True):
            for i in range(SIDE):
                for j in range(SIDE):
                    rows = whole[max(0, i - rim) : i + rim + 1]
                    assert left[i][j] == all(all(row[max(0, j - rim) : j + rim + 1]) for row in rows)
