from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cosine_similarity

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.directpred import DirectPred
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.ranks import Counted, run_ranks

MINI = ROOT / "tests/methods/mini/directpred.yaml"
BATCH, WIDTH = 16, 8
WHICH = ["directpred", "directset", "directcopy"]


def build(*overrides: str) -> DirectPred:
    torch.manual_seed(0)
    return build_method(load_config(MINI, list(overrides))).double()


def views(step: int = 0, batch: int = BATCH) -> Views:
    generator = torch.Generator().manual_seed(step)
    return Views.numbered([torch.randn(2 * batch, 3, 24, 24, generator=generator, dtype=torch.float64)], batch)


def embeddings(step: int = 0) -> torch.Tensor:
    """As of two views [2, BATCH, WIDTH], in directions of different strength."""
    generator = torch.Generator().manual_seed(step)
    scale = torch.linspace(0.2, 2, WIDTH, dtype=torch.float64)
    return torch.randn(2, BATCH, WIDTH, generator=generator, dtype=torch.float64) * scale


def lose(method: DirectPred, f: torch.Tensor, step: int) -> torch.Tensor:
    """The loss of embeddings in the place of a network's."""
    targets = embeddings(100 + step)
    return method.loss({"predictions": f, "embeddings": f, "targets": targets}, torch.arange(f.shape[1]), step).loss


def naive_weight(moments: torch.Tensor, which: str, power: float, eps: float) -> torch.Tensor:
    if which == "directcopy":
        return moments + eps * torch.eye(WIDTH, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(moments)
    shares = values / values.max()
    weight = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for share, vector in zip(shares, vectors.T, strict=True):
        value = share**0.5 if which == "directpred" else share**power
        weight += max(value + eps, 1e-4) * vector[:, None] * vector
    return weight


@pytest.mark.parametrize("which", WHICH)
def test_loss_gradient_moments_and_predictor_equal_the_naive_loop_over_steps(which):
    """No option is dead: each way to set the predictor gives a matrix of its own."""
    method = build(f"method.which={which}", "method.power=0.8" if which == "directset" else "method.eps=0.2")
    moments, weight = None, torch.eye(WIDTH, dtype=torch.float64)
    parameters = [p for p in method.parameters() if p.requires_grad]
    for step in range(3):
        batch = views(step)
        first, second = batch.images[0].chunk(2)
        f = torch.stack([method.projection(method.backbone(view)) for view in (first, second)])
        with torch.no_grad():
            k = [method.teacher["projection"](method.teacher["backbone"](view)) for view in (first, second)]
        terms = [
            2 - 2 * cosine_similarity(f[v][i] @ weight.T, k[1 - v][i], dim=0) for v in (0, 1) for i in range(BATCH)
        ]
        expected = torch.stack(terms).sum() / BATCH
        loss = method(batch, step).loss
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for ours, theirs in zip(
            torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        mean = sum(torch.outer(row, row) for row in f.detach().flatten(0, 1)) / (2 * BATCH)
        moments = mean if moments is None else 0.3 * moments + 0.7 * mean
        torch.testing.assert_close(method.moments, moments, rtol=1e-10, atol=1e-14)
        method.after_update(step)
        weight = naive_weight(moments, which, 0.8, method.config.eps)
        torch.testing.assert_close(method.weight, weight, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("which", WHICH)
def test_the_predictor_is_symmetric_and_commutes_with_the_moments(which):
    method = build(f"method.which={which}")
    lose(method, embeddings(), 0)
    method.after_update(0)
    weight, moments = method.weight, method.moments
    torch.testing.assert_close(weight, weight.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(weight @ moments, moments @ weight, rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(moments)
    expected = values + 0.01 if which == "directcopy" else (values / values.max()).sqrt() + 0.01
    torch.testing.assert_close(torch.linalg.eigvalsh(weight), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("which", WHICH)
def test_rotated_embeddings_have_a_rotated_predictor(which):
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)).double())
    own, other = build(f"method.which={which}"), build(f"method.which={which}")
    for step in range(2):
        lose(own, embeddings(step), step)
        lose(other, embeddings(step) @ rotation.T, step)
        for method in (own, other):
            method.after_update(step)
    torch.testing.assert_close(other.weight, rotation @ own.weight @ rotation.T, rtol=1e-9, atol=1e-11)


def test_powers_of_a_half_and_of_one_are_the_other_two_up_to_scale():
    found = {}
    for name, overrides in {
        "directpred": ["method.which=directpred", "method.eps=0"],
        "half": ["method.which=directset", "method.power=0.5", "method.eps=0"],
        "directcopy": ["method.which=directcopy", "method.eps=0"],
        "one": ["method.which=directset", "method.power=1", "method.eps=0"],
    }.items():
        method = build(*overrides)
        lose(method, embeddings(), 0)
        method.after_update(0)
        found[name] = method.weight / method.weight.norm()
    torch.testing.assert_close(found["half"], found["directpred"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["one"], found["directcopy"], rtol=1e-9, atol=1e-12)
    assert (found["one"] - found["half"]).norm() > 0.1


def test_the_predictor_is_no_parameter_and_the_first_one_the_identity():
    method = build()
    assert torch.equal(method.weight, torch.eye(WIDTH, dtype=torch.float64))
    assert not [name for name, _ in method.named_parameters() if "predictor" in name or name == "weight"]
    with torch.no_grad():
        method.weight.zero_()
    method.finish_initialisation()
    assert torch.equal(method.weight, torch.eye(WIDTH, dtype=torch.float64))


def test_embeddings_that_span_few_directions_leave_a_finite_predictor():
    for f in (embeddings()[..., :1] * torch.ones(WIDTH, dtype=torch.float64), torch.zeros_like(embeddings())):
        method = build()
        lose(method, f, 0)
        method.after_update(0)
        assert method.weight.isfinite().all()
        assert float(torch.linalg.eigvalsh(method.weight).min()) == pytest.approx(0.01, rel=1e-3)


def moments_of_this_rank(accumulate: int) -> Any:
    """After two steps, a micro-batch at a time, with the collectives of each step."""
    method, calls = build(f"train.accumulate={accumulate}"), []
    ranks = dist.get_world_size()
    for step in range(2):
        own = embeddings(step)[:, BATCH // ranks * dist.get_rank() :][:, : BATCH // ranks]
        with Counted() as counted:
            for part in own.chunk(accumulate, dim=1):
                targets = torch.ones_like(part)
                inputs = {"predictions": part, "embeddings": part, "targets": targets}
                method.loss(inputs, torch.arange(part.shape[1]), step)
            method.after_update(step)
        calls.append(counted.calls)
    return method.moments, method.weight, calls


@pytest.mark.distributed
def test_moments_are_those_of_all_ranks_and_micro_batches():
    """Ranks have other images. A predictor of each rank's own, as public code has had it, would differ."""
    [[moments, weight, calls]] = run_ranks(moments_of_this_rank, 1, 1)
    assert calls == [[], []]
    for ranks, accumulate in ((2, 4), (4, 1)):
        for own_moments, own_weight, own_calls in run_ranks(moments_of_this_rank, ranks, accumulate):
            torch.testing.assert_close(own_moments, moments, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(own_weight, weight, rtol=1e-10, atol=1e-12)
            assert own_calls == [[("all_reduce", WIDTH * WIDTH)]] * 2


def test_a_network_at_its_start_gets_no_warning():
    method = build()
    output = method(views(), 0)
    found = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert said_of(load_config(MINI), found) == ""


def test_equal_embeddings_are_called_collapse():
    method = build().eval()
    with torch.no_grad():
        for head in (method.projection, method.teacher["projection"]):
            head[-1].weight.zero_()
            head[-1].bias.fill_(1.0)
    output = method(views(), 0)
    found = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert float(output.loss.detach()) == pytest.approx(0, abs=1e-12)
    assert "looks like collapse" in said_of(load_config(MINI), found)
