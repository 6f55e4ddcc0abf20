"""Localisation: a place is in a box if its middle is, equals share, and boxes are of what is seen."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from largescale.config import Config
from largescale.data.clip_facts import ClipFacts
from largescale.evaluate import sound_localisation
from largescale.evaluate.sound_localisation import Boxes, Settings, _as_seen, _box_in, measure
from shards.ground.errors import InputError


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


def box_in(content: str, frames: int = 5):
    return _box_in(content.encode(), "box", frames)


def test_boxes_of_each_frame_give_that_of_the_middle_and_wrong_ones_are_named():
    boxes = [[0.1 * place, 0.0, 0.1, 0.1] for place in range(5)]
    assert box_in(json.dumps({"box": boxes})) == ((0.2, 0.0, 0.1, 0.1), False)
    assert box_in(json.dumps({"box": [None, *boxes[1:]]})) == ((0.2, 0.0, 0.1, 0.1), False)
    assert box_in(json.dumps({"box": [*boxes[:2], None, *boxes[3:]]})) == (None, False)
    assert box_in('{"box": [null]}', 1) == (None, False)
    assert box_in('{"box": [0, 0, 1, 1]}') == ((0, 0, 1, 1), True)
    assert box_in('{"other": 1}') == box_in("[]") == (None, False)
    for wrong in ("[10, 10, 40, 40]", "[0, 0, 0, 1]", '"left"', "[0.1, 0.2]", "[[0, 0, 1]]", '[0, 0, 1, "1"]', "[]"):
        with pytest.raises(ValueError, match="expected left, top, width and height as shares"):
            box_in(f'{{"box": {wrong}}}', 1)
    with pytest.raises(ValueError):
        box_in("{")


def test_a_list_that_is_not_of_the_clip_s_frames_is_refused():
    """As that of a whole video that was cut into several clips."""
    for frames in (1, 4, 6):
        with pytest.raises(ValueError, match=f"a list of 5 for a clip of {frames} frames"):
            box_in(json.dumps({"box": [[0, 0, 1, 1]] * 5}), frames)


class Members:
    """Of clips of two frames of 80 x 40 px, whose json and starts are given."""

    def __init__(self, contents: list[tuple[str, float]]) -> None:
        self._contents, self.reader = contents, self

    def read(self, number: int) -> bytes:
        return self._contents[number][0].encode()

    def clip(self, number: int) -> ClipFacts:
        return ClipFacts(self._contents[number][1], np.arange(2), np.zeros(2), 8000, 0.0, 8000)

    def size(self, number: int) -> tuple[int, int]:
        return 80, 40

    def name(self, number: int) -> str:
        return f"clip {number}"


def boxes_of(monkeypatch, *contents: tuple[str, float]) -> Boxes:
    monkeypatch.setattr(sound_localisation, "MemberReader", lambda *_: Members(list(contents)))
    config, found = Config(name="boxes"), Boxes({}, [])
    config.evaluate.resize = config.evaluate.size = 40
    manifest = SimpleNamespace(num_samples=len(contents), name="test")
    found.read(SimpleNamespace(manifest=manifest), "json:box", config)
    return found


def test_what_is_cropped_away_has_no_part_and_boxes_that_may_be_of_another_clip_are_doubted(monkeypatch):
    seen = '{"box": [0.5, 0.5, 0.1, 0.1]}'
    outside = '{"box": [0.0, 0.0, 0.25, 1.0]}'  # up to the crop, whose left edge is at 0.25
    across = '{"box": [0.0, 0.0, 0.26, 1.0]}'
    listed = '{"box": [null, [0.5, 0.5, 0.1, 0.1]]}'
    found = boxes_of(monkeypatch, (seen, 0.0), (outside, 0.0), (across, 0.0), ("{}", 0.0), (listed, 10.0), (seen, 10.0))
    assert sorted(found.seen) == [0, 2, 4, 5]
    assert [line.partition(":")[0].partition(", perhaps")[0] for line in found.doubts] == [
        "1 of 6 clips have no box",
        "1 of 6 clips are left out",
        "1 of 6 clips start later than their video and have a single box",
    ]
    assert boxes_of(monkeypatch, (seen, 0.0), (listed, 10.0)).doubts == []
    with pytest.raises(
        InputError, match="none of the 1 clips of test has a box there that is seen: 1 are cropped away"
    ):
        boxes_of(monkeypatch, (outside, 0.0))
    with pytest.raises(InputError, match="clip 1: json:box: a list of 1 for a clip of 2 frames"):
        boxes_of(monkeypatch, (seen, 0.0), ('{"box": [[0, 0, 1, 1]]}', 0.0))
