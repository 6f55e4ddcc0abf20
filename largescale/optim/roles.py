"""What is done to which parameters: a method declares roles, parameter groups follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from largescale.config import OptimConfig

MAIN = "main"
"""The objective of a step that moves whatever no role gives to another one; most methods have no other."""


@dataclass(frozen=True)
class Role:
    """Parameters that are to be treated in a way of their own. Those without a role are weights (two dimensions or
    more) or biases and normalisation (fewer), for which `optim` has settings.

    Attributes:
        name: what they are, for people: "predictor".
        pattern: of their names, as in a shell: "predictor.*".
        decay: whether `optim.weight_decay` holds for them; for biases and normalisation among them also
            `optim.exclude_bias_and_norm` has to be false.
        scaled: whether LARS scales their gradients; likewise.
        lr_factor: of the learning rate; biases and normalisation also have that of `optim`.
        scheduled: whether the rate follows the schedule; else it stays at `optim.lr`.
        frozen_until: first step whose update changes them. Before, they gather no momentum either.
        unit_rows: every row has length 1 after an update.
        float32: kept and used in float32 where the strategy casts weights.
        objective: the one that moves them, where a step has several; see `Method.objectives`.
    """

    name: str
    pattern: str
    decay: bool = True
    scaled: bool = True
    lr_factor: float = 1.0
    scheduled: bool = True
    frozen_until: int = 0
    unit_rows: bool = False
    float32: bool = False
    objective: str = MAIN

    def owns(self, name: str) -> bool:
        """Whether a parameter of this name has the role."""
        return fnmatchcase(name, self.pattern)


_REST = Role("weights", "*")


def parameters_with(network: nn.Module, roles: Sequence[Role], what: str) -> list[Tensor]:
    """Parameters whose role has a property: `unit_rows` or `float32`."""
    return [
        parameter
        for name, parameter in network.named_parameters()
        if (role := role_of(name, roles)) is not None and getattr(role, what)
    ]


def moved_by_others(network: nn.Module, roles: Sequence[Role], objectives: Sequence[str]) -> dict[str, list[Tensor]]:
    """The parameters that each objective of a step does not move; empty where there is one objective."""
    assert objectives[-1] == MAIN, objectives
    for role in roles:
        assert role.objective in objectives and (role.objective == MAIN or not role.unit_rows), role
    if len(objectives) == 1:
        return {}
    owned = [((role_of(name, roles) or _REST).objective, p) for name, p in network.named_parameters()]
    return {own: [parameter for other, parameter in owned if other != own] for own in objectives}


def role_of(name: str, roles: Sequence[Role]) -> Role | None:
    """The first role that owns a parameter of this name; None for weights, biases and normalisation."""
    return next((role for role in roles if role.owns(name)), None)


def parameter_groups(network: nn.Module, roles: Sequence[Role], config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters by what is done to them: weights, then biases and normalisation; the same of each role."""
    owned: dict[Role, list[Tensor]] = {}
    for role in (_REST, *roles):
        owned |= {role: [], _small_of(role, config): []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            role = role_of(name, roles) or _REST
            owned[role if parameter.dim() > 1 else _small_of(role, config)].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if role.decay else 0.0,
            "scaled": role.scaled,
            "role": role,
            "frozen": False,
        }
        for role, parameters in owned.items()
        if parameters
    ]


def _small_of(role: Role, config: OptimConfig) -> Role:
    """The role of biases and normalisation among the parameters of a role."""
    as_weights = not config.exclude_bias_and_norm
    return replace(
        role,
        name=f"{role.name}: biases and normalisation",
        decay=role.decay and as_weights,
        scaled=role.scaled and as_weights,
        lr_factor=role.lr_factor * config.bias_and_norm_lr_factor,
    )


def set_rates(groups: list[dict[str, Any]], *, step: int, lr: float, peak: float, objective: str = MAIN) -> None:
    """Give each group of an optimizer its learning rate in a step, and say whether it is frozen.

    Args:
        lr: that of the schedule.
        peak: that of groups which the schedule does not concern.
        objective: whose update this is; what others move is frozen in it.
    """
    for group in groups:
        role: Role = group["role"]
        group["lr"] = (lr if role.scheduled else peak) * role.lr_factor
        group["frozen"] = step < role.frozen_until or role.objective != objective
