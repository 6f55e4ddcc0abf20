"""`largescale evaluate`: a run's newest checkpoint, and its baselines, measured by one protocol."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from largescale.checkpoint.folder import Checkpoint, find_latest
from largescale.config import Config, flatten, load_config, with_present_names
from largescale.config.setting import a_name
from largescale.data.corpora import Corpus
from largescale.evaluate.doubts import doubts
from largescale.evaluate.extract import labelled_corpus
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.features import NETWORKS, features_of_run
from largescale.evaluate.made_from import result_stamp, shards_stamp
from largescale.evaluate.protocols import PROTOCOLS
from largescale.evaluate.results import write_result
from shards.format.manifest import Manifest
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)

_OF_THE_CHECKPOINT = ("model.", "method.", "data.mean", "data.std", "run.seed", "train.precision")
"""Keys (or groups) that describe the weights: the checkpoint knows them, whatever config.yaml has become."""

_FREE = ("model.recompute_stages", "model.compile_stages")

_USED = ("evaluate", "data", "model", *_OF_THE_CHECKPOINT)
"""Beginnings of the keys that an evaluation depends on."""

Read = TypeVar("Read")

_ATTEMPTS = 5
"""Checkpoints that may be removed by a run that goes on while they are being read."""


def evaluate(protocol: str, run_dir: Path, overrides: list[str]) -> str:
    """Measure a run's newest checkpoint, and its baselines, by one protocol; writes RUN/eval/<protocol>.json.

    Args:
        protocol: `knn` or `linear`.
        run_dir: folder of the run.
        overrides: `key=value` replacements of the run's configuration.

    Returns:
        A short table for people.

    Raises:
        InputError: no such protocol, no checkpoint, no labelled shards, or features that are not finite.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"largescale evaluate {protocol}: expected {a_name(protocol, PROTOCOLS)}")
    for override in overrides:
        if not override.startswith(_USED):
            _log.warning("%s has no effect on an evaluation: %s is measured as it was trained", override, run_dir)
    checkpoint, record = read_newest(
        run_dir, lambda checkpoint: (checkpoint, _measure(protocol, run_dir, checkpoint, overrides))
    )
    path = write_result(run_dir, record)
    for sentence in record["warnings"]:
        _log.warning("%s", sentence)
    _log.info(
        "checkpoint of step %d, %d test images of %s, %d training images of %s; %s",
        checkpoint.step,
        record["num_test"],
        record["test_shards"],
        record["num_train"],
        record["train_shards"],
        path,
    )
    return "\n".join(
        f"{protocol:>7}  {NETWORKS[name]:<24} top-1 {result['top1']:6.2%}" for name, result in record["results"].items()
    )


def read_newest(run_dir: Path, read: Callable[[Checkpoint], Read]) -> Read:
    """What `read` makes of a run's newest checkpoint, or of the next one if a run that goes on removes it meanwhile.

    Raises:
        InputError: there is none, or they are removed too fast.
    """
    for _ in range(_ATTEMPTS):
        checkpoint = newest_checkpoint(run_dir)
        try:
            return read(checkpoint)
        except Exception:
            if checkpoint.path.exists():
                raise
            _log.info("%s was removed while being read, since the run goes on; taking the newest", checkpoint.path)
    raise InputError(f"{run_dir}: its checkpoints are replaced faster than they can be read; raise checkpoint.keep")


def newest_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest whole checkpoint of a run.

    Raises:
        InputError: there is none.
    """
    checkpoint = find_latest(run_dir / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{run_dir}: no whole checkpoint; run `largescale pretrain` with this run.dir first")
    return checkpoint


def config_of(checkpoint: Checkpoint, run_dir: Path, overrides: list[str]) -> tuple[Config, list[str]]:
    """A run's configuration with what describes the weights as the checkpoint has it, and a line where that differs.

    Raises:
        InputError: config.yaml or an override cannot be used.
    """
    path = run_dir / "config.yaml"
    config = load_config(path)
    written, saved = flatten(config), with_present_names(checkpoint.progress["config"], config)
    about_weights = [key for key in written if key.startswith(_OF_THE_CHECKPOINT) and key not in _FREE]
    edited = {key: saved[key] for key in about_weights if key in saved and saved[key] != written[key]}
    lines = [
        f"{path} has {key}={written[key]}, but the checkpoint was trained with {value}, which is used; pass "
        f"{key}=... to override it"
        for key, value in edited.items()
    ]
    given = {override.split("=", 1)[0] for override in overrides}
    return (
        load_config(path, [*(f"{key}={json.dumps(value)}" for key, value in edited.items()), *overrides]),
        [line for key, line in zip(edited, lines, strict=True) if key not in given],
    )


def _measure(protocol: str, run_dir: Path, checkpoint: Checkpoint, overrides: list[str]) -> dict[str, Any]:
    config, warnings = config_of(checkpoint, run_dir, overrides)
    shards, locations = _labelled_shards(config)
    stamps = shards_stamp(shards[0], locations[0]), shards_stamp(shards[1], locations[1])
    train, test = features_of_run(config, run_dir, checkpoint, shards, stamps)
    results = {name: PROTOCOLS[protocol].measure(train[name], test[name], config.evaluate) for name in train}
    pair = train["pretrained"], test["pretrained"]
    return {
        "protocol": protocol,
        "settings": {key: value for key, value in vars(config.evaluate).items()},
        "num_train": len(pair[0]),
        "num_test": len(pair[1]),
        "checkpoint_step": checkpoint.step,
        "train_shards": stamps[0]["location"],
        "test_shards": stamps[1]["location"],
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": results,
        "warnings": [*warnings, *_left_out(shards, pair), *doubts(protocol, config, shards, pair)],
        "made_from": result_stamp(config, checkpoint, *stamps),
    }


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
