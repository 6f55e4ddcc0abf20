"""What networks make of test clips with their sound: a row for each, of the frame in the middle and what is heard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from largescale.config import SoundConfig
from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from largescale.data.sounds import has_sound, require_sound
from largescale.evaluate.extract import Network, extract, on_every_rank
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.subject import Subject
from largescale.evaluate.weights import Published, method_of
from largescale.methods import Method
from largescale.methods.table import method_class
from largescale.processes import from_rank_0
from shards.ground.errors import InputError


@dataclass(frozen=True)
class Heard:
    """What networks make of clips.

    Attributes:
        sets: by network, on every rank; `pretrained` and, if baselines are wanted, `untrained`.
        doubts: sentences about clips that take no part.
    """

    sets: dict[str, FeatureSet]
    doubts: list[str]


def heard_by(
    subject: Subject,
    needed: str,
    lacking: str,
    network_of: Callable[[Method], Network],
    *,
    ids: np.ndarray | None = None,
) -> Heard:
    """Rows of the test clips that have sound.

    Args:
        subject: networks and shards.
        needed: name of what the method must have of its own.
        lacking: what to say of one that has not, after "it".
        network_of: what makes rows [B, K] of images and sounds.
        ids: of the clips that are wanted; None for all.

    Raises:
        InputError: the method does not hear, no clip that takes part has sound, or as `extract`.

    Collectives: every rank must call it; those of `extract` and `on_every_rank`.
    """
    config, corpus = subject.config, subject.shards[1]
    wanted = _sound_of(subject, needed, lacking)
    require_sound([corpus], wanted)
    asked = np.arange(corpus.manifest.num_samples) if ids is None else ids
    heard = partial(has_sound, ShardReader([corpus]))
    with_sound = np.array([number for number in asked.tolist() if heard(number)], np.int64)
    if not len(with_sound):
        task, which = subject.task.rpartition("-")[0], "clips" if ids is None else "clips that can be asked about"
        raise InputError(f"{task}: none of the {len(asked):,} {which} in {corpus.where} has sound")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    names = {"pretrained": True, **({"untrained": False} if config.evaluate.baselines else {})}
    networks = {
        name: network_of(method_of(config, subject.weights, trained=trained).to(device))
        for name, trained in names.items()
    }
    found = extract(corpus, config, networks, device, ids=with_sound, labelled=False, sound=wanted)
    return Heard(on_every_rank(found), _doubts(corpus, len(asked), len(with_sound), found, names))


def _sound_of(subject: Subject, needed: str, lacking: str) -> SoundConfig:
    """The windows that the method hears. InputError: it does not, or lacks what is needed."""
    wanted, kind = subject.config.method.sounds(), method_class(subject.config)
    own = getattr(kind, needed) is not getattr(Method, needed)
    if wanted is None or not own or isinstance(subject.weights, Published):
        what = "a file of weights" if isinstance(subject.weights, Published) else f"a {kind.title} run"
        raise InputError(f"{subject.task.rpartition('-')[0]}: {what} {lacking}; use a run of a method that does")
    return wanted


def _doubts(
    corpus: Corpus, num_asked: int, num_with_sound: int, found: dict[str, FeatureSet], names: dict[str, bool]
) -> list[str]:
    lines = []
    if num_with_sound < num_asked:
        lines.append(f"{num_asked - num_with_sound:,} of {num_asked:,} clips of {corpus.manifest.name} have no sound")
    num_found = from_rank_0(len(found["pretrained"]) if found else 0)
    if num_found < num_with_sound:
        lines.append(
            f"{num_with_sound - num_found:,} of {num_with_sound:,} clips of {corpus.manifest.name} with sound are left "
            "out: unreadable, or no window of sound around the frame in the middle"
        )
    return lines
