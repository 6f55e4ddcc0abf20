"""Edges in place of colours: a fixed Sobel filter before a network's first convolution.

As DeepCluster has it (arXiv 1807.05520, section 4): gray, the mean of the three channels, and two fixed 3x3 filters,
one for each direction. It is inside the network and sees normalised images, so that whatever feeds the network, feeds
it as before. Both filters are applied as one convolution of three channels, which is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d


class SobelConv2d(nn.Conv2d):
    """A network's first convolution, of the two channels that Sobel's filters make of colours.

    Attributes:
        sobel: the filters [2, 3, 3, 3]; in no checkpoint, since they never change.
    """

    sobel: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
        super().__init__(2, conv.out_channels, kernel, stride, padding, bias=conv.bias is not None)  # type: ignore[arg-type]
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.register_buffer("sobel", _filters(), persistent=False)

    @torch.no_grad()
    def finish_initialisation(self) -> None:
        """Put the filters back where memory was allocated anew."""
        self.sobel.copy_(_filters())

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to maps [B, K, H', W']."""
        return super().forward(conv2d(x, self.sobel.to(x.dtype), padding=1))


def _filters() -> Tensor:
    # On the host even where modules are built without memory: weights are put into those, but not filters.
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device="cpu")
    return torch.stack((across, across.t()))[:, None].repeat(1, 3, 1, 1) / 3


def see_edges(network: nn.Module) -> None:
    """Replace the first convolution of a network by one behind Sobel's filters, with random weights."""
    name = next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    network.set_submodule(name, SobelConv2d(network.get_submodule(name)))  # type: ignore[arg-type]
