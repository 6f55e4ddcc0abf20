from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.joint_embedding import unit
from largescale.methods.nnclr import NNCLR
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of

MINI = ROOT / "tests/methods/mini/nnclr.yaml"
BATCH = 6


@pytest.fixture
def method() -> NNCLR:
    torch.manual_seed(0)
    config = load_config(MINI, [f"train.global_batch={BATCH}", "data.streams=1", "method.queue=18"])
    return build_method(config).double().eval()


def views(step: int = 0, small: bool = False) -> Views:
    generator = torch.Generator().manual_seed(step)
    sizes = (24, 24, 16)[: 3 if small else 2]
    return Views.numbered(
        [torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes], BATCH
    )


def naive_loss(method: NNCLR, batch: Views, queue: list[Tensor]) -> tuple[Tensor, Tensor]:
    """An image at a time, and the first views' embeddings."""
    temperature = method.config.temperature
    z = [method.projection(method.backbone(view)) for view in batch.images]
    p = [unit(method.predictor(one)) for one in z]
    z = [unit(one.detach()) for one in z]
    pairs = [(a, b) for a in range(2) for b in range(len(p)) if a != b]
    total = torch.zeros((), dtype=torch.float64)
    for a, b in pairs:
        for i in range(BATCH):
            near = max(queue, key=lambda row: float(row @ z[a][i]))
            candidates = [torch.exp(near @ p[b][n] / temperature) for n in range(BATCH)]
            total = total - torch.log(candidates[i] / sum(candidates)) / (len(pairs) * BATCH)
    return total, z[0]


@pytest.mark.parametrize("small", [False, True], ids=["two", "multi-crop"])
def test_loss_gradient_and_queue_equal_the_naive_loop_over_steps(method, small):
    """Neighbours come from earlier steps alone."""
    queue = list(method.queue.rows.clone())
    for step in range(4):
        batch = views(step, small)
        loss = method(batch, step).loss
        expected, kept = naive_loss(method, batch, queue)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        parameters = [p for p in method.parameters() if p.requires_grad]
        for ours, theirs in zip(
            torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        place = step % 3 * BATCH
        queue[place : place + BATCH] = list(kept)
        torch.testing.assert_close(method.queue.rows, torch.stack(queue), rtol=0, atol=1e-15)


def test_a_queue_that_holds_the_embeddings_themselves_gives_them_as_neighbours(method):
    first, second = views().images
    z = [unit(method.projection(method.backbone(view))).detach() for view in (first, second)]
    method.queue.rows = torch.cat([*z, z[0]])
    output = method(views(), 0)
    assert float(output.signs["neighbour"]) == pytest.approx(1)
    p = [unit(method.predictor(method.projection(method.backbone(view)))) for view in (first, second)]
    logits = [z[0] @ p[1].T / 0.1, z[1] @ p[0].T / 0.1]
    expected = sum(torch.nn.functional.cross_entropy(one, torch.arange(BATCH)) for one in logits) / 2
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)


def test_no_gradient_goes_through_the_neighbour(method):
    """Embeddings are looked up; what learns is the prediction."""
    inputs = {name: value.detach().requires_grad_() for name, value in method.embed(views()).items()}
    method.loss(inputs, torch.arange(BATCH), 0).loss.backward()
    assert inputs["embeddings"].grad is None and inputs["predictions"].grad.abs().sum() > 0


def test_equal_embeddings_cost_as_much_as_a_guess_and_are_called_collapse(method):
    config = load_config(MINI)
    with torch.no_grad():
        method.projection[-1].weight.zero_()
        method.projection[-1].bias.fill_(1)
    output = method(views(), 0)
    assert float(output.loss.detach()) == pytest.approx(math.log(BATCH), rel=1e-9)
    row = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert "looks like collapse" in said_of(config, row)
    assert NNCLR.loss_references(config)["all views alike"] == pytest.approx(math.log(16))


@pytest.mark.parametrize(
    "override, words",
    [
        ("method.queue=33", "method.queue=33: expected a multiple of train.global_batch=16"),
        ("data.crops=[{num: 1, size: 24}]", "expected at least two large views"),
    ],
)
def test_what_does_not_fit_is_refused(override, words):
    with pytest.raises(InputError, match=words):
        load_config(MINI, [override])


def test_a_queue_as_large_as_the_corpus_is_a_warning():
    config = load_config(MINI)
    assert NNCLR.complaints(config, Length(10, 5, 33)) == []
    assert [line[:17] for line in NNCLR.complaints(config, Length(10, 2, 32))] == ["method.queue=32: "]
