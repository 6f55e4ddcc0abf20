"""Covers: largescale/methods/prototypes.py, largescale/methods/swav/method.py, largescale/methods/swav/settings.py,
largescale/optim/roles.py, largescale/optim/schedules.py
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax, normalize

from largescale.config import Config, load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.swav.method import SwAV
from largescale.optim.optimizers import build_optimizer
from largescale.optim.roles import set_rates
from largescale.optim.schedules import cosine_with_warmup
from tests.helpers.codes import oracle
from tests.helpers.commands import ROOT

BATCH = 6


def small(*overrides: str) -> tuple[Config, SwAV, list[torch.Tensor]]:
    """Three crop groups (2 + 1 + 1 views), two heads, no BatchNorm in evaluation mode's way."""
    config = load_config(
        ROOT / "tests/tiny.yaml",
        ["data.shards=unused", f"train.global_batch={BATCH}", "data.streams=1", "method.queue=0", *overrides],
    )
    torch.manual_seed(0)
    method = SwAV(config).double().eval()
    method.of_run(Length.nominal(config))
    views = [
        torch.randn(group.num * BATCH, 3, group.size, group.size, dtype=torch.float64) for group in config.data.crops
    ]
    return config, method, views


def embeddings_by_view(method: SwAV, views: list[torch.Tensor]) -> list[torch.Tensor]:
    """[V] tensors [B, D], group after group, view after view."""
    each = [part for group in views for part in group.split(BATCH)]
    return [normalize(method.projection(method.backbone(view)), dim=1) for view in each]


def naive_loss(
    config: Config, method: SwAV, views: list[torch.Tensor], queue: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """Section 3 of the paper, one pair of views at a time."""
    heads = []
    for head in method.prototypes.heads:
        scores = [z @ head.weight.T for z in embeddings_by_view(method, views)]
        pairs = []
        for assigned in range(2):
            rows = scores[assigned].detach()
            if queue is not None:
                rows = torch.cat([rows, queue[assigned] @ head.weight.detach().T])
            codes = oracle(rows, config.method.epsilon, config.method.sinkhorn_iterations)[:BATCH]
            for predicting in range(4):
                if predicting != assigned:
                    log_p = log_softmax(scores[predicting] / config.method.temperature, dim=1)
                    pairs.append(-(codes * log_p).sum(1).mean())
        heads.append(torch.stack(pairs).mean())
    return torch.stack(heads).mean()


@pytest.mark.parametrize(
    "prototypes, per_group", [("[12, 12]", False), ("[12, 7]", False), ("[12, 7]", True), ("9", False)]
)
def test_loss_and_gradient_equal_the_naive_loop(prototypes, per_group):
    config, method, views = small(f"method.prototypes={prototypes}", f"method.head_per_group={per_group}")
    method.begin()
    loss = method(Views.numbered(views, BATCH), 0).loss
    expected = naive_loss(config, method, views)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours = torch.autograd.grad(loss, list(method.parameters()))
    theirs = torch.autograd.grad(expected, list(method.parameters()))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-7, atol=1e-10)


def test_the_queue_joins_the_assignment_once_it_is_full_and_holds_the_newest():
    config, method, views = small("method.queue=12", "method.queue_start_step=1")
    batches = [[group + step for group in views] for step in range(5)]
    for step, batch in enumerate(batches):
        full = step >= 1 + 2
        queue = None
        if full:
            past = [embeddings_by_view(method, earlier)[:2] for earlier in (batches[step - 1], batches[step - 2])]
            queue = [torch.cat([both[assigned] for both in past]).detach() for assigned in range(2)]
        assert method.queue_is_full(step) == full
        expected = naive_loss(config, method, batch, queue)
        torch.testing.assert_close(method(Views.numbered(batch, BATCH), step).loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
def test_prototypes_stay_during_the_first_steps_and_gather_no_momentum(optimizer):
    config, method, views = small(
        "method.freeze_prototypes_steps=2", f"optim.name={optimizer}", "optim.weight_decay=0.1", "optim.momentum=0.9"
    )
    steps = build_optimizer(method, method.roles(), config.optim)
    for step, frozen in ((0, True), (1, True), (2, False)):
        before = [p.detach().clone() for p in method.parameters()]
        method(Views.numbered(views, BATCH), step).loss.backward()
        set_rates(steps.param_groups, step=step, lr=config.optim.lr, peak=config.optim.lr)
        steps.step()
        moved = {id(p): not torch.equal(p, old) for p, old in zip(method.parameters(), before, strict=True)}
        prototypes = list(method.prototypes.parameters())
        assert all(moved[id(p)] != frozen and (p in steps.state) != frozen for p in prototypes)
        assert any(moved[id(p)] for p in method.backbone.parameters())


def test_what_is_watched_says_collapse_when_everything_collapses():
    _, method, views = small()
    alive = method(Views.numbered(views, BATCH), 0).signs
    assert 0 < float(alive["assignment_entropy"]) < 0.99
    same = [group[:1].expand_as(group) for group in views]
    dead = method(Views.numbered(same, BATCH), 0)
    assert float(dead.signs["assignment_entropy"]) == pytest.approx(1, abs=1e-6)
    assert float(dead.loss) >= math.log(12) - 1e-6
    assert [int(dead.signs[f"used.{head}"].sum()) for head in (0, 1)] == [1, 1]


@pytest.mark.parametrize("per_group", [False, True])
def test_batchnorm_of_the_head_sees_all_views_or_those_of_one_group(per_group):
    _, method, views = small(f"method.head_per_group={per_group}")
    method.train()
    features = [method.backbone(group) for group in views]
    embeddings = [method.project(part) for part in (features if per_group else [torch.cat(features)])]
    expected = method.prototypes(torch.cat(embeddings))[0].view(4, BATCH, -1)
    torch.testing.assert_close(method.embed(Views.numbered(views, BATCH))["scores.0"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_group", [False, True])
def test_large_views_may_be_of_several_groups(per_group):
    """As those are whose augmentation differs."""
    small_views, found = "{num: 2, size: 16}", []
    for large in ("{num: 2, size: 32}", "{num: 1, size: 32}, {num: 1, size: 32, augment: {blur: 1.0}}"):
        overrides = [f"data.crops=[{large}, {small_views}]", f"method.head_per_group={per_group}"]
        _, method, _ = small(*overrides, f"method.queue={BATCH}", "method.queue_start_step=0")
        torch.manual_seed(1)
        views = [torch.randn(2 * BATCH, 3, size, size, dtype=torch.float64) for size in (32, 16)]
        if "augment" in large:
            views = [*views[0].split(BATCH), views[1]]
        method.train()
        found.append(method(Views.numbered(views, BATCH), 0))
        assert method.num_assign == 2 and "agreement" in method.signs
        assert method.queue.shape[:3] == (2, 1, BATCH) and method.queue.norm(dim=-1).min() > 0.99
    torch.testing.assert_close(found[0].loss, found[1].loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0].signs, found[1].signs, rtol=1e-12, atol=1e-14)


def test_codes_are_computed_beside_the_network_only_where_that_changes_nothing():
    over_batch = ["train.accumulate=2", "train.loss_spans=global_batch"]
    cases = {
        True: [["method.head_per_group=true"], ["method.head_per_group=true", "train.accumulate=2"]],
        False: [
            [],
            ["method.head_per_group=true", "method.overlap_codes=false"],
            ["method.head_per_group=true", "data.crops=[{num: 2, size: 32}]"],
            ["method.head_per_group=true", "data.crops=[{num: 1, size: 32}, {num: 1, size: 32}]"],
            ["method.head_per_group=true", *over_batch],
        ],
    }
    for overlaps, settings in cases.items():
        for overrides in settings:
            config, _, _ = small(*overrides)
            assert config.method.overlaps(config) == overlaps, overrides


def test_scores_stay_in_float32_under_autocast():
    _, method, views = small()
    method.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = method(Views.numbered([view.float() for view in views], BATCH), 0)
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()


def test_the_schedule_warms_up_and_ends_as_configured():
    rates = cosine_with_warmup(peak=4.8, final=0.0048, start=0.3, warmup_steps=10, num_steps=110)
    assert rates[0] == 0.3 and rates[10] == 4.8 and rates.argmax() == 10
    assert rates[5] == pytest.approx((0.3 + 4.8) / 2)
    assert rates[60] == pytest.approx((4.8 + 0.0048) / 2)
    assert 0.0048 < rates[-1] < 0.01 and len(rates) == 110
    assert (rates[11:] < rates[10:-1]).all()


def test_a_queue_that_is_too_large_for_a_rank_is_refused():
    """Two assign views of 60 samples, 8 numbers each."""
    length, gb = Length(10, 5, 30), 1.1 * 2 * 60 * 8 * 4 / 1e9
    for precision, words in (
        ("fp32", ""),
        ("fp64", "method.queue=60: expected at most 30, since 7.68e-06 GB on each of 1 rank are more than "),
    ):
        config, _, _ = small("method.queue=60", f"train.precision={precision}", f"method.max_queue_gb={gb}")
        assert config.method.embedding == 8
        assert SwAV.misfit(config, length) == (words and f"{words}method.max_queue_gb={gb:g}")


@pytest.mark.parametrize(
    "setting",
    ["method.epsilon_end=0.2", "method.temperature_end=0.3", "method.hard_codes_steps=1", "method.prior_power=1"],
)
def test_each_takes_part_in_the_loss(setting):
    """In the step where it does, and not in one where it does not."""
    settings = ["method.prototypes=5"]
    _, method, views = small(*settings)
    _, changed, _ = small(*settings, setting)
    changed.load_state_dict(method.state_dict())
    end = method.length.num_steps - 1
    batch = Views.numbered(views, BATCH)
    same = [bool(torch.equal(method(batch, step).loss, changed(batch, step).loss)) for step in (0, end)]
    expected = {"epsilon_end": [True, False], "temperature_end": [True, False], "hard_codes_steps": [False, True]}
    assert same == expected.get(setting.split(".")[1].split("=")[0], [False, False])


def test_what_a_step_asks_sinkhorn_for(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "largescale.methods.swav.method.sinkhorn", lambda scores, **options: asked.append(options) or scores.softmax(-1)
    )
    _, method, views = small(
        "method.prototypes=5",
        "method.sinkhorn_iterations_end=9",
        "method.epsilon_end=0.01",
        "method.fused_sinkhorn=true",
    )
    for step in (0, method.length.num_steps - 1):
        method(Views.numbered(views, BATCH), step)
    first, last = asked
    assert (first["iterations"], last["iterations"]) == (3, 9) and first["fused"] and first["prior"] is None
    assert (first["epsilon"], last["epsilon"]) == (pytest.approx(0.05), pytest.approx(0.01))


def test_hard_codes_make_the_loss_that_of_classes():
    config, method, views = small("method.prototypes=5", "method.hard_codes_steps=1")
    with torch.no_grad():
        output = method(Views.numbered(views, BATCH), 0)
        scores = method.embed(Views.numbered(views, BATCH))["scores.0"]
        codes = oracle(scores[:2], config.method.epsilon, config.method.sinkhorn_iterations)
        classes = codes.argmax(-1)
        terms = [
            cross_entropy(scores[view] / config.method.temperature, classes[assigned])
            for assigned in range(2)
            for view in range(len(scores))
            if view != assigned
        ]
    assert float(output.loss) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-12)
