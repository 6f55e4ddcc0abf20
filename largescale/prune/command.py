"""`largescale prune`: which part of a network is enough, found round by round.

    RUN/checkpoints (trained) --smallest weights--> mask --on the weights of an early step--> round-01, trained
      round-01/checkpoints    --smallest weights--> mask --on the weights of an early step--> round-02, trained
      ...

Each round is the folder of a run of its own: everything that works on a run works on it. What is killed is continued
by the same command: a round's mask follows from the checkpoint before it, its training from its own checkpoints.

    OUT/pruning.json        what is pruned and how
        round-01/           a run, with mask.safetensors, its model.mask
        round-02/ ...
        curve.json          share of weights left and accuracies of each round
        pruning.html        the same as a page

Source: arXiv 2001.03554, section 3.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from largescale.checkpoint.folder import Checkpoint
from largescale.config import Config, load_config
from largescale.distributed import stopping
from largescale.evaluate.measure import evaluate, is_measured
from largescale.evaluate.protocols import owners_of, protocol_named
from largescale.pretrain import pretrain
from largescale.processes import from_rank_0, on_rank_0, process_group, rank, world_size
from largescale.prune import record
from largescale.prune.copied import check_masks
from largescale.prune.curve import CURVE, points_of, told
from largescale.prune.page import PAGE, write_page
from largescale.prune.record import OWN_KEYS
from largescale.prune.rewind import kept_step
from largescale.prune.rounds import Pruning, Round
from largescale.prune.same_network import require_same_backbone, require_same_settings, require_same_start
from largescale.prune.trained import last_checkpoint
from largescale.prune.wish import MASKS, WEIGHTS, Wish
from largescale.run.owner import job_began
from largescale.run.resume import with_precision_of
from largescale.run.status import COMPLETE, status_of
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

_OF_EVALUATION = ("evaluate.", "data.eval_shards=")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """What is pruned, and where it goes.

    Attributes:
        run: folder of a complete run.
        out: folder to make; None takes one in the run's.
        masks: folder of a pruning, of this run or another, whose masks are taken; None finds masks, or for random
            weights takes those of this run.
    """

    run: Path
    out: Path | None = None
    masks: Path | None = None


def prune(places: Places, wish: Wish, *, protocols: Sequence[str] = (), overrides: Sequence[str] = ()) -> str:
    """Prune a run, or go on with it; returns a table of what is there.

    Args:
        places: folders.
        wish: how.
        protocols: of `largescale evaluate`, by which the run and each round are measured.
        overrides: `key=value` replacements of the run's configuration, for the training of rounds.

    Raises:
        InputError: the run, a folder or a setting cannot be used.
        StoppedInOrder: training was asked to stop; the same command goes on.

    Collectives: every rank must call it.
    """
    started = job_began()  # one time limit for all rounds
    pruning = _begin(places, wish, protocols, list(overrides))
    _measure(pruning, pruning.run, protocols, overrides)
    for one in pruning.rounds():
        with _together(pruning):
            leave_together(f"round {one.number} was to begin")
            on_rank_0(lambda: _write_curve(pruning))
            todo = from_rank_0(rank() == 0 and not _is_complete(one))
            if todo:
                one.prepare()
        if todo:
            pretrain(one.config, started)
        _measure(pruning, one.folder, protocols, overrides)
    with _together(pruning):
        on_rank_0(lambda: _write_curve(pruning))
        return from_rank_0(told(points_of(pruning.run, pruning.out)) if rank() == 0 else "")


def leave_together(doing: str) -> None:
    """Leave on all ranks if a signal asked one of them to: the others would wait for it.

    Args:
        doing: what comes next, in words.

    Raises:
        StoppedInOrder: one was asked to.

    Collectives: every rank must call it; one all-gather of objects.
    """
    asked, reasons = "", [""] * world_size()
    try:
        stopping.leave_if_asked(doing)
    except stopping.StoppedInOrder as stop:
        asked = str(stop)
    dist.all_gather_object(reasons, asked)
    if first := next(filter(None, reasons), ""):
        raise stopping.StoppedInOrder(first)


def _together(pruning: Pruning) -> AbstractContextManager[object]:
    run = pruning.config.run
    return process_group(join_timeout_s=run.join_timeout_s, owner_wait_s=run.owner_wait_s)


def _begin(places: Places, wish: Wish, protocols: Sequence[str], overrides: list[str]) -> Pruning:
    """Check everything before anything takes its time."""
    wish.check()
    for protocol in protocols:
        protocol_named(protocol)
    if places.masks is not None and (wish.one_shot or wish.random == MASKS):
        other = "--one-shot" if wish.one_shot else f"--random {MASKS}"
        raise InputError(f"--masks={places.masks}: {other} finds masks of its own; leave one of them out")
    _check_settings(protocols, overrides)
    config = _configuration(places.run, overrides)
    again = f"restore it, or train the last steps again: largescale pretrain {places.run / 'config.yaml'}"
    with process_group(join_timeout_s=config.run.join_timeout_s):
        trained = last_checkpoint(places.run, again)
        return on_rank_0(lambda: _check(places, wish, config, trained))


def _check_settings(protocols: Sequence[str], overrides: list[str]) -> None:
    """Refuse settings of protocols that are not asked for."""
    for override in overrides:
        owners = owners_of(override)
        if owners and not set(owners) & set(protocols):
            raise InputError(f"{override}: used by --evaluate {' and '.join(owners)} alone; pass that, or leave it out")


def _configuration(run: Path, overrides: list[str]) -> Config:
    path = run / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run}: no run here (config.yaml is missing); pass the folder that pretrain wrote")
    for override in overrides:
        key = override.partition("=")[0]
        if key in OWN_KEYS:
            raise InputError(f"{override}: each round has its own {key}; leave it out, --out says where rounds go")
    return load_config(path, overrides)


def _check(places: Places, wish: Wish, config: Config, trained: Checkpoint) -> Pruning:
    run = places.run
    if wish.rewind >= trained.step:
        raise InputError(f"--rewind={wish.rewind}: expected a step before {trained.step}, the last of {run}")
    known = places.masks or (run / Wish().folder if wish.random == WEIGHTS else None)
    folder = "pruning-masks" if places.masks and not wish.random else wish.folder
    out, masks = (places.out or run / folder).absolute(), known and known.absolute()
    require_same_backbone(trained, config)
    rewound = kept_step(run, wish.rewind) if wish.rewind else None
    now = record.record_of(trained, wish, masks, config)
    record.compare(out, now)
    if rewound is not None:
        config = with_precision_of(rewound.progress, config)  # rounds go on in it, so their checkpoints must name it
        require_same_settings(rewound, config)
    elif wish.random != WEIGHTS:
        require_same_start(trained, config)
    pruning = Pruning(run, out, masks, trained, rewound, wish, config)
    if masks is not None:
        check_masks(pruning)
    if wish.random == MASKS and config.model.mask:
        _log.info("masks are drawn within %s", config.model.mask)
    record.write(out, now)
    return pruning


def _is_complete(one: Round) -> bool:
    status = status_of(one.folder)
    return one.mask_path.is_file() and status.state == COMPLETE and status.saved == status.steps


def _measure(pruning: Pruning, run: Path, protocols: Sequence[str], overrides: Sequence[str]) -> None:
    """Evaluate a run by the protocols that have no result yet of its newest checkpoint, these settings and shards."""
    for protocol in protocols:
        own = _of_protocol(protocol, overrides)
        with _together(pruning):
            todo = not _is_measured(run, protocol, own)
        if todo:
            evaluate(protocol, run, overrides=own)


def _is_measured(run: Path, protocol: str, overrides: Sequence[str]) -> bool:
    return on_rank_0(lambda: is_measured(protocol, run, overrides))


def _of_protocol(protocol: str, overrides: Sequence[str]) -> list[str]:
    """Those overrides that are of its evaluation: its own, and those that all protocols have."""
    of_evaluation = [override for override in overrides if override.startswith(_OF_EVALUATION)]
    return [override for override in of_evaluation if protocol in (owners_of(override) or [protocol])]


def _write_curve(pruning: Pruning) -> None:
    points = points_of(pruning.run, pruning.out)
    if not points:
        return
    with atomic_write(pruning.out / CURVE) as file:
        file.write(json.dumps([vars(point) for point in points], indent=1).encode() + b"\n")
    write_page(pruning.out / PAGE, pruning.run, pruning.out)
