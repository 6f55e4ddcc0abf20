"""Every loss on several ranks, each with other images, against one process with all of them.

Covers: largescale/methods/losses/distances.py, largescale/methods/losses/picks.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from largescale.methods.losses import nt_xent
from largescale.methods.losses.over_ranks import all_ranks, mean_of_counted
from tests.helpers.ranks import Counted, run_ranks
from tests.methods.losses.cases import CASES, IMAGES, embeddings, identities


def on_this_rank() -> dict[str, Any]:
    """Loss, its gradient at this rank's rows after the mean over ranks, and collectives of both passes, by case.

    And the loss of views that equal each other and no other image's, over all ranks and over this one alone.
    """
    ranks = dist.get_world_size()
    own = slice(dist.get_rank() * IMAGES // ranks, (dist.get_rank() + 1) * IMAGES // ranks)
    equal = torch.eye(IMAGES, dtype=torch.float64)[own].expand(2, -1, -1)
    found: dict[str, Any] = {"equal": [float(nt_xent(equal, 0.1, group=group)) for group in (all_ranks(), None)]}
    for name, (loss_of, _, _) in CASES.items():
        views = embeddings()[:, own].requires_grad_()
        with Counted() as forward:
            loss = loss_of(views, identities()[own], all_ranks())
        with Counted() as backward:
            loss.backward()
        found[name] = (loss.detach(), views.grad / ranks, len(forward.calls), len(backward.calls))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_and_gradients_on_several_ranks_are_those_of_one_process(ranks):
    found = run_ranks(on_this_rank, ranks)
    for name, (loss_of, forward, backward) in CASES.items():
        views = embeddings().requires_grad_()
        expected = loss_of(views, identities(), None)
        expected.backward()
        losses, gradients, *calls = zip(*(rank[name] for rank in found), strict=True)
        torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-12, atol=1e-14, msg=name)
        torch.testing.assert_close(torch.cat(gradients, dim=1), views.grad, rtol=1e-9, atol=1e-13, msg=name)
        assert [set(one) for one in calls] == [{forward}, {backward}], name
    assert_partners_are_found_and_candidates_are_of_all_ranks([rank["equal"] for rank in found], ranks)


def assert_partners_are_found_and_candidates_are_of_all_ranks(losses: list[list[float]], ranks: int) -> None:
    """Gathered as [first views, second views] of each rank, a partner taken for that of one process is another image,
    and such views cost ln(2 N); without candidates of others the loss is lower.
    """
    for over_all, alone in losses:
        assert over_all == pytest.approx(math.log(1 + 2 * (IMAGES - 1) * math.exp(-10)), rel=1e-9)
        assert alone == pytest.approx(math.log(1 + 2 * (IMAGES // ranks - 1) * math.exp(-10)), rel=1e-9)


def test_a_process_without_others_has_no_group():
    assert all_ranks() is None


def test_a_mean_over_nothing_is_zero_and_has_a_gradient():
    terms = torch.tensor([1.0, float("-inf")], requires_grad=True)
    mean = mean_of_counted(terms, torch.tensor([False, False]), None)
    mean.backward()
    assert mean == 0 and torch.equal(terms.grad, torch.zeros(2))
