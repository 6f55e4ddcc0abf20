"""Features of a run's networks on labelled shards, kept under RUN/eval/features and used again where they fit.

Every file carries the stamp of what it was made from, inside it, so a command that is killed or that runs beside
another can at worst make one again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from largescale.config import Config
from largescale.data.sounds import require_sound, soundfile
from largescale.evaluate import exemplars, task_pictures
from largescale.evaluate.corpora_shown import keep_corpora
from largescale.evaluate.extract import can_be_read, drop_equal_channels, extract, pixels
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.made_from import VERSION, Stamp, difference, images_stamp, network_stamp, weights_stamp
from largescale.evaluate.subject import Subject
from largescale.evaluate.weights import Weights, exemplars_of, method_of, pictures_of
from largescale.methods import Method
from largescale.methods.pictures import Pictures
from largescale.processes import from_rank_0, on_rank_0, rank, together
from shards.ground.errors import InputError

NETWORKS = {"pretrained": "pretrained network", "untrained": "same network, untrained", "pixels": "raw pixels"}
PARTS = ("train", "test")

_log = logging.getLogger(__name__)


def path_of(run_dir: Path, name: str, part: str, *, every: bool = False, frames: int = 1, alone: bool = False) -> Path:
    """Where the features of a network on a part (`train` or `test`) are: of its labelled images, or of every one, or of
    its clips by several frames; raw pixels are others where the part is `alone`.
    """
    kind = "-all" if every else "-clips" if frames > 1 else "-alone" if alone and name == "pixels" else ""
    return run_dir / "eval" / "features" / f"{name}-{part}{kind}.safetensors"


def features_of_subject(
    subject: Subject, *, every: bool = False, frames: int = 1, networks: Networks | None = None
) -> tuple[dict[str, FeatureSet], dict[str, FeatureSet]]:
    """Features of training and test shards by network name; only those that do not fit are made again.

    Under torchrun the ranks share the images; rank 0 writes the files, and the other ranks read them.

    Args:
        subject: networks and shards.
        every: whether samples without a class take part.
        frames: of each clip, whose features are averaged.
        networks: of the subject, which the caller goes on with; a run that goes on may remove the checkpoint.

    Raises:
        InputError: no sample can be used, features are not finite, or another command replaces their files before the
            other ranks have read them.

    Collectives: every rank must call it; those of `extract` and `keep_corpora`, two broadcasts of an object, and a
    gather of what went wrong.
    """
    train, test = _features(subject, (0, 1), every, frames, networks)
    return train, test


def test_features_of_subject(subject: Subject) -> dict[str, FeatureSet]:
    """As `features_of_subject`, of the labelled test images alone."""
    [test] = _features(subject, (1,), every=False, frames=1)
    return test


def _features(
    subject: Subject, places: tuple[int, ...], every: bool, frames: int, networks: Networks | None = None
) -> list[dict[str, FeatureSet]]:
    """Features of training (0) and test (1) shards by network name."""
    config, run_dir, weights, shards = subject.config, subject.run_dir, subject.weights, subject.shards
    alone = len(places) == 1
    plain = not every and frames == 1 and not alone  # the features that the report shows

    def path(name: str, place: int) -> Path:
        return path_of(run_dir, name, PARTS[place], every=every, frames=frames, alone=alone)

    names = list(NETWORKS) if config.evaluate.baselines else ["pretrained"]
    wanted = {(name, place): _stamp(name, place, subject, every, frames, alone) for name in names for place in places}
    kept: dict[tuple[str, int], FeatureSet | None] = {}
    on_rank_0(lambda: kept.update(_kept(path, wanted, subject, every, frames)))
    of_pixels = [("pixels", place) for place in places]
    if kept and "pixels" in names and None in [kept[one] for one in of_pixels]:
        kept |= dict.fromkeys(of_pixels)  # all lose their equal channels, or none does
    stale = from_rank_0([place for place in wanted if kept[place] is None] if kept else [])
    networks = networks or Networks(config, weights)
    made: dict[tuple[str, int], FeatureSet] = {}
    for place in places:
        if needed := [name for name, where in stale if where == place]:
            chosen = {name: networks[name] for name in needed}
            found = extract(shards[place], config, chosen, networks.device, labelled=not every, frames=frames)
            made |= {(name, place): features for name, features in found.items()}
    whole = {place: one for place, one in kept.items() if one is not None} | made

    def write() -> None:
        if made.keys() >= set(of_pixels):
            whole.update(zip(of_pixels, drop_equal_channels(*(made[one] for one in of_pixels)), strict=True))
        for name, place in stale:
            whole[name, place].save(path(name, place), wanted[name, place])
        if plain and (shown := exemplars_of(config, weights)):
            scores = exemplars.path_of(run_dir, shown.name)
            _keep_exemplars(config, scores, networks, whole["pretrained", 0], wanted["pretrained", 0])
        if plain and (drawn := pictures_of(config, weights)):
            _keep_pictures(subject, drawn, networks, whole["pretrained", 1].ids, wanted["pretrained", 1])

    on_rank_0(write)
    if plain:
        own = {key: wanted["pretrained", 0][key] for key in ("images", "network", "weights")}
        keep_corpora(run_dir, config, lambda images: networks["pretrained"](images), own, networks.device)
    whole = together(lambda: whole if rank() == 0 else _of_rank_0(path, wanted))
    return [{name: whole[name, place] for name in names} for place in places]


def _of_rank_0(
    path_to: Callable[[str, int], Path], wanted: dict[tuple[str, int], Stamp]
) -> dict[tuple[str, int], FeatureSet]:
    """The features that rank 0 has kept.

    Raises:
        InputError: others are there now, or they cannot be read.
    """
    found = {}
    for (name, place), stamp in wanted.items():
        path = path_to(name, place)
        found[name, place] = FeatureSet.load(path)
        if why := difference(found[name, place].made_from, stamp):
            raise InputError(f"{path}: another command has replaced these features meanwhile ({why}); run this again")
    return found


def _stamp(name: str, place: int, subject: Subject, every: bool, frames: int, alone: bool = False) -> Stamp:
    """What the features of one file depend on."""
    config, shards = subject.config, subject.stamps
    stamp = {"version": VERSION, "images": images_stamp(config), "shards": shards[place]}
    if every:
        stamp["samples"] = "all"
    if frames > 1:
        stamp["frames"] = frames
    if name == "pixels":
        return stamp if alone else {**stamp, "other_part": shards[1 - place]}
    network = network_stamp(config, subject.weights)
    if name == "untrained":
        return {**stamp, "network": network, "seed": config.run.seed}
    return {**stamp, "network": network, "weights": weights_stamp(subject.weights)}


def _kept(
    path_to: Callable[[str, int], Path],
    wanted: dict[tuple[str, int], Stamp],
    subject: Subject,
    every: bool,
    frames: int,
) -> dict[tuple[str, int], FeatureSet | None]:
    """The features on disk that are of what is wanted, None for others; a line says why those are made again."""
    kept, reasons = {}, dict[str, list[str]]()
    for (name, place), stamp in wanted.items():
        path = path_to(name, place)
        features, why = _read(path, stamp) if path.is_file() else (None, "")
        if features is not None and can_be_read(
            subject.shards[place], subject.config, features.ids, labelled=not every, frames=frames
        ):
            features, why = None, "images that could not be read before can be read now"
        kept[name, place] = features
        if why:
            reasons.setdefault(why, []).append(path.stem)
    for why, names in reasons.items():
        _log.info("recomputing the features of %s in %s: %s", ", ".join(names), subject.run_dir / "eval", why)
    return kept


def _read(path: Path, wanted: Stamp) -> tuple[FeatureSet | None, str]:
    try:
        features = FeatureSet.load(path)
    except InputError:
        return None, "they do not say what they were made from (another version wrote them), or are damaged"
    why = difference(features.made_from, wanted)
    return (None if why else features), why


class Networks:
    """The networks by name, each built when it is first needed: features that are kept need none."""

    def __init__(self, config: Config, weights: Weights) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._config, self._weights = config, weights
        self._method: Method | None = None

    @property
    def method(self) -> Method:
        """The method with the weights that are measured."""
        if self._method is None:
            self._method = method_of(self._config, self._weights).to(self.device)
        return self._method

    def method_named(self, name: str) -> Method:
        """The method `pretrained` or `untrained`."""
        return self.method if name == "pretrained" else self._untrained()

    def __getitem__(self, name: str) -> Callable[[Tensor], Tensor]:
        return pixels if name == "pixels" else self.method_named(name).encode

    def _untrained(self) -> Method:
        return method_of(self._config, self._weights, trained=False).to(self.device)


def _keep_exemplars(config: Config, path: Path, networks: Networks, train: FeatureSet, made_from: Stamp) -> None:
    stamp = {**made_from, "seed": config.run.seed}
    known = exemplars.load(path)
    if known is not None and json.dumps(known.made_from) == json.dumps(stamp):
        return  # without a look at the method: to build it takes a checkpoint
    if networks.method.has_exemplars():
        exemplars.save(path, networks.method, train, networks.device, config.run.seed, stamp)


def keep_pictures(subject: Subject, ids: Tensor) -> None:
    """Keep what the method draws of some of these test images, where it draws and they are not there yet."""
    if drawn := pictures_of(subject.config, subject.weights):
        networks = Networks(subject.config, subject.weights)
        _keep_pictures(subject, drawn, networks, ids, _stamp("pretrained", 1, subject, every=False, frames=1))


def _keep_pictures(subject: Subject, drawn: Pictures, networks: Networks, ids: Tensor, made_from: Stamp) -> None:
    path, config = task_pictures.path_of(subject.run_dir), subject.config
    stamp = task_pictures.stamp_of(config, made_from, drawn.columns)
    known = task_pictures.load(path)
    if known is None or json.dumps(known.made_from) != json.dumps(stamp):
        if sound := config.method.sounds():
            try:
                soundfile()
                require_sound([subject.shards[1]], sound)
            except InputError as error:
                _log.info("no pictures of the task are kept: %s", error)
                return
        task_pictures.save(path, networks.method, subject.shards[1], ids, config, networks.device, stamp)
