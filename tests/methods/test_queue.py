"""On several ranks and in micro-batches, the harness compares queues with those of one process.

Covers: largescale/methods/state_size.py, largescale/methods/replicated.py
"""

from __future__ import annotations

import pytest
import torch

from largescale.config import load_config
from largescale.data.length import Length
from largescale.methods.queue import Queue
from largescale.run.schedule_check import complaints
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

RECIPE = ROOT / "tests/methods/mini/mocov2.yaml"


def test_rows_stand_where_their_step_and_place_say():
    """Over several rounds, and in micro-batches, which nobody sees before the last of a step."""
    config = load_config(RECIPE, ["train.global_batch=4", "train.accumulate=2"])
    queue = Queue(config, 12, 3)
    steps = torch.arange(7 * 12.0).view(7, 4, 3)
    expected = list(queue.rows.clone())
    for step, rows in enumerate(steps):
        before = queue.rows
        assert torch.equal(before, torch.stack(expected))
        queue.keep(rows[:2], step)
        assert queue.rows is before and torch.equal(before, torch.stack(expected))
        queue.keep(rows[2:], step)
        assert torch.equal(before, torch.stack(expected)), "the backward pass of this step is yet to come"
        for place in range(4):
            expected[(step * 4 + place) % 12] = rows[place]
        assert torch.equal(queue.rows, torch.stack(expected))
    whole = Queue(config, 12, 3)
    for step, rows in enumerate(steps):
        whole.keep(rows, step)
    assert torch.equal(whole.rows, queue.rows)


def test_a_queue_is_written_in_place_after_the_backward_pass():
    queue = Queue(load_config(RECIPE, ["train.global_batch=4"]), 8, 3)
    place = queue.rows.data_ptr()
    for step in range(3):
        views = torch.randn(4, 3, requires_grad=True)
        before = queue.rows.clone()
        loss = (views @ queue.rows.T).square().sum()
        queue.keep(views, step)
        loss.backward()
        torch.testing.assert_close(views.grad, 2 * views.detach() @ before.T @ before)
        assert torch.equal(queue.rows[step * 4 % 8 :][:4], views) and queue.rows.data_ptr() == place


@pytest.mark.parametrize(
    "method, most", [("mocov2", 4_000_000_000 // (4 * 8) // 8 * 8), ("densecl", 4_000_000_000 // (2 * 4 * 8) // 8 * 8)]
)
def test_a_queue_that_is_too_large_is_refused_when_the_configuration_is_read(method, most):
    recipe = RECIPE.with_stem(method)
    load_config(recipe, [f"method.queue={most}", "train.global_batch=8", "data.shards=x", "train.precision=fp32"])
    with pytest.raises(InputError) as refusal:
        load_config(recipe, [f"method.queue={2**39}", "train.global_batch=8", "data.shards=x", "train.precision=fp32"])
    assert f"method.queue={2**39}: expected at most {most:,}, since " in str(refusal.value)
    assert str(refusal.value).endswith("GB on every rank are more than method.max_queue_gb=4")


def test_queues_start_with_unit_rows_of_their_own():
    config = load_config(RECIPE)
    first, again, second = Queue(config, 32, 8), Queue(config, 32, 8), Queue(config, 32, 8, number=1)
    assert torch.equal(first.rows, again.rows) and not torch.equal(first.rows, second.rows)
    torch.testing.assert_close(first.rows.norm(dim=1), torch.ones(32))
    assert not first.state_dict(), "part of a method's state, not of its weights"


@pytest.mark.parametrize("images, words", [(33, []), (32, ["the queue holds every one of the 32 images"])])
def test_a_queue_of_as_many_embeddings_as_there_are_images_is_a_warning(images, words):
    config = load_config(RECIPE, ["data.shards=x"])
    length = Length(num_steps=1000, steps_per_epoch=images // 16, num_samples=images)
    said = [line for line in complaints(config, length) if line.startswith("method.queue")]
    assert len(said) == len(words) and all(word in line for word, line in zip(words, said, strict=True))
    assert not said or said[0].endswith("so each meets itself in it; set method.queue=16")


def test_a_queue_in_double_precision_is_twice_as_large():
    gb = 32 * 8 * 4 / 1e9
    overrides = ["method.queue=32", "train.global_batch=8", "data.shards=x", f"method.max_queue_gb={gb}"]
    load_config(RECIPE, [*overrides, "train.precision=fp32"])
    with pytest.raises(InputError, match=r"method\.queue=32: expected at most 16, since 2\.05e-06 GB"):
        load_config(RECIPE, [*overrides, "train.precision=fp64"])
