"""What features and results were made from: a stamp that is stored with them and compared before they are used.

A stamp is plain JSON. It names the weights by their hash and the shards by their fingerprints, so that neither another
run in the same folder nor other images at the same path can pass for what was measured. Where shards lie (`location`)
and what they are called is for people, and no part of the comparison: a folder that was moved holds the same images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from largescale.config import Config, flatten, without_later_defaults
from largescale.data.corpora import Corpus
from largescale.evaluate.weights import Published, Weights
from largescale.models.image_classifier import described
from shards.format.tar import file_checksum
from shards.stores.store import is_url

VERSION = 1
"""Of the stamp and of what it stands for. To be raised when the same inputs give other features."""

Stamp = dict[str, Any]

_FOR_PEOPLE = ("location", "name", "step", "file")
_ABSENT = "nothing"


def weights_stamp(weights: Weights) -> Stamp:
    """Step and hash of a checkpoint, or name and hash of a file that others published."""
    if isinstance(weights, Published):
        return {"file": weights.path.name, "hash": weights.content_hash}
    return {"step": weights.step, "hash": weights.content_hash}


def words_for(weights: Stamp) -> str:
    """What `weights_stamp` stands for, for people."""
    return f"weights of {weights['file']}" if "file" in weights else f"checkpoint of step {weights['step']}"


def shards_stamp(corpus: Corpus, location: str) -> Stamp:
    """The images and labels of a shard folder, and where they were found."""
    manifest = corpus.manifest
    place = location if is_url(location) else str(Path(location).resolve())
    labels = xxhash.xxh3_128()
    labels.update(json.dumps(manifest.classes).encode())
    for number, shard in enumerate(manifest.shards):
        # Labels are in the index alone, and an index can be made again with other ones.
        here = not shard.index_checksum and corpus.cache is None
        labels.update((file_checksum(manifest.index_path(number)) if here else shard.index_checksum).encode())
    return {
        "location": place,
        "name": place.rstrip("/").rsplit("/", 1)[-1],
        "fingerprint": corpus.fingerprint(),
        "labels": labels.hexdigest(),
        "samples": manifest.num_samples,
        "classes": len(manifest.classes),
    }


def network_stamp(config: Config, weights: Weights) -> Stamp:
    """The architecture, by the keys that decide it."""
    # How it is run, and where it began.
    beside = ("model.recompute_stages", "model.compile_stages", "model.weights", "model.mask")
    flat = without_later_defaults(flatten(config))
    keys = [key for key in sorted(flat) if key.startswith("model.") and key not in beside]
    method = {} if isinstance(weights, Published) else {"method.name": config.method.name}
    return {**method, **{key: flat[key] for key in keys}}


def images_stamp(config: Config) -> Stamp:
    """How an image becomes the input of a network."""
    return {
        "resize": config.evaluate.resize,
        "size": config.evaluate.size,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "max_pixels": config.data.max_pixels,
        "scaled_decode": config.data.scaled_decode,
        "precision": "fp32",
    }


def _head_stamp(weights: Weights) -> Stamp:
    """The layers of a head that a file of weights has, by which protocols measure that look through heads."""
    if isinstance(weights, Published) and weights.found.projection is not None:
        return {"head": described(weights.found.projection)}
    return {}


def result_stamp(
    config: Config, weights: Weights, train: Stamp, test: Stamp, *, depends_on: Sequence[str] = ()
) -> Stamp:
    """All that an accuracy depends on but for the settings of its protocol.

    Args:
        config, weights: what is measured.
        train, test: stamps of shards.
        depends_on: beginnings of keys that matter to this protocol and not to others.
    """
    also = {key: value for key, value in flatten(config).items() if key.startswith(tuple(depends_on))}
    return {
        "version": VERSION,
        "weights": weights_stamp(weights),
        "network": {**network_stamp(config, weights), **_head_stamp(weights)},
        "seed": config.run.seed,
        "images": images_stamp(config),
        "train_shards": train,
        "test_shards": test,
        **({"settings": also} if also else {}),
    }


def difference(before: Stamp, now: Stamp) -> str:
    """The first thing in which two stamps differ, in words; empty if they stand for the same."""
    was, is_now = _flat(before), _flat(now)
    for key in [*is_now, *was]:
        if was.get(key, _ABSENT) != is_now.get(key, _ABSENT):
            return f"{key} was {_short(was.get(key, _ABSENT))} and is now {_short(is_now.get(key, _ABSENT))}"
    return ""


def identity(stamp: Stamp) -> str:
    """Eight characters that stand for a stamp, for names of files."""
    return xxhash.xxh3_64_hexdigest(json.dumps(_flat(stamp), sort_keys=True).encode())[:8]


def _flat(stamp: Any, prefix: str = "") -> Stamp:
    if not isinstance(stamp, dict):
        return {prefix: stamp}
    flat: Stamp = {}
    for key, value in stamp.items():
        if key not in _FOR_PEOPLE:
            flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:18]}..."
