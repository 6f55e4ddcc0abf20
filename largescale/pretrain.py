"""The training loop, to be read from top to bottom.

A run is a pure function of its configuration: every step's samples, views and update follow from (config, step), so
a run that is stopped anywhere and started again by the same command continues where its last checkpoint stands and
ends as if nothing had happened.
"""

from __future__ import annotations

import gc
import logging
import time
from contextlib import closing

import torch

from largescale.checkpoint.mask_file import read_mask, share_left
from largescale.config import Config, without_effect
from largescale.data.corpora import shares_of_batch
from largescale.data.stream import Stream, num_loading
from largescale.distributed import stopping
from largescale.distributed.stopping import StoppedInOrder
from largescale.evaluate.online import Online
from largescale.methods import build_method, require_fit
from largescale.observe.console import Progress, configure_logging
from largescale.observe.meter import Meter
from largescale.observe.pixels import pixel_signs
from largescale.observe.spikes import SpikeWatch
from largescale.observe.warnings import Warnings
from largescale.optim.schedules import learning_rates
from largescale.parallel import precision
from largescale.parallel.batchnorm import average_statistics
from largescale.parallel.freed_memory import keep_freed_memory
from largescale.parallel.objectives import as_one, stage_begins
from largescale.parallel.strategies import build_engine, drawn_in_pieces
from largescale.processes import process_group, rank, together, world_size
from largescale.run import init_from
from largescale.run.failures import TrainingStopped
from largescale.run.first_weights import read_backbone
from largescale.run.folder import RunFolder
from largescale.run.lease import Lease, lease_of
from largescale.run.memory_advice import memory_advice
from largescale.run.owner import job_began
from largescale.run.phases import Phases
from largescale.run.resume import settle_precision
from largescale.run.rollback import DataSteps
from largescale.run.schedule_check import complaints, facts, warn_of_schedule
from largescale.run.shared import check_shared
from largescale.run.start import start_in_status

_log = logging.getLogger(__name__)


def pretrain(config: Config, started: float | None = None) -> None:
    """Train the configured method to its last step, or from its last checkpoint to there.

    Args:
        config: of the run.
        started: when its time limit began (seconds since 1970), if that was before.

    Raises:
        InputError: configuration, shards or run folder cannot be used as they are.
        OutOfMemory: the line says what needs less.
        TrainingStopped: a loss or gradient was not finite, too many images were unreadable, or nothing can be saved.
        StoppedInOrder: a signal or the end of the job's time stopped it.

    Collectives: every rank that torchrun started must call it.
    """
    started = job_began() if started is None else started
    stopping.check_job_time(config.run.stop_before_s)
    waits = (config.run.hang_timeout_s, config.run.join_timeout_s, num_loading(config), config.run.owner_wait_s)
    with memory_advice(config), process_group(*waits) as device:
        configure_logging(rank(), world_size())
        keep_freed_memory(device)
        with lease_of(config) as lease, start_in_status(lease):
            check_shared(lease.run_dir)
            config = settle_precision(config, device)
            precision.set_up(config, device)
            while not _train(config, device, started, lease):
                gc.collect()  # an engine is a circle of references; the next one would be beside it
                torch.cuda.empty_cache()
                _log.warning("going back to the last checkpoint")


def _train(config: Config, device: torch.device, started: float, lease: Lease) -> bool:
    """Train from the last checkpoint on; True at the end of the run, False where it goes back to a checkpoint."""
    # -- Data: which samples form which step, and how this rank gets its share -------------------------------------
    dtype = precision.views_dtype(config)
    stream = Stream(config, rank=rank(), world_size=world_size(), device=device, dtype=dtype)
    together(stream.check_files)
    together(lambda: require_fit(config, stream.length))
    num_steps, steps_per_epoch = stream.num_steps, stream.order.steps_per_epoch
    rates = learning_rates(config, num_steps=num_steps, steps_per_epoch=steps_per_epoch)

    # -- Model: the same random weights on every rank, then sharded or replicated by the strategy ------------------
    torch.manual_seed(config.run.seed)
    method = build_method(config, stream.length, on_meta=drawn_in_pieces(config))
    engine = build_engine(method, config, device)

    # -- Run folder: continue from the newest whole checkpoint, if there is one ------------------------------------
    run = RunFolder(config, stream.fingerprint, device, lease)
    phases = Phases(config, stream, engine, device, run.logs.skipped)
    first_step, num_skipped, spike_state = run.resume(engine)
    if first_step >= num_steps:
        _log.info("%s is complete: %d steps", run.path, num_steps)
        run.record_configuration()
        run.end("complete", num_steps, num_steps)
        return True
    run.open_logs(first_step)
    run.status.set("running", first_step, num_steps)
    _log.info("%s: %s, from step %d", run.path, _extent(config, stream), first_step)
    warn_of_schedule(config, stream.length)

    # -- The loop ----------------------------------------------------------------------------------------------------
    of_epochs = config.train.global_batch, stream.order.num_samples
    meter = Meter(engine.method, *of_epochs, device, engine.loss_scale, run.unread)
    spikes, warnings = SpikeWatch(config.train.spike_factor, spike_state), Warnings(config, run.logged())
    progress = Progress(first_step, num_steps, engine.method.brief)
    online = Online(config, stream.corpora, first_step, steps_per_epoch, device)
    asked = stopping.asking(config.run.time_limit_s, started, config.run.stop_before_s)
    data_steps = DataSteps(first_step, num_steps, run.rollbacks.windows())
    with run.status.failure(first_step, num_steps), closing(stream(data_steps)) as batches, run.watched() as watchdog:
        waiting_since = time.perf_counter()
        for step, batch in enumerate(batches, first_step):
            lr = float(rates[step])
            data_wait = time.perf_counter() - waiting_since
            if why := phases.before(step, watchdog.beat, asked):
                run.stop_in_phase(step, num_steps, why)
            if stage_begins(engine.method, step):  # from here on, what has learnt may be used as it is
                average_statistics(engine.method)
            stop_reason = asked()
            views, results = batch.inputs(), {}
            objectives = engine.method.objectives_of(step)  # one, but for adversarial methods
            for objective in objectives:
                watchdog.beat(f"step {step}: forward and backward")
                output = engine.forward_backward(views, step, objective)
                check = engine.check(views, output.loss, stop=bool(stop_reason))
                if trouble := check.trouble or spikes.look(check.grad_norm, objective):
                    run.stop_or_go_back(step, batch, output, trouble, rates=rates, beat=watchdog.beat)
                    return False
                watchdog.beat(f"step {step}: update")
                run.saving.wait_staged()
                engine.update(check, step=step, lr=lr, clip=config.optim.clip_grad_norm)
                results[objective] = output, check
            output, check = as_one(results)
            run.record_batch(step, batch)
            meter.add(output, check, data_wait, batch)
            done, last = step + 1, step + 1 == num_steps
            every = config.checkpoint.every_steps
            stops = check.stop and not last
            saves = last or stops or phases.due(done) or (every > 0 and done % every == 0)
            if saves or done % config.run.log_every == 0:
                # Saving closes the interval, so that a resumed run logs the same intervals.
                measured = meter.summary(phases.unread()) | phases.measures()
                num_skipped += measured.pop("skipped_in_interval")
                row = {
                    "step": step,
                    "progress": done / num_steps,
                    "epoch": done / steps_per_epoch,
                    "images_seen": done * config.train.global_batch,
                    "lr": lr,
                    "grad_norm": check.grad_norm,
                    **{f"grad_norm_{objective}": norm for objective, norm in check.norms.items()},
                    "skipped_samples": num_skipped,
                    **measured,
                    **pixel_signs(views, config.data.crops, of_frames=config.method.frame_tuples() is not None),
                    **({} if stops else online.measure(engine, done, watchdog.beat)),  # the save has no time to lose
                }
                run.record_metrics(row)
                _log.info(progress.line(row))
                starting = done - first_step <= config.run.log_every
                warnings.say(row, stream.counts, starting=starting)
                rate = max(row["skipped_rate"], row.get("phase_skipped_rate", 0.0))
                if why := too_many_skipped(config, num_skipped, rate):
                    run.saving.settle()
                    raise TrainingStopped(f"step {step}: {why}; {run.path}/skipped lists them")
                meter.reset()
            if saves:
                watchdog.beat(f"step {step}: saving")
                average_statistics(engine.method)
                run.save(engine, done, num_skipped, spikes.state, meter.unread, final=last or stops)
            if stops:
                run.end("stopped", done, num_steps)
                who = f"by {stop_reason}" if stop_reason else "at another rank's request"
                raise StoppedInOrder(f"stopped after step {step} {who}; checkpoint saved")
            watchdog.beat(f"step {done}: waiting for data")
            waiting_since = time.perf_counter()

    run.end("complete", num_steps, num_steps)
    _log.info("%s is complete: %d steps, %d images unreadable", run.path, num_steps, num_skipped)
    return True


def _extent(config: Config, stream: Stream) -> str:
    """The size of a run, for its first line."""
    order = stream.order
    return (
        f"{order.num_samples} samples, {stream.num_steps} steps of {config.train.global_batch} images "
        f"({order.steps_per_epoch} per epoch, which leaves out {order.left_out}), {world_size()} ranks, "
        f"{config.parallel.strategy}"
    )


def too_many_skipped(config: Config, num_skipped: int, rate: float) -> str:
    """Why a run stops for unreadable images, in total or as a fraction of the last steps; empty if it continues."""
    if num_skipped > config.data.max_skipped:
        return f"{num_skipped} images could not be read, more than data.max_skipped={config.data.max_skipped}"
    if rate > config.data.max_skipped_rate:
        limit = config.data.max_skipped_rate
        return f"{rate:.0%} of the last images could not be read, more than data.max_skipped_rate={limit}"
    return ""


def describe(config: Config) -> tuple[dict[str, object], list[str]]:
    """What follows from a configuration, for `--print`: sizes, steps, what happens when, parameters.

    Returns:
        Facts by name, and a line for everything that does not fit the run.

    Raises:
        InputError: as `pretrain` would before its first step.
    """
    stream = Stream(config, rank=0, world_size=world_size(), device=torch.device("cpu"), dtype=torch.float32)
    stream.check_files()
    method = build_method(config, stream.length, on_meta=True)
    if config.init_from:
        init_from.require_source(config.init_from)
    order, length = stream.order, stream.length
    found: dict[str, object] = {
        **({"weights": read_backbone(config).summary()} if config.model.weights else {}),
        **({"share of weights left": share_left(read_mask(config))} if config.model.mask else {}),
        "samples": order.num_samples,
        "global batch": config.train.global_batch,
        "steps": stream.num_steps,
        "steps per epoch": order.steps_per_epoch,
        "epochs": stream.num_steps / order.steps_per_epoch,
        "samples left out per epoch": order.left_out,
        **facts(config, length),
        "corpora": "; ".join(
            f"{part['name']}, {part['samples']:,} samples, {part['share']:.1%} of a batch"
            for part in shares_of_batch(stream.corpora, order.stream_counts)
        ),
        **({"labelled images": stream.supports.summary()} if stream.supports else {}),
        "views per image": " + ".join(f"{group.num} x {group.size} px" for group in config.data.crops),
        "backbone parameters": sum(p.numel() for p in method.backbone.parameters()),
        "head parameters": sum(p.numel() for p in method.parameters() if p.requires_grad)
        - sum(p.numel() for p in method.backbone.parameters()),
        "feature width": method.num_features,
    }
    return found, [*without_effect(config), *complaints(config, length)]
