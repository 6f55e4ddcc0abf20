"""MoCo v1: MoCo with a linear head (arXiv 1911.05722). What it does and its loss are in `moco.py`."""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config.setting import setting
from largescale.methods.moco import MoCo, MoCoSettings
from largescale.models.heads import hidden_widths


@dataclass
class Settings(MoCoSettings):
    """MoCo v1's keys under `method`."""

    hidden: list[int] = hidden_widths([])
    temperature: float = setting(0.07, "Divides cosines before the softmax.", at_least=1e-6, at_most=1e6)


class MoCoV1(MoCo):
    """MoCo with its first published head and temperature."""

    title = "MoCo v1"
    reference = "mocov1/resnet50_200ep"
    Settings = Settings
