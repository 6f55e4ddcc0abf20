"""Networks that no rank ever holds: the same weights on any number of ranks, and the memory of a piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from largescale.config import Config, load_config
from largescale.methods import build_method
from largescale.models.backbones import BLOCKS, REGNETS_Y
from largescale.models.initialise import initialise_pieces
from largescale.parallel.engine import Engine
from largescale.parallel.strategies import build_engine
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks
from tests.methods.harness import views_of_step

pytestmark = pytest.mark.distributed

TENTH = {"depth": 27, "w_0": 176, "w_a": 62.08, "w_m": 2.52, "group_width": 101}
"""RegNetY-10B with a tenth of its width."""


def configuration(*overrides: str) -> Config:
    REGNETS_Y["regnet_y_tenth"] = TENTH
    return load_config(
        ROOT / "tests" / "strategies.yaml",
        [
            "parallel.strategy=fsdp",
            "parallel.sharded_init=true",
            "train.precision=fp32",
            "parallel.unit_min_parameters=0",
            "method.freeze_prototypes_steps=0",
            *overrides,
        ],
    )


def build(config: Config) -> Engine:
    return build_engine(build_method(config, on_meta=True), config, torch.device("cpu"))


def weights(overrides: list[str]) -> dict[str, torch.Tensor]:
    state = build(configuration(*overrides)).method.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.backbone=resnet", "model.depths=[1,1]", "model.width=6", "model.zero_init_residual=true"],
        ["model.backbone=regnet_y_400mf"],
    ],
)
def test_weights_do_not_depend_on_the_ranks(overrides):
    [whole] = run_ranks(whole_state, 1, configuration(*overrides))
    for ranks, more in ((2, []), (3, []), (4, ["parallel.replicate=2"])):
        batch = [f"train.global_batch={12 if ranks == 3 else 8}", "method.queue=0", "data.streams=1"]
        found = run_ranks(weights, ranks, [*overrides, *more, *batch])[0]
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(found[name], value), name


def whole_state(config: Config) -> dict[str, torch.Tensor]:
    method = build_method(config, on_meta=True).to_empty(device="cpu")
    initialise_pieces(method, config.run.seed)
    return method.state_dict()


def spreads(config: Config) -> dict[str, tuple[float, float]]:
    """Standard deviations of large tensors: as constructors draw them, and as pieces are drawn."""
    torch.manual_seed(0)
    usual, drawn = build_method(config).state_dict(), whole_state(config)
    assert usual.keys() == drawn.keys()
    for name, value in usual.items():
        if value.float().std(correction=0) == 0:  # norms, their statistics, biases of zero
            assert torch.equal(drawn[name], value), name
    return {
        name: (float(value.std()), float(drawn[name].std()))
        for name, value in usual.items()
        if value.is_floating_point() and value.numel() > 2000
    }


@pytest.mark.parametrize("backbone, zero", [("resnet50", "true"), ("regnet_y_400mf", "true"), ("resnet", "false")])
def test_the_distributions_are_those_of_the_constructors(backbone, zero):
    config = configuration(f"model.backbone={backbone}", f"model.zero_init_residual={zero}")
    [found] = run_ranks(spreads, 1, config)
    assert len(found) > 3
    for name, (usual, drawn) in found.items():
        assert drawn == pytest.approx(usual, rel=0.1), name


def trained() -> list[float]:
    config = configuration("model.backbone=resnet", "model.depths=[1,1]", "model.width=6")
    engine = build(config)
    losses = []
    for step in range(3):
        views = views_of_step(config, step)
        output = engine.forward_backward(views, step)
        check = engine.check(views, output.loss)
        losses.append(check.loss)
        engine.update(check, step=step, lr=0.1, clip=0.0)
    return losses


def test_they_train_to_the_same_losses():
    two, four = run_ranks(trained, 2)[0], run_ranks(trained, 4)[0]
    assert two == pytest.approx(four, rel=1e-5) and len(set(two)) == 3


def peak() -> tuple[int, int, int, int]:
    """Bytes of the whole network, of its largest block, of this rank's pieces, and peak memory of building them."""
    config = configuration(
        "model.backbone=regnet_y_tenth",
        "method.hidden=[64]",
        "method.prototypes=64",
        "method.head_batchnorm=false",
        "parallel.sync_batchnorm=false",
    )
    Path("/proc/self/clear_refs").write_text("5")  # forgets earlier peaks
    before = memory("VmRSS")
    engine = build(config)
    highest = memory("VmHWM") - before
    parameters = list(engine.method.parameters())
    pieces = sum(p.to_local().nbytes for p in parameters)
    block = max(
        sum(p.numel() * 4 for p in module.parameters())
        for module in engine.method.modules()
        if isinstance(module, BLOCKS)
    )
    return sum(p.numel() * 4 for p in parameters), block, pieces, highest


def memory(key: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024 * int(line.split()[1])


def test_no_rank_holds_more_than_its_share_and_one_block():
    for whole, block, pieces, highest in run_ranks(peak, 4):
        assert whole > 350e6
        assert pieces < 0.27 * whole
        assert highest < pieces + block + 40e6 < 0.75 * whole


def error_of(overrides: list[str]) -> str:
    try:
        build(configuration(*overrides))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "override, says",
    [
        ("parallel.strategy=ddp", "parallel.sharded_init=True: expected false with parallel.strategy=ddp; only fsdp"),
        ("parallel.cpu_offload=true", "cannot be combined with parallel.cpu_offload"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(override, says):
    assert says in run_ranks(error_of, 1, [override])[0]
