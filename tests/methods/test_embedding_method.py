"""Losses that span several micro-batches; that they are exact for every method is tested in test_all_methods.py.

Covers: largescale/methods/float32.py
"""

from __future__ import annotations

import pytest
import torch

from largescale.methods import METHODS
from largescale.methods.embedding_method import SPANS, Embedded, EmbeddingMethod, Gradients
from largescale.methods.method import Output
from largescale.plan.simulate import simulate
from shards.ground.errors import InputError
from tests.helpers.ranks import run_ranks
from tests.methods.harness import GLOBAL_BATCH, mini, train


class Ratio(EmbeddingMethod):
    """A loss that no mean over micro-batches equals."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2).double()

    def embed(self, views):
        return {"z": self.layer(views)[None], "unused": self.layer(views)[None]}

    def targets(self, views):
        return {"t": views.sum(1)[None]}

    def loss(self, inputs, ids, step):
        scale = inputs["t"].square().mean() + ids.double().mean()
        return Output((inputs["z"].square().mean(1) / scale).mean().sqrt(), {}, {})


def test_gradients_at_embeddings_make_those_of_parameters():
    torch.manual_seed(0)
    method, images, ids = Ratio(), torch.randn(6, 3, dtype=torch.float64), torch.arange(6)
    inputs, targets = method.embed(images), method.targets(images)
    expected = torch.autograd.grad(method.loss(inputs | targets, ids, 0).loss, method.parameters())
    parts = images.split(2)
    with torch.no_grad():
        output, gradients = method(Embedded([method(part, 0, "inputs") for part in parts], ids), 0, "loss")
    for number, part in enumerate(parts):
        gradients.loss_at(method(part, 0, "embed"), number, len(parts)).backward()
    for parameter, gradient in zip(method.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)
    assert set(gradients.by_name) == {"z"} and not output.loss.requires_grad


def test_the_loss_scale_of_fp16_fits():
    half = torch.ones(1, 2, 1, dtype=torch.float16, requires_grad=True)
    (Gradients({"z": torch.full((1, 2, 1), 1e-6, dtype=torch.float16)}).loss_at({"z": half}, 0, 1) * 2.0**20).backward()
    assert float(half.grad.float().mean()) == pytest.approx(1e-6 * 2**20, rel=0.1)


def test_gradients_at_half_precision_embeddings_keep_what_is_small():
    """fp16 holds nothing below 6e-8, and the loss scale comes only after them."""

    class Tiny(Ratio):
        def loss(self, inputs, ids, step):
            return Output((inputs["z"] * inputs["t"][..., None]).sum() * 1e-9, {}, {})

    halves = {"z": torch.ones(1, 2, 3, dtype=torch.float16)}, {"t": torch.ones(1, 2, dtype=torch.float16)}
    with torch.no_grad():
        _, gradients = Tiny()(Embedded([halves], torch.arange(2)), 0, "loss")
    torch.testing.assert_close(gradients.by_name["z"], torch.full((1, 2, 3), 1e-9))


def test_methods_say_what_their_loss_may_span():
    for name, method in METHODS.items():
        assert method.Settings.loss_spans == SPANS[:1] or issubclass(method, EmbeddingMethod), name


def test_a_loss_that_compares_no_images_refuses_to_span_the_global_batch():
    """It would cost a forward pass per step; in which methods it changes something is shown over all of them."""
    for name, method in METHODS.items():
        if method.Settings.loss_spans == SPANS:
            assert mini(name, GLOBAL_BATCH).train.loss_spans == "global_batch"
            continue
        with pytest.raises(InputError) as refusal:
            mini(name, GLOBAL_BATCH)
        assert str(refusal.value).startswith(
            f"train.loss_spans=global_batch: expected micro_batch with method.name={name}, whose loss compares "
            "no images beyond a micro-batch"
        )
    with pytest.raises(InputError, match=r"train\.loss_spans=all: expected micro_batch or global_batch"):
        mini("simclr", "train.loss_spans=all")


@pytest.mark.parametrize(
    "method, exchange, expected",
    [
        ("simclr", "rows of the batch", {"all-gather": 1, "reduce-scatter": 1}),
        ("mocov2", "rows of the batch", {"all-gather": 1}),
        ("mocov3", "rows of the batch", {"all-gather": 1}),
        ("nnclr", "rows of the batch", {"all-gather": 2, "reduce-scatter": 1}),
        ("paws", "rows of the batch", {"all-gather": 5, "reduce-scatter": 2}),
        ("byol", "rows of the batch", {}),
        ("simsiam", "rows of the batch", {}),
        ("barlow", "rows of the batch", {"all-gather": 1, "reduce-scatter": 1}),
        ("vicreg", "rows of the batch", {"all-gather": 1, "reduce-scatter": 1}),
        ("swav", "Sinkhorn's marginals", {"all-reduce": 2 * 3}),  # heads of two sizes, three iterations
    ],
)
def test_a_loss_over_the_global_batch_is_exchanged_once_per_step(method, exchange, expected):
    for spans in METHODS[method].Settings.loss_spans:
        times = {"global_batch": 1, "micro_batch": 4}[spans]
        step = simulate(mini(method, "train.accumulate=4", f"train.loss_spans={spans}", "train.precision=fp32"), 2)
        found = {what.kind: count for what, count in step.counts.items() if what.of == exchange}
        assert found == {kind: times * count for kind, count in expected.items()}


def losses_in_bf16() -> list[float]:
    return train(
        mini(
            "simclr",
            "train.accumulate=2",
            "train.loss_spans=global_batch",
            "parallel.strategy=fsdp",
            "train.precision=bf16",
        ),
        steps=3,
    )["losses"]


@pytest.mark.distributed
def test_what_fsdp_casts_to_bf16_are_images_not_embeddings():
    losses = torch.tensor(run_ranks(losses_in_bf16, 1)[0])
    assert (losses != losses.bfloat16().float()).any()
