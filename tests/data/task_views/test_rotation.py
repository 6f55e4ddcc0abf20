from __future__ import annotations

import pytest
import torch
from torch import Tensor

from largescale.data.task_views.rotation import all_turns, random_turns, turned

BATCH, VIEWS, SIDE = 6, 2, 5


def images(count: int = VIEWS * BATCH) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by(quarters: int, count: int = VIEWS * BATCH) -> Tensor:
    return torch.full((count,), quarters)


def test_a_turn_puts_each_pixel_where_it_belongs():
    whole = images()
    for quarters in range(4):
        assert torch.equal(turned(whole, by(quarters)), torch.rot90(whole, quarters, (2, 3)))
    corner = torch.zeros(1, 1, SIDE, SIDE)
    corner[0, 0, 0, 0] = 1
    places = [turned(corner, torch.tensor([quarters])).nonzero()[0, 2:].tolist() for quarters in range(4)]
    assert places == [[0, 0], [SIDE - 1, 0], [SIDE - 1, SIDE - 1], [0, SIDE - 1]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_four_turns_give_the_same_bits_in_the_same_layout(layout):
    whole = images().contiguous(memory_format=layout)
    again = whole
    for _ in range(4):
        again = turned(again, by(1))
        assert again.is_contiguous(memory_format=layout)
    assert torch.equal(again, whole)
    assert torch.equal(turned(turned(whole, by(3)), by(2)), turned(whole, by(1)))


def test_all_turns_have_each_view_in_each_turn_once():
    whole = images()
    found = all_turns(whole, BATCH)
    assert found.images.shape == (4 * VIEWS * BATCH, 3, SIDE, SIDE) and found.turns.shape == (4 * VIEWS, BATCH)
    back = turned(found.images, (4 - found.turns.flatten()) % 4)
    assert torch.equal(back, whole.repeat(4, 1, 1, 1))
    assert torch.equal(found.turns.view(4, VIEWS, BATCH), torch.arange(4)[:, None, None].expand(4, VIEWS, BATCH))


def test_random_turns_say_what_was_done_and_are_a_function_of_seed_step_sample_group_and_view():
    ids = torch.tensor([5, 0, 5, 2**40, 7, 1])
    whole = images()
    found = random_turns(whole, ids, seed=3, step=8)
    assert torch.equal(turned(found.images, (4 - found.turns.flatten()) % 4), whole)
    assert torch.equal(found.turns[:, 0], found.turns[:, 2])
    some = [4, 1]  # as on another rank or in another micro-batch
    part = random_turns(whole.unflatten(0, (VIEWS, BATCH))[:, some].flatten(0, 1), ids[some], seed=3, step=8)
    assert torch.equal(part.turns, found.turns[:, some])
    assert torch.equal(part.images, found.images.unflatten(0, (VIEWS, BATCH))[:, some].flatten(0, 1))


def test_each_turn_is_drawn_equally_often_and_apart_from_others():
    many = torch.zeros(2 * 4000, 1, 1, 1)
    ids = torch.arange(4000)
    draws = {
        where: random_turns(many, ids, seed=where[0], step=where[1], group=where[2]).turns
        for where in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    }
    first = draws.pop((0, 0, 0))
    counts = first.flatten().bincount(minlength=4).double() / first.numel()
    assert counts.tolist() == pytest.approx([0.25] * 4, abs=0.02)
    for other in (*(one[0] for one in draws.values()), first[1]):
        assert float((first[0] == other).double().mean()) == pytest.approx(0.25, abs=0.03)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="images of 4x6 px: only square ones can be turned"):
        turned(torch.zeros(1, 3, 4, 6), torch.tensor([0]))
