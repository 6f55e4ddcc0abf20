"""A network that hears: a small VGG on log-spectrograms (arXiv 1712.06651, figure 2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from largescale.models.spectrogram import log_spectrogram


class SoundNetwork(nn.Module):
    """Stages of two 3x3 convolutions each, with BatchNorm and ReLU, a 2x2 maximum between stages and one over all
    places in the end. The first convolution has stride 2: with four stages, a second at 48,000 samples ends in maps of
    16 x 12.

    Args:
        rate: samples per second.
        widths: channels of each stage; published are 64, 128, 256, 512.

    Attributes:
        num_features: of the last stage.
    """

    def __init__(self, rate: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.rate, self.num_features = rate, widths[-1]
        self.stages = nn.Sequential(
            *(_stage(channels, width, first=channels == 1) for channels, width in pairwise([1, *widths]))
        )

    def maps(self, sounds: Tensor) -> Tensor:
        """Sounds [B, T], as of `log_spectrogram`, to maps [B, num_features, h, w]."""
        weights = next(self.stages.parameters()).dtype
        seen = log_spectrogram(sounds, self.rate, torch.promote_types(weights, torch.float32))
        return self.stages(seen[:, None].to(weights))

    def forward(self, sounds: Tensor) -> Tensor:
        """Sounds [B, T] to features [B, num_features]."""
        return self.maps(sounds).amax((2, 3))


def least_side(num_stages: int) -> int:
    """Of spectrograms that so many stages can see."""
    return 2**num_stages - 1


def _stage(channels: int, width: int, *, first: bool) -> nn.Sequential:
    stage = OrderedDict[str, nn.Module]() if first else OrderedDict[str, nn.Module](pool=nn.MaxPool2d(2))
    for number, (before, stride) in enumerate([(channels, 2 if first else 1), (width, 1)], 1):
        conv = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        stage[f"conv{number}"], stage[f"norm{number}"] = conv, nn.BatchNorm2d(width)
        stage[f"relu{number}"] = nn.ReLU(inplace=True)
    return nn.Sequential(stage)
