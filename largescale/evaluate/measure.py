"""`largescale evaluate`: runs or checkpoints, and their baselines, measured by one protocol."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from largescale.config import Config
from largescale.data.corpora import Corpus
from largescale.distributed.launch import own_launch
from largescale.evaluate.doubts import doubts
from largescale.evaluate.extract import labelled_corpus
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.features import features_of_run
from largescale.evaluate.image_training import Trial, labelled
from largescale.evaluate.made_from import Stamp, result_stamp, shards_stamp, words_for
from largescale.evaluate.protocols import COMMON, Protocol, check_settings, protocol_named
from largescale.evaluate.published import AnyTarget, PublishedTarget, any_target_at
from largescale.evaluate.results import Record, write_result
from largescale.evaluate.shares import interval
from largescale.evaluate.targets import USED
from largescale.evaluate.weights import Weights, method_of
from largescale.processes import process_group, rank
from shards.format.manifest import Manifest
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)


def evaluate(protocol: str, *places: str | Path, overrides: Sequence[str] = ()) -> list[Record]:
    """Measure runs, or checkpoints of runs, and their baselines, by one protocol.

    Each result is written to RUN/eval/results, and to RUN/eval/<protocol>.json if it is of the run's last checkpoint.
    Under torchrun or srun the ranks share the work; only rank 0 writes.

    Args:
        protocol: a name in `PROTOCOLS`.
        places: folders of runs, whose newest whole checkpoint is taken, RUN/checkpoints/step-..., or files of weights
            that others published (see `evaluate/published.py`).
        overrides: `key=value` replacements of the runs' configurations.

    Returns:
        A result per place, as its file has it.

    Raises:
        InputError: no such protocol or setting, no checkpoint, no labelled shards, or features that are not finite.

    Collectives: every rank must call it.
    """
    chosen, replaced = protocol_named(protocol), list(overrides)
    if not places:
        raise InputError(f"largescale evaluate {protocol}: no run; pass the folder that pretrain wrote")
    check_settings(protocol, replaced)
    targets = [any_target_at(place, replaced) for place in places]  # all of them before the first takes its time
    of_files = ("run.dir=",) if any(isinstance(target, PublishedTarget) for target in targets) else ()
    for override in replaced:
        if not override.startswith((*USED, *of_files)):
            _log.warning("%s has no effect on an evaluation: runs are measured as they were trained", override)
    alone = own_launch() is None
    with nullcontext() if alone else process_group():
        return [_evaluated(protocol, chosen, target, replaced) for target in targets]


def _evaluated(name: str, protocol: Protocol, target: AnyTarget, overrides: list[str]) -> Record:
    def measured(weights: Weights, config: Config, warnings: list[str]) -> Record:
        return _measure(name, protocol, Subject.of(target.run_dir, weights, config), warnings)

    record = target.read(overrides, measured)
    if rank() > 0:
        return record
    path = write_result(target.run_dir, record, newest=target.is_newest(record["checkpoint_step"]))
    for sentence in record["warnings"]:
        _log.warning("%s", sentence)
    _log.info(
        "%s, %d test images of %s, %d training images of %s; chosen on: %s; %s",
        words_for(record["made_from"]["weights"]),
        record["num_test"],
        record["test_shards"],
        record["num_train"],
        record["train_shards"],
        record["chosen_on"],
        path,
    )
    return record


@dataclass(frozen=True)
class Subject:
    """What is measured, and on what.

    Attributes:
        run_dir: where features and results go.
        weights: those that are measured.
        config: that describes them.
        shards: labelled training and test shards.
        stamps: of these.
    """

    run_dir: Path
    weights: Weights
    config: Config
    shards: tuple[Corpus, Corpus]
    stamps: tuple[Stamp, Stamp]

    @staticmethod
    def of(run_dir: Path, weights: Weights, config: Config) -> Subject:
        """With the shards that the configuration names.

        Raises:
            InputError: they are not there, have no labels or other classes.
        """
        shards, locations = _labelled_shards(config)
        stamps = shards_stamp(shards[0], locations[0]), shards_stamp(shards[1], locations[1])
        return Subject(run_dir, weights, config, shards, stamps)


def _measure(name: str, protocol: Protocol, subject: Subject, warnings: list[str]) -> Record:
    config, shards, stamps = subject.config, subject.shards, subject.stamps
    results, pair = (_by_training if protocol.trains else _by_features)(protocol, subject)
    for result in results.values():
        if protocol.metric == "top1":
            result["interval"] = interval(result["top1"], len(pair[1]))
    own = {*COMMON, *protocol.own_keys()}
    return {
        "protocol": name,
        "metric": protocol.metric,
        "metric_title": protocol.title,
        "metric_is_share": protocol.is_share,
        "chosen_on": protocol.chosen_on,
        "settings": {key: value for key, value in vars(config.evaluate).items() if key in own},
        "num_train": len(pair[0]),
        "num_test": len(pair[1]),
        "checkpoint_step": subject.weights.step,
        "train_shards": stamps[0]["location"],
        "test_shards": stamps[1]["location"],
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": results,
        "warnings": [*warnings, *_left_out(shards, pair), *doubts(name, config, shards, pair)],
        "made_from": result_stamp(config, subject.weights, *stamps),
    }


Measured = tuple[dict[str, dict[str, Any]], tuple[FeatureSet, FeatureSet]]
"""Results by network, and the labelled training and test images."""


def _by_features(protocol: Protocol, subject: Subject) -> Measured:
    config = subject.config
    train, test = features_of_run(config, subject.run_dir, subject.weights, subject.shards, subject.stamps)
    results = {network: protocol.measure(train[network], test[network], config.evaluate) for network in train}
    return results, (train["pretrained"], test["pretrained"])


def _by_training(protocol: Protocol, subject: Subject) -> Measured:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    config, shards = subject.config, subject.shards
    # The baseline is the same training from scratch.
    networks = {"pretrained": True, **({"untrained": False} if config.evaluate.baselines else {})}
    results = {}
    for name, trained in networks.items():
        method = method_of(config, subject.weights, trained=trained).to(device)
        place = config.evaluate.train_shards or config.data.shards
        trial = Trial(config, method, *shards, place, subject.run_dir / "eval" / "splits", device)
        try:
            results[name] = protocol.measure(trial, config.evaluate)
        except InputError as error:
            if name == "pretrained":
                raise
            _log.warning("left out, the %s network: %s", name, error)  # it may not cost the result that is there
    return results, (labelled(shards[0]), labelled(shards[1]))


def _labelled_shards(config: Config) -> tuple[tuple[Corpus, Corpus], tuple[str, str]]:
    """Training and test shards, and where they are."""
    # Both folders first: a missing one must not cost the time of the other.
    locations = config.evaluate.train_shards or config.data.shards, config.data.eval_shards
    shards = (
        labelled_corpus(locations[0], "evaluate.train_shards", config),
        labelled_corpus(locations[1], "data.eval_shards", config),
    )
    _check_same_classes(shards[0].manifest, shards[1].manifest)
    return shards, locations


def _check_same_classes(train: Manifest, test: Manifest) -> None:
    # Labels are positions in the list of classes.
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(
            f"data.eval_shards={test.root}: its {len(test.classes)} classes are not the {len(train.classes)} of "
            f"{train.root} ({f'{only[0]} is only in one of them' if only else 'their order differs'}); convert both "
            f"with the same class folders"
        )


def _left_out(shards: tuple[Corpus, Corpus], features: tuple[FeatureSet, FeatureSet]) -> list[str]:
    lines = []
    for corpus, found in zip(shards, features, strict=True):
        total = corpus.manifest.num_samples
        if len(found) < total:
            lines.append(
                f"{total - len(found):,} of {total:,} samples of {corpus.manifest.name} are left out: "
                f"unlabelled or unreadable"
            )
    return lines
