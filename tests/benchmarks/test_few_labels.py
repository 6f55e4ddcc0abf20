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
