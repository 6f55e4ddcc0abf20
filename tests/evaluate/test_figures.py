from __future__ import annotations

from pathlib import Path
from typing import Any

from largescale.checkpoint.folder import find_latest
from largescale.evaluate.figures import figures_of
from largescale.evaluate.made_from import images_stamp, weights_stamp
from largescale.evaluate.results import write_result
from tests.helpers.checkpoints import OWN, config_of, save_checkpoint
from tests.helpers.results import record


def shown(run: Path) -> dict[tuple[str, str], str]:
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint is not None
    return {(one.protocol, one.measure): one.in_words(one.value) for one in figures_of(run)(checkpoint)}


def measured(run: Path, share: float, day: int, protocol: str = "knn", **images: Any) -> None:
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint is not None
    found = record(share, protocol=protocol, measured=f"2026-01-0{day}")
    found["made_from"] |= {"weights": weights_stamp(checkpoint), "images": images_stamp(config_of(OWN)) | images}
    write_result(run, found)


def test_a_card_has_figures_of_images_that_were_prepared_as_it_says(tmp_path):
    save_checkpoint(tmp_path, config_of(OWN), 10)
    measured(tmp_path, 0.25, 1, max_pixels=10**6)
    assert shown(tmp_path) == {("knn", "top1"): "25.00%"}
    for number, other in enumerate(({"size": 24}, {"resize": 32}, {"mean": [0.1] * 3}, {"std": [0.1] * 3}), 2):
        measured(tmp_path, number / 10, number, **other)
    assert shown(tmp_path) == {("knn", "top1"): "25.00%"}
    measured(tmp_path, 0.375, 6)
    assert shown(tmp_path) == {("knn", "top1"): "37.50%"}
