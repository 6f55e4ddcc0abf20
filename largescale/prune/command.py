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
from typing import Any

from largescale.checkpoint.folder import Checkpoint, find_latest
from largescale.config import Config, flatten, free_keys, load_config
from largescale.distributed import stopping
from largescale.evaluate.measure import evaluate
from largescale.evaluate.protocols import protocol_named
from largescale.evaluate.results import age, read_results
from largescale.pretrain import pretrain
from largescale.processes import from_rank_0, on_rank_0, process_group, rank
from largescale.prune.curve import CURVE, points_of, told
from largescale.prune.page import PAGE, write_page
from largescale.prune.rewind import kept_step
from largescale.prune.rounds import Pruning, Round
from largescale.prune.wish import MASKS, WEIGHTS, Wish
from largescale.run.status import COMPLETE, status_of
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

RECORD = "pruning.json"
VERSION = 1
"""To be raised when the same run and settings give other masks."""

_OWN_KEYS = ("name", "run.dir", "model.mask", "checkpoint.mirror")
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
    pruning = _begin(places, wish, protocols, list(overrides))
    measured = [override for override in overrides if override.startswith(_OF_EVALUATION)]
    _measure(pruning, pruning.run, protocols, measured)
    for one in pruning.rounds():
        with _together(pruning):
            stopping.leave_if_asked(f"before round {one.number}")
            on_rank_0(lambda: _write_curve(pruning))
            todo = from_rank_0(rank() == 0 and not _is_complete(one))
            if todo:
                one.prepare()
        if todo:
            pretrain(one.config)
        _measure(pruning, one.folder, protocols, measured)
    with _together(pruning):
        on_rank_0(lambda: _write_curve(pruning))
    return told(points_of(pruning.run, pruning.out))


def _together(pruning: Pruning) -> AbstractContextManager[object]:
    return process_group(join_timeout_s=pruning.config.run.join_timeout_s)


def _begin(places: Places, wish: Wish, protocols: Sequence[str], overrides: list[str]) -> Pruning:
    """Check everything before anything takes its time."""
    wish.check()
    for protocol in protocols:
        protocol_named(protocol)
    if places.masks is not None and (wish.one_shot or wish.random == MASKS):
        other = "--one-shot" if wish.one_shot else f"--random {MASKS}"
        raise InputError(f"--masks={places.masks}: {other} finds masks of its own; leave one of them out")
    config = _configuration(places.run, overrides)
    with process_group(join_timeout_s=config.run.join_timeout_s):
        found: list[Pruning] = []
        on_rank_0(lambda: found.append(_check(places, wish, config)))
        [pruning] = from_rank_0(found)
        return pruning


def _configuration(run: Path, overrides: list[str]) -> Config:
    path = run / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run}: no run here (config.yaml is missing); pass the folder that pretrain wrote")
    for override in overrides:
        key = override.partition("=")[0]
        if key in _OWN_KEYS:
            raise InputError(f"{override}: each round has its own {key}; leave it out, --out says where rounds go")
    return load_config(path, overrides)


def _check(places: Places, wish: Wish, config: Config) -> Pruning:
    run = places.run
    status = status_of(run)
    if status.state != COMPLETE:
        raise InputError(f"{run}: {status}; finish its training first: largescale pretrain {run / 'config.yaml'}")
    trained = find_latest(run / "checkpoints")
    if trained is None:
        raise InputError(f"{run}: no whole checkpoint is left to prune; train it again")
    if wish.rewind >= trained.step:
        raise InputError(f"--rewind={wish.rewind}: expected a step before {trained.step}, the last of {run}")
    rewound = kept_step(run, wish.rewind) if wish.rewind else None
    known = places.masks or (run / Wish().folder if wish.random == WEIGHTS else None)
    folder = "pruning-masks" if places.masks and not wish.random else wish.folder
    out, masks = (places.out or run / folder).absolute(), known and known.absolute()
    if wish.random == MASKS and config.model.mask:
        _log.info("masks are drawn within %s", config.model.mask)
    _same_as_before(out, trained, wish, masks, config)
    return Pruning(run, out, masks, trained, rewound, wish, config)


def _same_as_before(out: Path, trained: Checkpoint, wish: Wish, masks: Path | None, config: Config) -> None:
    """Record what is pruned and how, or compare it with what a former start recorded."""
    free = free_keys(config) | set(_OWN_KEYS)
    settings = {key: value for key, value in flatten(config).items() if key not in free}
    how = wish.stamp() | {"masks": str(masks or "")}
    record = {"version": VERSION, "of": trained.content_hash, "wish": how, "settings": settings}
    path = out / RECORD
    if path.exists():
        before = _read(path)
        if change := _change(before, record):
            raise InputError(f"{out}: was made with {change}; use another --out, or the settings of before")
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: holds something else than a pruning; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        assert record["wish"].keys() and record["settings"].keys() and record["of"]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"{path}: is damaged; remove {path.parent}, or choose another --out") from error
    return record


def _change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, in words; empty if nothing does."""
    if before.get("version") != now["version"]:
        return f"version {before.get('version')} of pruning, and this is {now['version']}"
    if before["of"] != now["of"]:
        return "another last checkpoint of the run"
    for name, value in now["wish"].items():
        if before["wish"].get(name) != value:
            was = before["wish"].get(name)
            return f"--{name.replace('_', '-')}={was}, and is now to go on with {value or 'none'}"
    now_settings = json.loads(json.dumps(now["settings"]))
    for key in sorted(now_settings.keys() & before["settings"].keys()):
        if before["settings"][key] != now_settings[key]:
            return f"{key}={before['settings'][key]}, and is now to go on with {now_settings[key]}"
    return ""


def _is_complete(one: Round) -> bool:
    return one.mask_path.is_file() and status_of(one.folder).state == COMPLETE


def _measure(pruning: Pruning, run: Path, protocols: Sequence[str], overrides: list[str]) -> None:
    """Evaluate a run by the protocols that have no result of its newest checkpoint yet."""
    for protocol in protocols:
        with _together(pruning):
            todo = from_rank_0(rank() == 0 and not _is_measured(run, protocol))
        if todo:
            evaluate(protocol, run, overrides=overrides)


def _is_measured(run: Path, protocol: str) -> bool:
    record = read_results(run).newest.get(protocol)
    return record is not None and not age(record, run)


def _write_curve(pruning: Pruning) -> None:
    points = points_of(pruning.run, pruning.out)
    if not points:
        return
    with atomic_write(pruning.out / CURVE) as file:
        file.write(json.dumps([vars(point) for point in points], indent=1).encode() + b"\n")
    write_page(pruning.out / PAGE, pruning.run, pruning.out)
