"""What a frozen network holds inside: the maps of its stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from largescale.methods import Method
from largescale.models.backbones import stages


class StageMaps(nn.Module):
    """A frozen network that also gives the maps of its stages; it stays in evaluation mode."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method.float().eval().requires_grad_(False)
        self._maps: list[Tensor] = []
        for stage in stages(method.get_submodule(method.encoder_name)):
            stage.register_forward_hook(lambda module, inputs, output: self._maps.append(output))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps [B, C, H, W] of the stages in their order, and features [B, D], of normalised images [B, 3, S, S]."""
        self._maps.clear()
        features = self.method.encode(images)
        maps = [*self._maps]
        self._maps.clear()
        return maps, features

    def train(self, mode: bool = True) -> StageMaps:
        """It keeps its running statistics."""
        return super().train(False)
