"""How well a network solves the task that it was trained by, on samples that it has not seen.

Nothing is trained: samples of data.eval_shards are cropped, augmented and asked as in training, but in evaluation mode
and of epochs that no training reaches. Every sample is asked `own_task_draws` times, each time about other views; some
once more, so that all batches are of one size. None comes twice in a batch. Where a task's choices are those of a
batch, chance is that of these batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from largescale.config import Config, EvaluateConfig
from largescale.config.setting import setting
from largescale.data.batches import BatchMaker
from largescale.data.corpora import Corpus
from largescale.data.frames import require_clips
from largescale.data.loaded import Batch, DeviceBatches
from largescale.data.loader import Position
from largescale.data.loader_counts import counts_for
from largescale.data.random import hash_coordinates, permute
from largescale.data.reader import ShardReader
from largescale.data.sounds import require_sound
from largescale.distributed.collectives import sum_over_ranks
from largescale.distributed.launch import own_launch
from largescale.evaluate.stand_ins import StandIns
from largescale.evaluate.subject import Subject
from largescale.evaluate.ways import Measure, Measured
from largescale.evaluate.weights import method_of, what_is_measured
from largescale.methods import Method
from largescale.processes import process_group, rank, world_size
from shards.ground.errors import InputError

BATCH = ("train.global_batch", "train.accumulate", "evaluate.batch")
"""Settings of the batch that samples are asked in: answers may be chosen among all that is in it."""

CHOSEN_ON = "nothing; nothing is trained"
ACCURACY = "task_accuracy"
"""What `Method.measures` calls the share of right answers."""

_NO_ANSWERS = "has no task whose answers are right or wrong"
_EPOCH = 1 << 40


@dataclass
class Settings(EvaluateConfig):
    """The keys of own-task under `evaluate`."""

    own_task_draws: int = setting(
        4, "How often each test sample is asked, each time about other views.", at_least=1, at_most=10_000, free=True
    )


@dataclass(frozen=True)
class _Rounds:
    """All samples in an order of the seed, again and again the same, each round in an epoch of its own.

    In the order in which they are stored, a task that takes other samples of the batch would meet clips of one video.
    """

    num_samples: int
    batch: int
    seed: int

    def samples(self, steps: int | np.ndarray, places: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and epochs."""
        rounds, positions = np.divmod(np.asarray(steps) * self.batch + places, self.num_samples)
        return permute(positions, self.num_samples, hash_coordinates(self.seed, _EPOCH)), _EPOCH + rounds


@torch.no_grad()
def measure(method: Method, batches: Iterable[Batch]) -> dict[str, Any]:
    """Means over batches of what the method logs of a step. Collectives: one all-reduce, and those of the method."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        output = method(batch.inputs(), batch.step)
        of_batch = {"loss": output.loss, **output.signs, "batches": torch.ones((), device=output.loss.device)}
        sums = {name: value.double() + sums.get(name, 0.0) for name, value in of_batch.items()}
    sums = sum_over_ranks(sums)
    count = sums.pop("batches")
    means = {name: value / count for name, value in sums.items()}
    return {"loss": float(means["loss"]), **method.measures(float(means.pop("loss")), means, 0)}


def _draws(run: Config) -> int:
    config = cast(Settings, run.evaluate)
    return config.own_task_draws


def by_own_task(measure: Measure, subject: Subject) -> Measured:
    """`measure(method, batches)` of the network and, as a baseline, of its first weights, on the same batches.

    Raises:
        InputError: the method has no task with right answers, sees clips where there are images, or hears nothing.

    Collectives: every rank must call it; those of `measure` and `from_all_ranks`.
    """
    with nullcontext() if own_launch() is not None or world_size() > 1 else process_group():
        return _measured(measure, subject)


def _measured(measure: Measure, subject: Subject) -> Measured:
    [_, corpus] = subject.shards
    config = in_batches(subject.config, corpus)
    if (sound := config.method.sounds()) is not None:
        require_sound([corpus], sound)
    require_clips(config, [corpus])
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    results: dict[str, dict[str, Any]] = {}
    stand_ins = StandIns()
    asked: Method | None = None
    for name, trained in {"pretrained": True, **({"untrained": False} if config.evaluate.baselines else {})}.items():
        method = method_of(config, subject.weights, trained=trained).to(device)
        if len(method.objectives) > 1 or not method.has_answers:
            why = "has several losses and no single task" if len(method.objectives) > 1 else _NO_ANSWERS
            what = what_is_measured(config, subject.weights)
            raise InputError(f"own-task: {what} {why}; measure its features, as by linear or knn")
        for known in method.exemplar_state if asked is not None else ():  # the same task for both
            setattr(method, known, getattr(asked, known))
        asked = asked or method
        results[name] = measure(method, stand_ins.noting(_Batches(corpus, config, device)))
    return Measured(results, 0, corpus.manifest.num_samples, stand_ins.doubts("test samples cannot be asked"))


def in_batches(run: Config, corpus: Corpus) -> Config:
    """A run's configuration with the batch in which test samples are asked: as large as a micro-batch of training,
    `evaluate.batch` and the samples there are allow, and smaller where fewer are then asked once more.

    Raises:
        InputError: there are fewer samples than ranks.
    """
    num_samples, ranks = corpus.manifest.num_samples, world_size()
    most = min(run.evaluate.batch, run.train.global_batch // run.train.accumulate, num_samples) // ranks
    if most == 0:
        raise InputError(f"{corpus.where}: {num_samples} samples are too few for {ranks} ranks")
    of_rank = -(-num_samples * _draws(run) // ranks)
    batch = -(-of_rank // -(-of_rank // most)) * ranks
    return replace(run, train=replace(run.train, global_batch=batch, accumulate=1))


class _Batches:
    """Batches of test samples on the device.

    Args:
        corpus: of the samples.
        config: of `in_batches`.
        device: where views go.
    """

    def __init__(self, corpus: Corpus, config: Config, device: torch.device) -> None:
        num_samples, batch = corpus.manifest.num_samples, config.train.global_batch
        self._steps = range(-(-num_samples * _draws(config) // batch))
        data = replace(config.data, audit=False)
        maker = BatchMaker(
            ShardReader([corpus]),
            _Rounds(num_samples, batch, config.run.seed),
            replace(config, data=data),
            rank=rank(),
            world_size=world_size(),
        )
        counts = counts_for(data, on_gpu=device.type == "cuda")
        self._loaded = DeviceBatches(maker, device=device, dtype=torch.float32, counts=counts, position=Position())

    def __iter__(self) -> Iterator[Batch]:
        with closing(self._loaded(self._steps)) as batches:
            yield from batches
