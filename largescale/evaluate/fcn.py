"""A fully convolutional network (FCN) for segmentation, the whole of it trained.

As MoCo has it (arXiv 1911.05722, appendix): the last stage keeps the size of the map that it gets, with its 3x3
convolutions at dilation 2, so that the stride is 16 with a ResNet; two 3x3 convolutions of 256 channels at dilation 6
with BatchNorm and ReLU, and a 1x1 convolution to scores. All BatchNorm is trained, over all ranks. FCN: Long et al.,
arXiv 1411.4038.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from largescale.evaluate.image_training import Trial
from largescale.models.backbones import in_sequence
from largescale.models.narrow import pick_in_narrow
from largescale.parallel.batchnorm import synchronize_batchnorm
from largescale.processes import world_size

_OF_STAGE, _OF_HEAD = 2, 6
"""Dilations."""


class Fcn(nn.Module):
    """A method's backbone and a head: normalised images to scores [B, classes, h, w].

    The backbone is changed: what it gives afterwards is not what it gave before.

    Args:
        trial: whose method is trained.
        num_classes: of the pixels.
        width: channels of the head.
        seed: of the head's weights.
    """

    def __init__(self, trial: Trial, num_classes: int, width: int, seed: int) -> None:
        super().__init__()
        backbone = trial.method.get_submodule(trial.method.encoder_name)
        self.body: nn.Module = in_sequence(backbone.requires_grad_(True).float())
        self.body.eval()
        if trial.device.type == "cpu":
            pick_in_narrow(self.body)
        dilate(self.body.get_submodule([*dict(self.body.named_children())][-1]))
        with torch.no_grad():
            channels = self.body(torch.zeros(1, 3, 64, 64, device=trial.device)).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Sequential(
                *_convolution(channels, width), *_convolution(width, width), nn.Conv2d(width, num_classes, 1)
            )
        self.head: nn.Module = head.to(trial.device)
        if world_size() > 1:
            synchronize_batchnorm(self, trial.device)

    @property
    def trained(self) -> nn.Module:
        """What is trained: all of it."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, classes, h, w] of normalised images [B, 3, S, S]."""
        return self.head(self.body(images))


def dilate(stage: nn.Module) -> None:
    """Let a stage keep the size of maps, and its 3x3 convolutions see as far as before."""
    for module in stage.modules():
        if isinstance(module, nn.MaxPool2d):
            module.kernel_size, module.stride, module.padding = 3, 1, 1
        if isinstance(module, nn.AvgPool2d):  # of a shortcut, in the place of its stride
            module.kernel_size = module.stride = 1
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (_OF_STAGE, _OF_STAGE)


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=_OF_HEAD, dilation=_OF_HEAD, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
