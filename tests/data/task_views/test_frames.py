"""Frames in another order, displaced, with one channel: against loops."""

from __future__ import annotations

import pytest
import torch

from largescale.data.device_random import uniform
from largescale.data.task_views.frames import drawn_numbers, drawn_reversals, reordered, shifted_crops, split_channels
from largescale.data.views import Views

BATCH, NUM, SIDE = 5, 4, 9
IDS = torch.tensor([3, 900, 0, 7, 3])


def frames() -> torch.Tensor:
    return torch.randn(NUM * BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def test_frames_and_their_facts_are_put_in_order():
    images, order = frames(), torch.stack([torch.randperm(NUM) for _ in range(BATCH)])
    times = torch.arange(NUM * BATCH, dtype=torch.float64).view(NUM, BATCH)
    boxes = torch.arange(NUM * BATCH * 4).view(NUM, BATCH, 4)
    found = reordered(Views([images], IDS, {"times": times, "boxes": boxes}), order)
    for row in range(BATCH):
        for place in range(NUM):
            old = int(order[row, place])
            assert torch.equal(found.images[0][place * BATCH + row], images[old * BATCH + row])
            assert found.facts["times"][place, row] == times[old, row]
            assert torch.equal(found.facts["boxes"][place, row], boxes[old, row])


def test_half_of_the_samples_are_reversed():
    ids = torch.arange(2000)
    orders = drawn_reversals(ids, 3, seed=1, step=2)
    turned = (orders == torch.tensor([2, 1, 0])).all(1)
    assert (turned | (orders == torch.tensor([0, 1, 2])).all(1)).all() and turned.double().mean() == pytest.approx(
        0.5, abs=0.05
    )
    assert not torch.equal(orders, drawn_reversals(ids, 3, seed=1, step=3))
    counts = drawn_numbers(ids, 24, seed=1, step=2).bincount(minlength=24)
    assert len(counts) == 24 and counts.min() > 40


@pytest.mark.parametrize("most", [0, 1, 3])
def test_crops_are_those_of_a_loop_in_every_place(most):
    images, side, seen = frames(), SIDE - 2 * most, set()
    for step in range(6):
        found = shifted_crops(images, IDS, most, seed=1, step=step)
        draws = uniform(1, step, IDS, 62, num=2 * NUM, device=IDS.device).view(BATCH, NUM, 2)
        for row in range(BATCH):
            for place in range(NUM):
                top, left = (int(one * (2 * most + 1)) for one in draws[row, place])
                number = place * BATCH + row
                assert torch.equal(found[number], images[number, :, top : top + side, left : left + side])
                seen.add(top)
    assert seen == set(range(2 * most + 1))


def test_one_channel_of_each_frame_stands_in_the_place_of_all():
    images = frames()
    found = split_channels(images, IDS, seed=1, step=2)
    chosen = [
        [torch.equal(one[0], image[channel]) for channel in range(3)] for one, image in zip(found, images, strict=True)
    ]
    assert all(sum(one) == 1 for one in chosen) and (found == found[:, :1]).all()
    assert {tuple(one) for one in chosen} == {(True, False, False), (False, True, False), (False, False, True)}
    own = [chosen[place * BATCH] for place in range(NUM)]
    assert own != [own[0]] * NUM, "each frame of a sample has its own"
    assert [chosen[place * BATCH + 4] for place in range(NUM)] == own, "the same sample, the same channels"
