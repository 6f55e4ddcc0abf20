"""A SwAV step as one would write it down from the paper (arXiv 2006.09882): what `benchmarks/step.py` compares with.

Autocast, one forward a resolution, images in NCHW, Sinkhorn as the released code has it (the whole matrix normalised
in every iteration, one assign view after the other), LARS a parameter at a time, nothing compiled. It computes what
`largescale` computes: the benchmark compares the losses of both before it measures.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from largescale.config import Config
from largescale.methods.swav.method import SwAV
from largescale.optim import lars


class ReferenceStep:
    """Network, optimizer and one training step on one device.

    Args:
        method: its weights are copied.
        config: crops, temperature and optimizer.
        dtype: of autocast; float32 switches it off.
    """

    def __init__(self, method: SwAV, config: Config, dtype: torch.dtype) -> None:
        self.network = nn.Sequential(deepcopy(method.backbone), deepcopy(method.projection))
        self.prototypes = deepcopy(method.prototypes.heads[0])
        self.config, self.dtype = config, dtype
        self.parameters = [*self.network.parameters(), *self.prototypes.parameters()]
        self.optimizer = PlainLARS(self.parameters, config.optim)

    def __call__(self, views: list[Tensor]) -> float:
        """Forward, backward and update; returns the loss."""
        groups, method = [group.num for group in self.config.data.crops], self.config.method
        device = views[0].device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            embeddings = torch.cat([self.network(group) for group in views])
            scores = self.prototypes(normalize(embeddings, dim=1)).float().chunk(sum(groups))
        loss = torch.zeros((), device=device)
        for assign in range(groups[0]):
            codes = plain_codes(scores[assign].detach(), epsilon=method.epsilon, iterations=method.sinkhorn_iterations)
            others = [view for number, view in enumerate(scores) if number != assign]
            for view in others:
                log_p = log_softmax(view / method.temperature, dim=1)
                loss = loss - (codes * log_p).sum(1).mean() / len(others) / groups[0]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.prototypes.weight.copy_(normalize(self.prototypes.weight, dim=1))
        return loss.item()


@torch.no_grad()
def plain_codes(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn's assignment of one view, [B, K]."""
    q = torch.exp(scores / epsilon).t()
    num_prototypes, num_rows = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True)
        q /= num_prototypes
        q /= q.sum(0, keepdim=True)
        q /= num_rows
    return (q * num_rows).t()


class PlainLARS(torch.optim.SGD):
    """SGD whose gradients are scaled one parameter after the other, looked at on the host as the released code does."""

    def __init__(self, parameters: list[Any], config: lars.Settings) -> None:
        super().__init__(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        self.trust = config.trust_coefficient

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter by LARS: rate scaled by |w| / (|g| + decay |w|), then momentum."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            for parameter in group["params"]:
                weight_norm, grad_norm = parameter.norm(), parameter.grad.norm()
                parameter.grad += decay * parameter
                if weight_norm != 0 and grad_norm != 0:
                    parameter.grad *= self.trust * weight_norm / (grad_norm + decay * weight_norm + 1e-8)
            group["weight_decay"] = 0.0
        super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
