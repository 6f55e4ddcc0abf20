"""What the doctor takes for a cause, what it waits for, and how much it keeps; by lines made for it.

Covers: largescale/methods/swav/observe.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from largescale.config import Config, load_config
from largescale.observe.doctor import Diagnosis, Doctor, is_young, judge
from tests.helpers.commands import ROOT


def config_of(*overrides: str) -> Config:
    return load_config(ROOT / "tests/mini.yaml", ["data.shards=unused", "train.steps=100", *overrides])


CONFIG = config_of()


def judged(config: Config = CONFIG, **signs: Any) -> Diagnosis | None:
    """Of ten lines, a tenth of a run of 100 steps each; a sign is a number or one for each line."""
    columns = {name: np.broadcast_to(values, 10).tolist() for name, values in signs.items()}
    rows = [{"step": 10 * line + 9, "progress": (line + 1) / 10} for line in range(10)]
    for line, row in enumerate(rows):
        row |= {name: values[line] for name, values in columns.items()}
    return judge(config, rows)


RISING = np.linspace(1.05, 1.3, 10)


@pytest.mark.parametrize("signs", [{}, {"agreement": 0.6, "agreement_of_others": 0.2}])
def test_too_high_a_rate_is_named_though_strong_crops_have_little_in_common(signs):
    found = judged(loss_over_ln_k=RISING, pixel_agreement=0.05, **signs)
    assert found and found.name == "learning rate too high" and "optim.lr=0.01 or a longer" in found.words
    assert found.words.endswith("images that are all the same: look at them in the report, and check data.shards")
    without = judged(loss_over_ln_k=RISING, pixel_agreement=0.4, **signs)
    assert without and found.words.startswith(f"{without.words}. Views of one image have hardly a pixel in common")


def test_images_are_the_cause_where_embeddings_do_not_tell_them_apart_either():
    found = judged(loss_over_ln_k=RISING, pixel_agreement=0.0, agreement=0.2, agreement_of_others=0.2)
    assert found and found.name == "images all the same"


def test_a_sign_below_zero_that_stays_as_it_is_did_not_get_worse():
    found = judged(agreement=-0.28, agreement_of_others=-0.02)
    assert found and found.name == "images not told apart"


def test_a_rate_is_only_suspected_and_what_else_to_try_names_none():
    found = judged(effective_rank=np.linspace(4, 1, 10).clip(1.2))
    assert found and found.name == "learning rate too high"
    assert "which a learning rate of 0.1 may have brought about. Try, in another run.dir, optim.lr=0.01 " in found.words
    assert found.words.endswith("; if it stays, a wider head (method.hidden, method.embedding)")
    collapsed = judged(embedding_spread=np.linspace(0.4, -0.2, 10).clip(0.01))
    assert collapsed and collapsed.name == "learning rate too high" and "if it stays" not in collapsed.words


AT_LN_K = {"loss_over_ln_k": 1.0, "prototype_usage": 0.01, "prototype_usage_reachable": 1.0}


def test_predictions_are_not_judged_while_prototypes_are_fixed():
    for signs in (AT_LN_K, {"loss_over_ln_k": 1.2}, {"loss_over_ln_k": RISING}, {**AT_LN_K, "loss_over_ln_k": 0.5}):
        assert judged(config_of("method.freeze_prototypes_steps=100"), **signs) is not None  # to the end
        assert judged(config_of("method.freeze_prototypes_steps=80"), **signs) is None  # two lines since
        assert judged(config_of("method.freeze_prototypes_steps=70"), **signs) is not None
    assert judged(config_of("method.freeze_prototypes_steps=80"), assignment_entropy=1.0) is not None


def test_a_loss_of_the_frozen_part_is_what_a_later_one_is_compared_with():
    slow = judged(config_of("method.freeze_prototypes_steps=50"), loss_over_ln_k=1.2)
    assert slow and slow.name == "learns too slowly"


@pytest.mark.parametrize("steps, advised", [(0, True), (9, True), (10, False), (60, False), (100, False), (500, False)])
@pytest.mark.parametrize("loss", [1.0, 0.5])
def test_a_longer_freeze_is_advised_where_it_is_short(steps, advised, loss):
    found = judged(config_of(f"method.freeze_prototypes_steps={steps}"), **{**AT_LN_K, "loss_over_ln_k": loss})
    assert found and found.name == ("stuck at ln K" if loss == 1 else "few prototypes")
    assert ("freeze_prototypes_steps" in found.words) == advised and "Try, in another run.dir, method." in found.words


def test_a_run_that_is_done_is_not_young():
    pirl = load_config(ROOT / "tests/methods/mini/pirl.yaml", ["method.bank_start=random"])
    assert is_young(pirl, {"step": 39, "progress": 0.8, "epoch": 0.8})
    assert not is_young(pirl, {"step": 49, "progress": 1.0, "epoch": 1.0})
    assert not is_young(config_of("optim.warmup_epochs=1"), {"step": 99, "progress": 1.0, "epoch": 1.0})


def test_a_long_run_keeps_a_bounded_number_of_its_lines_and_is_judged_alike():
    rows = [{"step": at, "progress": (at + 1) / 5000, "loss_over_ln_k": 0.7 + 0.3 * (at >= 4000)} for at in range(5000)]
    doctor, continued = Doctor(CONFIG, rows[:4300]), Doctor(CONFIG, rows[:4600])
    for row in rows[4300:4600]:
        doctor.look(row)
    assert doctor._rows == continued._rows and 500 <= len(doctor._rows) <= 1000 and doctor._rows[0] is rows[0]
    assert doctor.look(rows[4600]) == judge(CONFIG, rows[:4601]) and "ln K" in str(judge(CONFIG, rows[:4601]))
    assert Doctor(CONFIG, rows[:4000]).look(rows[4000]) is None
