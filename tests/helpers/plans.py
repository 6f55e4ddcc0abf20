"""The small network whose steps are planned and really made."""

from __future__ import annotations

from largescale.config import Config, load_config
from tests.helpers.commands import ROOT


def configuration(overrides: list[str]) -> Config:
    """tests/strategies.yaml with a network of two blocks."""
    small = [
        "model.backbone=resnet",
        "model.stem=3x3s2",
        "model.depths=[1,1]",
        "model.width=8",
        "train.precision=fp32",
        "parallel.unit_min_parameters=0",
        "method.freeze_prototypes_steps=0",
        "method.queue=0",
    ]
    return load_config(ROOT / "tests" / "strategies.yaml", [*small, *overrides])
