"""Faster R-CNN and Mask R-CNN of torchvision on a method's backbone, with a feature pyramid (FPN).

Sources: Faster R-CNN, arXiv 1506.01497; Mask R-CNN, arXiv 1703.06870; FPN, arXiv 1612.03144. All parts are
torchvision's: what is decided here is where the pyramid takes its maps, the sides of anchors, and what BatchNorm does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from largescale.models.backbones import in_sequence
from largescale.models.narrow import pick_in_narrow
from largescale.models.plain_networks import PlainNetwork
from largescale.parallel.batchnorm import synchronize_batchnorm
from largescale.processes import world_size
from shards.ground.errors import InputError

MODELS = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}

_SIDE = 256
"""Of the image that tells which maps a backbone gives, in px; a multiple of all strides."""
_RATIOS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Design:
    """What a detector is made like.

    Attributes:
        model: a name in `MODELS`.
        frozen: whether BatchNorm keeps the statistics and weights that it comes with, and the pyramid has none; else it
            is trained, over all ranks, in the pyramid as well.
        width: channels of the pyramid and of the mask head.
        anchor: side of the anchors of each level, in strides of it.
        regions: per image, that the box head learns from.
        size, max_side: of the shorter side of images, and the most of the longer one, in px.
        mean, std: of images.
    """

    model: str
    frozen: bool
    width: int
    anchor: float
    regions: int
    size: int
    max_side: int
    mean: list[float]
    std: list[float]


def build_detector(backbone: nn.Module, num_categories: int, design: Design, device: torch.device) -> Any:
    """A detector whose body is a backbone that `build_backbone` made; all of it takes gradients but frozen BatchNorm.

    In training mode it maps images and targets to losses, in evaluation mode images to detections, as torchvision says.

    Args:
        backbone: to be trained.
        num_categories: without the background.
        design: how it is made.
        device: that the backbone is on.

    Raises:
        InputError: the backbone has no stages of ever larger strides from about 4 on, such as VGG-16.
    """
    if isinstance(backbone, PlainNetwork):
        raise InputError(
            f"model.backbone={backbone.name}: detection needs the stages of a ResNet or RegNet for its pyramid; "
            f"`largescale evaluate segmentation` measures the maps of this backbone"
        )
    body = in_sequence(backbone.requires_grad_(True).float())
    if device.type == "cpu":
        pick_in_narrow(body)
    channels, strides = _maps_of(body, device)
    if design.frozen:
        body = _freeze(body)
    names = [str(number) for number in range(len(channels))]
    pyramid = BackboneWithFPN(
        body,
        {f"stage{number}": name for number, name in enumerate(names, 1)},
        channels,
        design.width,
        norm_layer=None if design.frozen else nn.BatchNorm2d,
    )
    sides = [round(design.anchor * stride) for stride in [*strides, 2 * strides[-1]]]
    parts: dict[str, Any] = {"box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)}
    if design.model == "mask_rcnn":
        parts["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
        parts["mask_head"] = MaskRCNNHeads(design.width, (design.width,) * 4, dilation=1)
    detector = MODELS[design.model](
        pyramid,
        num_categories + 1,
        rpn_anchor_generator=AnchorGenerator(tuple((max(1, side),) for side in sides), (_RATIOS,) * len(sides)),
        box_batch_size_per_image=design.regions,
        **parts,
    )
    if design.model == "mask_rcnn":  # its own is for a head of 256 channels
        detector.roi_heads.mask_predictor = MaskRCNNPredictor(design.width, design.width, num_categories + 1)
    detector.transform = Resizing(design)
    detector.to(device)
    if world_size() > 1 and not design.frozen:
        synchronize_batchnorm(detector, device)
    return detector


class Resizing(GeneralizedRCNNTransform):
    """torchvision's, but that the caller draws the sizes, and that the batches of all ranks are padded alike.

    Synchronised BatchNorm counts on equal pieces.

    Attributes:
        drawn: shorter sides of the images of the next training batch, in their order.
    """

    def __init__(self, design: Design) -> None:
        super().__init__(design.size, design.max_side, design.mean, design.std)
        self.drawn: list[int] = []

    def torch_choice(self, k: list[int]) -> int:
        """The next of the sizes that were drawn."""
        return self.drawn.pop(0)

    def max_by_axis(self, the_list: list[list[int]]) -> list[int]:
        """Channels, height and width of a batch. Collectives: one all-reduce of three numbers in training."""
        sides: list[int] = super().max_by_axis(the_list)
        if not self.training or world_size() == 1:
            return sides
        largest = torch.tensor(sides, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()


@torch.no_grad()
def _maps_of(body: nn.Sequential, device: torch.device) -> tuple[list[int], list[int]]:
    """Channels and strides of the stages' maps."""
    was, x = body.training, torch.zeros(1, 3, _SIDE, _SIDE, device=device)
    body.eval()
    maps: list[Tensor] = []
    for module in body:
        x = module(x)
        maps.append(x)
    body.train(was)
    return [one.shape[1] for one in maps[1:]], [_SIDE // one.shape[2] for one in maps[1:]]


def _freeze(module: Any) -> Any:
    """Replace every BatchNorm by one that never changes."""
    if isinstance(module, _BatchNorm):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps).to(module.weight.device)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(frozen, name).copy_(getattr(module, name).detach())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, _freeze(child))
    return module
