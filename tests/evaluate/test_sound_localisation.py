"""Localisation: a place is in a box if its middle is, equals share, and boxes are of what is seen."""

from __future__ import annotations

import json

import pytest
import torch

from largescale.config import Config
from largescale.evaluate.sound_localisation import Settings, _as_seen, _box_in, measure


def test_the_middle_of_the_best_place_counts_and_equals_share():
    maps = torch.zeros(4, 4, 4)
    maps[0, 1, 2] = 1.0  # its middle is at x = 0.625, y = 0.375
    maps[1, 1, 2] = 1.0
    maps[2, 0, 0] = maps[2, 1, 1] = 2.0
    boxes = torch.tensor([[0.6, 0.3, 0.7, 0.4], [0.63, 0.3, 0.7, 0.4], [0.2, 0.2, 0.5, 0.5], [0.0, 0.0, 0.5, 1.0]])
    found = measure(maps, boxes, Settings())
    assert found["hit_rate"] == pytest.approx((1 + 0 + 1 / 2 + 1 / 2) / 4)
    assert found["near_rate"] == pytest.approx((1 + 1 + 1 + 3 / 4) / 4)
    assert found["places_in_boxes"] == pytest.approx((1 + 0 + 1 + 8) / 16 / 4)
    centre = measure(torch.zeros(4, 1, 1), boxes, Settings())
    assert centre["hit_rate"] == 0.0  # the right edge of a box is not in it
    assert measure(torch.zeros(1, 1, 1), torch.tensor([[0.4, 0.4, 0.6, 0.6]]), Settings())["hit_rate"] == 1.0


def test_boxes_are_of_what_is_seen_of_the_frame():
    config = Config(name="seen")
    config.evaluate.resize, config.evaluate.size = 40, 32
    # Of 80 x 40 px the crop begins 24 px from the left and 4 px from the top.
    seen = _as_seen((0.5, 0.25, 0.25, 0.5), (160, 80), config)
    assert seen.tolist() == pytest.approx([(40 - 24) / 32, (10 - 4) / 32, (60 - 24) / 32, (30 - 4) / 32])
    assert _as_seen((0.0, 0.0, 1.0, 1.0), (50, 50), config).tolist() == pytest.approx([-4 / 32] * 2 + [36 / 32] * 2)


def test_boxes_of_each_frame_give_that_of_the_middle_and_wrong_ones_are_named():
    boxes = [[0.1 * place, 0.0, 0.1, 0.1] for place in range(5)]
    assert _box_in(json.dumps({"box": boxes}).encode(), "box") == (0.2, 0.0, 0.1, 0.1)
    assert _box_in(b'{"box": [0, 0, 1, 1]}', "box") == (0, 0, 1, 1)
    assert _box_in(b'{"other": 1}', "box") is None and _box_in(b"[]", "box") is None
    for wrong in ("[10, 10, 40, 40]", "[0, 0, 0, 1]", '"left"', "[0.1, 0.2]", "[[0, 0, 1]]", '[0, 0, 1, "1"]', "[]"):
        with pytest.raises(ValueError, match="expected left, top, width and height as shares"):
            _box_in(f'{{"box": {wrong}}}'.encode(), "box")
    with pytest.raises(ValueError):
        _box_in(b"{", "box")
