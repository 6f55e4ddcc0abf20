from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from largescale.data.clip_facts import microseconds
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.shuffle_learn import ShuffleLearn
from tests.methods.harness import mini

BATCH, SIDE = 6, 24


def build(*overrides: str) -> ShuffleLearn:
    torch.manual_seed(0)
    return build_method(mini("shuffle_learn", *overrides)).double()


def views(times: list[list[float]]) -> Views:
    """Random frames at these times, [3, B]."""
    generator = torch.Generator().manual_seed(1)
    count = len(times[0])
    images = torch.randn(3 * count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return Views([images], torch.arange(count), {"times_us": torch.from_numpy(microseconds(np.array(times)))})


def naive_loss(method: ShuffleLearn, batch: Views, reversed_: list[bool]) -> Tensor:
    """The loop of the docstring, in evaluation mode."""
    count, total = len(batch.ids), torch.zeros((), dtype=torch.float64)
    for row, turned in enumerate(reversed_):
        order = [2, 1, 0] if turned else [0, 1, 2]
        z = [method.frame_head(method.backbone(batch.images[0][place * count + row][None]))[0] for place in order]
        t = [float(batch.facts["times_us"][place, row]) for place in order]
        between = min(t[0], t[2]) < t[1] < max(t[0], t[2])
        total = total - torch.log_softmax(method.head(torch.cat(z)[None])[0], 0)[int(between)]
    return total / count


TIMES = [[1.0, 1.0, 1.0, 3.0, 0.5, 2.0], [2.0, 0.0, 4.0, 2.0, 3.5, 5.0], [3.0, 3.0, 3.0, 1.0, 2.5, 3.0]]


@pytest.mark.parametrize("hidden", [[], [10]])
def test_loss_and_gradients_equal_the_naive_loop(hidden):
    method, batch = build(f"method.hidden={hidden}").eval(), views(TIMES)
    seen = method.task_views(batch, 4).facts["times_us"]
    turned = (seen[0] != batch.facts["times_us"][0]).tolist()
    assert 0 < sum(turned) < BATCH
    expected, found = naive_loss(method, batch, turned), method(batch, 4)
    torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=1e-14)
    trained = list(method.parameters())
    gradients = torch.autograd.grad(expected, trained)
    torch.testing.assert_close(torch.autograd.grad(found.loss, trained), gradients, rtol=1e-9, atol=1e-12)


def test_labels_are_those_of_places_that_move_by_a_pixel_per_frame():
    """A square that moves to the right: what is between in time is between in place; reversed frames are no other."""
    method = build()
    lefts = torch.tensor(TIMES) * 8  # 8 frames per second, a pixel each
    between = (lefts[0] - lefts[1]).sign() == (lefts[1] - lefts[2]).sign()
    for step in range(8):
        wanted = method.targets(method.task_views(views(TIMES), step))["wanted"]
        assert wanted.shape == (1, BATCH) and wanted[0].tolist() == between.long().tolist() == [1, 0, 0, 1, 0, 0]


def test_late_frames_that_are_close_are_told_apart_though_what_is_not_whole_becomes_bf16():
    """As sharded strategies cast what a method sees."""
    method, batch = build().to(torch.bfloat16), views([[200.0, 200.05], [200.05, 200.0], [200.1, 200.1]])
    facts = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.facts.items()}
    assert method.targets(batch._replace(facts=facts))["wanted"].tolist() == [[1, 0]]


def test_what_is_asked_of_the_stream_are_the_paper_s_tuples():
    wanted = mini("shuffle_learn").method.frame_tuples()
    assert wanted.drawn == 5 and wanted.shown == 3
    assert dict(zip(wanted.orders, wanted.chances, strict=True)) == {
        (1, 2, 3): 0.25,
        (1, 0, 3): 0.375,
        (1, 4, 3): 0.375,
    }
    assert all(order[0] == 1 and order[2] == 3 for order in wanted.orders), "the ends say nothing"


def test_whoever_always_says_out_of_order_is_at_chance():
    method = build()
    row = method.measures(0.5623, {"task_accuracy": torch.tensor(0.75)}, 8)
    assert row["task_chance"] == 0.75 and row["loss_over_ln_k"] == pytest.approx(1, abs=1e-3)
