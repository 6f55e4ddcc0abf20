"""What does not fit into a run's length is said with the numbers, and what is told to set instead is right.

Covers: largescale/data/length.py, largescale/methods/milestone.py
"""

from __future__ import annotations

import re

import pytest

from largescale.config import load_config
from largescale.data.length import Length
from largescale.distributed import stopping
from largescale.run.schedule_check import complaints, facts
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

TINY = "tests/tiny.yaml"
SMALL_BATCH = "configs/swav/resnet50_400ep_bs256.yaml"
RECIPES = sorted(path for form in ("*/resnet50*", "*-gpu/*") for path in (ROOT / "configs").glob(f"{form}.yaml"))
LONG = Length(num_steps=2000, steps_per_epoch=100, num_samples=1600)


def said(recipe: str, length: Length, *overrides: str) -> list[str]:
    return complaints(load_config(ROOT / recipe, ["data.shards=x", *overrides]), length)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_published_recipes_fit_on_imagenet(recipe):
    config = load_config(recipe, ["data.shards=x"])
    batch = config.train.global_batch
    epoch = 1_281_167 // batch
    assert complaints(config, Length(int(config.train.epochs * epoch), epoch, 1_281_167, 1_281_167 % batch)) == []


@pytest.mark.parametrize("samples", [1000, 3000, 100_000, 1_000_000])
@pytest.mark.parametrize("recipe", ["own_images", "own_images_cpu"])
def test_recipes_for_own_images_fit_on_few_and_many(recipe, samples):
    config = load_config(ROOT / f"configs/swav/{recipe}.yaml", ["data.shards=x"])
    epoch, left_out = divmod(samples, config.train.global_batch)
    assert complaints(config, Length(int(config.train.epochs * epoch), epoch, samples, left_out)) == []


def test_imagenets_recipe_on_three_thousand_images():
    frozen, queue = said(SMALL_BATCH, Length(1100, 11, 3000, 184), "train.epochs=100")
    assert frozen == (
        "method.freeze_prototypes_steps=5005: prototypes train from step 5,005 on, and the run has 1,100, so never; "
        "set method.freeze_prototypes_steps=55, or train longer"
    )
    assert queue == (
        "method.queue_start_step=75060: the queue takes part from step 75,075 on, and the run has 1,100, so never; set "
        "method.queue_start_step=55, or train longer"
    )


@pytest.mark.parametrize(
    "length, overrides, expected",
    [
        (
            LONG,
            ["optim.warmup_epochs=20"],
            "optim.warmup_epochs=20 is 2,000 of the run's 2,000 steps: the rate rises to",
        ),
        (LONG, ["optim.warmup_epochs=15"], "1,500 of the run's 2,000 steps: little is left"),
        (LONG, ["method.freeze_prototypes_steps=1001"], "prototypes train only from step 1,001 of 2,000"),
        (
            LONG,
            ["method.queue=16000"],
            "the queue takes part only from step 1,001 of 2,000; set method.queue_start_step=0",
        ),
        (LONG, ["method.queue=17600"], "set method.queue=0, or train longer"),
        (LONG, ["checkpoint.every_steps=2000"], "saved only at its end: if killed, it starts over"),
        (LONG, ["checkpoint.keep_every=12"], "set checkpoint.keep_every=15"),
        (LONG, ["checkpoint.every_steps=0", "train.max_rollbacks=1"], "there is nothing to go back to"),
        (LONG, ["data.shuffle_window=4"], "a batch takes 4 images of a stream"),
        (LONG, ["data.shards=[{path: a, weight: 15}, b]"], "25.00% where 6.25% are asked for; set data.streams=16"),
        (LONG, ["data.shards=[{path: a, weight: 99}, b]"], "are asked for; set a larger train.global_batch"),
        (Length(100, 100, 1600), ["train.spike_factor=9"], "train.spike_factor=9: looks for spikes from step 100 on"),
        (
            Length(100, 100, 1600),
            ["run.log_every=200", "checkpoint.every_steps=0"],
            "run.log_every=200: the run has 100",
        ),
        (Length(100, 1, 31, 15), ["optim.warmup_epochs=1"], "an epoch leaves out 15 of 31 images"),
    ],
)
def test_each_thing_that_does_not_fit_is_said_and_what_it_says_helps(length, overrides, expected):
    [line] = said(TINY, length, *overrides)
    assert expected in line
    if remedy := re.search(r"; set (\S+=[\w.]+)", line):
        assert said(TINY, length, *overrides, remedy[1]) == []


def test_a_run_that_is_saved_before_phases_is_not_saved_only_at_its_end():
    recipe = "tests/methods/mini/deepclusterv2.yaml"
    settings = ["train.max_rollbacks=1", "run.log_every=3000"]
    for often in (2000, 0):
        assert said(recipe, LONG, f"checkpoint.every_steps={often}", *settings) == []
    config = load_config(ROOT / recipe, ["data.shards=x", "checkpoint.every_steps=500"])
    assert facts(config, LONG)["saves"].startswith("every 500 steps (3 times), before offline phases and at the end; ")


def test_what_fits_says_nothing():
    assert said(TINY, LONG) == []


def test_facts_say_when_what_happens():
    found = facts(load_config(ROOT / TINY, ["data.shards=x", "optim.final_lr=0.25"]), Length(14, 12, 200, 8))
    assert found["warm-up"] == "2 steps, from 0 to 0.5"
    assert found["prototypes train"] == "from step 2 of 14" and found["the queue takes part"] == "from step 3 of 14"
    assert found["saves"] == "every 5 steps (2 times) and at the end; the newest 2 are kept"
    # Twelve steps of cosine from 0.5 to 0.25: the last stands at 11/12 of half a turn.
    assert float(found["learning rate of the last step"]) == pytest.approx(0.254, abs=5e-4)


def test_a_time_limit_within_the_margin_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"run.time_limit_s=100: expected more than run.stop_before_s=120"):
        load_config(ROOT / TINY, ["data.shards=x", "run.time_limit_s=100"])
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1000")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1060")
    with pytest.raises(InputError, match=r"run.stop_before_s=120: expected less than the 60 s that SLURM gives"):
        stopping.check_job_time(120)
    stopping.check_job_time(59)
    monkeypatch.delenv("SLURM_JOB_START_TIME")
    stopping.check_job_time(120)
