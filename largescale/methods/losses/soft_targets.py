"""How far a student's answers are from a teacher's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


class SoftTargets(NamedTuple):
    """Means over images.

    Attributes:
        loss: cross entropy with the teacher's distribution, times T^2.
        entropy: of the teacher's distribution, in nats, without a gradient.
        divergence: of the student's from it, in nats, likewise: the cross entropy less the entropy.
    """

    loss: Tensor
    entropy: Tensor
    divergence: Tensor


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> SoftTargets:
    """The loss of a student that is to answer as a teacher does.

    The naive loop::

        for i in images:
            p = exp(teacher[i] / T) / sum(exp(teacher[i] / T))
            q = exp(student[i] / T) / sum(exp(student[i] / T))
            loss -= T**2 * sum(p[y] * log(q[y]) for y in classes) / N

    T^2 keeps gradients of one size whatever T is (arXiv 1503.02531, section 2). The teacher takes no gradient. In
    float32 at least, outside autocast.

    Args:
        student, teacher: logits [N, K].
        temperature: T of both.

    Source: arXiv 2006.10029, equation 2; T^2 as in its published code.

    Collectives: none; the mean over ranks of their losses is that of all images.
    """
    with torch.autocast(student.device.type, enabled=False):
        precision = torch.promote_types(student.dtype, torch.float32)
        log_p = log_softmax(teacher.detach().to(precision) / temperature, dim=-1)
        log_q = log_softmax(student.to(precision) / temperature, dim=-1)
        p = log_p.exp()
        cross = -(p * log_q).sum(-1).mean()
        entropy = -(p * log_p).sum(-1).mean()
        return SoftTargets(temperature**2 * cross, entropy, cross.detach() - entropy)
