"""From the images and the machine to all values of a recipe, each with its reason."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from largescale.config import Config, CropGroup, load_config
from largescale.data.length import Length
from largescale.methods import METHODS
from largescale.methods.choice import Choice
from largescale.propose.carried import Carried, carried
from largescale.propose.corpus import CorpusFacts
from largescale.propose.machine import Machine
from largescale.propose.references import changed_values, reference
from largescale.propose.views import views
from largescale.propose.written import written
from shards.ground.errors import InputError

PER_GPU, LARGEST_BATCH = 256, 4096
"""Images per GPU and step, and of all GPUs; the second is the largest batch of the published recipes."""

LEAST_BATCH = 8
"""`data.streams`, which the batch is laid out over."""

LEAST_STEPS_AN_EPOCH = 8
"""Batches that the images must fill: with fewer, each batch is much of the corpus."""

_WARMUP, _LONGEST_WARMUP = 0.05, 10.0
"""Share of a run, and epochs."""

_SAVES, _MOST_BETWEEN = 10, 1000


@dataclass(frozen=True)
class Proposal:
    """A recipe for these images on this machine.

    Attributes:
        name: of the run.
        shards: what it trains on.
        labelled: held-out images with labels, to evaluate on; empty if there are none.
        method: `method.name`.
        corpus, machine: what was seen.
        network: values and reasons of keys under `model`.
        batch: images per step.
        fitting: values and reasons of keys that make it fit into memory.
    """

    name: str
    shards: str
    labelled: str
    method: str
    corpus: CorpusFacts
    machine: Machine
    network: Mapping[str, Choice]
    batch: int
    fitting: Mapping[str, Choice]

    @cached_property
    def source(self) -> tuple[str, Config]:
        """Name and values of the packaged recipe that this one follows."""
        return reference(self.method, small=not self.machine.gpus)

    @cached_property
    def carried(self) -> Carried:
        """What it takes over of that recipe's network and BatchNorm."""
        return carried(self.source[1], self.network["backbone"].value, self.machine.gpus)

    def choices(self, epochs: Choice) -> dict[str, Choice]:
        """All values and reasons by dotted keys, for a run of so many epochs."""
        following = self.source[1]
        length = self.length(epochs.value)
        found = {
            "name": Choice(self.name, f"the run is in runs/{self.name}"),
            "data.shards": Choice(self.shards, f"{self.corpus.num_samples:,} images"),
            **self._evaluated(),
            "data.workers": Choice(-1, "loader processes per rank: chosen by the CPU cores"),
            **views(following, self.corpus, small=not self.machine.gpus),
            **{key: Choice(value, f"as {self.source[0]}") for key, value in self.carried.kept.items()},
            **{f"model.{key}": choice for key, choice in self.network.items()},
            **self._method(),
            **self._optimizer(epochs.value),
            "train.epochs": epochs,
            "train.global_batch": Choice(self.batch, self._why_batch()),
            "train.precision": Choice("auto", self._why_precision()),
            "parallel.strategy": Choice("ddp", self._why_strategy()),
            **self.fitting,
            "run.log_every": Choice(max(1, min(50, length.num_steps // 100)), f"of {length.num_steps:,} steps"),
            "checkpoint.every_steps": Choice(
                max(1, min(_MOST_BETWEEN, length.num_steps // _SAVES)), "at most so much is done again after a kill"
            ),
        }
        suited = METHODS[self.method].suited(self._so_far(found), length)
        return found | {f"method.{key}": choice for key, choice in suited.items()}

    def _so_far(self, found: Mapping[str, Choice]) -> Config:
        """The recipe that this one follows, with these views and batches. Not checked: the method may have to change
        its own settings first.
        """
        following = self.source[1]
        crops = [CropGroup(**choice.value) for choice in found["data.crops"].value]
        accumulate = found.get("train.accumulate", Choice(1, "")).value
        train = replace(following.train, global_batch=self.batch, accumulate=accumulate)
        return replace(following, data=replace(following.data, crops=crops), train=train)

    def length(self, epochs: float) -> Length:
        """The length of a run of so many epochs."""
        per_epoch, left_out = divmod(self.corpus.num_samples, self.batch)
        num_steps = max(1, round(epochs * per_epoch))
        return Length(num_steps, per_epoch, self.corpus.num_samples, left_out, self.corpus.num_classes)

    def _evaluated(self) -> dict[str, Choice]:
        if not self.labelled:
            return {}
        return {"data.eval_shards": Choice(self.labelled, "held out by `shards convert --holdout`, to evaluate on")}

    def _method(self) -> dict[str, Choice]:
        name, following = self.source
        values = changed_values(following.method)
        values.pop("name", None)
        return {
            "method.name": Choice(self.method, "see docs/methods.md for others"),
            **{f"method.{key}": Choice(value, f"as {name}") for key, value in values.items()},
            **{f"method.{key}": self._scaled(getattr(following.method, key)) for key in METHODS[self.method].rates},
        }

    def _scaled(self, rate: float) -> Choice:
        """A rate of the recipe that this one follows, for another batch."""
        name, following = self.source
        batch = following.train.global_batch
        return Choice(
            _three_digits(self.batch / batch * rate),
            f"{rate:g} for batches of {batch} in {name}, in proportion to the batch",
        )

    def _optimizer(self, epochs: float) -> dict[str, Choice]:
        name, following = self.source
        values = changed_values(following.optim) | {"name": following.optim.name}
        warmup = min(_LONGEST_WARMUP, _three_digits(_WARMUP * epochs))
        for key in ("lr", "final_lr", "warmup_lr", "warmup_epochs", "name"):
            values.pop(key, None)
        return {
            "optim.name": Choice(following.optim.name, f"as {name}"),
            "optim.lr": self._scaled(following.optim.lr),
            "optim.final_lr": Choice(self._scaled(following.optim.final_lr).value, "where the cosine ends"),
            "optim.warmup_epochs": Choice(warmup, f"5% of the run, {_LONGEST_WARMUP:g} epochs at most"),
            **{f"optim.{key}": Choice(value, f"as {name}") for key, value in values.items()},
        }

    def _why_batch(self) -> str:
        gpus = self.machine.gpus
        if self.corpus.num_samples // self.batch < 2 * LEAST_STEPS_AN_EPOCH:
            return f"an epoch of {self.corpus.num_samples:,} images is {self.corpus.num_samples // self.batch} steps"
        return f"{self.batch // gpus} per GPU" if gpus else "what a CPU does in about a second or a few"

    def _why_precision(self) -> str:
        if self.machine.gpus:
            return "bf16 on GPUs, fp16 on those before Ampere"
        return "fp32 on CPUs; bf16 is faster on those with AMX"

    def _why_strategy(self) -> str:
        if self.machine.gpus > 1:
            how = "launch/slurm/submit" if self.machine.nodes > 1 else "torchrun or launch/local.sh"
            return f"a copy of the network per GPU, {self.machine.gpus} of them; start with {how}"
        return "the network fits on one device"


def first_proposal(
    name: str, shards: str, labelled: str, method: str, corpus: CorpusFacts, machine: Machine
) -> Proposal:
    """The recipe for these images on this machine, with a small network where there is no GPU.

    Raises:
        InputError: an unknown method, or too few images.
    """
    source, following = reference(method, small=not machine.gpus)
    most = corpus.num_samples // LEAST_STEPS_AN_EPOCH
    if most < LEAST_BATCH * max(1, machine.gpus):
        least = LEAST_BATCH * LEAST_STEPS_AN_EPOCH * max(1, machine.gpus)
        raise InputError(f"{shards}: {corpus.num_samples} images are too few to train on; expected at least {least}")
    wanted = min(PER_GPU, LARGEST_BATCH // machine.gpus) if machine.gpus else following.train.global_batch
    per_device = LEAST_BATCH
    while 2 * per_device <= wanted and 2 * per_device * max(1, machine.gpus) <= most:
        per_device *= 2
    batch = per_device * max(1, machine.gpus)
    own = network_on_gpus(source, following, corpus) if machine.gpus else network_on_cpus(following)
    return Proposal(name, shards, labelled, method, corpus, machine, own, batch, {})


def network_on_gpus(source: str, following: Config, corpus: CorpusFacts) -> dict[str, Choice]:
    """Keys under `model`: the backbone of a recipe that is followed."""
    tiny = corpus.shorter[1] < 96
    stem = {"stem": Choice("3x3s2", f"keeps detail of images of {corpus.shorter[1]} px")} if tiny else {}
    usual = following.model.backbone == "resnet50"
    why = "what most published figures are of" if usual else f"as {source}"
    return {"backbone": Choice(following.model.backbone, why), **stem}


def network_on_cpus(following: Config, *, larger: bool = False) -> dict[str, Choice]:
    """Keys under `model`: a narrow network, or a `larger` one, of as many stages as the recipe's that is followed."""
    stages = len(following.model.depths)
    depths, width = ([2] * stages, 64) if larger else ([1] * stages, 32)
    why = "a ResNet-18: the hours allow it" if larger else "1.3 M parameters: a ResNet-18 takes eight times as long"
    if stages < 4:
        why = "fewer stages than usual, whose maps are as fine as the method needs"
    return {
        "backbone": Choice("resnet", "of the depths and width below"),
        "stem": Choice("3x3s2", "keeps detail of small views"),
        "depths": Choice(depths, why),
        "width": Choice(width, "channels of the first stage"),
    }


def with_larger_network(proposal: Proposal) -> Proposal:
    """The same with a ResNet-18, for a CPU."""
    return replace(proposal, network=network_on_cpus(proposal.source[1], larger=True))


def as_config(choices: Mapping[str, Choice]) -> Config:
    """The configuration that the choices make, read as that of a user.

    Raises:
        InputError: they do not go together.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(written([], choices), encoding="utf-8")
        return load_config(path)


def _three_digits(number: Any) -> float:
    return float(f"{number:.3g}")
