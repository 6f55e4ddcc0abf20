"""What a checkpoint was measured to be worth, in a few numbers, for the card that travels with exported weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from largescale.checkpoint.folder import Checkpoint
from largescale.checkpoint.model_card import Figure
from largescale.config.loading import config_of_values
from largescale.evaluate.headline import OWN, SETTINGS, is_share
from largescale.evaluate.made_from import Stamp, images_stamp, weights_stamp
from largescale.evaluate.protocols import PROTOCOLS
from largescale.evaluate.results import Record, read_results

_SAID = ("resize", "size", "mean", "std")
"""What a card says of how images become input."""


def figures_of(run_dir: Path) -> Callable[[Checkpoint], Sequence[Figure]]:
    """A function that finds the results measured on a checkpoint's weights, the newest of each kind, with images
    prepared as the card says.
    """

    def of_checkpoint(checkpoint: Checkpoint) -> list[Figure]:
        prepared = images_stamp(config_of_values(checkpoint.progress["config"], str(checkpoint.path)))
        wanted = {"weights": weights_stamp(checkpoint), "images": {key: prepared[key] for key in _SAID}}
        records = [one for one in read_results(run_dir).all if _is_of(one, wanted)]
        found: dict[tuple[str, str, str], Figure] = {}
        for record in sorted(records, key=lambda one: str(one["measured"])):
            found |= {(one.protocol, one.images, one.measure): one for one in _figures(record)}
        return list(found.values())

    return of_checkpoint


def _is_of(record: Record, wanted: Stamp) -> bool:
    made_from = record["made_from"]
    images = made_from.get("images") or {}
    return {"weights": made_from.get("weights"), "images": {key: images.get(key) for key in _SAID}} == wanted


def _figures(record: Record) -> Iterator[Figure]:
    """The measure that the result names as its main one, by its title, then the others of the same network."""
    result, untrained = (record["results"].get(network, {}) for network in (OWN, "untrained"))
    metric = record.get("metric")
    names = [name for name, value in result.items() if isinstance(value, float) and name not in SETTINGS]
    for name in sorted(names, key=lambda name: name != metric):
        title = str(record.get("metric_title", name)) if name == metric else name
        yield Figure(
            str(record["protocol"]),
            _images(record),
            title,
            result[name],
            untrained.get(name),
            is_share=is_share(record, name, result[name]),
        )


def _images(record: Record) -> str:
    """The name of the images that a result is of."""
    protocol = PROTOCOLS.get(record["protocol"])
    if protocol is not None and protocol.on_training_images:
        return f"{record['made_from']['train_shards']['name']} (training images)"
    return str(record["made_from"]["test_shards"]["name"])
