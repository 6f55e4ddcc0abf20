"""Optimizers by name. A new one is a class and a line in OPTIMIZERS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from largescale.config import OptimConfig
from largescale.config.setting import a_name
from largescale.optim import adamw, lars, sgd
from largescale.optim.lars import LARS
from largescale.optim.roles import Role, parameter_groups
from shards.ground.errors import InputError


@dataclass(frozen=True)
class OptimizerChoice:
    """One entry of `OPTIMIZERS`.

    Attributes:
        optimizer: the class.
        Settings: the keys under `optim` that it has beside those of all.
        options: what the class is built with, from these.
    """

    optimizer: type[Optimizer]
    Settings: type[OptimConfig]
    options: Callable[[Any], dict[str, Any]]


OPTIMIZERS = {
    "lars": OptimizerChoice(LARS, lars.Settings, lars.options),
    "adamw": OptimizerChoice(torch.optim.AdamW, adamw.Settings, adamw.options),
    "sgd": OptimizerChoice(torch.optim.SGD, sgd.Settings, sgd.options),
}


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
    choice = OPTIMIZERS[config.name]
    return choice.optimizer, {"lr": config.lr, **choice.options(config)}


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
