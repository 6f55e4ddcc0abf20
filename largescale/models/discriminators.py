"""Networks that tell images from made ones, for adversarial methods."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from largescale.models.heads import HeadConv2d

_SLOPE = 0.2


class ConvDiscriminator(nn.Module):
    """Convolutions that halve the side, and a score of what is left: [B, 3, S, S] to [B].

    Source: DCGAN, arXiv 1511.06434, section 3: 4x4 convolutions of stride 2, leaky ReLU, BatchNorm in all layers but
    the first and the last.

    Args:
        side: S in px, at least 2 to the number of layers.
        widths: of the layers but the last.
    """

    def __init__(self, side: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [HeadConv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(_SLOPE, inplace=True)]
        for width, next_width in pairwise(widths):
            layers += [
                HeadConv2d(width, next_width, 4, 2, 1, bias=False),
                nn.BatchNorm2d(next_width),
                nn.LeakyReLU(_SLOPE, inplace=True),
            ]
        self.layers = nn.Sequential(*layers)
        self.score = HeadConv2d(widths[-1], 1, side >> len(widths))

    def forward(self, images: Tensor) -> Tensor:
        """Scores: above 0 for images, below for made ones."""
        return self.score(self.layers(images)).flatten()
