"""Activation checkpointing: blocks keep their input alone and are computed again in the backward pass.

Source: arXiv 1604.06174; SEER (arXiv 2103.01988, section 3) trains with it. A block that is computed again must not
feed its BatchNorm's running statistics a second time; torch's checkpointing does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from largescale.models.backbones import chosen_blocks
from largescale.models.running_statistics import statistics_untouched

_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Around a block when it is computed, and when it is computed again."""


def recompute_activations(backbone: nn.Module, numbers: list[int]) -> None:
    """Make the blocks of some stages, counted from 1, recompute their activations.

    Raises:
        InputError: a stage that the backbone does not have.
    """
    for block in chosen_blocks(backbone, numbers, key="model.recompute_stages"):
        norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
        block.forward = partial(_checkpointed, block.forward, partial(_contexts, norms))


def _checkpointed(forward: Callable[[Tensor], Tensor], contexts: Callable[[], _Contexts], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x)
    return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _contexts(norms: list[_BatchNorm]) -> _Contexts:
    return nullcontext(), statistics_untouched(norms)
