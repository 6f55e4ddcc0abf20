from __future__ import annotations

import pytest
import torch

from largescale.methods import build_method
from largescale.models.initialise import materialise
from tests.methods.harness import mini


@pytest.mark.parametrize(
    "name, overrides", [("denoising", ["method.decoder=[64,48]"]), ("cpc", ["method.embedding=48"])]
)
def test_convolutions_of_heads_start_as_their_constructors_draw_them(name, overrides):
    """Weights and biases, by their largest value and their spread."""
    config = mini(name, *overrides)
    torch.manual_seed(0)
    usual, drawn = build_method(config), build_method(config, on_meta=True)
    materialise(drawn, torch.device("cpu"), 0)
    large = {key: value for key, value in usual.state_dict().items() if value.ndim == 4 and value.numel() > 1000}
    assert any(not key.startswith("backbone.") for key in large)
    for key, value in large.items():
        assert float(drawn.state_dict()[key].std()) == pytest.approx(float(value.std()), rel=0.1), key
    biases = [key for key, value in usual.named_parameters() if key.endswith("bias") and value.any()]
    assert biases
    for key in biases:
        assert drawn.get_parameter(key).any(), key
