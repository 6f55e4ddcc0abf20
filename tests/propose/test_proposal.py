"""The values of a proposed recipe follow what was seen, load, and fit the length of the run.

Covers: largescale/propose/views.py, largescale/propose/references.py, largescale/propose/written.py,
largescale/methods/choice.py, largescale/methods/swav/suited.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from largescale.config import load_config
from largescale.methods import METHODS
from largescale.methods.choice import Choice
from largescale.propose.command import MOST_EPOCHS, TRAINING, epochs_in
from largescale.propose.corpus import CorpusFacts
from largescale.propose.machine import Machine
from largescale.propose.proposal import as_config, first_proposal, with_larger_network
from largescale.propose.rate import Rate
from largescale.propose.written import written
from largescale.run.schedule_check import complaints
from shards.ground.errors import InputError

PHOTOS = CorpusFacts(
    6000, 6000, (300, 375, 480), (1.33, 1.6), 0.0, 500, 0, 0.01, (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)
)
CPU = Machine(0, "", 0.0, here=True, cores=2, host_gb=8.0)
GPU, EIGHT = Machine(1, "a100-80", 80.0, False, 0, 0.0), Machine(8, "a100-80", 80.0, False, 0, 0.0)


def proposed(corpus=PHOTOS, machine=CPU, method="swav"):
    return first_proposal("photos", "data/photos", "", method, corpus, machine)


def config_of(corpus=PHOTOS, machine=CPU, method="swav", epochs=100.0):
    return as_config(proposed(corpus, machine, method).choices(Choice(epochs, "for so many hours")))


def test_photographs_on_a_cpu():
    config = config_of()
    assert [group.size for group in config.data.crops] == [64, 32]
    assert config.data.mean == list(PHOTOS.mean) and config.data.std == list(PHOTOS.std)
    assert (config.model.width, config.train.global_batch, config.optim.lr) == (32, 64, 0.002)
    assert config.method.prototypes == 96 and config.method.queue == 0
    assert config.data.augment.hue > 0 and config.data.augment.blur > 0
    assert config.evaluate.size == 64 and config.data.eval_shards == ""


def test_one_and_eight_gpus():
    many = replace(PHOTOS, num_samples=2_000_000)
    one, eight = config_of(many, GPU), config_of(many, EIGHT)
    assert (one.model.backbone, one.data.crops[0].size) == ("resnet50", 224)
    assert (one.train.global_batch, eight.train.global_batch) == (256, 2048)
    assert eight.optim.lr == pytest.approx(8 * one.optim.lr)
    assert one.method.queue == 15 * 256 and one.method.queue_start_step > 0
    assert eight.method.queue == 0 and eight.method.prototypes == one.method.prototypes == 3000
    assert config_of(replace(PHOTOS, num_samples=30_000), GPU).data.crops[0].size == 160


def test_tiny_grey_images():
    tiny = replace(PHOTOS, shorter=(28, 28, 28), grey=1.0, std=(0.0, 0.0, 0.0))
    config = config_of(tiny)
    assert [group.size for group in config.data.crops] == [28, 16]
    augment = config.data.augment
    assert augment.hue == augment.saturation == augment.grayscale == augment.blur == 0
    assert min(config.data.std) > 0  # what has a single colour is not divided by 0
    assert config.evaluate.resize == config.evaluate.size == 28
    least = min(group.scale[0] for group in config.data.crops)
    assert 28 * math.sqrt(least) >= 11.5
    assert config_of(tiny, GPU).model.stem == "3x3s2"


def test_few_images_make_small_batches_and_too_few_are_refused():
    assert config_of(replace(PHOTOS, num_samples=64)).train.global_batch == 8
    assert config_of(replace(PHOTOS, num_samples=300)).train.global_batch == 32
    with pytest.raises(InputError, match="data/photos: 63 images are too few to train on; expected at least 64"):
        proposed(replace(PHOTOS, num_samples=63))
    with pytest.raises(InputError, match="expected at least 512"):
        proposed(replace(PHOTOS, num_samples=400), EIGHT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("machine", [CPU, EIGHT], ids=["cpu", "gpus"])
def test_every_method_gets_a_recipe_that_loads_and_fits_its_length(method, machine):
    for images in (1000, 1_300_000):
        corpus = replace(PHOTOS, num_samples=images)
        found = proposed(corpus, machine, method)
        config = as_config(found.choices(Choice(100.0, "")))
        assert config.method.name == method
        assert METHODS[method].misfit(config, found.length(100.0)) == ""
        assert complaints(config, found.length(100.0)) == []


def test_epochs_follow_from_hours_and_speed():
    epochs = epochs_in(proposed(), Rate(100.0, "measured here"), 1.0)
    assert epochs.value == pytest.approx(TRAINING * 3600 * 100 / 6000) and "90% of 1 h at 100 images/s" in epochs.reason
    capped = epochs_in(proposed(), Rate(1e5, "measured here"), 12.0)
    assert capped.value == MOST_EPOCHS and "12 h would allow" in capped.reason
    # An epoch is 93 steps of 64 images; 20 steps, the least, take 0.2 of an epoch.
    with pytest.raises(InputError, match=r"at 100 images/s, .* these are 5 steps .* at least --hours 0.004"):
        epochs_in(proposed(), Rate(100.0, "measured here"), 0.001)
    assert epochs_in(proposed(), Rate(100.0, "measured here"), 0.004).value == pytest.approx(0.216, abs=0.001)


def test_a_larger_network_where_the_hours_allow_it():
    larger = with_larger_network(proposed())
    config = as_config(larger.choices(Choice(100.0, "")))
    assert (config.model.depths, config.model.width) == ([2, 2, 2, 2], 64)


def test_reasons_stand_beside_values_that_any_text_can_be(tmp_path):
    choices = {
        "name": Choice("on", "a word that YAML takes for true"),
        "data.shards": Choice("a: b # c", "a path"),
        "data.mean": Choice([1e-6, 0.5, 1.0], "small"),
        "data.crops": Choice([Choice({"num": 2, "size": 24, "scale": [0.3, 1.0]}, "only these")], ""),
    }
    text = written(["First line"], choices)
    assert text.startswith("# First line\nname: 'on'  # a word that YAML takes for true\n\ndata:\n")
    assert "  - {num: 2, size: 24, scale: [0.3, 1.0]}  # only these\n" in text.replace("    -", "  -")
    (tmp_path / "recipe.yaml").write_text(text)
    config = load_config(tmp_path / "recipe.yaml")
    assert (config.name, config.data.shards, config.data.mean[0]) == ("on", "a: b # c", 1e-6)


def test_a_method_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--method swaw: expected one of swav"):
        proposed(method="swaw")
