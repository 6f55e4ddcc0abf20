"""Networks of torchvision that tests can afford."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


def narrow_resnet() -> nn.Module:
    """torchvision's ResNet, eight times narrower than a ResNet-18 and of half its depth."""
    torch.manual_seed(0)
    found = ResNet(BasicBlock, [1, 1, 1, 1])
    found.conv1, found.bn1, found.inplanes = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), 8
    for number in range(4):
        stage = found._make_layer(BasicBlock, 8 * 2**number, 1, stride=1 if number == 0 else 2)
        setattr(found, f"layer{number + 1}", stage)
    found.fc = nn.Linear(64, 10)
    return found.eval()
