"""Every strategy trains the same network as one process: losses, weights, BatchNorm statistics, optimizer state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from largescale.config import Config, load_config
from largescale.data.order import rank_places
from largescale.methods import build_method
from largescale.parallel import build_engine
from tests.conftest import ROOT
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 10
NETWORKS = {
    "resnet18": ["model.backbone=resnet18"],
    "regnet": ["model.backbone=regnet_y_400mf"],
}
OPTIMIZERS = {"lars": ["optim.name=lars", "optim.lr=0.6"], "adamw": ["optim.name=adamw", "optim.lr=0.002"]}
CASES = [("resnet18", "lars", 1), ("resnet18", "adamw", 2), ("regnet", "lars", 2), ("regnet", "adamw", 1)]
"""Network, optimizer, micro-batches: each with each of the others."""


def case_config(case: tuple[str, str, int], *overrides: str) -> Config:
    network, optimizer, accumulate = case
    return load_config(ROOT / "tests" / "strategies.yaml", [
        *NETWORKS[network], *OPTIMIZERS[optimizer], f"train.accumulate={accumulate}", *overrides])


def views_of_step(config: Config, step: int) -> list[Tensor]:
    """This rank's views of random images that do not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(step)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    places = rank_places(config.train.global_batch, accumulate=config.train.accumulate, rank=dist.get_rank(),
                         world_size=dist.get_world_size())
    batch = config.train.global_batch
    return [
        torch.randn(group.num, batch, 3, group.size, group.size, generator=generator, dtype=torch.float64)
        .to(dtype)[:, places].flatten(0, 1) for group in config.data.crops
    ]


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def train(config: Config, snapshots: list[int]) -> dict[str, Any]:
    """Losses and gradient norms of all steps, and the whole state after some of them (kept on rank 0)."""
    torch.manual_seed(config.run.seed)
    engine = build_engine(build_method(config), config, torch.device("cpu"))
    losses, norms, states = [], [], {}
    for step in range(STEPS):
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


def train_cases(strategy: str, precision: str, overrides: list[str], snapshots: list[int]) -> list[dict[str, Any]]:
    shared = [f"parallel.strategy={strategy}", f"train.precision={precision}", *overrides]
    return [train(case_config(case, *shared), snapshots) for case in CASES]


@pytest.fixture(scope="module")
def reference() -> dict[str, list[dict[str, Any]]]:
    """One process, plain gradients, in both precisions."""
    return {
        precision: run_ranks(train_cases, 1, "ddp", precision, [], snapshots, timeout_s=600)[0]
        for precision, snapshots in (("fp64", [STEPS]), ("fp32", [2]))
    }


def assert_same_state(states: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    for name, value in expected.items():
        if name in states:
            scale = value.double().abs().max().clamp_min(1e-12)
            error = float((states[name].double() - value.double()).abs().max() / scale)
            assert error < rtol, f"{name}: {error:.2g}"


@pytest.mark.parametrize("strategy, ranks, overrides", [
    ("ddp", 2, []), ("ddp", 4, []),
    ("fsdp", 2, []), ("fsdp", 4, ["parallel.reshard_after_forward=false"]),
    ("fsdp", 4, ["parallel.replicate=2"]),
    ("fairscale", 2, []), ("fairscale", 4, []),
], ids=["ddp-2", "ddp-4", "fsdp-2", "fsdp-4", "hsdp-2x2", "fairscale-2", "fairscale-4"])
def test_float64_runs_equal_one_process(reference, strategy, ranks, overrides):
    results = run_ranks(train_cases, ranks, strategy, "fp64", overrides, [STEPS], timeout_s=600)
    for case, own, expected in zip(CASES, results[0], reference["fp64"], strict=True):
        assert own["losses"] == pytest.approx(expected["losses"], rel=1e-8), case
        assert own["norms"] == pytest.approx(expected["norms"], rel=1e-6), case
        states, whole_run = own["states"][STEPS], expected["states"][STEPS]
        missing = {name for name in whole_run if name not in states}
        # OSS keeps the optimizer's state of a parameter on its owner alone.
        assert all(strategy == "fairscale" and name.startswith("optimizer.") for name in missing)
        assert_same_state(states, whole_run, rtol=1e-8)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_runs_equal_one_process_until_round_off_grows(reference, stage, ranks):
    results = run_ranks(train_cases, ranks, f"zero{stage}", "fp32", [], [2], timeout_s=600)
    for case, own, expected in zip(CASES, results[0], reference["fp32"], strict=True):
        assert own["losses"][:3] == pytest.approx(expected["losses"][:3], rel=1e-5), case
        assert own["losses"][-1] == pytest.approx(expected["losses"][-1], rel=0.01), case
        assert own["states"][2].keys() == expected["states"][2].keys()
        weights = {name: value for name, value in own["states"][2].items() if name.startswith("model.")}
        assert_same_state(weights, expected["states"][2], rtol=1e-6)
