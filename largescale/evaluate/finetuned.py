"""`largescale finetune`: a network with a classifier, trained on labels and kept in a file.

The training is that of a protocol of `largescale evaluate`, without its baseline. What comes of it is measured as there
and written with its accuracy, so that it can be used: as a teacher, or by other programs (models/image_classifier.py).
A training that is killed goes on where it was, by the same command.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from largescale.config import Config
from largescale.config.setting import a_name
from largescale.distributed.launch import own_launch
from largescale.evaluate.classifier_files import about_network
from largescale.evaluate.doubts import doubts
from largescale.evaluate.image_training import Trial, labelled
from largescale.evaluate.made_from import identity
from largescale.evaluate.protocols import check_settings, protocol_named
from largescale.evaluate.published import PublishedTarget, any_target_at
from largescale.evaluate.subject import Subject
from largescale.evaluate.targets import warn_of_unused
from largescale.evaluate.weights import Weights
from largescale.models.image_classifier import ImageClassifier, write_classifier
from largescale.parallel.precision import without_tf32
from largescale.processes import on_rank_0, process_group, rank
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)

PROTOCOLS = ("low-shot-finetune", "finetune")
"""Those that train a whole network, the first one by default."""

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Finetuned:
    """What was written.

    Attributes:
        path: of the file.
        about: its metadata; numbers as text, lists as JSON.
    """

    path: Path
    about: dict[str, str]

    def __str__(self) -> str:
        share, count = float(self.about["top1"]), len(json.loads(self.about["classes"]))
        return (
            f"{self.path}: {self.about['architecture']} with a classifier of {count} classes, fine-tuned on "
            f"{self.about['num_train']} images; top-1 {share:.2%} of {self.about['num_test']} test images"
        )


@without_tf32()
def finetune(
    place: str | Path, out: str | Path, *, protocol: str = PROTOCOLS[0], overrides: Sequence[str] = ()
) -> Finetuned:
    """Fine-tune a run's network on labelled shards, and write it with its classifier, whole or not at all.

    Args:
        place: folder of a run, one of its checkpoints, or a file of weights.
        out: file to write, ending in .safetensors.
        protocol: one of `PROTOCOLS`.
        overrides: `key=value` replacements of the run's configuration, those of the protocol among them.

    Raises:
        InputError: another protocol, setting or output, no such run, no labelled shards, or a head of fewer layers than
            are to be kept.

    Collectives: every rank must call it.
    """
    out, replaced = Path(out).expanduser(), list(overrides)
    if protocol not in PROTOCOLS:
        raise InputError(f"--protocol {protocol}: expected {a_name(protocol, PROTOCOLS)}")
    if out.suffix != _SUFFIX or out.is_dir():
        raise InputError(f"{out}: expected an output file ending in {_SUFFIX}, such as teacher{_SUFFIX}")
    check_settings([protocol], replaced)
    target = any_target_at(place, replaced)
    warn_of_unused(replaced, ("run.dir=",) if isinstance(target, PublishedTarget) else ())

    def trained(weights: Weights, config: Config, warnings: list[str]) -> Finetuned:
        return _trained(protocol, target.run_dir, weights, config, out, warnings)

    with nullcontext() if own_launch() is None else process_group():
        return target.read(replaced, trained)


def _trained(
    protocol: str, run_dir: Path, weights: Weights, config: Config, out: Path, warnings: list[str]
) -> Finetuned:
    chosen = protocol_named(protocol)
    config = replace(config, evaluate=replace(config.evaluate, baselines=False))
    subject = Subject.of(run_dir, weights, config, protocol=protocol, own_keys=chosen.own_keys(), classes=True)
    if (num := len(subject.shards[0].manifest.classes)) < 2:
        raise InputError(f"{subject.shards[0].where}: has {num} class; a classifier tells at least 2 apart")
    subject = replace(subject, task=f"{subject.task}-{identity({'out': os.path.abspath(out)})}")
    written: list[Finetuned] = []

    def measured(trial: Trial, settings: Any) -> dict[str, Any]:
        kept: list[ImageClassifier] = []
        result = chosen.measure(replace(trial, keep=kept.append), settings)
        own = {key: getattr(settings, key) for key in chosen.own_keys()}
        about = about_network(config, weights, trial.method.num_features, trial.train.manifest.classes) | {
            "train_shards": trial.train.fingerprint(),
            "protocol": protocol,
            "settings": json.dumps(own),
            "top1": repr(result["top1"]),
            "num_train": str(result.get("num_train") or len(labelled(trial.train))),
            "num_test": str(len(result["hits"])),
        }
        on_rank_0(lambda: write_classifier(out, kept[0], about))
        written.append(Finetuned(out, about))
        return result

    found = chosen.way(measured, subject)
    if rank() == 0:
        for sentence in [*warnings, *found.doubts, *doubts(config, subject.shards, subject.weights)]:
            _log.warning("%s", sentence)
    if not written:  # killed between the end of the training and that of the command
        raise InputError(f"{out}: may be from an earlier command that was killed; run it again to be sure")
    return written[0]
