"""Under every strategy a run that starts from another's weights has, in its first step, the loss of that network; and
one that starts from a file has the backbone of that file.

Covers: largescale/checkpoint/from_memory.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import find_latest
from largescale.checkpoint.torchvision_layout import name_of
from largescale.cli import main
from largescale.config import Config, load_config
from largescale.methods import build_method
from largescale.models.backbones import build_backbone
from largescale.parallel.strategies import build_engine
from largescale.run.first_weights import first_weights
from largescale.run.init_from import take_weights
from tests.helpers.commands import TINY
from tests.helpers.ranks import run_ranks
from tests.methods.harness import views_of_step

pytestmark = pytest.mark.distributed

CASES = {
    "ddp": ["train.precision=fp64"],
    "fsdp": ["train.precision=fp64"],
    "fsdp in pieces": ["train.precision=fp64", "parallel.strategy=fsdp", "parallel.sharded_init=true"],
    "fairscale": ["train.precision=fp64"],
    "zero1": ["train.precision=fp32"],
    "zero3": ["train.precision=fp32"],
}

CUT = ["fsdp in pieces", "zero1", "zero3"]
"""Cases in which tensors are in pieces, each in another way."""


def configuration(source: Path, name: str) -> Config:
    strategy = f"parallel.strategy={name.split()[0]}"
    return load_config(TINY, ["data.shards=unused", "run.seed=7", f"init_from={source}", strategy, *CASES[name]])


def first_losses(source: Path, names: list[str]) -> list[tuple[float, int]]:
    """Loss of the first step, and step of the source, a case."""
    found = []
    for name in names:
        config = configuration(source, name)
        torch.manual_seed(config.run.seed)
        method = build_method(config, on_meta=config.parallel.sharded_init)
        engine = build_engine(method, config, torch.device("cpu"))
        record = take_weights(engine, config, torch.device("cpu"))
        views = views_of_step(config, 0)
        found.append((engine.check(views, engine.forward_backward(views, 0).loss).loss, record["step"]))
    return found


def backbones_from_file(path: Path, names: list[str]) -> list[dict[str, Tensor]]:
    """The whole backbone that each strategy has after it took a file of weights."""
    found = []
    for name in names:
        config = load_config(
            TINY, ["data.shards=unused", f"model.weights={path}", f"parallel.strategy={name.split()[0]}", *CASES[name]]
        )
        method = build_method(config, on_meta=config.parallel.sharded_init)
        engine = build_engine(method, config, torch.device("cpu"))
        first_weights(engine, config, torch.device("cpu"))
        state = {key: value for key, value in engine.state().items() if key.startswith("model.backbone.")}
        found.append(
            {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}
        )
    return found


def losses_and_backbones(source: Path, path: Path, names: list[str]) -> tuple[list[Any], list[Any]]:
    """Both, since starting ranks takes longer than either."""
    return first_losses(source, names), backbones_from_file(path, CUT)


def loss_of_source(source: Path) -> float:
    """In one process, in float64, without any strategy."""
    config = configuration(source, "ddp")
    method = build_method(config).double()
    checkpoint = find_latest(source / "checkpoints")
    assert checkpoint is not None
    state: dict[str, Tensor] = {f"model.{name}": value for name, value in method.state_dict().items()}
    sharded.load(checkpoint, state, no_dist=True)
    return float(method(views_of_step(config, 0), 0).loss.detach())


def save_backbone(path: Path) -> dict[str, Tensor]:
    """Write a backbone in torchvision's names; returns it by those of checkpoints."""
    torch.manual_seed(3)
    backbone, _ = build_backbone(load_config(TINY, ["data.shards=unused"]).model)
    state = backbone.state_dict()
    save_file({name_of(backbone, key): value for key, value in state.items()}, path)
    return {f"model.backbone.{key}": value for key, value in state.items()}


def test_the_first_loss_is_that_of_the_source(shard_folder, tmp_path):
    source = tmp_path / "run"
    assert (
        main(
            [
                "pretrain",
                str(TINY),
                f"data.shards={shard_folder}",
                "train.precision=fp32",
                "train.steps=2",
                f"run.dir={source}",
            ]
        )
        == 0
    )
    [expected] = run_ranks(loss_of_source, 1, source)
    state = save_backbone(tmp_path / "file.safetensors")
    _, (losses, backbones) = run_ranks(losses_and_backbones, 2, source, tmp_path / "file.safetensors", list(CASES))
    for name, backbone in zip(CUT, backbones, strict=True):
        assert backbone.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(backbone[key].to(value.dtype), value, rtol=0, atol=0, msg=f"{name}: {key}")
    for name, (loss, step) in zip(CASES, losses, strict=True):
        assert loss == pytest.approx(expected, rel=1e-9 if "fp64" in CASES[name][0] else 1e-5), name
        assert step == 2
