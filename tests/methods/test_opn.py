from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from largescale.data.length import Length
from largescale.data.task_views.frames import drawn_numbers
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.opn import OPN, ORDERS
from shards.ground.errors import InputError
from tests.helpers.doctor import said_of
from tests.methods.harness import mini

BATCH, SIDE = 5, 24


def build(*overrides: str) -> OPN:
    torch.manual_seed(0)
    return build_method(mini("opn", *overrides)).double()


def views(count: int = BATCH) -> Views:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4 * count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return Views([images], torch.arange(count))


def naive_loss(method: OPN, seen: Tensor, classes: list[int]) -> Tensor:
    """The loop of the docstring on frames [4 * B, 3, s, s] that are in order, displaced and of one channel."""
    count, total = len(classes), torch.zeros((), dtype=torch.float64)
    for row, wanted in enumerate(classes):
        z = [method.frame_head(method.backbone(seen[place * count + row][None]))[0] for place in range(4)]
        pairs = [method.pair(torch.cat([z[p], z[q]])[None])[0] for p in range(4) for q in range(p + 1, 4)]
        total = total - torch.log_softmax(method.head(torch.cat(pairs)[None])[0], 0)[wanted]
    return total / count


def test_loss_and_gradients_equal_the_naive_loop():
    method, batch = build().eval(), views()
    numbers = drawn_numbers(batch.ids, 24, seed=0, step=3).tolist()
    expected = naive_loss(method, method.task_views(batch, 3).images[0], [number // 2 for number in numbers])
    found = method(batch, 3)
    torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=1e-14)
    trained = list(method.parameters())
    gradients = torch.autograd.grad(expected, trained)
    torch.testing.assert_close(torch.autograd.grad(found.loss, trained), gradients, rtol=1e-9, atol=1e-12)


def test_an_order_and_its_reverse_are_one_class_and_no_others():
    assert len(set(ORDERS)) == math.factorial(4)
    for one, order in enumerate(ORDERS):
        same = [number for number, other in enumerate(ORDERS) if number // 2 == one // 2]
        assert {ORDERS[number] for number in same} == {order, order[::-1]}


def test_time_that_runs_backwards_swaps_eight_classes_in_pairs():
    """What docs/methods.md says of motion that looks the same both ways."""
    other = {number // 2: ORDERS.index(tuple(3 - one for one in order)) // 2 for number, order in enumerate(ORDERS)}
    assert sum(own == swapped for own, swapped in other.items()) == 4
    assert all(other[swapped] == own for own, swapped in other.items())


def test_the_class_is_that_of_places_that_move_by_a_pixel_per_frame():
    """Frames are their own place; where they come in the reverse order, the class is the same."""
    method, count = build("method.jitter=0"), 200
    ids = torch.arange(count)
    places = torch.arange(4.0)[:, None].expand(4, count)
    images = places.flatten()[:, None, None, None].expand(-1, 3, SIDE, SIDE)
    seen = method.task_views(Views([images], ids), 1)
    shown = seen.images[0][:, 0, 0, 0].view(4, count).T.long().tolist()
    by_class: dict[int, set[tuple[int, ...]]] = {}
    for own, wanted in zip(shown, method.targets(seen)["wanted"][0].tolist(), strict=True):
        by_class.setdefault(wanted, set()).add(tuple(own))
    assert sorted(by_class) == list(range(12))
    assert all(len(orders) == 2 and len({min(one, one[::-1]) for one in orders}) == 1 for orders in by_class.values())


def test_frames_have_one_channel_each_and_places_of_their_own():
    batch = views()
    seen = build("method.jitter=2").task_views(batch, 0).images[0]
    assert seen.shape == (4 * BATCH, 3, SIDE - 4, SIDE - 4) and (seen == seen[:, :1]).all()
    assert seen.is_contiguous(memory_format=torch.channels_last)
    coloured = build("method.jitter=2", "method.channel_splitting=false").task_views(batch, 0).images[0]
    assert not (coloured == coloured[:, :1]).all()


def test_frames_are_large_enough_for_the_network():
    with pytest.raises(InputError, match=r"method.jitter=5: expected at most 0: views of data.crops.0 have 24 px"):
        mini("opn", "model.backbone=alexnet_bn", "model.stem=imagenet", "method.jitter=5")


@pytest.mark.parametrize("side, jitter", [(90, 5), (224, 12), (28, 1), (16, 1)])
def test_frames_of_other_sizes_are_displaced_in_proportion(side, jitter):
    config = mini("opn", f"data.crops.0.size={side}", "method.jitter=1")
    assert OPN.suited(config, Length(10, 2, 40))["jitter"].value == jitter


@pytest.mark.parametrize(
    "override, remedy",
    [
        ("method.channel_splitting=false", "Set method.channel_splitting=true"),
        ("method.jitter=0", "Raise method.jitter"),
    ],
)
def test_a_solved_task_without_a_cure_may_be_a_shortcut(override, remedy):
    words = said_of(mini("opn", override), {"task_accuracy": 0.995, "loss_over_ln_k": 0.02})
    assert "told by traces that say nothing of images" in words and remedy in words
