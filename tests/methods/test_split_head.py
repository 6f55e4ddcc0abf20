from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from largescale.methods.feature_clusters import drawn_head
from largescale.methods.split_head import Answers, Asked, SplitHead
from largescale.plan.trace import StepTrace
from tests.helpers.ranks import Counted, run_ranks

WIDTH, GROUPS, BATCH, MICRO_BATCHES = 5, [3, 4, 2, 3], 4, 2
SAMPLES = BATCH * 2
"""Of both ranks."""


def head() -> SplitHead:
    found = SplitHead(WIDTH, GROUPS, MICRO_BATCHES).double()
    found.make_room()
    found.draw(seed=0, step=0)
    found._rows.own.mul_(100)  # probabilities that differ
    return found


def whole_rows(one: SplitHead) -> Tensor:
    rows = drawn_head(torch.arange(sum(GROUPS)), WIDTH, seed=0, step=0) * 100
    assert torch.equal(rows[one._rows.first : one._rows.first + one._rows.num_own], one._rows.own)
    return rows


def inputs(number: int) -> tuple[Tensor, Tensor, list[Asked]]:
    """Features and weights of the samples of both ranks; what is asked of them: one of three groups, and the last."""
    generator = torch.Generator().manual_seed(number)
    features = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.rand(SAMPLES, generator=generator, dtype=torch.float64)
    weights[3] = 0
    groups = torch.randint(3, (SAMPLES,), generator=generator)
    classes = torch.randint(2, (SAMPLES,), generator=generator)
    last = torch.randint(3, (SAMPLES,), generator=generator)
    return features, weights, [Asked(groups, classes), Asked(torch.full_like(groups, 3), last)]


def naive(features: Tensor, weights: Tensor, asked: list[Asked], rows: Tensor) -> tuple[Tensor, list[float]]:
    """The sum of the docstring over samples, a mean; and the share of right answers of samples with a weight."""
    total, right = torch.zeros((), dtype=torch.float64), []
    for one in asked:
        correct = 0
        for x, weight, group, wanted in zip(features, weights, one.groups.tolist(), one.classes.tolist(), strict=True):
            start = sum(GROUPS[:group])
            own = rows[start : start + GROUPS[group]]
            logits = own[:, :-1] @ x + own[:, -1]
            total = total - torch.log_softmax(logits, 0)[wanted] * weight / len(features)
            correct += weight > 0 and int(logits.argmax()) == wanted
        right.append(int(correct) / int((weights > 0).sum()))
    return total, right


def step(one: SplitHead) -> tuple[list[Answers], list[Tensor]]:
    """Both micro-batches of a step by a rank's part of the samples; gradients of its features."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    own = slice(rank * SAMPLES // ranks, (rank + 1) * SAMPLES // ranks)
    answers, gradients = [], []
    for number in range(MICRO_BATCHES):
        features, weights, asked = inputs(number)
        mine = features[own].clone().requires_grad_()
        found = one(mine, weights, asked)
        found.loss.backward()
        answers.append(Answers(*(value.detach() for value in found)))
        gradients.append(mine.grad)
    one.update(lr=0.5, weight_decay=0.1)
    return answers, gradients


def of_a_rank() -> tuple[list[Answers], list[Tensor], Tensor, int]:
    one = head()
    whole_rows(one)
    answers, gradients = step(one)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return answers, gradients, one.tensor(mesh).full_tensor(), one._rows.num_own


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_gradients_and_the_update_equal_the_naive_loop(ranks):
    found = run_ranks(of_a_rank, ranks, timeout_s=600)
    assert sum(own for *_, own in found) == sum(GROUPS)
    if ranks == 2:
        assert found[0][-1] not in torch.tensor(GROUPS).cumsum(0), "a group is split over both"
    rows = (drawn_head(torch.arange(sum(GROUPS)), WIDTH, seed=0, step=0) * 100).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for number in range(MICRO_BATCHES):
        features, weights, asked = inputs(number)
        features.requires_grad_()
        loss, right = naive(features, weights, asked, rows)
        total = total + loss / MICRO_BATCHES
        [expected] = torch.autograd.grad(loss, features, retain_graph=True)
        answers = [one[0][number] for one in found]
        torch.testing.assert_close(sum(one.loss for one in answers) / ranks, loss.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(sum(one.losses.sum() for one in answers) / ranks, loss.detach())
        assert (sum(one.right for one in answers) / ranks).tolist() == pytest.approx(right)
        # Strategies average over ranks, so a rank's gradient is as many times that of all.
        gradients = torch.cat([one[1][number] for one in found]) / ranks
        torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-14)
    [gradient] = torch.autograd.grad(total, rows)
    for *_, whole, _ in found:
        torch.testing.assert_close(whole, (rows - 0.5 * (gradient + 0.1 * rows)).detach(), rtol=1e-12, atol=1e-14)


def with_few_rows() -> tuple[int, float]:
    """Two classes, on more ranks than that."""
    one = SplitHead(WIDTH, [2], 1).double()
    one.make_room()
    one.draw(0, 0)
    asked = Asked(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 0]))
    found = one(torch.ones(1, WIDTH, dtype=torch.float64), torch.ones(3, dtype=torch.float64), [asked])
    return one._rows.num_own, float(found.loss)


def count_exchanges() -> list[tuple[str, int]]:
    one, own = head(), slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH)
    features, weights, asked = inputs(0)
    with Counted() as counted:
        one(features[own].clone().requires_grad_(), weights, asked).loss.backward()
    return counted.calls


@pytest.mark.distributed
def test_a_step_exchanges_features_and_four_numbers_per_sample_and_group():
    [calls, _] = run_ranks(count_exchanges, 2, timeout_s=600)
    names = ("all_gather", "all_reduce", "all_reduce", "reduce_scatter")
    assert [name.removesuffix("_").startswith(want) for (name, _), want in zip(calls, names, strict=True)] == [True] * 4
    assert [size for _, size in calls[1:3]] == [2 * SAMPLES, 6 * SAMPLES]


@pytest.mark.distributed
def test_ranks_without_a_row_take_part():
    found = run_ranks(with_few_rows, 3, timeout_s=600)
    assert [own for own, _ in found] == [1, 1, 0]
    assert sum(loss for _, loss in found) / 3 == pytest.approx(0.69, abs=0.05)


def test_a_step_that_is_passed_over_leaves_no_gradient():
    one, other = head(), head()
    for number in range(MICRO_BATCHES):
        one(*inputs(5 + number))  # fp16 overflows: no update
    for each in (one, other):
        step(each)
    assert torch.equal(one._rows.own, other._rows.own)


def test_equal_logits_pick_nothing_and_samples_without_a_weight_are_not_counted():
    one = SplitHead(WIDTH, [2], 1).double()
    one.make_room()
    one._rows.own[1, -1] = 1
    classes, weights = torch.tensor([1, 0, 1]), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    asked, x = [Asked(torch.zeros_like(classes), classes)], torch.ones(3, WIDTH, dtype=torch.float64)
    assert float(one(x, weights, asked).right) == pytest.approx(1 / 2)
    assert float(one(x, torch.zeros_like(weights), asked).right) == 0
    one._rows.own.zero_()
    assert float(one(x, weights, asked).right) == 0


def test_a_step_holds_one_gradient_beside_the_rows(monkeypatch):
    """Of a layer much larger than features and logits."""
    monkeypatch.setattr("largescale.plan.trace._SWEEP_EVERY", 1)
    one = SplitHead(4096, [64], MICRO_BATCHES)
    one.make_room()
    x, classes = torch.ones(2, 4096), torch.tensor([1, 2])
    with StepTrace() as trace:
        trace.watch(iter([one._rows.rows, x]))
        for _ in range(MICRO_BATCHES):
            one(x, torch.ones(2), [Asked(torch.zeros_like(classes), classes)])
        one.update(lr=0.5, weight_decay=0.1)
    rows = one._rows.rows
    assert trace.lap() < 2.2 * rows.numel() * rows.element_size()


def test_it_holds_no_parameters():
    assert isinstance(head(), nn.Module) and not list(head().parameters())
