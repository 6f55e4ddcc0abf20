"""Optimizers by name, and the parameter groups they work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from largescale.config import Config, OptimConfig
from largescale.optim.lars import LARS
from largescale.optim.schedules import cosine_with_warmup
from shards.errors import InputError


def _lars(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    return LARS(groups, config.lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    return torch.optim.AdamW(_without_scaled(groups), config.lr, betas=(config.betas[0], config.betas[1]), fused=True)


def _sgd(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    return torch.optim.SGD(_without_scaled(groups), config.lr, momentum=config.momentum, fused=True)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], Optimizer]] = {
    "lars": _lars,
    "adamw": _adamw,
    "sgd": _sgd,
}


def build_optimizer(module: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer that `optim.name` names, over the (already sharded) parameters of a module.

    Raises:
        InputError: for an unknown name.
    """
    if config.name not in OPTIMIZERS:
        raise InputError(f"optim.name={config.name}: expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[config.name](parameter_groups(module, config), config)


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Two groups: weights, and biases and normalisation parameters, which `optim.exclude_bias_and_norm` spares."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() <= 1]
    spared = config.exclude_bias_and_norm
    groups = [
        {"params": weights, "weight_decay": config.weight_decay, "scaled": True},
        {"params": vectors, "weight_decay": 0.0 if spared else config.weight_decay, "scaled": not spared},
    ]
    return [group for group in groups if group["params"]]


def learning_rates(config: Config, *, num_steps: int, steps_per_epoch: int) -> np.ndarray:
    """The learning rate of every step of a run: float64 [num_steps]."""
    return cosine_with_warmup(
        peak=config.optim.lr,
        final=config.optim.final_lr,
        start=config.optim.warmup_lr,
        warmup_steps=round(config.optim.warmup_epochs * steps_per_epoch),
        num_steps=num_steps,
    )


def _without_scaled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "scaled"} for group in groups]
