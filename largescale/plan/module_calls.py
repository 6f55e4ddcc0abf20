"""Hooks around every module of a network, forward and backward, where DeepSpeed's ZeRO stage 3 puts its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Calls:
    """Tells of one module. Counts as DeepSpeed does: a module that was called more than once since its last backward
    pass is "done backward" after the first of these passes alone.
    """

    def __init__(self, module: nn.Module, number: int, tell: Callable[[str, int], None]) -> None:
        self.number, self.tell = number, tell
        self.gradients_due = 0
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, _module: nn.Module, inputs: Any) -> Any:
        self.tell("forward", self.number)
        self.gradients_due = 0
        return _apply(lambda tensor: _Leaving.apply(tensor, self), inputs)

    def _after(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        self.tell("done forward", self.number)
        return _apply(lambda tensor: _Entering.apply(tensor, self), output)


class _Entering(torch.autograd.Function):
    """On a module's output: its backward pass is about to run."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, calls: _Calls) -> Tensor:
        ctx.calls = calls
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.calls.tell("backward", ctx.calls.number)
        return gradient, None


class _Leaving(torch.autograd.Function):
    """On a module's input: its backward pass is over."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, calls: _Calls) -> Tensor:
        ctx.calls = calls
        calls.gradients_due += 1
        return received.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.calls.gradients_due -= 1
        if ctx.calls.gradients_due == 0:
            ctx.calls.tell("done backward", ctx.calls.number)
        return gradient, None


def _apply(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply to all tensors in (named) tuples and lists that gradients flow through."""
    if isinstance(value, Tensor):
        return function(value) if value.requires_grad else value
    if isinstance(value, tuple | list):
        parts = [_apply(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tell_calls(network: nn.Module, tell: Callable[[str, int], None]) -> None:
    """Call `tell` with what happens to which module, numbered in the order of `network.modules()`: "forward" and
    "backward" before it runs, "done forward" and "done backward" behind.
    """
    for number, module in enumerate(network.modules()):
        _Calls(module, number, tell)
