"""Networks that follow another one as the running average of its weights."""

from __future__ import annotations

import copy
import math

from torch import nn

from largescale.methods.method import Average


def teacher_of(**parts: nn.Module) -> nn.ModuleDict:
    """A copy of the student's parts, by their names, that takes no gradient."""
    return nn.ModuleDict(copy.deepcopy(parts)).requires_grad_(False)


def following(teacher: str, *parts: str, buffers: bool = False) -> list[Average]:
    """What a method declares of a teacher: each part follows the student's part of that name.

    Args:
        teacher: name of the module that `teacher_of` made.
        parts: names in it and in the method.
        buffers: whether running statistics follow too, for a teacher in evaluation mode.
    """
    return [Average(part, f"{teacher}.{part}", buffers=buffers) for part in parts]


def cosine_momentum(start: float, step: int, num_steps: int) -> float:
    """Fraction of itself that a teacher keeps, from `start` in the first step to 1 at the end of the run.

    Source: BYOL, arXiv 2006.07733, section 3.3.
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / num_steps)) / 2
