"""`largescale init`: looks at shards and at the machine, and writes a commented recipe."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

from largescale.config import MethodConfig
from largescale.data.loader_counts import choose_counts
from largescale.methods import METHODS, Method
from largescale.methods.choice import Choice
from largescale.propose.corpus import CorpusFacts, look_at
from largescale.propose.hours import affordable, epochs_in
from largescale.propose.machine import machine
from largescale.propose.memory import fitted
from largescale.propose.proposal import Proposal, as_config, first_proposal, with_larger_network
from largescale.propose.rate import Rate, measured, planned
from largescale.propose.references import reference
from largescale.propose.written import written
from largescale.run.schedule_check import complaints
from shards.format.manifest import MANIFEST_NAME, read_manifest
from shards.ground.errors import InputError
from shards.stores.store import is_url

_TRIED = Choice(100.0, "")
"""Epochs of a recipe whose speed and memory are to be found."""

_LARGER_COSTS, _LARGER_EPOCHS = 8, 100
"""A larger network is taken if it can still be trained for so many epochs."""

_LONGEST_HOURS = 24 * 365.0
_MANY_COPIES = 0.02


def run(arguments: argparse.Namespace) -> str:
    """The recipe that the arguments ask for, as YAML; what is being done is said on standard error.

    Raises:
        InputError: shards, a method or hardware that cannot be used, or too little time.
    """
    hours, method = arguments.hours, arguments.method or MethodConfig.name
    if not 0 < hours <= _LONGEST_HOURS:
        raise InputError(f"--hours {hours:g}: expected above 0, and at most {_LONGEST_HOURS:g}")
    there = machine(arguments.gpu, arguments.gpus)
    _, following = reference(method, small=not there.gpus)  # before anything is read
    _say(f"looking at {arguments.shards}")
    shards = arguments.shards.rstrip("/") or arguments.shards
    corpus = look_at(shards, following)
    for line in (*_seen(corpus), str(there)):
        _say(line)
    proposal = fitted(first_proposal(_name(shards), shards, _held_out(shards), method, corpus, there), _TRIED)
    proposal, rate = _timed(proposal, hours)
    choices = proposal.choices(epochs_in(proposal, rate, hours))
    config = as_config(choices)
    for line in complaints(config, proposal.length(config.train.epochs)):
        _say(f"note: {line}")
    return written(header(proposal, hours, config.train.epochs), choices)


def _timed(proposal: Proposal, hours: float) -> tuple[Proposal, Rate]:
    """The recipe, with a larger network if there is time for it, and how fast it trains."""
    if not proposal.machine.here:
        rate = planned(as_config(proposal.choices(_TRIED)), proposal.machine, proposal.corpus.num_samples)
        return proposal, rate
    rate = _measured(proposal)
    if proposal.machine.gpus or affordable(proposal, rate, hours) < _LARGER_COSTS * _LARGER_EPOCHS:
        return proposal, rate
    larger = with_larger_network(proposal)
    rate_of_larger = _measured(larger)
    if affordable(larger, rate_of_larger, hours) < _LARGER_EPOCHS:
        return proposal, rate
    return larger, rate_of_larger


def _measured(proposal: Proposal) -> Rate:
    phases = METHODS[proposal.method].phase_due is not Method.phase_due
    _say(f"training a few steps to measure the speed{', and an offline phase of all images' * phases}")
    rate = measured(_alone(proposal), proposal.machine)
    _say(f"{rate.images_per_s:.0f} images/s, {rate.source}")
    return rate


def _alone(proposal: Proposal) -> str:
    """The recipe with the batch and loaders of one GPU, and without what a run only begins with."""
    choices, gpus = proposal.choices(_TRIED), max(1, proposal.machine.gpus)
    own = METHODS[proposal.method].without_start()
    workers, threads = choose_counts(-1, 0, local_ranks=gpus, on_gpu=proposal.machine.gpus > 0)
    values = {
        "data.workers": workers,
        "data.threads": threads,
        "data.prefetch": 1,  # what was made before the steps that are counted would hide slow loaders
        "train.global_batch": proposal.batch // gpus,
        **{f"method.{key}": value for key, value in own.items()},
    }
    if (supports := as_config(choices).method.supports()) is not None and gpus > 1:
        values["method.support.images"] = math.ceil(supports.images / gpus)  # of each class, so a few more at most
    return written([], choices | {key: Choice(value, "") for key, value in values.items()})


def _name(shards: str) -> str:
    """The name of the folder, fit to be that of another one."""
    last = shards.rsplit("/", 1)[-1] if is_url(shards) else Path(shards).resolve().name
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "pretraining"


def _held_out(shards: str) -> str:
    """The labelled images that `shards convert --holdout` put aside; empty if there are none."""
    place = Path(shards, "holdout")
    if is_url(shards) or not (place / MANIFEST_NAME).is_file() or not read_manifest(place).classes:
        return ""
    return str(place)


def header(proposal: Proposal, hours: float, epochs: float) -> list[str]:
    """The comment at the top of a recipe: commands, what was seen, what it follows and where it differs."""
    there, length = proposal.machine, proposal.length(epochs)
    start = f"torchrun --standalone --nproc-per-node={there.gpus} -m largescale" if there.gpus > 1 else "largescale"
    start = f"{start} pretrain THIS_FILE"
    if there.nodes > 1:
        start = f"launch/slurm/submit THIS_FILE --nodes {there.nodes} --gpus {there.gpus // there.nodes}"
    variables = "".join(f'{name}="{value}" ' for name, value in there.environment.items())
    return [
        f"Proposed by `largescale init` for {proposal.corpus.num_samples:,} images and {hours:g} hours on {there}.",
        "",
        f"  {variables}{start}",
        f"  largescale report runs/{proposal.name}",
        "",
        *(f"{line[0].upper()}{line[1:]}." for line in _seen(proposal.corpus)),
        f"{length.num_steps:,} steps of {proposal.batch} images. Follows the recipe {proposal.source[0]}; nothing was "
        "tuned on these images.",
        *(f"Unlike there, without {key}={value}." for key, value in proposal.carried.left_out.items()),
    ]


def _seen(corpus: CorpusFacts) -> list[str]:
    low, middle, high = corpus.shorter
    some = "" if corpus.num_indexed == corpus.num_samples else f" (of {corpus.num_indexed:,} looked at)"
    lines = [
        f"{corpus.num_samples:,} images; shorter side {low:,} to {high:,} px, mostly about {middle:,}{some}",
        f"{corpus.num_decoded:,} images decoded, {corpus.grey:.0%} of them grey",
    ]
    if corpus.num_broken:
        lines.append(f"{corpus.num_broken} more could not be decoded; training lists and replaces such images")
    if corpus.copies > _MANY_COPIES:
        lines.append(f"{corpus.copies:.0%} are exact copies; `shards convert --duplicates exact` leaves them out")
    if corpus.aspect[1] > 3:
        lines.append(
            f"a tenth are more than {corpus.aspect[1]:.1f} times as long as wide, and crops show little of these"
        )
    return lines


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
