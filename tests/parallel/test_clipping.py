"""Over ranks and under every strategy, the harness of all methods compares it with one process (mini/dino.yaml)."""

from __future__ import annotations

import pytest
import torch

from largescale.config import load_config
from largescale.parallel.clipping import GradientPieces, clip_each
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT


def test_each_gradient_is_clipped_by_the_norm_of_its_whole_tensor():
    """The second one is in two pieces; the third is short enough."""
    whole = [torch.randn(5, 3).double(), torch.randn(7, 4).double(), torch.full((4,), 0.1).double(), torch.zeros(2)]
    expected = [one * min(1.0, 0.5 / (float(one.norm()) + 1e-6)) for one in whole]
    pieces = [whole[0], whole[1][:2], whole[1][2:], whole[2], whole[3]]
    clip_each(GradientPieces([0, 1, 1, 2, 3], pieces, 4, None), 0.5, torch.device("cpu"))
    for one, other in zip(whole, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(whole[2], torch.full((4,), 0.1).double())


def test_one_of_two_ways_to_clip_is_asked_for():
    recipe, both = ROOT / "tests/methods/mini/simclr.yaml", ["optim.clip_tensor_norm=3", "optim.clip_grad_norm=2"]
    with pytest.raises(InputError, match=r"optim.clip_tensor_norm=3.0: expected 0 with optim.clip_grad_norm=2; leave"):
        load_config(recipe, ["data.shards=x", *both])
