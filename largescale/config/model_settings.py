"""The settings of the backbone: which network, how it begins and ends, what it starts from."""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config.setting import setting

LATER = {"model.pool": 1}
"""Keys that records of earlier versions lack, and the value that means the same as their absence."""


@dataclass
class ModelConfig:
    """The backbone."""

    backbone: str = setting(
        "resnet50",
        "A torchvision resnet* / wide_resnet* / regnet_* name; resnet50w2, w4, w5 (SwAV's); regnet_y_64gf, "
        "256gf, 10b (SEER's); vgg16_bn, alexnet_bn, their convolutions alone; resnet50_sk, "
        "101, 152, w2_sk and w3_sk, with selective kernels; or `resnet` with the depths and width below.",
        table="largescale.models.backbones:available",
    )
    stem: str = setting(
        "imagenet",
        "`imagenet` as published, `3x3s2` or `3x3`: one 3x3 convolution (stride 2 or 1), no pooling.",
        one_of=("imagenet", "3x3s2", "3x3"),
    )
    depths: list[int] = setting(
        [2, 2, 2, 2],
        "Blocks per stage, for `resnet`.",
        at_least=1,
        at_most=1000,
        min_length=1,
        used_if="model.backbone=resnet",
        expected="blocks per stage, at least 1 and at most 1000",
    )
    width: int = setting(
        64,
        "Channels of the first stage, for `resnet`; doubled at each stage.",
        at_least=1,
        at_most=2**20,
        used_if="model.backbone=resnet",
    )
    block: str = setting(
        "basic",
        "`basic` or `bottleneck`, for `resnet`.",
        one_of=("basic", "bottleneck"),
        used_if="model.backbone=resnet",
    )
    pool: int = setting(
        1,
        "Side of the grid of cells in which features are means of the last map: 1, a single mean, as published; 2 "
        "makes features of four means, four times as wide, which tell where things are in images framed alike.",
        at_least=1,
        at_most=64,
    )
    zero_init_residual: bool = setting(
        False,
        "Whether the last normalisation of each residual block starts at 0, so that blocks start as their shortcuts.",
    )
    sobel: bool = setting(
        False,
        "Whether a fixed Sobel filter stands before the first convolution: gray, then two 3x3 filters, so that the "
        "network sees edges and no colours. It is a part of the backbone, on normalised images.",
    )
    norm: str = setting(
        "batch",
        "`batch` normalisation, or `layer` normalisation in its place, over channels and places of each image: for "
        "tasks that statistics of a batch would give away. torchvision and timm have no such networks.",
        one_of=("batch", "layer"),
    )
    weights: str = setting(
        "",
        "File of weights (of torchvision, timm and many others, see docs/weights.md) that the backbone of a new run "
        "starts from; not with init_from, which takes all of another run.",
        place=True,
    )
    mask: str = setting(
        "",
        "File of masks (`largescale prune` writes them): a bool per weight of some of the backbone's parameters, false "
        "for those that are zero and stay zero. A run that has started may find the file elsewhere, but not another "
        "mask.",
        free=True,
        place=True,
    )
    recompute_stages: list[int] = setting(
        [],
        "Stages (from 1) whose activations are recomputed in the backward pass instead of stored (checkpointing).",
        free=True,
    )
    compile_stages: list[int] = setting(
        [], "Stages (from 1) whose blocks go through torch.compile; none of the recomputed ones.", free=True
    )
