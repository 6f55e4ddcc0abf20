"""All methods by name. A new one is a file (or a folder) and a line in METHODS."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from largescale.config import Config
from largescale.config.setting import a_name
from largescale.data.length import Length
from largescale.methods.artifacts import Artifacts
from largescale.methods.avc import AVC
from largescale.methods.avol import AVOL
from largescale.methods.barlow import BarlowTwins
from largescale.methods.byol import BYOL
from largescale.methods.colorization import Colorization
from largescale.methods.colour_tracking import ColourTracking
from largescale.methods.context_encoder import ContextEncoder
from largescale.methods.cpc import CPC
from largescale.methods.deepcluster import DeepCluster
from largescale.methods.deepclusterv2 import DeepClusterV2
from largescale.methods.deepercluster import DeeperCluster
from largescale.methods.denoising import Denoising
from largescale.methods.densecl import DenseCL
from largescale.methods.dino import DINO
from largescale.methods.directpred import DirectPred
from largescale.methods.distillation import Distillation
from largescale.methods.jigsaw import Jigsaw
from largescale.methods.method import Method
from largescale.methods.mocov1 import MoCoV1
from largescale.methods.mocov2 import MoCoV2
from largescale.methods.mocov3 import MoCoV3
from largescale.methods.nnclr import NNCLR
from largescale.methods.odc import ODC
from largescale.methods.opn import OPN
from largescale.methods.patches import Patches
from largescale.methods.paws import PAWS
from largescale.methods.pcl import PCL
from largescale.methods.pirl import PIRL
from largescale.methods.rotation import Rotation
from largescale.methods.sela import SeLa
from largescale.methods.shuffle_learn import ShuffleLearn
from largescale.methods.simclr import SimCLR
from largescale.methods.simsiam import SimSiam
from largescale.methods.swav.method import SwAV
from largescale.methods.vicreg import VICReg
from largescale.models.backbones import require_cells
from shards.ground.errors import InputError

METHODS: dict[str, type[Method]] = {
    "swav": SwAV,
    "simclr": SimCLR,
    "mocov1": MoCoV1,
    "mocov2": MoCoV2,
    "densecl": DenseCL,
    "mocov3": MoCoV3,
    "nnclr": NNCLR,
    "byol": BYOL,
    "simsiam": SimSiam,
    "directpred": DirectPred,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "dino": DINO,
    "paws": PAWS,
    "pirl": PIRL,
    "pcl": PCL,
    "deepcluster": DeepCluster,
    "deepclusterv2": DeepClusterV2,
    "deepercluster": DeeperCluster,
    "odc": ODC,
    "sela": SeLa,
    "jigsaw": Jigsaw,
    "patches": Patches,
    "rotation": Rotation,
    "shuffle_learn": ShuffleLearn,
    "opn": OPN,
    "colour_tracking": ColourTracking,
    "denoising": Denoising,
    "colorization": Colorization,
    "context_encoder": ContextEncoder,
    "artifacts": Artifacts,
    "cpc": CPC,
    "avc": AVC,
    "avol": AVOL,
    "distillation": Distillation,
}


def build_method(config: Config, length: Length | None = None, *, on_meta: bool = False) -> Method:
    """The method that `method.name` names, with random weights from the current generator; without any `on_meta`.

    Args:
        config: of the run.
        length: of the run; a nominal one if none is given, as where nothing is trained.
        on_meta: whether to make it without weights.

    Raises:
        InputError: for an unknown name.
    """
    method = method_class(config)
    with torch.device("meta") if on_meta else nullcontext():
        built = method(config)
        built.of_run(length or Length.nominal(config))
    return built


def require_fit(config: Config, length: Length) -> None:
    """Refuse a run whose method cannot be trained on so many images, or on so few ranks.

    Raises:
        InputError: on all ranks, before anything is made or read.
    """
    crops = {f"data.crops.{number}.size": group.size for number, group in enumerate(config.data.crops)}
    require_cells(config.model, {"evaluate.size": config.evaluate.size, **crops})
    if line := method_class(config).misfit(config, length):
        raise InputError(line)


def method_class(config: Config) -> type[Method]:
    """The class that `method.name` names.

    Raises:
        InputError: for an unknown name.
    """
    if config.method.name not in METHODS:
        raise InputError(f"method.name={config.method.name}: expected {a_name(config.method.name, METHODS)}")
    return METHODS[config.method.name]
