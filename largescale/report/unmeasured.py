"""What to run where nothing is measured yet: another command where images have no labels."""

from __future__ import annotations

from largescale.config import Config
from largescale.data.corpora import open_corpus
from shards.ground.errors import InputError
from shards.stores.store import is_url


def first_protocol(config: Config) -> str:
    """The protocol that a run is measured by first."""
    return "spectrum" if _without_labels(config) else "knn"


def needed(config: Config) -> str:
    """What has to be done before images are shown by their features, as a sentence."""
    if unlabelled := _without_labels(config):
        return f"Needs labels, and {unlabelled}: pass others to `largescale evaluate knn RUN`."
    return "Needs `largescale evaluate knn RUN`."


def _without_labels(config: Config) -> str:
    """Shards that would be measured on and have no labels, with their key; empty if there are none, or nobody knows."""
    trained_on = config.data.shards if isinstance(config.data.shards, str) else ""
    places = {
        "evaluate.train_shards": config.evaluate.train_shards or trained_on,
        "data.eval_shards": config.data.eval_shards,
    }
    for key, place in places.items():
        if not place or is_url(place):  # a page is not to wait for a server
            continue
        try:
            if not open_corpus(place, config.data).manifest.classes:
                return f"{key}={place} has none"
        except (InputError, OSError):
            continue
    return ""
