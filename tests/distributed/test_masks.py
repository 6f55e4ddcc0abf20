"""Masked weights, their momentum and their teachers' stay zero under every strategy and optimizer, elsewhere too.

Covers: largescale/parallel/masks.py, largescale/run/masked.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import find_latest
from largescale.checkpoint.mask_file import read_mask, write_mask
from largescale.checkpoint.saver import Saver
from largescale.config import Config
from largescale.methods import build_method
from largescale.models.backbones import build_backbone
from largescale.parallel.strategies import build_engine
from largescale.prune.find import convolutions, smaller, weights_of
from largescale.run.masked import take_mask
from largescale.run.resume import load
from tests.helpers.ranks import run_ranks
from tests.methods.harness import LENGTH, mini, views_of_step, whole

pytestmark = pytest.mark.distributed

OPTIMIZERS = {
    "lars": ["optim.name=lars", "optim.lr=0.5", "optim.weight_decay=0.01"],
    "lars of sums": ["optim.name=lars", "optim.trust_denominator=norm_of_sum", "optim.weight_decay=0.01"],
    "sgd": ["optim.name=sgd", "optim.lr=0.1", "optim.weight_decay=0.01"],
    "adamw": ["optim.name=adamw", "optim.lr=0.01", "optim.weight_decay=0.1"],
}
STRATEGIES = {
    "ddp": ["train.precision=fp64"],
    "fsdp": ["train.precision=fp64"],
    "fsdp replicated": ["train.precision=fp64", "parallel.replicate=2"],
    "fairscale": ["train.precision=fp64"],
    "zero1": ["train.precision=fp32"],
    "zero2": ["train.precision=fp32"],
    "zero3": ["train.precision=fp32"],
    "zero2 offloaded": ["train.precision=fp32", "parallel.cpu_offload=true"],
}
STEPS = 4
PRUNED = 300
"""Weights that are pruned of those left, in checkpoints of each case."""


def configuration(strategy: str, optimizer: str, mask: Path) -> Config:
    word = strategy.split()[0]
    shared = [f"parallel.strategy={word}", *STRATEGIES[strategy], f"model.mask={mask}", "optim.clip_tensor_norm=0"]
    return mini("byol", *OPTIMIZERS[optimizer], *shared)


def masks_of(config: Config, share: float = 0.3) -> dict[str, Tensor]:
    """Random masks of all convolutions; a shortcut has nothing left."""
    generator = torch.Generator().manual_seed(1)
    backbone, _ = build_backbone(config.model)
    masks = {
        name: torch.rand(value.shape, generator=generator) < share
        for name, value in backbone.named_parameters()
        if value.dim() > 1
    }
    masks[next(name for name in masks if "downsample" in name)].zero_()
    return masks


def train(config: Config, checkpoints: Path, *, first: int, steps: int, step_kept: int = 0) -> dict[str, Any]:
    """Losses, norms and, on rank 0, the whole state; saves a checkpoint of step `step_kept`, goes on from `first`."""
    device = torch.device("cpu")
    torch.manual_seed(config.run.seed)
    engine = build_engine(build_method(config, LENGTH), config, device)
    before = None
    if first:
        checkpoint = sharded.agree_on_latest(checkpoints, device)
        assert checkpoint is not None and checkpoint.step == first
        load(checkpoint, engine)
        before = checkpoint.progress["mask"]
    record = take_mask(engine, config, before)
    checks = []
    for step in range(first, steps):
        views = views_of_step(config, step)
        check = engine.check(views, engine.forward_backward(views, step).loss)
        assert not check.trouble
        engine.update(check, step=step, lr=config.optim.lr, clip=0.0)
        checks.append((check.loss, check.grad_norm))
        if step + 1 == step_kept:
            saver = Saver(checkpoints, keep=1, keep_every=0, background=False, device=device)
            saver.save(engine.state(), {"step": step_kept, "mask": record}, until_update=set())
    state = {name: whole(value) for name, value in engine.state().items()}
    return {"checks": checks, "state": state if dist.get_rank() == 0 else {}}


def train_all(cases: list[tuple[str, str]], folder: Path, **extent: int) -> list[dict[str, Any]]:
    return [
        train(configuration(*case, folder / "mask.safetensors"), folder / "-".join(case), **extent) for case in cases
    ]


CASES = [
    *((strategy, optimizer) for strategy in ("ddp", "fsdp", "zero1", "zero3") for optimizer in ("lars", "adamw")),
    *((strategy, "sgd") for strategy in ("ddp", "zero2", "fairscale", "fsdp replicated")),
    ("zero2 offloaded", "lars"),
    ("fairscale", "lars of sums"),
    ("ddp", "lars of sums"),
]


def zeros_in(state: dict[str, Tensor], masks: dict[str, Tensor], *, everything: bool = True) -> None:
    for name, mask in masks.items():
        tensors = {
            key: value for key, value in state.items() if f"backbone.{name}" in key and value.shape == mask.shape
        }
        assert any(key.startswith("optimizer.") for key in tensors) or not everything
        assert any("teacher" in key for key in tensors) and f"model.backbone.{name}" in tensors
        for key, value in tensors.items():
            assert not value[~mask].any(), key
            assert not mask.any() or value[mask].count_nonzero() > 0.9 * mask.sum() - 1, key


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("masks")
    path = folder / "mask.safetensors"
    masks = masks_of(configuration("ddp", "sgd", path))
    write_mask(path, masks, {})
    results = run_ranks(train_all_of, 2, CASES, folder)
    return folder, masks, dict(zip(CASES, results[0], strict=True))


def train_all_of(cases: list[tuple[str, str]], folder: Path) -> list[dict[str, Any]]:
    found = train_all(cases, folder, first=0, steps=STEPS, step_kept=STEPS - 2)
    for case, result in zip(cases, found, strict=True):
        config = configuration(*case, folder / "mask.safetensors")
        checkpoint = find_latest(folder / "-".join(case))
        assert checkpoint is not None
        weights, kept = weights_of(checkpoint, convolutions(config)), read_mask(config)
        result["pruned"] = smaller(weights, kept, PRUNED)
    return found


def go_on(cases: list[tuple[tuple[str, str], tuple[str, str]]], folder: Path) -> list[dict[str, Any]]:
    return [
        train(configuration(*to, folder / "mask.safetensors"), folder / "-".join(of), first=STEPS - 2, steps=STEPS)
        for of, to in cases
    ]


def test_zeros_stay_under_every_strategy_and_optimizer(trained):
    _, masks, found = trained
    for (strategy, optimizer), result in found.items():
        # OSS keeps the optimizer's state of a parameter on its owner alone.
        zeros_in(result["state"], masks, everything=strategy != "fairscale")
        expected = found["ddp", optimizer]["checks"]
        for (loss, norm), (expected_loss, expected_norm) in zip(result["checks"], expected, strict=True):
            tolerance = 1e-8 if "fp64" in STRATEGIES[strategy][0] else 1e-2
            assert loss == pytest.approx(expected_loss, rel=tolerance), (strategy, optimizer)
            assert norm == pytest.approx(expected_norm, rel=10 * tolerance), (strategy, optimizer)


def test_zeros_stay_where_training_goes_on_elsewhere(trained):
    folder, masks, found = trained
    moves = [
        (("ddp", "lars"), ("fsdp", "lars")),
        (("fsdp", "lars"), ("zero1", "lars")),
        (("zero3", "adamw"), ("ddp", "adamw")),
        (("zero1", "adamw"), ("fsdp", "adamw")),
        (("fairscale", "sgd"), ("zero2", "sgd")),
    ]
    for (_, to), result in zip(moves, run_ranks(go_on, 1, moves, folder)[0], strict=True):
        zeros_in(result["state"], masks, everything=to[0] != "fairscale")
        for (loss, _), (expected, _) in zip(result["checks"], found["ddp", to[1]]["checks"][STEPS - 2 :], strict=True):
            assert loss == pytest.approx(expected, rel=2e-2), to


def test_masks_found_in_checkpoints_of_all_strategies_are_those_of_torch(trained):
    folder, masks, found = trained
    for case, result in found.items():
        checkpoint = find_latest(folder / "-".join(case))
        assert checkpoint is not None
        precision = torch.float64 if "fp64" in STRATEGIES[case[0]][0] else torch.float32
        whole = {f"model.backbone.{name}": torch.zeros(mask.shape, dtype=precision) for name, mask in masks.items()}
        sharded.load(checkpoint, whole, no_dist=True)
        modules = {name: nn.Module() for name in masks}
        for name, module in modules.items():
            module.register_parameter("w", nn.Parameter(whole[f"model.backbone.{name}"]))
            prune.custom_from_mask(module, "w", masks[name])
        parameters = [(module, "w") for module in modules.values()]
        prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=PRUNED)
        assert result["pruned"].keys() == masks.keys()
        for name, module in modules.items():
            assert torch.equal(result["pruned"][name], dict(module.named_buffers())["w_mask"].bool()), (case, name)


def test_without_the_mask_they_do_not_stay(trained):
    folder, masks, _ = trained
    [state] = run_ranks(unmasked, 1, folder)
    with pytest.raises(AssertionError):
        zeros_in(state, masks)


def unmasked(folder: Path) -> dict[str, Tensor]:
    config = configuration("ddp", "sgd", folder / "mask.safetensors")
    torch.manual_seed(config.run.seed)
    engine = build_engine(build_method(config, LENGTH), config, torch.device("cpu"))
    take_mask(engine, config, None)
    engine.mask({})
    views = views_of_step(config, 0)
    engine.update(engine.check(views, engine.forward_backward(views, 0).loss), step=0, lr=0.1, clip=0.0)
    return {name: whole(value) for name, value in engine.state().items()}
