"""Checks the schedule against the length of the run: what would never happen, or too late to matter.

A recipe is made for a number of steps. On fewer images, or for fewer epochs, warm-up, frozen weights, queues and saves
may last longer than the run itself, which then learns little, silently. Each finding is a line with both numbers
and what to set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from largescale.config import Config, corpus_settings, without_effect
from largescale.data.length import Length
from largescale.data.order import share_error, share_streams
from largescale.methods import method_class
from largescale.methods.milestone import LATEST, Milestone
from largescale.observe.spikes import FIRST_STEPS
from largescale.optim.schedules import learning_rates, warmup_steps
from largescale.processes import rank

_log = logging.getLogger(__name__)

SUGGESTED = 0.05
"""Fraction of a run suggested instead; published recipes spend 0.1 to 5%."""
MOST_LEFT_OUT = 0.25
"""Fraction of the images that an epoch may leave out because they do not fill a batch."""
MOST_SHARE_ERROR = 1.5
"""Factor by which the share of a corpus may differ from its weight's, since a batch is cut into `data.streams`."""


def complaints(config: Config, length: Length) -> list[str]:
    """One line for each setting that does not fit the run's length."""
    return [
        *_of_warmup(config, length),
        *_of_method(config, length),
        *_of_saving(config, length),
        *_of_data(config, length),
    ]


def warn_of_schedule(config: Config, length: Length) -> None:
    """Warn on rank 0 of what does not fit the run's length, and of settings without effect."""
    if rank() == 0:
        for complaint in [*without_effect(config), *complaints(config, length)]:
            _log.warning("%s", complaint)


def facts(config: Config, length: Length) -> dict[str, str]:
    """When what happens, by name, for `--print`."""
    steps, optim, save = length.num_steps, config.optim, config.checkpoint
    warmup = warmup_steps(config.optim, length.steps_per_epoch)
    last = learning_rates(config, num_steps=steps, steps_per_epoch=length.steps_per_epoch)[-1]
    saves = (steps - 1) // save.every_steps if save.every_steps else 0
    when = [f"every {save.every_steps:,} steps ({saves:,} times)"] if saves else []
    if method_class(config).later_phases:
        when.append("before offline phases")
    often = f"{', '.join(when)} and at the end" if when else "only at the end"
    run = config.run
    return {
        "warm-up": f"{warmup:,} steps, from {optim.warmup_lr:g} to {optim.lr:g}" if warmup else "none",
        "learning rate of the last step": f"{last:.3g}",
        **{
            milestone.what: f"from step {milestone.step:,} of {steps:,}" if milestone.step < steps else "never"
            for milestone in method_class(config).milestones(config)
        },
        "saves": f"{often}; the newest {save.keep} are kept",
        "logs": f"every {run.log_every:,} steps",
        "time limit": f"{run.time_limit_s:g} s, saves and stops {run.stop_before_s:g} s before"
        if run.time_limit_s
        else "none but SLURM's",
    }


def _of_warmup(config: Config, length: Length) -> Iterator[str]:
    warmup, steps = warmup_steps(config.optim, length.steps_per_epoch), length.num_steps
    if warmup > LATEST * steps:
        what = "the rate rises to the last step" if warmup >= steps else "little is left to train at full rate"
        epochs = SUGGESTED * steps / length.steps_per_epoch
        yield (
            f"optim.warmup_epochs={config.optim.warmup_epochs:g} is {warmup:,} of the run's {steps:,} steps: {what}"
            f"; set optim.warmup_epochs={epochs:.2g}, or train longer"
        )


def _of_method(config: Config, length: Length) -> Iterator[str]:
    for milestone in method_class(config).milestones(config):
        if milestone.step > LATEST * length.num_steps:
            yield _late(milestone, length)
    yield from method_class(config).complaints(config, length)
    # Refused where a run starts; a line where one is described.
    if line := method_class(config).misfit(config, length):
        yield line


def _late(milestone: Milestone, length: Length) -> str:
    steps = length.num_steps
    when = (
        f"{milestone.what} only from step {milestone.step:,} of {steps:,}"
        if milestone.step < steps
        else (f"{milestone.what} from step {milestone.step:,} on, and the run has {steps:,}, so never")
    )
    value = min(int(SUGGESTED * steps), int(LATEST * steps) - milestone.delay)
    remedy = f"{milestone.key}={value}" if value >= 0 else milestone.without
    return f"{milestone.key}={milestone.step - milestone.delay}: {when}; set {remedy}, or train longer"


def _of_saving(config: Config, length: Length) -> Iterator[str]:
    save, train, steps = config.checkpoint, config.train, length.num_steps
    first, sooner = save.every_steps or steps, max(1, steps // 5)
    only_at_end = first >= steps and not method_class(config).later_phases
    if save.every_steps and only_at_end:
        yield (
            f"checkpoint.every_steps={save.every_steps}: the run has {steps:,} steps and is saved only at its end: "
            f"if killed, it starts over; set checkpoint.every_steps={sooner}, or 0 if that is intended"
        )
    if save.keep_every and save.every_steps and save.keep_every % save.every_steps:
        multiple = -(-save.keep_every // save.every_steps) * save.every_steps
        yield (
            f"checkpoint.keep_every={save.keep_every}: only steps that checkpoint.every_steps={save.every_steps} "
            f"divides are saved; set checkpoint.keep_every={multiple}"
        )
    if train.max_rollbacks and only_at_end:
        yield (
            f"train.max_rollbacks={train.max_rollbacks}: there is nothing to go back to before the first save, at "
            f"step {first:,} of {steps:,}; set checkpoint.every_steps={sooner}"
        )
    if train.spike_factor and steps <= FIRST_STEPS:
        yield (
            f"train.spike_factor={train.spike_factor:g}: looks for spikes from step {FIRST_STEPS} on, and the run "
            f"has {steps:,}; set train.spike_factor=0, or train longer"
        )
    if config.run.log_every > steps and only_at_end:
        yield (
            f"run.log_every={config.run.log_every}: the run has {steps:,} steps and logs only its last one; set "
            f"run.log_every={max(1, steps // 20)}"
        )


def _of_data(config: Config, length: Length) -> Iterator[str]:
    batch, per_stream = config.train.global_batch, config.train.global_batch // config.data.streams
    if length.left_out > MOST_LEFT_OUT * length.num_samples:
        yield (
            f"train.global_batch={batch}: an epoch leaves out {length.left_out:,} of {length.num_samples:,} images, "
            f"which do not fill a batch (different ones each epoch); set a smaller train.global_batch"
        )
    if config.data.shuffle_window <= per_stream < length.steps_per_epoch * per_stream:
        yield (
            f"data.shuffle_window={config.data.shuffle_window}: a batch takes {per_stream} images of a stream, so "
            f"it consists of neighbours in the shards; set data.shuffle_window={100 * per_stream} or more"
        )
    weights, streams = [weight for _, weight, _ in corpus_settings(config.data)], config.data.streams
    if share_error(weights, streams) > MOST_SHARE_ERROR:
        shares = (
            f"{count / streams:.2%} where {weight / sum(weights):.2%} are asked for"
            for count, weight in zip(share_streams(weights, streams), weights, strict=True)
        )
        enough = (
            f"data.streams={number}"
            for number in range(streams + 1, batch + 1)
            if batch % number == 0 and share_error(weights, number) <= MOST_SHARE_ERROR
        )
        yield (
            f"data.streams={streams}: too few for the weights of data.shards, whose corpora have {', '.join(shares)}; "
            f"set {next(enough, 'a larger train.global_batch, and data.streams')}"
        )
