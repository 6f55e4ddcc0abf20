"""Makes a proposed recipe fit into the memory of GPUs, by the planner."""

from __future__ import annotations

from dataclasses import replace

import torch
import yaml

from largescale.config import Config
from largescale.methods import METHODS
from largescale.methods.choice import Choice
from largescale.parallel import auto_precision
from largescale.plan.changes import fitting_changes
from largescale.plan.hardware import Assumptions
from largescale.plan.planner import in_half_precision
from largescale.plan.simulate import Simulation, simulate
from largescale.propose.proposal import LEAST_BATCH, Proposal, as_config
from shards.ground.errors import InputError

_LEAST_PER_GPU = 32
"""Before batches become smaller than this on a GPU, something else is changed."""

_SPLIT = "the loss compares the images of a micro-batch only, or all for one more forward pass: train.loss_spans"


def fitted(proposal: Proposal, epochs: Choice) -> Proposal:
    """The recipe with the batch, and if need be other settings, that fit; as it is without GPUs.

    Raises:
        InputError: nothing that was tried makes it fit.
    """
    gpus, assume = proposal.machine.gpus, Assumptions()
    if not gpus:
        return proposal
    available = proposal.machine.gpu_gb * 1e9 * (1 - assume.slack) - assume.reserve_gb * 1e9

    def config_of(one: Proposal) -> Config:
        config = as_config(one.choices(epochs))
        if one.machine.here:
            return auto_precision.of_device(config, torch.device("cuda"))
        return in_half_precision(config, one.machine.gpu)

    def step_of(one: Proposal) -> Simulation:
        return simulate(config_of(one), gpus, one.corpus.num_samples)

    step = step_of(proposal)
    while step.most_held > available and proposal.batch // 2 >= gpus * max(LEAST_BATCH, _LEAST_PER_GPU):
        proposal = replace(proposal, batch=proposal.batch // 2)
        step = step_of(proposal)
    needed = f"by the planner a step needs {step.most_held / 1e9:.1f} of {proposal.machine.gpu_gb:.0f} GB"
    if step.most_held <= available:
        return replace(proposal, fitting={"parallel.strategy": Choice("ddp", needed)})
    changes = fitting_changes(
        config_of(proposal),
        gpus,
        step,
        available=available,
        needed=lambda _, changed: changed.most_held,
        images=proposal.corpus.num_samples,
    )
    for best in changes:
        if best.fits:
            return changed_by(proposal, best.overrides, f"{needed}, with this {best.needed / 1e9:.1f}")
    raise InputError(
        f"{needed} with the smallest batches, and no change that was tried makes it fit; give GPUs with more memory"
    )


def changed_by(proposal: Proposal, overrides: list[str], reason: str) -> Proposal:
    """The recipe with these settings; rate and steps follow another batch."""
    values = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in overrides)}
    batch = values.pop("train.global_batch", proposal.batch)
    fitting = {key: Choice(value, reason) for key, value in values.items()}
    if "train.accumulate" in fitting and "global_batch" in METHODS[proposal.method].Settings.loss_spans:
        fitting["train.accumulate"] = Choice(values["train.accumulate"], f"{reason}; {_SPLIT}")
    return replace(proposal, batch=batch, fitting=fitting)
