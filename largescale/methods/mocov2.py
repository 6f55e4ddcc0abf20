"""MoCo v2: MoCo with a hidden layer in its head, blurred views and a cosine schedule (arXiv 2003.04297). What it does
and its loss are in `moco.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config.setting import setting
from largescale.methods.moco import MoCo, MoCoSettings


@dataclass
class Settings(MoCoSettings):
    """MoCo v2's keys under `method`."""

    temperature: float = setting(0.2, "Divides cosines before the softmax.", at_least=1e-6, at_most=1e6)


class MoCoV2(MoCo):
    """MoCo with its second published head and temperature."""

    title = "MoCo v2"
    reference = "mocov2/resnet50_200ep"
    Settings = Settings
