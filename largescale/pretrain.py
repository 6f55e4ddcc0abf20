"""The training loop, to be read from top to bottom.

A run is a pure function of its configuration: every step's samples, views and update follow from (config, step), so
a run that is stopped anywhere and started again by the same command continues where its last checkpoint stands and
ends as if nothing had happened.
"""

from __future__ import annotations

import logging
import time

import torch

from largescale import precision
from largescale.config import Config, prototype_counts
from largescale.data.stream import Stream
from largescale.methods import build_method
from largescale.observe.collapse import warning
from largescale.observe.console import Progress, configure_logging
from largescale.observe.meter import Meter
from largescale.optim import learning_rates
from largescale.parallel import build_engine
from largescale.parallel.batchnorm import average_statistics
from largescale.processes import process_group, rank, world_size
from largescale.run_folder import RunFolder

_log = logging.getLogger(__name__)


class TrainingStopped(Exception):
    """The run cannot go on; its last checkpoint is whole and its message says what happened."""


def pretrain(config: Config) -> None:
    """Train the configured method to its last step, or from its last checkpoint to there.

    Raises:
        InputError: configuration, shards or run folder cannot be used as they are.
        TrainingStopped: a loss or gradient was not finite, or too many images were unreadable.

    Collectives: every rank that torchrun started must call it.
    """
    with process_group() as device:
        configure_logging(rank(), world_size())

        # -- Data: which samples form which step, and how this rank gets its share ---------------------------------
        config = precision.resolve(config, device)
        precision.set_up(config)
        dtype = precision.weights_dtype(config)
        stream = Stream(config, rank=rank(), world_size=world_size(), device=device, dtype=dtype)
        num_steps, steps_per_epoch = stream.num_steps, stream.order.steps_per_epoch
        rates = learning_rates(config, num_steps=num_steps, steps_per_epoch=steps_per_epoch)

        # -- Model: the same random weights on every rank, then sharded or replicated by the strategy --------------
        torch.manual_seed(config.run.seed)
        engine = build_engine(build_method(config), config, device)

        # -- Run folder: continue from the newest whole checkpoint, if there is one --------------------------------
        run = RunFolder(config, stream.manifest)
        first_step, num_skipped = run.resume(engine)
        if first_step >= num_steps:
            _log.info("%s is complete: %d steps", run.path, num_steps)
            return
        run.open_logs(first_step)
        _log.info(
            "%s: %d samples, %d steps of %d images (%d an epoch, which leaves out %d), %d ranks, %s, from step %d",
            run.path, stream.order.num_samples, num_steps, config.train.global_batch, steps_per_epoch,
            stream.order.left_out, world_size(), config.parallel.strategy, first_step,
        )

        # -- The loop ------------------------------------------------------------------------------------------------
        meter = Meter(prototype_counts(config), config.train.global_batch, device)
        progress = Progress(first_step, num_steps)
        waiting_since = time.perf_counter()
        for batch in stream(first_step):
            step, lr = batch.step, float(rates[batch.step])
            data_wait = time.perf_counter() - waiting_since

            output = engine.forward_backward(batch.views, step)
            check = engine.check(batch.views, output.loss)
            if check.trouble:
                raise TrainingStopped(
                    f"step {step}: {check.trouble}; stopped before the update. The last checkpoint is good; "
                    f"try a lower optim.lr or train.precision=fp32"
                )
            engine.update(check, step=step, lr=lr, clip=config.optim.clip_grad_norm)

            run.record_batch(batch)
            meter.add(output, check, data_wait, len(batch.skipped))
            done, last = step + 1, step + 1 == num_steps
            saves = last or (config.checkpoint.every_steps > 0 and done % config.checkpoint.every_steps == 0)
            if saves or done % config.run.log_every == 0:
                # Saving closes the interval, so that a resumed run logs the same intervals.
                measured, signs = meter.summary()
                num_skipped += measured.pop("skipped_in_interval")
                row = {
                    "step": step, "epoch": done / steps_per_epoch, "images_seen": done * config.train.global_batch,
                    "lr": lr, "grad_norm": check.grad_norm, "skipped_samples": num_skipped, **measured,
                }
                run.record_metrics(row)
                _log.info(progress.line(row))
                if rank() == 0 and (trouble := warning(signs, done / num_steps)):
                    _log.warning("step %d: %s", step, trouble)
                if num_skipped > config.data.max_skipped:
                    raise TrainingStopped(
                        f"step {step}: {num_skipped} images could not be read, more than data.max_skipped="
                        f"{config.data.max_skipped}; {run.path}/skipped lists them"
                    )
                meter.reset()
            if saves:
                average_statistics(engine.method)
                run.save(engine, done, num_skipped)
            waiting_since = time.perf_counter()

        run.close_logs()
        _log.info("%s is complete: %d steps, %d images unreadable", run.path, num_steps, num_skipped)


def describe(config: Config) -> dict[str, object]:
    """What follows from a configuration, for `--print`: sizes, steps, samples left out, parameters.

    Raises:
        InputError: as `pretrain` would before its first step.
    """
    stream = Stream(config, rank=0, world_size=world_size(), device=torch.device("cpu"), dtype=torch.float32)
    method = build_method(config)
    order = stream.order
    return {
        "samples": order.num_samples,
        "global batch": config.train.global_batch,
        "steps": stream.num_steps,
        "steps an epoch": order.steps_per_epoch,
        "epochs": stream.num_steps / order.steps_per_epoch,
        "samples left out of an epoch": order.left_out,
        "views of an image": " + ".join(f"{group.num} x {group.size} px" for group in config.data.crops),
        "backbone parameters": sum(p.numel() for p in method.backbone.parameters()),
        "head and prototype parameters": sum(p.numel() for p in method.parameters())
        - sum(p.numel() for p in method.backbone.parameters()),
        "feature width": method.num_features,
    }


