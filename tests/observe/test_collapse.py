from __future__ import annotations

import pytest

from largescale.observe.collapse import Signs, warning

HEALTHY = {"loss_over_ln_k": 0.7, "assignment_entropy": 0.5, "prototype_usage": 0.9}


def test_a_healthy_run_gets_no_warning():
    assert warning(Signs(**HEALTHY), progress=0.5) == ""


@pytest.mark.parametrize(
    "sign, value, words",
    [
        ("loss_over_ln_k", 0.995, "as if predictions were uniform"),
        ("assignment_entropy", 0.99, "samples are not told apart"),
        ("prototype_usage", 0.02, "embeddings gather in few places"),
    ],
)
def test_each_sign_of_collapse_is_said_in_words_but_not_while_a_run_begins(sign, value, words):
    signs = Signs(**{**HEALTHY, sign: value})
    assert words in warning(signs, progress=0.5) and "Try" in warning(signs, progress=0.5)
    assert warning(signs, progress=0.05) == ""
