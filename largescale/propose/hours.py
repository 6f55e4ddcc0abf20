"""How many epochs so many hours allow: steps, and the offline phases that come before some of them."""

from __future__ import annotations

import math

from largescale.config import Config
from largescale.data.length import Length
from largescale.methods import build_method
from largescale.methods.choice import Choice
from largescale.propose.proposal import Proposal, as_config
from largescale.propose.rate import Rate
from shards.ground.errors import InputError

TRAINING = 0.9
"""Share of the hours that is spent on steps and phases; the rest goes to the start and to saving."""

MOST_EPOCHS = 800
"""As many as the longest published runs of most methods; what more would give is not known."""

LEAST_STEPS = 20

_HALVINGS = 12
"""Of what is left of the epochs that may be too many."""


def affordable(proposal: Proposal, rate: Rate, hours: float) -> float:
    """Epochs in so many hours; 0 if they are too few for phases alone."""
    budget, epoch = TRAINING * 3600 * hours, proposal.corpus.num_samples / rate.images_per_s
    most, least = budget / epoch, _least_epochs(proposal)
    if not rate.embedding_s and not rate.solving_s:
        return most
    if (in_phases := _phases_s(proposal, rate, least)) + least * epoch > budget:
        return max(0.0, budget - in_phases) / epoch
    low, high = least, max(least, min(most, MOST_EPOCHS))
    if (longest := high * epoch + _phases_s(proposal, rate, high)) <= budget:
        return high * budget / longest
    for _ in range(_HALVINGS):  # the number of phases rises with the epochs, but not evenly
        middle = (low + high) / 2
        if middle * epoch + _phases_s(proposal, rate, middle) <= budget:
            low = middle
        else:
            high = middle
    return low


def epochs_in(proposal: Proposal, rate: Rate, hours: float) -> Choice:
    """Epochs for so many hours.

    Raises:
        InputError: too few steps to learn anything; says how many hours are the least.
    """
    epochs, per_epoch = affordable(proposal, rate, hours), proposal.length(1).steps_per_epoch
    epoch = proposal.corpus.num_samples / rate.images_per_s
    steps = per_epoch * epochs
    if steps < LEAST_STEPS:
        shortest = _least_epochs(proposal)
        least = _two_digits_up((shortest * epoch + _phases_s(proposal, rate, shortest)) / TRAINING / 3600)
        raise InputError(
            f"--hours {hours:g}: at {rate.images_per_s:.3g} images/s, {rate.source}, these are {steps:.0f} steps of "
            f"{proposal.batch} images; give at least --hours {least:g}"
        )
    speed = f"{rate.images_per_s:.0f} images/s, {rate.source}"
    if epochs > MOST_EPOCHS:
        return Choice(MOST_EPOCHS, f"the longest published runs; {hours:g} h would allow {epochs:,.0f}: {speed}")
    in_phases = _phases_s(proposal, rate, epochs) / (TRAINING * 3600 * hours)
    also = f", less {in_phases:.0%} of it for offline phases" if in_phases > 0.005 else ""
    return Choice(float(f"{epochs:.3g}"), f"{TRAINING:.0%} of {hours:g} h{also} at {speed}")


def phases_of(config: Config, length: Length) -> tuple[int, int]:
    """Offline phases of a run, and how many of them embed all images."""
    method = build_method(config)
    method.of_run(length)
    due = [step for step in range(length.num_steps) if method.phase_due(step)]
    return len(due), sum(map(method.phase_embeds, due))


def _least_epochs(proposal: Proposal) -> float:
    return LEAST_STEPS / proposal.length(1).steps_per_epoch


def _phases_s(proposal: Proposal, rate: Rate, epochs: float) -> float:
    if not rate.embedding_s and not rate.solving_s:
        return 0.0
    config = as_config(proposal.choices(Choice(epochs, "")))
    phases, embedding = phases_of(config, proposal.length(epochs))
    return phases * rate.solving_s + embedding * rate.embedding_s


def _two_digits_up(number: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return float(f"{math.ceil(number / unit) * unit:.2g}")
