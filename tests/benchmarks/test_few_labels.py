from __future__ import annotations

import sys

import pytest

from benchmarks import few_labels


def test_seeds_whose_splits_may_have_held_out_images_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["few_labels", "--seeds", "3"])
    monkeypatch.setattr(few_labels, "measure", lambda *case: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        few_labels.main()
    assert "invalid choice: 3" in capsys.readouterr().err


def test_a_student_has_the_teacher_whose_rates_were_best_on_held_out_images(monkeypatch):
    def found(seed: int, rates: list[float], held_out: float, test: float) -> dict[str, object]:
        told = {"row": few_labels.TEACHER, "share": 0.01, "seed": seed, "rates": rates}
        return told | {"held_out": held_out, "test": test}

    known = [found(0, [0.1, 0.1], 66.0, 60.0), found(0, [0.03, 0.03], 69.0, 99.0)]
    known += [found(1, [0.1, 0.1], 74.0, 60.0), found(1, [0.03, 0.03], 69.0, 99.0)]
    student = "SimCLRv2, distilled to a quarter"
    monkeypatch.setattr(few_labels, "found_before", lambda: known)
    with pytest.raises(SystemExit, match="with all seeds"):
        few_labels.tries(student, few_labels.Case(0.01, 1), 3)
    known += [found(2, [0.1, 0.1], 70.0, 60.0), found(2, [0.03, 0.03], 69.0, 99.0)]
    [case] = few_labels.tries(student, few_labels.Case(0.01, 1), 3)
    assert (case.seed, case.rates) == (1, [0.1, 0.1])
    tried = few_labels.tries(few_labels.TEACHER, few_labels.Case(0.01, 1), 1)
    assert [case.rates for case in tried] == list(few_labels.RATES[:1])
    with pytest.raises(SystemExit, match=r"measure SimCLRv2, fine-tuned from layer 1 first"):
        few_labels.tries(student, few_labels.Case(0.1, 1), 3)
