"""What to change in a recipe that does not fit into memory, by planning one change after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from largescale.config import Config
from largescale.config.checks import validate
from largescale.data.length import NOMINAL
from largescale.data.supports import require_shared_evenly
from largescale.methods import build_method
from largescale.models.backbones import stages
from largescale.parallel import fsdp
from largescale.plan.simulate import Simulation, simulate
from shards.ground.errors import InputError

_FACTORS = (2, 4, 8, 16)
"""By which micro-batches and batches become smaller."""

_HOPE = 1.25
"""Changes guessed to need more than this many times the available memory are not simulated."""


@dataclass(frozen=True)
class Change:
    """Settings with other values, and the memory that the recipe needs with them.

    Attributes:
        overrides: `key=value`, as they are typed.
        needed: bytes per rank.
        fits: whether it has them.
    """

    overrides: list[str]
    needed: float
    fits: bool


def fitting_changes(
    config: Config,
    ranks: int,
    before: Simulation,
    *,
    available: float,
    needed: Callable[[Config, Simulation], float],
    images: int = NOMINAL,
) -> Iterator[Change]:
    """Try `changes` until one fits, which is the last; each is simulated, which may take seconds.

    Args:
        config: what does not fit.
        ranks: how many there are.
        before: a step of it.
        available: bytes that a rank has.
        needed: bytes that a rank needs, from a configuration and its step.
        images: of the corpus.
    """
    planned = [(config, before)]
    for overrides, changed in changes(config, ranks):
        guesses = [needed(changed, guess) for base in planned if (guess := _guessed(*base, changed)) is not None]
        if guesses and min(guesses) > _HOPE * available:
            continue
        try:
            validate(changed)
            step = simulate(changed, ranks, images)
        except InputError:
            continue  # it does not go with another setting
        planned.append((changed, step))
        size = needed(changed, step)
        yield Change(overrides, size, size <= available)
        if size <= available:
            return


def first_guess(
    config: Config, ranks: int, before: Simulation, *, available: float, needed: Callable[[Config, Simulation], float]
) -> Change | None:
    """The first change of micro-batches or batches that should fit, without a simulation; arguments as above."""
    for overrides, changed in changes(config, ranks):
        guess = _guessed(config, before, changed)
        if guess is None or (size := needed(changed, guess)) > available:
            continue
        try:
            validate(changed)
            require_shared_evenly(changed, ranks)
        except InputError:
            continue
        return Change(overrides, size, True)
    return None


def _guessed(config: Config, before: Simulation, changed: Config) -> Simulation | None:
    """A step with another micro-batch, whose activations are its share; None if more than that is changed."""
    if replace(changed, train=config.train) != config:
        return None
    lasting = before.weights + before.gradients + before.optimizer + before.buffers
    share = _pixels(changed) / _pixels(config)
    return replace(before, peak=int(lasting + (before.peak - lasting) * share))


def _pixels(config: Config) -> float:
    """Pixels of a micro-batch: supports are as many in a smaller batch."""
    shown = config.train.global_batch * sum(group.num * group.size**2 for group in config.data.crops)
    if (support := config.method.supports()) is not None:
        shown += support.size * support.views * config.data.crops[0].size ** 2
    return shown / config.train.accumulate


def changes(config: Config, ranks: int) -> Iterator[tuple[list[str], Config]]:
    """Changes that save memory, those of one setting before those of several: first what leaves the losses as they are
    (recomputation, sharding), then micro-batches, in the end smaller batches, which train another recipe.
    """
    harmless = [overrides for overrides in (_recomputing(config), _sharding(config, ranks)) if overrides]
    together = [[*chosen] for number in range(1, len(harmless) + 1) for chosen in combinations(harmless, number)]
    for chosen in together:
        yield _changed(config, *chosen)
    batch, micro_batches = config.train.global_batch, config.train.accumulate
    lighter = [
        {"train.accumulate": factor * micro_batches}
        for factor in _FACTORS
        if batch % (ranks * factor * micro_batches) == 0
    ]
    smaller = [
        {"train.global_batch": batch // factor}
        for factor in _FACTORS
        if batch % factor == 0 and batch // factor % (ranks * micro_batches) == 0
    ]
    for family in (lighter, smaller):
        for chosen in ([], together[-1]) if together else ([],):
            for one in family:
                yield _changed(config, *chosen, one)


def _recomputing(config: Config) -> dict[str, object]:
    every = list(range(1, 1 + len(stages(build_method(config, on_meta=True).backbone))))
    if config.model.recompute_stages == every:
        return {}
    compiled: dict[str, object] = {"model.compile_stages": []} if config.model.compile_stages else {}
    return {"model.recompute_stages": every, **compiled}


def _sharding(config: Config, ranks: int) -> dict[str, object]:
    parallel = fsdp.settings(config)
    if parallel.replicate > 1:
        return {"parallel.replicate": 1, **({"parallel.shard": 0} if parallel.shard else {})}
    return {"parallel.strategy": "fsdp"} if ranks > 1 and parallel.strategy not in ("fsdp", "zero3") else {}


def _changed(config: Config, *parts: Mapping[str, object]) -> tuple[list[str], Config]:
    """The overrides, as they are typed, and the configuration with them."""
    values = {key: value for part in parts for key, value in part.items()}
    for key, value in values.items():
        group, name = key.split(".")
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return [f"{key}={value}".replace(" ", "") for key, value in values.items()], config
