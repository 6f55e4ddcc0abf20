"""How others name the tensors of backbones, and how to get from there to torchvision's names.

A layout is recognised by one tensor that every network in it has. What stands before that name is the prefix of the
network in its file: `module.`, `state_dict.module.encoder_q.`, `teacher.module.backbone.`, ... A file may hold several
networks, a student and a teacher for instance; `SECOND` names those that the authors do not evaluate.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and standard deviation of channels that nearly everyone normalises with."""

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"}
"""Parts of names that wrappers of torch put between others (DDP, torch.compile, FSDP, checkpointing)."""

HEADS = {
    "bn", "classifier", "fc", "head", "heads", "mlp", "pred", "prediction", "predictor", "projection",
    "projection_head", "projector", "prototypes", "queue", "queue_ptr", "sobel", "top_layer",
}  # fmt: skip
"""Beginnings of names, beside a backbone's own, that are not a part of it."""

SECOND = {
    "backbone_momentum", "encoder_k", "key_encoder", "momentum_backbone", "momentum_encoder", "momentum_network",
    "student", "student_backbone", "target", "target_backbone", "target_network",
}  # fmt: skip
"""Parts of prefixes of the network that is not evaluated where a file holds two: MoCo's key encoder, BYOL's target,
DINO's student."""

TENSORFLOW = "SimCLRv2's TensorFlow variables"
"""Those that `tensorflow_layout.py` is about."""

Rules = list[tuple[str, str]]


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a network.

    Attributes:
        title: for people.
        family: `resnet`, `regnet` or `plain`.
        mark: pattern of the name of a tensor that every network in this layout has.
        rules: pattern and replacement, applied one after the other, that lead to torchvision's names.
    """

    title: str
    family: str
    mark: str
    rules: Rules

    def torchvision_name(self, name: str) -> str:
        """torchvision's name of a tensor; others, such as those of heads, come back as they are."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name

    def prefixes(self, names: list[str]) -> list[str]:
        """Prefixes of the networks in this layout among names of tensors."""
        pattern = re.compile(rf"^(|.*\.){self.mark}$")
        return sorted({found[1] for name in names if (found := pattern.match(name))})


_REGNET_BLOCK = r"trunk_output.block\1.block\1-"

LAYOUTS = [
    Layout("torchvision's ResNet", "resnet", r"layer1\.0\.conv1\.weight", []),
    Layout("torchvision's RegNet", "regnet", r"trunk_output\.block1\.block1-0\.f\.a\.0\.weight", []),
    Layout(
        "this project's ResNet",
        "resnet",
        r"stages\.0\.0\.conv1\.weight",
        [
            (r"^stem\.0\.", "conv1."),
            (r"^stem\.1\.", "bn1."),
            *((rf"^stages\.{stage}\.", f"layer{stage + 1}.") for stage in range(20)),
        ],
    ),
    Layout("torchvision's VGG", "plain", r"features\.0\.weight", []),  # DeepCluster's AlexNet has such names too
    Layout(
        "this project's VGG or AlexNet",
        "plain",
        r"stages\.0\.block0\.0\.weight",
        [(r"^stages\.\d+\.block\d+\.", "features.")],
    ),
    Layout(
        "timm's RegNet",
        "regnet",
        r"s1\.b1\.conv1\.conv\.weight",
        [
            (r"^stem\.conv\.", "stem.0."),
            (r"^stem\.bn\.", "stem.1."),
            # timm counts blocks from 1, torchvision from 0.
            *((rf"^s(\d)\.b{block + 1}\.", rf"{_REGNET_BLOCK}{block}.") for block in range(60)),
            *(
                (rf"(block\d-\d+)\.{theirs}\.{part}\.", rf"\1.{ours}.{number}.")
                for theirs, ours in (("conv1", "f.a"), ("conv2", "f.b"), ("conv3", "f.c"), ("downsample", "proj"))
                for number, part in enumerate(("conv", "bn"))
            ),
            (r"(block\d-\d+)\.se\.", r"\1.f.se."),
            (r"^head\.fc\.", "fc."),
        ],
    ),
    Layout(
        "VISSL's RegNet",
        "regnet",
        r"res2\.(?:block1-part0\.)?block1-0\.f\.a\.0\.weight",
        [
            (r"^conv1\.stem\.", "stem."),
            (r"^(res\d\.)block\d-part\d+\.", r"\1"),
            (r"^res\d\.block(\d)-(\d+)\.", rf"{_REGNET_BLOCK}\2."),
            (r"\.f\.se\.excitation\.0\.", ".f.se.fc1."),
            (r"\.f\.se\.excitation\.2\.", ".f.se.fc2."),
            (r"\.f\.final_bn\.", ".f.c.1."),
            (r"\.f\.c\.weight$", ".f.c.0.weight"),
            (r"(block\d-\d+)\.proj\.weight$", r"\1.proj.0.weight"),
            (r"(block\d-\d+)\.bn\.", r"\1.proj.1."),
        ],
    ),
    Layout(
        "Hugging Face's RegNet",
        "regnet",
        r"encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight",
        [
            (r"^embedder\.embedder\.convolution\.", "stem.0."),
            (r"^embedder\.embedder\.normalization\.", "stem.1."),
            *((rf"^encoder\.stages\.{s}\.layers\.", f"trunk_output.block{s + 1}.block{s + 1}-") for s in range(4)),
            (r"\.layer\.2\.attention\.0\.", ".f.se.fc1."),
            (r"\.layer\.2\.attention\.2\.", ".f.se.fc2."),
            *(
                (rf"\.layer\.{number}\.{part}\.", f".f.{letter}.{place}.")
                for number, letter in ((0, "a"), (1, "b"), (2, "c"), (3, "c"))
                for place, part in enumerate(("convolution", "normalization"))
            ),
            (r"\.shortcut\.convolution\.", ".proj.0."),
            (r"\.shortcut\.normalization\.", ".proj.1."),
        ],
    ),
    Layout(
        "SimCLRv2's ResNet, converted",
        "resnet",
        r"net\.1\.blocks\.0\.net\.0\.weight",
        [
            (r"^net\.0\.0\.", "conv1."),
            (r"^net\.0\.1\.0\.", "bn1."),
            *((rf"^net\.{stage}\.blocks\.", f"layer{stage}.") for stage in (1, 2, 3, 4)),
            *((rf"\.net\.{2 * n}\.weight$", f".conv{n + 1}.weight") for n in range(3)),
            *((rf"\.net\.{2 * n + 1}\.0\.", f".bn{n + 1}.") for n in range(3)),
            (r"\.projection\.shortcut\.", ".downsample.0."),
            (r"\.projection\.bn\.0\.", ".downsample.1."),
        ],
    ),
]


@dataclass(frozen=True)
class Origin:
    """Who made a file, where its names tell.

    Attributes:
        title: for people.
        tells: whether names of tensors are of theirs.
        mean, std: what they normalise images with.
    """

    title: str
    tells: Callable[[list[str]], bool]
    mean: list[float]
    std: list[float]


def _any(pattern: str) -> Callable[[list[str]], bool]:
    return lambda names: any(re.search(pattern, name) for name in names)


ORIGINS = [
    Origin("SimCLRv2", _any(r"^base_model/"), [0.0] * 3, [1.0] * 3),
    Origin("SimCLRv2", _any(r"(^|\.)net\.1\.blocks\.0\.net\.0\.weight$"), [0.0] * 3, [1.0] * 3),
    Origin("VISSL", _any(r"(^|\.)_feature_blocks\."), *IMAGENET),
    Origin("MoCo v1 or v2", _any(r"(^|\.)encoder_q\."), *IMAGENET),
    Origin("MoCo v3", _any(r"(^|\.)base_encoder\."), *IMAGENET),
    Origin("DINO", _any(r"^teacher\.(.*\.)?backbone\."), *IMAGENET),
    Origin("PAWS", _any(r"^encoder\.layer1\."), *IMAGENET),
    Origin(
        "SwAV, DeepCluster-v2 or SeLa-v2",
        _any(r"^(state_dict\.)?(projection_head\.\d\.weight|prototypes\.(weight|prototypes\d))"),
        IMAGENET[0],
        [0.228, 0.224, 0.225],
    ),
]
"""In order: the first that tells counts. Names are without `WRAPPERS`."""
