"""What a protocol measures, and on what: weights, and training and test shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from largescale.config import Config
from largescale.data.corpora import Corpus
from largescale.evaluate.extract import labelled_corpus
from largescale.evaluate.made_from import Stamp, identity, result_stamp, shards_stamp
from largescale.evaluate.weights import Weights
from shards.format.manifest import Manifest
from shards.ground.errors import InputError


@dataclass(frozen=True)
class Subject:
    """What is measured, and on what.

    Attributes:
        run_dir: where features and results go.
        weights: those that are measured.
        config: that describes them.
        shards: training and test shards.
        stamps: of these.
        made_from: all that its result depends on but for the settings of its protocol.
        task: identifies the measurement: its protocol, and all that decides its result.
    """

    run_dir: Path
    weights: Weights
    config: Config
    shards: tuple[Corpus, Corpus]
    stamps: tuple[Stamp, Stamp]
    made_from: Stamp
    task: str

    @staticmethod
    def of(
        run_dir: Path,
        weights: Weights,
        config: Config,
        *,
        protocol: str,
        own_keys: Sequence[str],
        classes: bool,
        tests: bool = True,
        trains: bool = True,
        depends_on: Sequence[str] = (),
    ) -> Subject:
        """With the shards that the configuration names.

        Args:
            run_dir, weights, config: as of the attributes.
            protocol: its name.
            own_keys: its keys under `evaluate`.
            classes: whether samples must be of classes.
            tests: whether test shards are measured on; if not, the training shards stand in their place.
            trains: whether anything is learnt of training shards; if not, the test shards stand in their place.
            depends_on: beginnings of other keys that decide its result.

        Raises:
            InputError: they are not there, have no labels or other classes.
        """
        shards, locations = _labelled_shards(config, classes, tests, trains)
        stamps = shards_stamp(shards[0], locations[0]), shards_stamp(shards[1], locations[1])
        settings = {key: getattr(config.evaluate, key) for key in own_keys}
        made_from = result_stamp(config, weights, *stamps, depends_on=depends_on)
        task = identity({"settings": settings, "made_from": made_from})
        return Subject(run_dir, weights, config, shards, stamps, made_from, f"{protocol}-{task}")


def _labelled_shards(
    config: Config, classes: bool, tests: bool, trains: bool
) -> tuple[tuple[Corpus, Corpus], tuple[str, str]]:
    """Training and test shards, and where they are."""
    if not tests:
        place = config.evaluate.train_shards or config.data.shards
        alone = labelled_corpus(place, "evaluate.train_shards", config, classes=classes)
        return (alone, alone), (place, place)
    if not trains:
        place = config.data.eval_shards
        alone = labelled_corpus(place, "data.eval_shards", config, classes=classes)
        return (alone, alone), (place, place)
    # Both folders first: a missing one must not cost the time of the other.
    locations = config.evaluate.train_shards or config.data.shards, config.data.eval_shards
    shards = (
        labelled_corpus(locations[0], "evaluate.train_shards", config, classes=classes),
        labelled_corpus(locations[1], "data.eval_shards", config, classes=classes),
    )
    if classes:
        _check_same_classes(shards[0].manifest, shards[1].manifest)
    return shards, locations


def _check_same_classes(train: Manifest, test: Manifest) -> None:
    # Labels are positions in the list of classes.
    if train.classes != test.classes:
        only, how = sorted(set(train.classes) ^ set(test.classes)), "their order differs"
        if only:
            side = train if only[0] in train.classes else test
            how = f"{only[0]} is only in one of them, {side.root}"
        raise InputError(
            f"data.eval_shards={test.root}: its {len(test.classes)} classes are not the {len(train.classes)} of "
            f"{train.root} ({how}); convert both from images of the same classes, without a class that the other side "
            f"has no image of, or, where classes are numbers, both with the same --class-names FILE"
        )
