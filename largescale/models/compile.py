"""Regional compilation: the residual blocks of chosen stages go through torch.compile, one by one.

Blocks repeat, so a few small graphs serve a deep network, and what strategies hook around a block (gathers, gradient
reductions) stays outside the graphs. Synchronised BatchNorm is traced through, its collectives included.
"""

from __future__ import annotations

import torch
from torch import nn

from largescale.models.backbones import chosen_blocks

_GRAPHS = 256
"""Graphs of one function: of a block one per width, stride and crop size, of augmentation one per crop group. Beyond 8,
torch would run the rest uncompiled, or fail where a whole graph is asked for."""


def allow_many_graphs() -> None:
    """Raise torch's limit on graphs of one function; to be called before what is compiled first runs."""
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)


def compile_blocks(backbone: nn.Module, numbers: list[int]) -> None:
    """Compile the blocks of some stages, counted from 1; the work is done when they first run.

    Raises:
        InputError: a stage that the backbone does not have.
    """
    blocks = chosen_blocks(backbone, numbers, key="model.compile_stages")
    if blocks:
        allow_many_graphs()
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
