"""A recipe that does not fit is changed until it does, and all that depends on a change follows; or it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from largescale.methods.choice import Choice
from largescale.propose.memory import changed_by, fitted
from largescale.propose.proposal import as_config
from shards.ground.errors import InputError
from tests.helpers.proposals import GPU, PHOTOS, proposed

EPOCHS = Choice(100.0, "")
NARROW = {"backbone": Choice("resnet", ""), "depths": Choice([1, 1], ""), "width": Choice(8, "")}


def narrow(gpu_gb: float, method: str = "swav", batch: int = 256):
    machine = replace(GPU, gpu_gb=gpu_gb)
    recipe = proposed(replace(PHOTOS, num_samples=1_300_000), machine, method)
    return replace(recipe, network=NARROW, batch=batch)


def test_what_fits_in_a_smaller_batch_gets_its_rate():
    before = narrow(1.9, batch=64)  # 0.4 GB of 0.3, in half the batch 0.2
    tight = fitted(before, EPOCHS)
    assert tight.batch == 32 and "by the planner a step needs " in tight.fitting["parallel.strategy"].reason
    rates = [one.choices(EPOCHS)["optim.lr"].value for one in (before, tight)]
    assert rates[0] / rates[1] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("here", [False, True])
def test_it_fits_in_the_precision_that_it_will_train_in(here, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    before = narrow(2.2, batch=64)  # 0.4 GB of 0.6; in fp32 0.7
    assert fitted(replace(before, machine=replace(before.machine, here=here)), EPOCHS).batch == 64


def test_what_fits_by_no_change_is_refused():
    with pytest.raises(InputError, match=r"by the planner a step needs .* of 1 GB .* no change that was tried"):
        fitted(narrow(1.0, batch=32), EPOCHS)


def test_another_batch_is_that_of_the_whole_recipe():
    halved = changed_by(narrow(80.0), ["model.recompute_stages=[1,2]", "train.global_batch=64"], "why")
    config, before = (as_config(one.choices(EPOCHS)) for one in (halved, narrow(80.0)))
    assert (halved.batch, config.train.global_batch, config.model.recompute_stages) == (64, 64, [1, 2])
    assert config.optim.lr == pytest.approx(before.optim.lr / 4, rel=0.01)
    assert halved.length(1).num_steps == 1_300_000 // 64


@pytest.mark.parametrize("method, compared", [("swav", True), ("simclr", True), ("byol", False)])
def test_it_is_said_where_a_loss_sees_micro_batches(method, compared):
    split = changed_by(narrow(80.0, method), ["train.accumulate=4"], "why")
    assert ("train.loss_spans" in split.fitting["train.accumulate"].reason) == compared
