"""The smallest weights over pieces are those that torch prunes in one process, on any number of ranks, with ties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import prune

from largescale.prune.find import smaller
from largescale.prune.threshold import magnitudes, prune_smallest
from tests.helpers.ranks import run_ranks

SHAPES = {"b.weight": (7, 5, 3, 3), "a.weight": (3, 4), "c.weight": (16, 1, 1, 1), "d.weight": (2, 40)}
CASES = {
    "normal": (lambda t: t, 0.2),
    "most": (lambda t: t, 0.97),
    "ties": (lambda t: (t * 4).round() / 4, 0.5),
    "all equal": (lambda t: t.sign(), 0.3),
    "zeros": (lambda t: t * (t > 0), 0.4),
    "tiny": (lambda t: t * 1e-41, 0.3),
    "double": (lambda t: t.double() * (1 + 1e-12), 0.45),
    "huge": (lambda t: t * 1e38, 0.6),
}
ROUNDS = 3


def weights_of(case: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: CASES[case][0](torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def by_sorting(weights: dict[str, Tensor], kept: dict[str, Tensor], num: int) -> dict[str, Tensor]:
    """What the docstring of the module says, by a loop."""
    left = [
        (abs(value), name, place)
        for name, weight in weights.items()
        for place, value in enumerate(weight.flatten().tolist())
        if kept[name].flatten()[place]
    ]
    found = {name: mask.clone().flatten() for name, mask in kept.items()}
    for _, name, place in sorted(left)[:num]:
        found[name][place] = False
    return {name: mask.view_as(kept[name]) for name, mask in found.items()}


def on_ranks(drawn: int | None) -> list[list[dict[str, Tensor]]]:
    """The masks of three rounds of every case, from weights in pieces; whole on rank 0."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for case, (_, rate) in CASES.items():
        weights: dict[str, DTensor] = {
            name: distribute_tensor(value, mesh, src_data_rank=None) for name, value in weights_of(case).items()
        }
        weights = {name: value.redistribute(placements=[dist.tensor.Shard(0)]) for name, value in weights.items()}
        kept, rounds = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in weights.items()}, []
        for _ in range(ROUNDS):
            num = round(rate * sum(int(mask.sum()) for mask in kept.values()))
            masks = [smaller(weights, kept, num, drawn=drawn)]
            dist.broadcast_object_list(masks)
            kept = masks[0]
            rounds.append(kept)
        found.append(rounds)
    return found


SEEDS = (None, 5, 6)
"""Masks by magnitude, and two draws."""


def every_way() -> list[list[list[dict[str, Tensor]]]]:
    return [on_ranks(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def ways() -> list[list[list[dict[str, Tensor]]]]:
    return run_ranks(every_way, 1)[0]


@pytest.fixture(scope="module")
def one_process(ways) -> list[list[dict[str, Tensor]]]:
    return ways[0]


@pytest.mark.distributed
def test_masks_are_those_of_a_sort(one_process):
    for (case, (_, rate)), rounds in zip(CASES.items(), one_process, strict=True):
        weights = weights_of(case)
        kept = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in weights.items()}
        for masks in rounds:
            num = round(rate * sum(int(mask.sum()) for mask in kept.values()))
            kept = by_sorting(weights, kept, num)
            assert all(torch.equal(masks[name], mask) for name, mask in kept.items()), case


@pytest.mark.distributed
def test_masks_are_those_of_torch(one_process):
    """Of equal weights torch prunes any; how many, and all others, are the same."""
    for (case, (_, rate)), rounds in zip(CASES.items(), one_process, strict=True):
        weights = weights_of(case)
        modules = {name: nn.Module() for name in weights}
        for name, module in modules.items():
            module.register_parameter("w", nn.Parameter(weights[name]))
        for masks in rounds:
            prune.global_unstructured(
                [(modules[name], "w") for name in sorted(modules)], pruning_method=prune.L1Unstructured, amount=rate
            )
            theirs = {name: dict(module.named_buffers())["w_mask"].bool() for name, module in modules.items()}
            assert sum(int(m.sum()) for m in theirs.values()) == sum(int(m.sum()) for m in masks.values()), case
            differ = torch.cat([weights[name].abs()[theirs[name] != masks[name]] for name in weights])
            assert len(differ.unique()) <= 1, case
            if case in ("normal", "most", "double"):
                assert not len(differ), case
            if len(differ):
                break  # the next round begins with other masks


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_find_the_same(ways, ranks):
    for own in run_ranks(every_way, ranks):
        for cases, expected in zip(own, ways, strict=True):
            for rounds, whole in zip(cases, expected, strict=True):
                for masks, others in zip(rounds, whole, strict=True):
                    assert all(torch.equal(masks[name], mask) for name, mask in others.items())


@pytest.mark.distributed
def test_drawn_masks_are_as_large_and_within_each_other(ways):
    _, drawn, others = ways
    total = sum(math.prod(shape) for shape in SHAPES.values())
    for (_, rate), rounds, differing in zip(CASES.values(), drawn, others, strict=True):
        assert any(not torch.equal(mask, differing[0][name]) for name, mask in rounds[0].items())
        assert sum(int(mask.sum()) for mask in rounds[0].values()) == total - round(rate * total)
        for before, after in itertools.pairwise(rounds):
            assert all(not (mask & ~before[name]).any() for name, mask in after.items())


def test_nothing_to_prune_and_everything():
    scores = {"a": magnitudes(torch.tensor([1.0, -2.0])), "b": magnitudes(torch.tensor([0.5]))}
    kept = {name: torch.ones(len(value), dtype=torch.bool) for name, value in scores.items()}
    assert all(mask.all() for mask in prune_smallest(scores, kept, 0).values())
    assert not any(mask.any() for mask in prune_smallest(scores, kept, 3).values())


def test_what_is_not_a_number_is_pruned_last():
    values = torch.tensor([float("nan"), float("inf"), -1e30, 0.0])
    [mask] = prune_smallest({"a": magnitudes(values)}, {"a": torch.ones(4, dtype=torch.bool)}, 3).values()
    assert mask.tolist() == [True, False, False, False]
