from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.simsiam import SimSiam
from largescale.optim.roles import parameter_groups, set_rates
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of

MINI = ROOT / "tests/methods/mini/simsiam.yaml"
BATCH = 6
CROPS = "data.crops=[{num: 2, size: 24}, {num: 2, size: 16}]"


def build(*overrides: str) -> SimSiam:
    torch.manual_seed(0)
    return build_method(load_config(MINI, list(overrides))).double()


def views(*sizes: int) -> Views:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]
    return Views.numbered(images, BATCH)


def naive_loss(method: SimSiam, images: list[torch.Tensor], stop: bool) -> torch.Tensor:
    """A pair of views and an image at a time."""
    z = [method.projection(method.backbone(view)) for view in images]
    p = [method.predictor(one) for one in z]
    terms = []
    for a in range(2):
        for v in range(len(images)):
            if v != a:
                targets = z[a].detach() if stop else z[a]
                terms += [-cosine_similarity(p[v][i], targets[i], dim=0) for i in range(BATCH)]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("overrides, sizes", [([], (24, 24)), ([CROPS], (24, 24, 16, 16))])
def test_loss_and_gradient_equal_the_naive_loop(stop, overrides, sizes):
    method = build(f"method.stop_gradient={str(stop).lower()}", *overrides)
    parameters = [p for p in method.parameters() if p.requires_grad]
    batch = views(*sizes)
    loss, expected = method(batch, 0).loss, naive_loss(method, batch.images, stop)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stop", [True, False])
def test_what_is_predicted_takes_a_gradient_in_the_ablation_alone(stop):
    method = build(f"method.stop_gradient={str(stop).lower()}")
    inputs = {name: value.detach().requires_grad_() for name, value in method.embed(views(24, 24)).items()}
    method.loss(inputs, torch.arange(BATCH), 0).loss.backward()
    assert (inputs["embeddings"].grad is None) == stop and inputs["predictions"].grad is not None


def test_the_predictors_rate_stays_where_it_is():
    config = load_config(MINI, ["optim.name=sgd", "optim.lr=0.5"])
    method = build()
    groups = parameter_groups(method, method.roles(), config.optim)
    set_rates(groups, step=7, lr=0.1, peak=config.optim.lr)
    held = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    rates = {name: held[id(p)] for name, p in method.named_parameters() if p.requires_grad}
    assert {rate for name, rate in rates.items() if name.startswith("predictor.")} == {0.5}
    assert {rate for name, rate in rates.items() if not name.startswith("predictor.")} == {0.1}


def test_the_predictors_biases_and_norms_are_excluded_where_those_of_others_are():
    for excluded in (True, False):
        overrides = [f"optim.exclude_bias_and_norm={excluded}", "optim.weight_decay=0.1"]
        config = load_config(MINI, [*overrides, "optim.bias_and_norm_lr_factor=0.5"])
        method = build()
        groups = parameter_groups(method, method.roles(), config.optim)
        set_rates(groups, step=0, lr=0.01, peak=0.2)
        found = {id(p): (g["weight_decay"], g["scaled"], g["lr"]) for g in groups for p in g["params"]}
        assert len(found) == sum(len(group["params"]) for group in groups)
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                rate = 0.2 if name.startswith("predictor") else 0.01
                excepted, factor = (excluded, 0.5) if parameter.dim() == 1 else (False, 1.0)
                assert found[id(parameter)] == (0.0 if excepted else 0.1, not excepted, rate * factor), name


def test_heads_are_the_published_ones():
    method = build()
    linear = [layer for head in (method.projection, method.predictor) for layer in head if isinstance(layer, nn.Linear)]
    assert [layer.bias is not None for layer in linear] == [False, False, False, True]
    assert isinstance(method.projection[-1], nn.BatchNorm1d)
    assert not any(parameter.requires_grad for parameter in method.projection[-1].parameters())


def test_equal_embeddings_are_called_collapse():
    method = build("method.stop_gradient=false").eval()
    with torch.no_grad():
        method.projection[-1].running_mean.fill_(-1.0)
        method.projection[-2].weight.zero_()
        method.predictor[-1].weight.zero_()
        method.predictor[-1].bias.fill_(1.0)
    output = method(views(24, 24), 0)
    assert float(output.loss.detach()) == pytest.approx(-1)
    found = method.measures(-1.0, output.signs, BATCH)
    words = said_of(load_config(MINI, ["method.stop_gradient=false"]), found)
    assert "looks like collapse" in words and "set method.stop_gradient=true" in words
    assert "optim.lr=" in said_of(load_config(MINI), found)


def test_a_network_at_its_start_gets_no_warning():
    method = build()
    output = method(views(24, 24), 0)
    found = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert said_of(load_config(MINI), found) == ""
    assert -1 <= float(output.loss.detach()) <= 1
