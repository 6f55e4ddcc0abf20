"""Weights that others published, measured in place of a run: the file stands where the run's folder would.

Images are normalised as the file, or what is known of its origin, says. Results and features are written beside it, in
`FILE.evaluated`, or below `run.dir` if that is given. The baseline "untrained" is the same architecture, drawn by
`run.seed`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from largescale.checkpoint.foreign import load_backbone
from largescale.checkpoint.state_file import read_state
from largescale.config import Config
from largescale.config.loading import config_of_values
from largescale.evaluate.targets import Target, target_at
from largescale.evaluate.weights import Published
from largescale.processes import rank
from shards.ground.errors import InputError

_UNSET = "(not set)"
_FOLDERS = ("model.safetensors", "pytorch_model.bin")

Read = TypeVar("Read")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedTarget:
    """A file of weights.

    Attributes:
        run_dir: where results and features go, as into the folder of a run.
        weights: what was read.
    """

    run_dir: Path
    weights: Published

    def read(self, overrides: list[str], read: Callable[[Published, Config, list[str]], Read]) -> Read:
        """What `read` makes of the weights and the configuration that describes them; nothing to warn of.

        Raises:
            InputError: an override cannot be used.
        """
        return read(*self.agreed(overrides))

    def agreed(self, overrides: list[str]) -> tuple[Published, Config, list[str]]:
        """The same: every rank has read the file."""
        config = _config_of(self.weights, overrides)
        known = "" if config.data.shards == _UNSET else config.data.shards
        config.data.shards = config.evaluate.train_shards or known
        return self.weights, config, []


AnyTarget = Target | PublishedTarget


def any_target_at(place: str | Path, overrides: Sequence[str] = ()) -> AnyTarget:
    """A run or a checkpoint as `target_at` finds it, or a file of weights (or a folder in the layout of Hugging Face).

    Args:
        place: where it is.
        overrides: `key=value`; those of `model` insist on an architecture, `run.dir` says where results of files go.

    Raises:
        InputError: none of these, damaged, or not weights of a known network.
    """
    path = Path(place).expanduser()
    if not _is_of_weights(path):
        return target_at(place)
    found = load_backbone(path, stem_told=any(override.startswith("model.stem=") for override in overrides))
    weights = Published(found)
    config = _config_of(weights, list(overrides))
    if config.model != found.model:
        other = load_backbone(path, config.model)  # says what differs
        # The stride of every other stem is known.
        other_stride = found.model.stem == "3x3s2" and replace(config.model, stem=found.model.stem) == found.model
        if not other_stride or "config" in read_state(path).metadata:  # as of an export of ours, which says its stem
            raise InputError(f"{place}: model.stem or another setting of model is not that of the file; leave it out")
        found, weights = other, Published(other, told_stem=config.model.stem)
        config = _config_of(weights, list(overrides))
    if rank() == 0:
        _log.info("%s: %s", place, found.taken.summary())
    own = _absolute(path)  # whose name is never `..`
    folder = Path(config.run.dir) / own.name if _says_where(overrides) else own.with_name(f"{own.name}.evaluated")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; pass run.dir=FOLDER, where results can be written") from error
    return PublishedTarget(folder, weights)


def check_names(places: Sequence[str | Path], overrides: Sequence[str]) -> None:
    """Files of weights have results of their own also below `run.dir`, where folders have the files' names.

    Raises:
        InputError: different files of the same name, and `run.dir`.
    """
    if not _says_where(overrides):
        return
    known: dict[str, Path] = {}
    for path in filter(_is_of_weights, (Path(place).expanduser() for place in places)):
        other = known.setdefault(_absolute(path).name, path)
        if _absolute(other) != _absolute(path):
            raise InputError(
                f"{other} and {path}: both results would go into the folder {_absolute(path).name} below run.dir; "
                f"leave run.dir out, or measure them one by one, each with another run.dir"
            )


def _is_of_weights(path: Path) -> bool:
    return path.is_file() or any((path / name).is_file() for name in _FOLDERS)


def _says_where(overrides: Sequence[str]) -> bool:
    return any(override.startswith("run.dir=") for override in overrides)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _config_of(weights: Published, overrides: list[str]) -> Config:
    found = weights.found
    values = {
        "name": weights.path.stem,
        "data.shards": _UNSET,
        "data.mean": found.mean,
        "data.std": found.std,
        **{f"model.{key}": value for key, value in asdict(found.model).items()},
    }
    if found.size:
        values |= {"evaluate.resize": found.resize, "evaluate.size": found.size}
    return config_of_values(values, str(weights.path), overrides)
