"""Protocols that train on images.

Covers: largescale/evaluate/finetune.py, largescale/evaluate/linear_augmented.py,
largescale/evaluate/low_shot_finetune.py, largescale/evaluate/layers.py, largescale/evaluate/stand_ins.py,
largescale/evaluate/training_recipe.py, largescale/evaluate/training_state.py
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

from largescale.config import DataConfig, load_config
from largescale.data.corpora import Corpus, open_corpus
from largescale.data.loaded import Batch
from largescale.evaluate import finetune, image_training, layers, linear_augmented, low_shot_finetune, ways
from largescale.evaluate.extract import load_method
from largescale.evaluate.image_training import (
    Classifier,
    Probe,
    Trial,
    kept_layers,
    labels_of,
    stream_config,
    trained_scores,
)
from largescale.evaluate.logistic_start import start_from_logistic
from largescale.evaluate.training_recipe import Recipe, batch_for, rate_factor
from largescale.evaluate.training_state import Unfinished
from largescale.methods import METHODS, build_method
from largescale.models.image_classifier import ImageClassifier
from largescale.models.narrow import NarrowConv2d
from shards.format.manifest import read_manifest, write_manifest
from shards.format.shard_index import read_index, write_index
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.streams import overwrite
from tests.methods.harness import mini


@pytest.fixture
def trial(shard_folder, held_out_shards, tmp_path) -> Trial:
    config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={shard_folder}", "data.audit=false"])
    config.evaluate.resize = config.evaluate.size = 16
    train, test = (Corpus(read_manifest(folder)) for folder in (shard_folder, held_out_shards))
    method = load_method(config, None)
    return Trial(config, method, train, test, str(shard_folder), tmp_path / "splits", torch.device("cpu"))


def state(trial: Trial) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trial.method.state_dict().items()}


def test_a_linear_probe_leaves_the_trunk_as_it_is_and_learns(trial):
    before = state(trial)
    config = linear_augmented.Settings(linear_augmented_epochs=6, linear_augmented_batch=40, linear_augmented_rate=10)
    found = linear_augmented.measure(trial, config)
    assert 0.15 < found["top1"] < found["top5"] <= 1  # chance: 0.1
    assert all(torch.equal(value, before[name]) for name, value in trial.method.state_dict().items())


def test_training_images_that_cannot_be_read_are_said(trial, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(trial.train.manifest.root, tmp_path / "damaged")
    key = overwrite(folder, 1, 8)
    trial.config.evaluate.train_shards, trial.config.evaluate.baselines = str(folder), False
    subject = SimpleNamespace(
        config=trial.config,
        shards=(Corpus(read_manifest(folder)), trial.test),
        run_dir=tmp_path,
        task="probe",
        weights=None,
    )
    monkeypatch.setattr(ways, "method_of", lambda *_, **__: trial.method)

    def measure(trial: Trial, _: object) -> dict[str, object]:
        trained_scores(trial, Recipe(epochs=2, batch=40, trunk_rate=0.0, head_rate=1.0))
        return {"num_train": 200, "num_test": 100}

    said = "1 training images cannot be read; others stand in for them"
    assert ways.by_dense_training(measure, subject).doubts == [said]
    assert caplog.text.count(f"train-000001.tar, key {key}: another stands in for it: ") == 1

    step = image_training._step

    def killed(network: Probe, batch: Batch, *others: object) -> torch.Tensor:
        if batch.step == 9:
            raise Killed
        return step(network, batch, *others)

    monkeypatch.setattr(image_training, "_step", killed)
    with pytest.raises(Killed):
        ways.by_dense_training(measure, subject)
    monkeypatch.setattr(image_training, "_step", step)
    assert ways.by_dense_training(measure, subject).doubts == [said], "what was noted before it was killed"


def test_what_is_doubtful_of_a_baseline_alone_names_it():
    results = {"pretrained": {"doubts": ["a", "3 b"]}, "untrained": {"doubts": ["a", "5 b"]}, "pixels": {}}
    assert ways._doubts_of(results) == ["a", "3 b", "untrained: 5 b"] and not any(map(len, results.values()))


def test_fine_tuning_changes_the_trunk_and_repeats_itself(trial):
    before, config = state(trial), finetune.Settings(finetune_epochs=2, finetune_batch=40)
    found = finetune.measure(trial, config)
    after = state(trial)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("conv" in name for name in changed) and any("running_mean" in name for name in changed)
    assert all(name.startswith("backbone.") for name in changed)
    assert any(isinstance(one, NarrowConv2d) for one in trial.method.modules())  # oneDNN's gradient of others is unsafe
    trial.method.load_state_dict(before)
    assert finetune.measure(trial, config) == found
    assert all(torch.equal(value, after[name]) for name, value in trial.method.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_fine_tuning_trains_the_network_that_is_measured_and_nothing_else_of_the_method(trial, name):
    config = mini(name)
    method = build_method(config)
    recipe = Recipe(epochs=1, batch=8, trunk_rate=0.1, head_rate=0.1)
    network = Classifier(replace(trial, config=config, method=method), recipe).train()
    network(torch.randn(8, 3, 24, 24)).square().sum().backward()
    encoder = f"method.{method.encoder_name}."
    for key, value in network.named_parameters():
        measured = key.startswith((encoder, "head."))
        assert (value.grad is not None) == measured and value.requires_grad == measured, key
    taken = {parameter for group in network.groups(recipe) for parameter in group["params"]}
    assert taken == {value for value in network.parameters() if value.grad is not None}
    kept = {tensor.data_ptr() for tensor in network.trained().values()}
    assert {value.data_ptr() for value in taken} <= kept


def test_kept_layers_of_the_head_are_trained_between_backbone_and_classifier(trial):
    """Cut at layer 1, a head is its first layer run by hand, its ReLU included."""
    config = mini("simclr", "method.hidden=[10,9]")
    method = build_method(config)
    recipe = Recipe(epochs=1, batch=8, trunk_rate=0.1, head_rate=0.1, head_layers=1)
    network = Classifier(replace(trial, config=config, method=method), recipe)
    images = torch.randn(8, 3, 24, 24)
    linear, norm = method.projection[0], method.projection[1]
    x = method.backbone(images) @ linear.weight.T
    x = norm.weight * (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt() + norm.bias
    by_hand = torch.relu(x) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network.train()(images), by_hand, rtol=1e-4, atol=1e-5)
    network(images).square().sum().backward()
    trained = {name for name, value in network.named_parameters() if value.grad is not None}
    assert {"method.projection.0.weight", "method.projection.1.bias", "head.weight"} <= trained
    assert not any(name.startswith("method.projection.3") for name in trained)
    taken = {parameter for group in network.groups(recipe) for parameter in group["params"]}
    assert taken == {value for value in network.parameters() if value.grad is not None}
    assert {value.data_ptr() for value in taken} <= {tensor.data_ptr() for tensor in network.trained().values()}
    alone = network.alone()
    torch.testing.assert_close(alone.eval()(images), network.eval()(images))


@pytest.mark.parametrize(
    "name, number, expected",
    [
        ("simclr", 3, "its head has 2 linear layers; expected 0 .* to 2"),
        ("rotation", 1, "a Rotation has no projection head; leave it at 0"),
    ],
)
def test_a_head_without_so_many_layers_is_refused(name, number, expected):
    recipe = Recipe(1, 8, 0.1, 0.1, head_layers=number, head_layers_key="evaluate.finetune_head_layers")
    with pytest.raises(InputError, match=f"evaluate.finetune_head_layers={number}: {expected}"):
        kept_layers(build_method(mini(name)), recipe)


class Killed(Exception):
    pass


@pytest.mark.parametrize("protocol", ["finetune", "layers", "lars"])
def test_a_training_that_is_killed_goes_on_and_finds_the_same(trial, monkeypatch, protocol):
    start, config = state(trial), finetune.Settings(finetune_epochs=2, finetune_batch=40)
    measure = finetune.measure
    if protocol == "lars":
        config = replace(config, finetune_optimizer="lars")
    if protocol == "layers":
        config, measure = layers.Settings(layers_epochs=2, layers_batch=40, layers_rate=0.1), layers.measure
    expected = measure(trial, config)
    here = Unfinished(trial.scratch.parent / "unfinished", "x")
    begun: list[int] = []

    def again(stop_at: int) -> dict:
        trial.method.load_state_dict(start)
        fresh = replace(trial, method=load_method(trial.config, None), unfinished=here)
        steps = image_training._batches

        def some(stream, numbers):
            begun.append(numbers.start)
            for one in steps(stream, numbers):
                if one.step == stop_at:
                    raise Killed
                yield one

        monkeypatch.setattr(image_training, "_batches", some)
        try:
            return measure(fresh, config)
        finally:
            monkeypatch.setattr(image_training, "_batches", steps)

    for stop_at in (4, 7):
        with pytest.raises(Killed):
            again(stop_at)
    assert again(99) == expected and begun == [0, 4, 7]
    here.state_path.write_bytes(here.state_path.read_bytes()[:-9])  # and what a disk may lose is begun again
    assert again(99) == expected and begun[3:] == [0]
    assert here.result() is None
    here.finish(expected)
    assert here.result() == expected and not here.state_path.exists()
    here.remove()
    assert not here.folder.exists()


def test_stages_are_probed_each_on_its_own_map(trial):
    before = state(trial)
    found = layers.measure(
        trial, layers.Settings(layers_epochs=6, layers_batch=40, layers_rate=0.3, layers_numbers=100)
    )
    assert found["numbers_by_stage"] == {"stage 1": 72, "stage 2": 64, "features": 16}
    top1, top5 = found["top1_by_stage"], found["top5_by_stage"]
    assert (found["top1"], found["top5"]) == (top1["features"], top5["features"])
    assert all(0.12 < top1[stage] < top5[stage] <= 1 for stage in found["numbers_by_stage"])  # chance: 0.1
    assert all(torch.equal(value, before[name]) for name, value in trial.method.state_dict().items())


@pytest.mark.parametrize("num", [60, 0])
def test_images_without_a_label_take_no_part_in_training(trial, tmp_path, num):
    """Not in steps, in BatchNorm's statistics or in gradients: as if a subset left them out."""
    ids = np.arange(0, 3 * num, 3)
    np.save(tmp_path / "ids.npy", ids)
    recipe = Recipe(epochs=2, batch=20, trunk_rate=0.05, head_rate=0.3)
    before = state(trial)
    mixed = shutil.copytree(trial.train.manifest.root, tmp_path / "mixed")
    manifest = read_manifest(mixed)
    first = 0
    for number in range(len(manifest.shards)):
        index = read_index(manifest.index_path(number))
        known = np.isin(np.arange(first, first := first + len(index)), ids)
        write_index(replace(index, label=np.where(known, index.label, -1)), manifest.index_path(number))
    write_manifest(replace(manifest, shards=tuple(replace(shard, index_checksum="") for shard in manifest.shards)))
    some = replace(trial, train=Corpus(read_manifest(mixed)), place=str(mixed))
    if not num:
        with pytest.raises(InputError, match="mixed: none of its images has a label"):
            trained_scores(some, recipe)
        return
    expected = trained_scores(trial, replace(recipe, subset=str(tmp_path / "ids.npy")))
    trial.method.load_state_dict(before)
    found = trained_scores(some, recipe)
    assert expected is not None and found is not None and torch.equal(found.features, expected.features)


def test_low_shot_trains_on_the_split_alone(trial):
    config = low_shot_finetune.Settings(low_shot_finetune_share=0.1, low_shot_finetune_epochs=1)
    assert low_shot_finetune.measure(trial, config)["num_train"] == 20
    (path,) = trial.scratch.iterdir()
    other = replace(trial, train=trial.test, place=str(trial.test.manifest.root))
    assert low_shot_finetune.measure(other, config)["num_train"] == 10
    assert len(set(trial.scratch.iterdir()) - {path}) == 1  # beside that of other training shards
    numbers = np.load(path)
    labels = labels_of(trial.train)
    assert torch.bincount(labels[numbers]).tolist() == [2] * 10
    assert torch.equal(labels_of(trial.train, str(path)), labels[numbers])
    made = stream_config(trial, Recipe(epochs=1, batch=256, trunk_rate=0.1, head_rate=0.1, subset=str(path)))
    assert (made.train.global_batch, made.data.subset, made.data.augment.flip) == (16, str(path), 0.5)
    assert (made.data.augment.blur, made.data.augment.noise, len(made.data.crops)) == (0, 0, 1)
    trial.config.data.shuffle_window += 1
    again = stream_config(trial, Recipe(epochs=1, batch=256, trunk_rate=0.1, head_rate=0.1, subset=str(path)))
    assert again.data == made.data  # as the warning of settings without effect says
    near = Recipe(epochs=1, batch=8, trunk_rate=0.1, head_rate=0.1, crop_scale=(0.5, 0.9), flip=0.0)
    made = stream_config(trial, near)
    assert (made.data.crops[0].scale, made.data.augment.flip) == ([0.5, 0.9], 0)
    with pytest.raises(InputError, match="expected those of trunk"):
        low_shot_finetune.measure(trial, low_shot_finetune.Settings(low_shot_finetune_rates=[0.1]))


def test_images_of_a_store_are_shuffled_within_the_window_that_the_run_was_given_for_its_cache(
    trial, shard_folder, tmp_path
):
    store = "memory://stored-for-training"
    fsspec.filesystem("memory").put(str(shard_folder), store, recursive=True)
    trial.config.data.cache = str(tmp_path / "cache")
    stored = replace(trial, train=open_corpus(store, trial.config.data), place=store)
    default = DataConfig().shuffle_window
    for one, given, expected in [(stored, 4, 4), (stored, 2 * default, default), (trial, 4, default)]:
        one.config.data.shuffle_window = given
        made = stream_config(one, Recipe(epochs=1, batch=40, trunk_rate=0.1, head_rate=0.1))
        assert made.data.shuffle_window == expected


def test_low_shot_may_start_from_logistic_regression(trial):
    """Of the trunk as it is: at a rate of nearly 0, that is what is measured."""
    kept: list[ImageClassifier] = []
    config = low_shot_finetune.Settings(
        low_shot_finetune_share=0.3,
        low_shot_finetune_epochs=1,
        low_shot_finetune_rates=[1e-12, 0.0],
        low_shot_finetune_linear_first=True,
        low_shot_finetune_crop_scale=[0.8, 1.0],
        low_shot_finetune_flip=0.0,
    )
    low_shot_finetune.measure(replace(trial, keep=kept.append), config)
    [path] = trial.scratch.iterdir()
    ids = np.load(path)
    head, method = nn.Linear(trial.method.num_features, 10), load_method(trial.config, None)
    start_from_logistic(head, method.encode, trial.train, ids, trial.config, trial.device)
    torch.testing.assert_close(kept[0].head[-1].weight, head.weight)
    torch.testing.assert_close(kept[0].head[-1].bias, head.bias)


@pytest.mark.parametrize(
    "measure, settings",
    [
        (finetune.measure, finetune.Settings(finetune_epochs=1, finetune_batch=1)),
        (layers.measure, layers.Settings(layers_epochs=1, layers_batch=1)),
    ],
)
def test_steps_of_one_image_are_refused_where_batchnorm_is_trained(trial, measure, settings):
    with pytest.raises(InputError, match="_batch=1: steps of one image, of which BatchNorm has no statistics"):
        measure(trial, settings)


def test_a_rate_that_diverges_is_said(trial):
    config = finetune.Settings(finetune_epochs=1, finetune_batch=40, finetune_rate=1e9)
    with pytest.raises(InputError, match="at step 4 of 5; lower the learning rate"):
        finetune.measure(trial, config)


def test_a_batch_is_of_equal_parts_for_any_number_of_ranks():
    recipe = Recipe(epochs=1, batch=256, trunk_rate=0, head_rate=1, batch_key="evaluate.finetune_batch")
    for ranks, num_images, expected in (
        (1, 1000, 256),
        (8, 1000, 256),
        (3, 1000, 240),
        (6, 1000, 240),
        (12, 1000, 240),
        (16, 1000, 256),
        (3, 100, 96),
        (1, 20, 16),
        (1, 5, 5),
        (3, 20, 18),
        (12, 20, 12),
        (8, 9, 8),
    ):
        assert batch_for(recipe, num_images, ranks) == expected, (ranks, num_images)
    with pytest.raises(InputError, match="7 training images for 8 ranks"):
        batch_for(recipe, 7, 8)
    with pytest.raises(InputError, match=r"evaluate\.finetune_batch=256 for 512 ranks"):
        batch_for(recipe, 1000, 512)


def test_rates_follow_a_cosine_or_drop():
    cosine = Recipe(epochs=10, batch=8, trunk_rate=0, head_rate=1)
    assert [round(rate_factor(cosine, progress), 4) for progress in (0, 0.5, 1)] == [1, 0.5, 0]
    drops = Recipe(epochs=20, batch=8, trunk_rate=0, head_rate=1, drops=(12 / 20, 16 / 20), drop=0.2)
    assert [round(rate_factor(drops, epoch / 20), 4) for epoch in (0, 11.9, 12, 15.9, 16, 19)] == [
        1,
        1,
        0.2,
        0.2,
        0.04,
        0.04,
    ]
