"""A folder in the layout of Hugging Face that timm opens: config.json, model.safetensors, README.md.

    timm.create_model("local-dir:FOLDER", pretrained=True)

transformers opens the same folder through its TimmWrapper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from largescale.checkpoint.exported import Network
from largescale.checkpoint.model_card import Figure, model_card

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def write_beside(network: Network, architecture: str, folder: Path, figures: Sequence[Figure]) -> None:
    """Write what stands beside the weights.

    Args:
        network: what is exported.
        architecture: timm's name of it.
        folder: to write to.
        figures: for the model card.
    """
    (folder / CONFIG).write_text(json.dumps(_config(network, architecture), indent=2) + "\n")
    load = f"""import timm

model = timm.create_model("local-dir:{{FOLDER}}", pretrained=True)  # {architecture}, without a classifier
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model.eval()(transform(image)[None])  # image: a PIL image; features: [1, {network.num_features}]
"""
    (folder / CARD).write_text(model_card(network, load, figures, in_timm=True))


def _config(network: Network, architecture: str) -> dict[str, object]:
    values, evaluate = network.values, network.config.evaluate
    regnet = architecture.startswith("regnet")
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": network.num_features,
        "global_pool": "avg",
        "pretrained_cfg": {
            "tag": f"{values.get('method.name')}_step{network.checkpoint.step}",
            "custom_load": False,
            "input_size": [3, evaluate.size, evaluate.size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": crop_share(evaluate.resize, evaluate.size),
            "crop_mode": "center",
            "mean": values["data.mean"],
            "std": values["data.std"],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "stem.conv" if regnet else "conv1",
            "classifier": "head.fc" if regnet else "fc",
            "license": None,
        },
        "largescale": network.about(),
    }


def crop_share(resize: int, size: int) -> float:
    """`size / resize`, so that timm, which resizes to floor(size / share), comes back to `resize` and not one below."""
    share = size / resize
    return share if math.floor(size / share) == resize else math.nextafter(share, 0)
