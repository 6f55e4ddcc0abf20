"""`largescale evaluate`: runs or checkpoints, and their baselines, measured by one protocol."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

from largescale.checkpoint.folder import newest_first
from largescale.config import Config
from largescale.distributed.launch import own_launch
from largescale.evaluate.doubts import doubts
from largescale.evaluate.made_from import difference, words_for
from largescale.evaluate.protocols import COMMON, Protocol, check_settings, protocol_named
from largescale.evaluate.published import AnyTarget, PublishedTarget, any_target_at, check_names
from largescale.evaluate.results import Record, age, read_results, write_result
from largescale.evaluate.shares import interval
from largescale.evaluate.subject import Subject
from largescale.evaluate.targets import config_of, warn_of_unused
from largescale.evaluate.weights import Weights
from largescale.parallel.precision import without_tf32
from largescale.processes import process_group, rank
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)


@without_tf32()
def evaluate(protocol: str, *places: str | Path, overrides: Sequence[str] = ()) -> list[Record]:
    """Measure runs, or checkpoints of runs, and their baselines, by one protocol.

    Each result is written to RUN/eval/results, and to RUN/eval/<protocol>.json unless that is of a later checkpoint.
    Under torchrun or srun the ranks share the work; only rank 0 writes.

    Args:
        protocol: a name in `PROTOCOLS`.
        places: folders of runs, whose newest whole checkpoint is taken, RUN/checkpoints/step-..., or files of weights
            that others published (see `evaluate/published.py`).
        overrides: `key=value` replacements of the runs' configurations.

    Returns:
        A result per place, as its file has it.

    Raises:
        InputError: no such protocol or setting, files of one name for one folder, no checkpoint, no labelled shards,
            or features that are not finite.

    Collectives: every rank must call it.
    """
    chosen, replaced = protocol_named(protocol), list(overrides)
    if not places:
        raise InputError(f"largescale evaluate {protocol}: no run; pass the folder that pretrain wrote")
    check_settings([protocol], replaced)
    check_names(places, replaced)
    targets = [any_target_at(place, replaced) for place in places]  # all of them before the first takes its time
    of_files = any(isinstance(target, PublishedTarget) for target in targets)
    warn_of_unused(replaced, (*chosen.depends_on, *(("run.dir=",) if of_files else ())))
    alone = own_launch() is None
    with nullcontext() if alone else process_group():
        return [_evaluated(protocol, chosen, target, replaced) for target in targets]


def is_measured(protocol: str, run_dir: Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a run's newest result of a protocol is of what `evaluate` would measure now; weights are not read.

    Args:
        protocol: a name in `PROTOCOLS`.
        run_dir: folder of the run.
        overrides: as of `evaluate`.

    Raises:
        InputError: as `evaluate`, for shards and settings.
    """
    record = read_results(run_dir).newest.get(protocol)
    if record is None or age(record, run_dir):
        return False
    chosen, checkpoint = protocol_named(protocol), newest_first(run_dir / "checkpoints")[0]
    config, _ = config_of(checkpoint, run_dir, list(overrides))
    subject, own = _subject(protocol, chosen, run_dir, checkpoint, config), chosen.own_keys()
    now = {"made_from": subject.made_from, "settings": {key: getattr(config.evaluate, key) for key in own}}
    settings = {key: value for key, value in record["settings"].items() if key in own}
    return not difference({"made_from": record["made_from"], "settings": settings}, json.loads(json.dumps(now)))


def _subject(name: str, protocol: Protocol, run_dir: Path, weights: Weights, config: Config) -> Subject:
    return Subject.of(
        run_dir,
        weights,
        config,
        protocol=name,
        own_keys=protocol.own_keys(),
        classes=protocol.of_classes,
        tests=not protocol.on_training_images,
        trains=protocol.trains,
        depends_on=protocol.depends_on,
    )


def _evaluated(name: str, protocol: Protocol, target: AnyTarget, overrides: list[str]) -> Record:
    def measured(weights: Weights, config: Config, warnings: list[str]) -> Record:
        return _measure(name, protocol, _subject(name, protocol, target.run_dir, weights, config), warnings)

    record = target.read(overrides, measured)
    if rank() > 0:
        return record
    path = write_result(target.run_dir, record)
    for sentence in record["warnings"]:
        _log.warning("%s", sentence)
    images = {
        "test": "" if protocol.on_training_images else f"{record['num_test']} test images of {record['test_shards']}, ",
        "training": f"{record['num_train']} training images of {record['train_shards']}; " if protocol.trains else "",
    }
    _log.info(
        "%s, %schosen on: %s; %s",
        words_for(record["made_from"]["weights"]),
        "".join(images.values()),
        record["chosen_on"],
        path,
    )
    return record


def _measure(name: str, protocol: Protocol, subject: Subject, warnings: list[str]) -> Record:
    config, stamps = subject.config, subject.stamps
    found = protocol.way(protocol.measure, subject)
    for result in found.results.values():
        if protocol.metric == "top1":
            result["interval"] = interval(result["top1"], found.num_test)
    own, compares = {*COMMON, *protocol.own_keys()}, protocol.trains and not protocol.on_training_images
    return {
        "protocol": name,
        "metric": protocol.metric,
        "metric_title": protocol.title,
        "metric_is_share": protocol.is_share,
        "chosen_on": protocol.chosen_on,
        "settings": {key: value for key, value in vars(config.evaluate).items() if key in own},
        "num_train": found.num_train,
        "num_test": found.num_test,
        "checkpoint_step": subject.weights.step,
        "train_shards": stamps[0]["location"],
        "test_shards": stamps[1]["location"],
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": found.results,
        "warnings": [*warnings, *found.doubts, *(doubts(config, subject.shards, subject.weights) if compares else [])],
        "made_from": subject.made_from,
    }
