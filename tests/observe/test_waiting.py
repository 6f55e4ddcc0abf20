"""Covers: largescale/observe/console.py"""

from __future__ import annotations

import pytest

from largescale.config import DataConfig, load_config
from largescale.observe.waiting import advice
from largescale.pretrain import too_many_skipped
from tests.helpers.commands import ROOT

ROW = {"data_wait_s": 0.05, "step_s": 0.1, "augment_s": 0.0, "read_ms": 0.2, "decode_ms": 3.0, "crop_ms": 1.0}


@pytest.mark.parametrize(
    "changes, counts, says",
    [
        (
            {},
            (2, 4),
            r"waits for data 50% of the time; per image and thread: read 0.2 ms, decode 3.0 ms, crop 1.0 ms; "
            r"2 x 4 threads per rank are too few; raise data.workers",
        ),
        ({"read_ms": 9.0}, (2, 4), "reading is slowest; move the shards to a faster disk"),
        ({"read_ms": 9.0, "cache_hit_rate": 0.5}, (2, 4), "shards come too late from the store (data.fetches=4)"),
        ({"data_wait_s": 0.009}, (2, 4), ""),
        ({"augment_s": 0.045}, (2, 4), ""),
        ({}, (0, 1), ""),
    ],
)
def test_who_waits_for_whom_and_what_to_change(changes, counts, says):
    line = advice(ROW | changes, DataConfig(), counts)
    assert says in line if says else line == ""
    assert advice(ROW | changes, DataConfig(), counts, starting=True) == ""


@pytest.mark.parametrize(
    "skipped, rate, says",
    [
        (5, 0.0, ""),
        (6, 0.0, "6 images could not be read, more than data.max_skipped=5"),
        (3, 0.25, "25% of the last images could not be read, more than data.max_skipped_rate=0.2"),
    ],
)
def test_unreadable_images_have_limits_in_number_and_rate(skipped, rate, says):
    config = load_config(
        ROOT / "tests" / "tiny.yaml", ["data.shards=unused", "data.max_skipped=5", "data.max_skipped_rate=0.2"]
    )
    assert too_many_skipped(config, skipped, rate) == says
