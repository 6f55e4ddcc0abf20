from __future__ import annotations

from typing import Any

from benchmarks import few_labels_page
from benchmarks.few_labels_page import chosen, page


def row(name: str, seed: int, rates: list[float], held_out: float, test: float) -> dict[str, Any]:
    measured = {"held_out": held_out, "test": test, "machine": "m", "cpu_s": 1.0}
    return {"row": name, "share": 0.01, "seed": seed, "rates": rates, **measured}


def test_rates_are_chosen_on_held_out_images_and_what_was_written_by_hand_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(few_labels_page, "OUT", tmp_path / "few_labels.md")
    found = [
        row("A", 0, [0.1, 0.1], 70.0, 60.0),
        row("A", 0, [0.4, 0.4], 71.0, 99.0),
        row("A", 1, [0.1, 0.1], 71.0, 62.0),
        row("A", 1, [0.4, 0.4], 69.0, 99.0),
        row("A", 2, [0.4, 0.4], 90.0, 99.0),
        row("B", 0, [], 50.0, 51.0),
    ]
    assert chosen(found[:5]) == [0.1, 0.1]  # seed 2, which lacks one of the rates, chooses nothing
    (tmp_path / "few_labels.md").write_text("# Old\n\n<!-- read -->\nBy hand.\n")
    text = page(found, ["A", "B", "C"])
    assert "| A | 60.00 | 62.00 | - | **61.00** |" in text and "| B | 51.00 | - | - | **51.00** |" in text
    assert "| A | 1% | **0.1, 0.1: 70.50, 61.00**; 0.4, 0.4: 76.67, 99.00 |" in text and "| C |" not in text
    assert text.endswith("<!-- read -->\nBy hand.\n")
