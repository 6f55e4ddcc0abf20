"""Every strategy trains the same network as one process: losses, weights, BatchNorm statistics, optimizer state.

Covers: largescale/parallel/fairscale.py, largescale/parallel/fsdp.py,
largescale/parallel/strategies.py, largescale/parallel/strategy.py, largescale/parallel/zero.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock

from largescale.config import Config, load_config
from largescale.methods import build_method
from largescale.models.backbones import REGNETS_Y
from largescale.parallel.strategies import build_engine
from tests.helpers.commands import ROOT
from tests.helpers.once import once
from tests.helpers.ranks import run_ranks
from tests.methods.harness import views_of_step, whole

pytestmark = pytest.mark.distributed

STEPS = 10
STEPS_OF_FOUR = 6
"""Four ranks on a small machine take their time: three steps with frozen prototypes, three in which they move."""
SHORT = {"depth": 6, "w_0": 48, "w_a": 74.4, "w_m": 2.09, "group_width": 8}
"""RegNetY-400MF with 6 of its 16 blocks: the same widths, one or two blocks a stage."""
NETWORKS = {
    "resnet": ["model.backbone=resnet", "model.depths=[2,2,2,2]", "model.width=16"],
    "resnet18": ["model.backbone=resnet18"],  # in float32, where few channels would amplify round-off
    "regnet": ["model.backbone=regnet_y_short"],
}
OPTIMIZERS = {
    "lars": ["optim.name=lars", "optim.lr=0.1", "optim.trust_coefficient=0.01"],
    "adamw": ["optim.name=adamw", "optim.lr=0.001"],
}
CASES = [("resnet", "lars", 1), ("resnet", "adamw", 2), ("regnet", "lars", 2), ("regnet", "adamw", 1)]
"""Network, optimizer, micro-batches: each with each of the others."""


def case_config(case: tuple[str, str, int], *overrides: str) -> Config:
    network, optimizer, accumulate = case
    REGNETS_Y["regnet_y_short"] = SHORT
    return load_config(
        ROOT / "tests" / "strategies.yaml",
        [*NETWORKS[network], *OPTIMIZERS[optimizer], f"train.accumulate={accumulate}", *overrides],
    )


def calm(method: nn.Module) -> None:
    """Start with small residual branches: at its usual start a RegNet multiplies round-off by up to 1000 a step."""
    for block in method.modules():
        if isinstance(block, ResBottleneckBlock):
            nn.init.constant_(block.f.c[1].weight, 0.1)
        elif isinstance(block, BasicBlock):
            nn.init.constant_(block.bn2.weight, 0.1)


def train(config: Config, snapshots: list[int], steps: int) -> dict[str, Any]:
    """Losses and gradient norms of all steps, and the whole state after some of them (kept on rank 0)."""
    torch.manual_seed(config.run.seed)
    method = build_method(config)
    calm(method)
    engine = build_engine(method, config, torch.device("cpu"))
    losses, norms, states = [], [], {}
    for step in range(steps):
        views = views_of_step(config, step)
        output = engine.forward_backward(views, step)
        check = engine.check(views, output.loss)
        assert not check.trouble
        engine.update(check, step=step, lr=config.optim.lr, clip=config.optim.clip_grad_norm)
        losses.append(check.loss)
        norms.append(check.grad_norm)
        if step + 1 in snapshots:
            states[step + 1] = {name: whole(value) for name, value in engine.state().items()}
    return {"losses": losses, "norms": norms, "states": states if dist.get_rank() == 0 else {}}


def train_cases(
    cases: list[tuple[str, str, int]],
    strategy: str,
    precision: str,
    overrides: list[str],
    snapshots: list[int],
    steps: int = STEPS,
) -> list[dict[str, Any]]:
    shared = [f"parallel.strategy={strategy}", f"train.precision={precision}", *overrides]
    return [train(case_config(case, *shared), snapshots, steps) for case in cases]


def assert_same(states: dict[str, Tensor], expected: dict[str, Tensor], names: list[str], rtol: float) -> None:
    for name in names:
        difference = (states[name].double() - expected[name].double()).norm()
        assert difference <= rtol * expected[name].double().norm() + 1e-12, f"{name}: {difference:.2g}"


FOUR_RANKS = [("regnet", "lars", 2)]
"""Four ranks on a small machine take their time: one case, with everything in it."""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], dict[str, Any]]:
    def compute() -> list[dict[str, Any]]:
        return run_ranks(train_cases, 1, CASES, "ddp", "fp64", [], [STEPS_OF_FOUR, STEPS], timeout_s=600)[0]

    return dict(zip(CASES, once(tmp_path_factory, "strategies", compute), strict=True))


@pytest.mark.parametrize(
    "strategy, ranks, overrides, cases",
    [
        ("ddp", 2, [], CASES),
        ("fsdp", 2, [], CASES),
        ("fairscale", 2, [], CASES),
        ("ddp", 4, [], FOUR_RANKS),
        ("fsdp", 4, ["parallel.reshard_after_forward=false"], FOUR_RANKS),
        ("fsdp", 4, ["parallel.replicate=2"], [("regnet", "lars", 2), ("resnet", "adamw", 2)]),
        ("fairscale", 4, [], FOUR_RANKS),
    ],
    ids=["ddp-2", "fsdp-2", "fairscale-2", "ddp-4", "fsdp-4", "hsdp-2x2", "fairscale-4"],
)
def test_float64_runs_equal_one_process(one_process, strategy, ranks, overrides, cases):
    steps = STEPS if ranks == 2 else STEPS_OF_FOUR
    results = run_ranks(train_cases, ranks, cases, strategy, "fp64", overrides, [steps], steps, timeout_s=600)
    for case, own in zip(cases, results[0], strict=True):
        expected = one_process[case]
        assert own["losses"] == pytest.approx(expected["losses"][:steps], rel=1e-8), case
        assert own["norms"] == pytest.approx(expected["norms"][:steps], rel=1e-6), case
        states, whole_run = own["states"][steps], expected["states"][steps]
        missing = whole_run.keys() - states.keys()
        # OSS keeps the optimizer's state of a parameter on its owner alone.
        assert all(strategy == "fairscale" and name.startswith("optimizer.") for name in missing)
        assert_same(states, whole_run, sorted(states), rtol=1e-8)


FLOAT32_STEPS = 6
"""Prototypes are frozen in half of them; what comes later is round-off, amplified."""

ROOMY = ["train.global_batch=16", "method.queue=32"]
"""On four ranks, batches that leave each rank four images: with one or two, BatchNorm amplifies round-off at once."""


@pytest.fixture(scope="module")
def ddp_in_float32(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """DeepSpeed keeps fp32 weights. Against fp64 a ReLU that opens in one of them alone would show in a few weights, so
    it is compared with DDP on the same ranks, which the test above compares with one process."""

    def of_ranks(ranks: int) -> list[dict[str, Any]]:
        name = f"strategies-in-float32-{ranks}"
        return once(tmp_path_factory, name, lambda: train_in_float32("ddp", ranks))

    return cache(of_ranks)


def train_in_float32(strategy: str, ranks: int) -> list[dict[str, Any]]:
    wide = [(network.replace("resnet", "resnet18"), *rest) for network, *rest in CASES]
    cases, overrides = (wide, []) if ranks == 2 else ([("resnet18", "lars", 1)], ROOMY)
    return run_ranks(train_cases, ranks, cases, strategy, "fp32", overrides, [2], FLOAT32_STEPS, timeout_s=600)[0]


@pytest.mark.parametrize("stage, ranks", [(1, 2), (2, 2), (3, 2), (1, 4), (3, 4)])
def test_deepspeed_equals_ddp_in_float32(ddp_in_float32, stage, ranks):
    for own, expected in zip(train_in_float32(f"zero{stage}", ranks), ddp_in_float32(ranks), strict=True):
        assert own["losses"][:3] == pytest.approx(expected["losses"][:3], rel=1e-5)
        assert own["losses"][-1] == pytest.approx(expected["losses"][-1], rel=0.01)
        states, whole_run = own["states"][2], expected["states"][2]
        assert states.keys() == whole_run.keys()
        names = [name for name in states if name.startswith("model.")]
        assert_same(states, whole_run, names, rtol=5e-6)
        everything = [torch.cat([values[name].double().flatten() for name in names]) for values in (states, whole_run)]
        assert (everything[0] - everything[1]).norm() <= 1e-6 * everything[1].norm()
