"""Whether a checkpoint belongs to this run, what has changed since, and how its state gets into the engine."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import Checkpoint, make_newest, newest_first
from largescale.checkpoint.mirror import Mirror, MirrorAway, OfAnotherRun
from largescale.config import PRECISIONS, Config, flatten, values_saved_before
from largescale.data import order
from largescale.data.supports import parts_of
from largescale.parallel import auto_precision
from largescale.parallel.batchnorm import batchnorm_images
from largescale.parallel.engine import Engine
from largescale.processes import on_rank_0, rank, world_size
from largescale.run import init_from
from largescale.run.advice import instead_of_changing, new_run
from largescale.run.same_run import changed_setting, changed_weights
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)


def newest_checkpoint(checkpoints: Path, mirror: Mirror | None, device: torch.device) -> Checkpoint | None:
    """The checkpoint to continue from, the same one on all ranks: the newest whole one here, or in the mirror if that
    has a later step; None for a new run. Damaged ones that are newer are set aside.

    Raises:
        InputError: all are damaged, and the mirror has none; or as `_fetch_newer`.

    Collectives: every rank must call it; those of `agree_on_latest`, twice if one is fetched, and two broadcasts.
    """
    if mirror is None:
        checkpoint = sharded.agree_on_latest(checkpoints, device)
    else:
        checkpoint, _ = sharded.newest_whole(checkpoints, device)
        than = checkpoint.step if checkpoint else -1
        fetched = on_rank_0(lambda: _fetch_newer(mirror, checkpoints, than))
        if checkpoint is None or fetched:
            checkpoint = sharded.agree_on_latest(checkpoints, device)
    if checkpoint is not None:
        on_rank_0(lambda: _make_newest(checkpoint))
    return checkpoint


def _make_newest(checkpoint: Checkpoint) -> None:
    for aside in make_newest(checkpoint):
        _log.warning("%s: damaged; this run never reads it again, so it may be removed", aside)


def _fetch_newer(mirror: Mirror, checkpoints: Path, than: int) -> bool:
    """Fetch the newest checkpoint from the mirror, if it is later than this step; returns whether it was.

    Raises:
        InputError: the mirror is another run's; or it is away, and there is nothing here to go on from.
    """
    try:
        return mirror.fetch_newer(checkpoints, than)
    except OfAnotherRun as error:
        raise InputError(f"checkpoint.mirror={mirror.url}: {error}") from error
    except MirrorAway as error:
        if than < 0:
            raise _nothing_without(mirror, checkpoints, error) from error
        # At worst another machine had come further, and those steps are done again, with the same result.
        _log.warning("%s; continuing from the newest checkpoint in %s", _cannot_be_read(mirror, error), checkpoints)
        return False


def _cannot_be_read(mirror: Mirror, error: MirrorAway) -> str:
    return f"checkpoint.mirror={mirror.url}: cannot be read ({error})"


def _nothing_without(mirror: Mirror, checkpoints: Path, error: MirrorAway) -> InputError:
    return InputError(
        f"{_cannot_be_read(mirror, error)}, and {checkpoints} holds no whole checkpoint: if there are copies of this "
        f"run, it would start without them; check the URL, the network and the credentials, "
        f"or pass checkpoint.mirror=''"
    )


def settle_precision(config: Config, device: torch.device) -> Config:
    """The configuration with `train.precision=auto` replaced: by the precision of the checkpoint that the run goes on
    from, here or in the mirror, whatever GPUs it now has; for a new run by what its ranks' devices compute in.

    Raises:
        InputError: there is no checkpoint here, and the mirror cannot be read.

    Collectives: every rank must call it; with auto, a broadcast of an object and those of `auto_precision.of_ranks`.
    """
    if config.train.precision != "auto":
        return config
    config = with_precision_of(on_rank_0(lambda: _newest_progress(config)), config)
    return auto_precision.of_ranks(config, device)


def with_precision_of(progress: dict[str, Any], config: Config) -> Config:
    """The configuration with `train.precision=auto` replaced by what a checkpoint was trained in, if that is known."""
    settings = progress.get("config", {})
    saved = settings.get("train.precision") if isinstance(settings, dict) else None
    if config.train.precision != "auto" or saved not in PRECISIONS:
        return config
    return replace(config, train=replace(config.train, precision=saved))


def _newest_progress(config: Config) -> dict[str, Any]:
    """`progress.json` of the run's newest checkpoint here, else in the mirror; empty for a new run."""
    checkpoints, url = Path(config.run.dir) / "checkpoints", config.checkpoint.mirror
    if here := newest_first(checkpoints):
        return here[0].progress
    if not url:
        return {}
    mirror = Mirror(url)
    try:
        there = mirror.newest_progress()
    except MirrorAway as error:
        raise _nothing_without(mirror, checkpoints, error) from error
    return there if isinstance(there, dict) else {}


def check_same_run(checkpoint: Checkpoint, config: Config, fingerprint: str) -> None:
    """Check that a run may continue from a checkpoint.

    Raises:
        InputError: the checkpoint was trained on other shards or labels, or with a setting that changes the result.
    """
    path = Path(config.run.dir)
    (images, supports), (own_images, own_supports) = parts_of(checkpoint.progress["data"]), parts_of(fingerprint)
    before = values_saved_before(checkpoint.progress["config"], config)
    if images != own_images:
        if weights := changed_weights(before, config):
            raise InputError(
                f"{path}: cannot continue, weights in data.shards were {weights[0]} and are now {weights[1]}; "
                f"set them back, or start a new run from its weights: {new_run(config)}"
            )
        raise InputError(
            f"{path}: its checkpoint was trained on other shards than {config.data.shards}; "
            f"use those, or start a new run from its weights: {new_run(config)}"
        )
    init_from.require_unchanged(config, before)
    if key := changed_setting(before, config):
        raise InputError(
            f"{path}: cannot continue, {key} was {before[key]} and is now {flatten(config)[key]}; "
            f"set it back, or {instead_of_changing(config, key)}"
        )
    if supports != own_supports:
        raise InputError(
            f"{path}: its checkpoint was trained with other labelled images than method.support.shards and "
            f"method.support.subset give now; use those, or start a new run from its weights: {new_run(config)}"
        )


def load(checkpoint: Checkpoint, engine: Engine) -> None:
    """Put a checkpoint's state into the engine.

    Collectives: every rank must call it; those of `sharded.load`.
    """
    engine.prepare_optimizer_state(sharded.shapes(checkpoint))
    state = engine.state()
    sharded.load(checkpoint, state)
    engine.take_state(state)


def warn_of_changes(checkpoint: Checkpoint, config: Config) -> None:
    """Warn, on rank 0, of what changes for the rest of the run though it may continue: order, batch statistics."""
    if rank() > 0:
        return
    if checkpoint.progress.get("order", 1) != order.VERSION:
        _log.warning(
            "%s: saved by a version with another order of the samples; unless train.global_batch divides "
            "them, the current epoch may use some twice and others never; later epochs are exact",
            config.run.dir,
        )
    was, now = _statistics_images(checkpoint, config)
    if was != now:
        _log.warning(
            "%s: BatchNorm statistics were over %g images and now are over %g (%d ranks, now %d); "
            "the loss may shift a little",
            config.run.dir,
            was,
            now,
            checkpoint.progress["world_size"],
            world_size(),
        )


def _statistics_images(checkpoint: Checkpoint, config: Config) -> tuple[float, float]:
    """Images that share batch statistics, before and now: another number of ranks or other groups change it."""

    def images(settings: dict[str, Any], ranks: int) -> float:
        group = settings["parallel.batchnorm_group_size"] if settings["parallel.sync_batchnorm"] else 1
        return batchnorm_images(config, group, ranks)

    before = checkpoint.progress
    return images(before["config"], before["world_size"]), images(flatten(config), world_size())
