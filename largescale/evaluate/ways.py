"""How protocols come to what they measure: from features of classes, of all samples, or by training on images.

Each way measures the network and its baselines, and says on how many images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from largescale.checkpoint.folder import Checkpoint
from largescale.data.supports import fingerprint_of, labelled_images, parts_of
from largescale.evaluate import support_neighbours, svm
from largescale.evaluate.doubts import class_doubts
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.features import Networks, features_of_subject, test_features_of_subject
from largescale.evaluate.image_training import Trial, labelled
from largescale.evaluate.label_lists import LabelLists
from largescale.evaluate.shares import mcnemar
from largescale.evaluate.subject import Subject
from largescale.evaluate.training_state import Unfinished
from largescale.evaluate.weights import exemplars_of, method_of
from shards.ground.errors import InputError

Measure = Callable[..., dict[str, Any]]

_ROWS = 65_536

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What a way has found.

    Attributes:
        results: by network.
        num_train, num_test: images that took part.
        doubts: sentences about them.
    """

    results: dict[str, dict[str, Any]]
    num_train: int
    num_test: int
    doubts: list[str]


Way = Callable[[Measure, Subject], Measured]


def by_features(measure: Measure, subject: Subject) -> Measured:
    """`measure(train, test, settings)` of the `FeatureSet`s of labelled images."""
    train, test = features_of_subject(subject)
    results = {network: measure(train[network], test[network], subject.config.evaluate) for network in train}
    return of_classes(results, subject, train["pretrained"], test["pretrained"])


def by_test_features(measure: Measure, subject: Subject) -> Measured:
    """`measure(test, settings)` of the `FeatureSet` of labelled test images."""
    test = test_features_of_subject(subject)
    results = {network: measure(found, subject.config.evaluate) for network, found in test.items()}
    return of_classes(results, subject, None, test["pretrained"])


def by_features_and_heads(measure: Measure, subject: Subject) -> Measured:
    """`measure(train, test, settings, assigned)`: as `by_features`, and what the method assigns the test images to.

    `assigned` is the name of the method's exemplars and numbers int64 [N]; None for pixels, and where it has none.
    """
    networks, results = Networks(subject.config, subject.weights), {}
    train, test = features_of_subject(subject, networks=networks)
    for network in train:
        assigned = _assigned(subject, networks, network, test[network])
        results[network] = measure(train[network], test[network], subject.config.evaluate, assigned)
    return of_classes(results, subject, train["pretrained"], test["pretrained"])


@torch.no_grad()
def _assigned(subject: Subject, networks: Networks, network: str, test: FeatureSet) -> tuple[str, torch.Tensor] | None:
    shown = exemplars_of(subject.config, subject.weights)
    if shown is None or network == "pixels":
        return None
    method = networks.method_named(network)
    if not method.has_exemplars():
        return None
    parts = [method.exemplar_scores(some.to(networks.device))[0].argmax(1).cpu() for some in test.features.split(_ROWS)]
    return shown.name, torch.cat(parts)


def by_features_and_labels(measure: Measure, subject: Subject) -> Measured:
    """`measure(train, test, settings, embedded, own, splits)`: as `by_features`, also the images as the method's head
    embeds them (None without one, and for pixels), rows of the training images whose labels the run was trained with,
    and splits that all networks share.
    """
    networks, settings = Networks(subject.config, subject.weights), subject.config.evaluate
    train, test = features_of_subject(subject, networks=networks)
    assert isinstance(settings, support_neighbours.Settings)
    splits = support_neighbours.splits_of(train["pretrained"], settings)
    own, results = _rows_of_own_labels(subject, train["pretrained"]), {}
    for network in train:
        pair = train[network], test[network]
        results[network] = measure(*pair, settings, _embedded(networks, network, pair), own, splits)
    return of_classes(results, subject, train["pretrained"], test["pretrained"])


def _embedded(
    networks: Networks, network: str, pair: tuple[FeatureSet, FeatureSet]
) -> tuple[FeatureSet, FeatureSet] | None:
    if network == "pixels":
        return None
    method, device = networks.method_named(network), networks.device
    if not method.head_name:
        return None
    head = method.get_submodule(method.head_name)
    return support_neighbours.through(head, pair[0], device), support_neighbours.through(head, pair[1], device)


def _rows_of_own_labels(subject: Subject, train: FeatureSet) -> torch.Tensor | None:
    """Rows of the training images that the run's supports are among; None where it has none, or they are not those that
    its checkpoint names.
    """
    corpus = subject.shards[0]
    if (wanted := subject.config.method.supports()) is None:
        return None
    trained_with = ""
    if isinstance(subject.weights, Checkpoint):
        trained_with = parts_of(str(subject.weights.progress.get("data", "")))[1]
    try:
        if corpus.cache is not None:
            raise InputError("labelled images of a run are in no store")
        found = labelled_images(corpus, wanted)
        why = "" if fingerprint_of(corpus, found) == trained_with else "the checkpoint was trained with others"
    except InputError as error:
        why = str(error)
    if why:
        _log.warning(
            "the labels of %s are not those of the run (%s): measured by splits alone; set evaluate.train_shards to "
            "the folder of its supports for the run's own",
            corpus.where,
            why,
        )
        return None
    return torch.isin(train.ids, torch.from_numpy(found.ids)).nonzero().flatten()


def by_lists(measure: Measure, subject: Subject) -> Measured:
    """`measure(train, test, settings)` of `FeatureSet`s of all images with their `LabelLists`."""
    lists, settings = [LabelLists(corpus) for corpus in subject.shards], subject.config.evaluate
    assert isinstance(settings, svm.Settings)
    for one in lists:  # before hours of features
        one.require(settings.svm_labels, "evaluate.svm_labels")
    train, test = features_of_subject(subject, every=True)
    results = {
        network: measure((train[network], lists[0]), (test[network], lists[1]), subject.config.evaluate)
        for network in train
    }
    shown = results["pretrained"]
    return Measured(results, shown["num_train"], shown["num_test"], _doubts_of(results))


def by_training(measure: Measure, subject: Subject) -> Measured:
    """`measure(trial, settings)` of a network that may be trained; the baseline is the same training from scratch."""
    return of_classes(_trained(measure, subject), subject, *map(labelled, subject.shards))


def by_dense_training(measure: Measure, subject: Subject) -> Measured:
    """As `by_training`, on images whose labels are members beside them; the results say how many."""
    results = _trained(measure, subject)
    shown = results["pretrained"]
    return Measured(results, shown["num_train"], shown["num_test"], _doubts_of(results))


def _trained(measure: Measure, subject: Subject) -> dict[str, dict[str, Any]]:
    """Results by network. A training that was killed goes on where it was, and what is done is not trained again."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    config, shards = subject.config, subject.shards
    networks = {"pretrained": True, **({"untrained": False} if config.evaluate.baselines else {})}
    places = {name: Unfinished(subject.run_dir / "eval" / "unfinished", f"{subject.task}-{name}") for name in networks}
    results: dict[str, dict[str, Any]] = {}
    for name, trained in networks.items():
        if (known := places[name].result()) is not None:
            results[name] = known
            continue
        method = method_of(config, subject.weights, trained=trained).to(device)
        place, scratch = config.evaluate.train_shards or config.data.shards, subject.run_dir / "eval" / "splits"
        trial = Trial(config, method, *shards, place, scratch, device, places[name])
        try:
            results[name] = measure(trial, config.evaluate)
        except InputError as error:
            if name == "pretrained":
                raise
            _log.warning("left out, the %s network: %s", name, error)  # it may not cost the result that is there
            continue
        if trial.doubts:
            results[name]["doubts"] = [*results[name].get("doubts", []), *trial.doubts]
        places[name].finish(results[name])
    for one in places.values():
        one.remove()
    return results


def of_classes(
    results: dict[str, dict[str, Any]], subject: Subject, train: FeatureSet | None, test: FeatureSet
) -> Measured:
    """Results of networks that tell classes apart, compared, with what is to be said of the images.

    Args:
        results: by network; `num_train` in that of the pretrained one says how many images it has learnt from, if not
            all; `hits` in them make a paired test, and are of the test images that were measured.
        subject: what is measured.
        train: labelled images; features are not looked at. None where nothing is learnt.
        test: likewise.
    """
    shown = results["pretrained"]
    num_train, num_test = shown.get("num_train", len(train or ())), len(shown.get("hits", test))
    sides = (
        [(subject.shards[1], num_test)]
        if train is None
        else [(subject.shards[0], len(train)), (subject.shards[1], num_test)]
    )
    lines = []
    for corpus, found in sides:
        total = corpus.manifest.num_samples
        if found < total:
            out = f"{total - found:,} of {total:,} samples of {corpus.manifest.name}"
            lines.append(f"{out} are left out: unlabelled or unreadable")
    _compare(results)
    said = dict.fromkeys([*lines, *class_doubts(train, test), *_doubts_of(results)])
    return Measured(results, num_train, num_test, list(said))


def _compare(results: dict[str, dict[str, Any]]) -> None:
    """Put a paired test with the pretrained network beside each baseline, in place of which images it gets right."""
    hits = {name: result.pop("hits", None) for name, result in results.items()}
    own = hits.get("pretrained")
    for name, theirs in hits.items():
        if name != "pretrained" and own is not None and theirs is not None and len(own) == len(theirs):
            found = mcnemar(own, theirs)
            results[name]["against_pretrained"] = {
                "only_pretrained": found["only_first"],
                "only_this": found["only_second"],
                "p": found["p"],
            }


def _doubts_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """What measures say under `doubts`, taken out of the results; what holds for a baseline alone names it."""
    said: list[str] = []
    for network, result in results.items():
        prefix = "" if network == "pretrained" else f"{network}: "
        said += [f"{prefix}{sentence}" for sentence in result.pop("doubts", []) if sentence not in said]
    return said
