"""Optimizers by name, and learning rates of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from largescale.config import Config, OptimConfig
from largescale.config.setting import a_name
from largescale.optim.lars import LARS
from largescale.optim.roles import Role, parameter_groups
from largescale.optim.schedules import cosine_with_warmup
from shards.ground.errors import InputError

OPTIMIZERS: dict[str, tuple[type[Optimizer], Callable[[OptimConfig], dict[str, Any]]]] = {
    "lars": (LARS, lambda c: {"momentum": c.momentum, "trust_coefficient": c.trust_coefficient}),
    "adamw": (torch.optim.AdamW, lambda c: {"betas": (c.betas[0], c.betas[1]), "fused": True}),
    # Not fused: torch cannot run that on the sharded parameters of FSDP2.
    "sgd": (torch.optim.SGD, lambda c: {"momentum": c.momentum, "foreach": True}),
}
"""Class by name, and the options it takes from the configuration."""


def build_optimizer(network: nn.Module, roles: Sequence[Role], config: OptimConfig) -> Optimizer:
    """The optimizer that `optim.name` names, over the (already sharded) parameters of a network.

    Raises:
        InputError: for an unknown name.
    """
    optimizer_class, options = optimizer_recipe(config)
    optimizer = optimizer_class(parameter_groups(network, roles, config), **options)
    pass_over_frozen_groups(optimizer)
    return optimizer


def optimizer_recipe(config: OptimConfig) -> tuple[type[Optimizer], dict[str, Any]]:
    """Class and options of `optim.name`, for strategies that make the optimizer themselves.

    Raises:
        InputError: for an unknown name.
    """
    if config.name not in OPTIMIZERS:
        raise InputError(f"optim.name={config.name}: expected {a_name(config.name, OPTIMIZERS)}")
    optimizer_class, options = OPTIMIZERS[config.name]
    return optimizer_class, {"lr": config.lr, **options(config)}


def pass_over_frozen_groups(optimizer: Optimizer) -> None:
    """Make `step` leave groups alone whose "frozen" is true: no update, no decay, and no momentum gathers."""
    optimizer.register_step_pre_hook(_set_aside)
    optimizer.register_step_post_hook(_put_back)


def _set_aside(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        if group.get("frozen"):
            group["set_aside"], group["params"] = group["params"], []


def _put_back(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        if "set_aside" in group:
            group["params"] = group.pop("set_aside")


def learning_rates(config: Config, *, num_steps: int, steps_per_epoch: int) -> np.ndarray:
    """The learning rate of every step of a run: float64 [num_steps]."""
    return cosine_with_warmup(
        peak=config.optim.lr,
        final=config.optim.final_lr,
        start=config.optim.warmup_lr,
        warmup_steps=warmup_steps(config.optim, steps_per_epoch),
        num_steps=num_steps,
    )


def warmup_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Steps in which the learning rate rises, as asked for; a run may be shorter."""
    return round(config.warmup_epochs * steps_per_epoch)
