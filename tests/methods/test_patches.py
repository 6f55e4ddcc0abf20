from __future__ import annotations

import torch

from largescale.methods.patches import shuffled_patches

CELLS, SIZE, SIDE = 3, 5, 25
"""Cells of 8 pixels; one pixel is left over."""


def cut(ids: list[int], *, seed: int = 0, step: int = 0) -> torch.Tensor:
    """Patches [B, 9, SIZE, SIZE] of images whose pixels say where they are."""
    where = torch.arange(SIDE * SIDE).view(1, 1, SIDE, SIDE).expand(len(ids), 2, SIDE, SIDE)
    found = shuffled_patches(where, torch.tensor(ids), cells=CELLS, size=SIZE, seed=seed, step=step)
    assert torch.equal(found[:, 0], found[:, 1])
    return found[:, 0].unflatten(0, (len(ids), -1))


def test_each_cell_gives_a_whole_patch_at_a_random_place_in_a_random_order():
    patches = cut(list(range(200)))
    corner = patches[:, :, 0, 0]
    steps = torch.arange(SIZE)[:, None] * SIDE + torch.arange(SIZE)
    assert torch.equal(patches, corner[..., None, None] + steps)
    down, right = corner // SIDE, corner % SIDE
    cells = down // 8 * CELLS + right // 8
    assert torch.equal(cells.sort(dim=1).values, torch.arange(9).expand(200, 9))
    for place in (down % 8, right % 8):
        assert place.unique().tolist() == [0, 1, 2, 3]  # and none that would reach over the cell's edge
    assert len(cells.unique(dim=0)) > 190
    assert (cells == cells[0]).float().mean(0).max() < 0.25  # no place of the order is fixed


def test_they_are_a_function_of_seed_step_and_sample_alone():
    together, alone = cut([4, 7, 4]), cut([7])
    assert torch.equal(together[0], together[2]) and torch.equal(together[1], alone[0])
    assert not torch.equal(cut([7], step=1), alone) and not torch.equal(cut([7], seed=1), alone)
