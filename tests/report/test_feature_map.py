"""The map of features where there is nothing to map; that it is shown and answers the pointer: test_page.py."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from largescale.evaluate.feature_set import FeatureSet
from largescale.report.evaluated import Predictions
from largescale.report.feature_map import feature_map
from shards.ground.errors import InputError


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_collapsed_network_has_no_map_and_a_reason(value):
    num = 60
    alike = FeatureSet(torch.full((num, 16), value), torch.arange(num) % 2, torch.arange(num), ("a", "b"))
    found = Predictions(np.arange(num), np.zeros(num, np.int64), np.ones(num))
    with pytest.raises(InputError, match="the network has collapsed"):
        feature_map(SimpleNamespace(features=alike), found)
