"""Protocols give the same figures on one and on several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from largescale.checkpoint.folder import Checkpoint
from largescale.config import load_config
from largescale.data.corpora import Corpus
from largescale.evaluate import (
    clusters,
    detection,
    knn,
    layers,
    linear_cached,
    low_shot,
    retrieval,
    segmentation,
    support_neighbours,
    svm,
)
from largescale.evaluate import features as features_module
from largescale.evaluate.annotations import AnnotatedImages
from largescale.evaluate.average_precision import AveragePrecision
from largescale.evaluate.extract import load_method
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.image_training import Classifier, Trial, scores_of, trained_scores
from largescale.evaluate.label_lists import LabelLists
from largescale.evaluate.subject import Subject
from largescale.evaluate.training_recipe import Recipe
from largescale.processes import rank, world_size
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError
from tests.helpers.canvases import scenes
from tests.helpers.commands import ROOT
from tests.helpers.detection import small
from tests.helpers.features import features
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Two(LabelLists):
    """Two labels for each image: its class, and whether it is one of the first two."""

    def __init__(self, features: FeatureSet) -> None:
        self._labels = features.labels.tolist()

    def read(self, source: str, ids: torch.Tensor) -> list[frozenset[str] | None]:
        return [frozenset({str(label), "few" if label < 2 else "more"}) for label in self._labels]


def figures() -> dict[str, Any]:
    """What protocols on features find."""
    train, test = features(300, 0), features(101, 1)
    strengths = [0.1, 0.01]
    return {
        "knn": knn.measure(train, test, knn.Settings()),
        "linear-cached": linear_cached.measure(train, test, linear_cached.Settings(linear_cached_strengths=strengths)),
        "low-shot": low_shot.measure(train, test, low_shot.Settings(low_shot_splits=2, low_shot_strengths=strengths)),
        "support-neighbours": support_neighbours.measure(
            train, test, support_neighbours.Settings(support_neighbours_splits=2), own=torch.arange(30)
        ),
        "retrieval": retrieval.measure(test, retrieval.Settings()),
        "clusters": clusters.measure(train, test, clusters.Settings()),
        "svm": svm.measure((train, Two(train)), (test, Two(test)), svm.Settings(svm_costs=[0.1, 1.0])),
    }


def trial_of(shards: tuple[Path, Path]) -> Trial:
    config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={shards[0]}", "data.audit=false"])
    config.evaluate.resize = config.evaluate.size = 16
    train, test = (Corpus(read_manifest(folder)) for folder in shards)
    return Trial(config, load_method(config, None), train, test, str(shards[0]), Path(), torch.device("cpu"))


def scores(shards: tuple[Path, Path], trunk_rate: float) -> torch.Tensor | None:
    """Scores of the test images after two epochs; a trained trunk keeps a layer of the head."""
    recipe = Recipe(epochs=2, batch=40, trunk_rate=trunk_rate, head_rate=0.3, head_layers=int(trunk_rate > 0))
    found = trained_scores(trial_of(shards), recipe)
    return None if found is None else found.features


def of_stages(shards: tuple[Path, Path]) -> torch.Tensor | None:
    """Scores of all stages."""
    trial = trial_of(shards)
    found = scores_of(layers.Probes(trial, 64), trial, Recipe(epochs=2, batch=40, trunk_rate=0, head_rate=0.3))
    return None if found is None else found.features


@torch.no_grad()
def said_at_first(shards: tuple[Path, Path]) -> list[int]:
    """What a classifier says of noise that starts from logistic regression."""
    trial, recipe = trial_of(shards), Recipe(epochs=1, batch=40, trunk_rate=0.1, head_rate=0.1, starts_linear=True)
    network = Classifier(trial, recipe)
    network.start_from_logistic(trial, recipe)
    noise = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return network.eval()(noise).argmax(1).tolist()


def both(shards: tuple[Path, Path]) -> tuple[dict[str, Any], *tuple[torch.Tensor | None, ...]]:
    found = figures() | {"logistic start": {"classes": said_at_first(shards)}}
    return found, scores(shards, 0.0), scores(shards, 0.05), of_stages(shards)


def of_few() -> dict[str, Any]:
    """The same of 30 training images and 3 test images; 1% of the former are fewer than ranks."""
    train, test = features(30, 0), features(3, 1)
    few = low_shot.Settings(low_shot_splits=1, low_shot_strengths=[0.1], low_shot_shares=[0.2])
    return {
        "knn": knn.measure(train, test, knn.Settings()),
        "low-shot": low_shot.measure(train, test, few),
        "retrieval": retrieval.measure(features(7, 1), retrieval.Settings()),
    }


def test_ranks_may_be_more_than_rows():
    alone, found = of_few(), run_ranks(of_few, 5)
    assert all(one == found[0] for one in found)
    assert found[0]["retrieval"].pop("map") == pytest.approx(alone["retrieval"].pop("map"), abs=1e-6)
    assert found[0] == alone


def test_several_ranks_find_what_one_finds(shard_folder, held_out_shards):
    shards = shard_folder, held_out_shards
    alone, *trained = both(shards)
    average = alone["retrieval"].pop("map")
    for ranks in (2, 4):
        (here, *of_training), *others = run_ranks(both, ranks, shards)
        assert all(there == here and nothing == [None] * 3 for there, *nothing in others)
        assert here["retrieval"].pop("map") == pytest.approx(average, abs=1e-6)  # a sum of shares
        assert here == alone
        # Sums of gradients in another order; BatchNorm's statistics are those of the whole batch.
        for ours, theirs in zip(trained, of_training, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def of_three(shards: tuple[Path, Path]) -> tuple[torch.Tensor | None, str]:
    """Scores, and what is raised where the loss of one rank is not a number."""
    found, trial = scores(shards, 0.0), trial_of(shards)
    if rank() == 1:
        for parameter in trial.method.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(InputError) as told:
        trained_scores(trial, Recipe(epochs=1, batch=40, trunk_rate=0.0, head_rate=0.3))
    return found, str(told.value)


def of_replaced_features(folder: Path, shards: tuple[Path, Path], size: int) -> str:
    """What is raised where another command writes features of a size just before other ranks read them."""
    words = [f"data.shards={shards[0]}", f"data.eval_shards={shards[1]}", "evaluate.baselines=false"]
    config = load_config(ROOT / "tests/tiny.yaml", words)
    weights = Checkpoint(Path("unused"), {"step": 3, "files": {}})
    subject = Subject.of(folder, weights, config, protocol="knn", own_keys=(), classes=True)

    def replaced(*_: object) -> None:
        if rank() == 0:
            path = features_module.path_of(folder, "pretrained", "test")
            found = FeatureSet.load(path)
            found.made_from["images"]["size"] = size
            replace(found, features=found.features.zero_()).save(path, found.made_from)
        dist.barrier()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features_module, "method_of", lambda *_, **__: load_method(config, None))
        patch.setattr(features_module, "keep_corpora", replaced)
        try:
            features_module.features_of_subject(subject)
        except InputError as error:
            return str(error)
    return ""


def near_misses(folder: Path) -> dict[str, Any]:
    """Average precision of boxes and masks that are moved a little, by numbers that follow from the sample."""
    trial = trial_of((folder, folder))
    images = AnnotatedImages(trial.test, trial.config, "json:annotations", masks=True)
    figures = AveragePrecision(masks=True)
    for number in images.ids[rank() :: world_size()].tolist():
        scene, random = images.scene(number), np.random.default_rng(number)
        moved = torch.from_numpy(random.normal(0, 2, scene.boxes.shape)).float()
        turned = random.permutation(len(scene.boxes))
        found = {
            "boxes": scene.boxes + moved,
            "labels": scene.categories,
            "scores": torch.from_numpy(random.random(len(scene.boxes)).round(1)).float(),  # many are equal
            "masks": (scene.masks if random.random() < 0.5 else scene.masks[turned])[:, None].float(),
        }
        figures.add(number, found, scene)
    return figures.figures()


def of_fcn(few: tuple[Path, Path]) -> dict[str, torch.Tensor]:
    """The network after two steps of an FCN."""
    trial = trial_of(few)
    settings = segmentation.Settings(
        segmentation_head="fcn", segmentation_fcn_width=4, segmentation_fcn_epochs=2, segmentation_batch=8
    )
    segmentation.measure(trial, settings)
    return dict(trial.method.state_dict())


def of_scenes(folders: tuple[Path, Path], few: tuple[Path, Path]) -> tuple[dict[str, Any], ...]:
    settings = segmentation.Settings(segmentation_epochs=1, segmentation_rate=0.02)
    trial = trial_of(few)
    detected = detection.measure(trial, small(detection_batch=4))
    weights = {name: float(value.double().sum()) for name, value in trial.method.state_dict().items()}
    segmented = segmentation.measure(trial_of(folders), settings)
    return segmented, near_misses(folders[1]), detected, weights, of_fcn(few)


def test_several_ranks_segment_and_detect_as_one_does(scene_folders, tmp_path):
    places = scene_folders, scenes(tmp_path, 8, 3)
    *alone, trunk = of_scenes(*places)
    for ranks in (2, 4):
        (*here, first), *others = run_ranks(of_scenes, ranks, *places)
        for theirs in (first, *(weights for *_, weights in others)):  # sums of gradients in another order
            torch.testing.assert_close(theirs, trunk, rtol=1e-3, atol=1e-4)
        assert all(there == here for *there, _ in others)
        assert here[0]["miou"] == pytest.approx(alone[0]["miou"], abs=2e-3)
        assert here[1] == alone[1] and 0.2 < here[1]["box_ap"] < 1 and 0.2 < here[1]["mask_ap"] < 1
        assert here[2]["num_test"] == alone[2]["num_test"] == 3


def test_three_ranks_share_a_batch_and_refuse_together(shard_folder, held_out_shards):
    (found, *_), said = zip(*run_ranks(of_three, 3, (shard_folder, held_out_shards)), strict=True)
    assert found.isfinite().all()
    assert len(set(said)) == 1 and said[0].startswith("the loss is nan at step 0 of ")


def test_features_that_another_command_replaces_are_refused_on_all_ranks(shard_folder, held_out_shards, tmp_path):
    shards = shard_folder, held_out_shards
    assert run_ranks(of_replaced_features, 2, tmp_path, shards, 28) == [""] * 2  # those of the same weights and images
    first, second = run_ranks(of_replaced_features, 2, tmp_path, shards, 24)
    assert first == second and "pretrained-test.safetensors: another command has replaced these" in first
    assert "(images.size was 24 and is now 28); run this again" in first
