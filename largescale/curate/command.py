"""`largescale curate`: what of a pile to train on.

    embeddings --coarse k-means, sorted by it--> buckets --in each: duplicates, k-means--> first level
        --k-means of centroids, with resampling--> further levels --shares from the top--> subset

Ranks under torchrun share files and buckets; what is found does not depend on their number. See `workshop` for what is
kept when the command is killed.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from largescale.curate import memory, stages
from largescale.curate.buckets import coarse_centroids, sort_rows
from largescale.curate.embeddings import Embeddings, read_embeddings
from largescale.curate.page import write_page
from largescale.curate.pictures import Pictures
from largescale.curate.result import Outcome, write_images
from largescale.curate.summary import record_of, sentence
from largescale.curate.wish import Wish
from largescale.curate.workshop import RECORD, Workshop, remove_workshop, workshop
from largescale.distributed.launch import own_launch
from largescale.processes import barrier, on_rank_0, together, world_size
from largescale.run.memory import footprint, gpu_bytes, host_bytes
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError
from shards.ground.files import atomic_write, sync_folder

VERSION = 2
"""To be raised when the same features and settings give another subset."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """What a curation reads, and where it goes.

    Attributes:
        features: folder of `largescale features`.
        out: folder to make.
        shards: that the features are of; None if they are not at hand.
        memory_gb: that a rank may use; 0 takes what this machine has, or its GPU if that is less.
    """

    features: Path
    out: Path
    shards: Path | None = None
    memory_gb: float = 0.0


def curate(places: Places, wish: Wish, device: torch.device) -> str:
    """Make a curation, or find that it is made; returns what is there in a line.

    Raises:
        InputError: features, shards or settings that cannot be used; OUT holds something else.

    Collectives: every rank must call it.
    """
    embeddings = together(lambda: _embeddings(places))
    wish.check(embeddings.num_images)
    stamp = {"version": VERSION, "features": embeddings.fingerprint(), "settings": wish.stamp()}
    places = replace(places, out=places.out.absolute())  # "." has no name of its own
    if found := on_rank_0(lambda: _done(places, stamp, embeddings)):
        return found
    limit = _limit(places, device)
    needed = memory.stages(embeddings, wish, world_size())
    together(lambda: memory.check(needed, limit))
    name, size = memory.most(needed)
    _log.info(
        "%s images of %d numbers, %d coarse clusters; at most %.2f GB on each rank, for %s; %.1f GB of disk beside %s",
        f"{embeddings.num_images:,}",
        embeddings.width,
        wish.num_coarse(embeddings.num_images),
        size / 1e9,
        name,
        embeddings.num_images * (embeddings.width * embeddings.dtype.itemsize + 8) / 1e9,
        places.out,
    )
    with workshop(places.out, stamp) as place:
        text = _Making(place, places, embeddings, wish, device, limit).run(stamp)
    return text


def _embeddings(places: Places) -> Embeddings:
    return read_embeddings(places.features, read_manifest(places.shards) if places.shards else None)


def _limit(places: Places, device: torch.device) -> float:
    if places.memory_gb < 0:
        raise InputError(f"--memory-gb={places.memory_gb}: expected 0 or more")
    if places.memory_gb:
        return places.memory_gb * 1e9
    launch = own_launch()
    here = host_bytes(max(1, launch.local_ranks) if launch else 1, footprint())
    return min(here, gpu_bytes()) if device.type == "cuda" else here


def _done(places: Places, stamp: dict[str, Any], embeddings: Embeddings) -> str:
    """What is in OUT, if it is what is wanted, and that nothing is to do; empty if nothing is there."""
    out = places.out
    if out.is_symlink() or out.is_file():
        raise InputError(f"{out}: is a {'link' if out.is_symlink() else 'file'}; pass a folder that does not exist yet")
    if not out.exists() or not any(out.iterdir()):
        return ""
    try:
        record = json.loads((out / RECORD).read_text())
        same = all(record[key] == stamp[key] for key in stamp)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out}: is not empty; pass a folder that does not exist yet") from error
    if not same:
        raise InputError(
            f"{out}: holds another curation (of other features, or with other settings); remove it, or "
            f"choose another OUT"
        )
    remove_workshop(out)  # of a command that was killed at its very end
    found = f"{sentence(record)}; nothing to do"
    if record.get("pictures", True) or not Pictures(embeddings, places.shards).are_there:
        return found
    return f"{found}; its page was made without pictures: to have them, remove {out} and run the command again"


class _Making:
    def __init__(
        self, place: Workshop, places: Places, embeddings: Embeddings, wish: Wish, device: torch.device, limit: float
    ) -> None:
        self._place, self._places, self._embeddings = place, places, embeddings
        self._wish, self._device, self._limit = wish, device, limit
        self._seconds: dict[str, float] = {}

    def run(self, stamp: dict[str, Any]) -> str:
        """Go through the stages, and put the result in its place."""
        wish, device = self._wish, self._device
        with self._timed("coarse clusters"):
            centroids = coarse_centroids(self._place, self._embeddings, wish, device)
        with self._timed("sorting"):
            buckets = sort_rows(self._place, self._embeddings, centroids)
        largest = int(together(lambda: buckets.sizes.max()))
        size = memory.bucket_bytes(largest, wish, buckets.count, buckets.width)
        remedy = "use more clusters with --coarse, or features with --dim"
        needed = {f"a coarse cluster of {largest:,} images": (size, remedy)}
        together(lambda: memory.check(needed, self._limit))
        epsilon = wish.epsilon
        with self._timed("duplicates"):
            if wish.fraction:
                epsilon = stages.find_epsilon(self._place, buckets, centroids, wish)
            if epsilon:
                stages.drop_duplicates(self._place, buckets, centroids, epsilon)
        with self._timed("levels"):
            pile = together(lambda: stages.Pile(self._place, buckets, wish, deduplicated=epsilon > 0))
            if wish.levels:
                pile.cluster(device)
                together(pile.share_out)
        with self._timed("result"):
            outcome = write_images(pile, self._embeddings, self._place.result)
        return self._publish(stamp, outcome, epsilon)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        barrier()
        self._seconds[name] = round(time.perf_counter() - started, 3)

    def _publish(self, stamp: dict[str, Any], outcome: Outcome, epsilon: float) -> str:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record = record_of(stamp, outcome, self._embeddings, epsilon) | {
            "seconds": self._seconds,
            "num_ranks": world_size(),
            "peak_memory_bytes": peak,
        }

        def publish() -> None:
            out, result = self._places.out, self._place.result
            pictures = Pictures(self._embeddings, self._places.shards)
            record["pictures"] = pictures.are_there
            write_page(result / "curation.html", record, outcome, pictures)
            with atomic_write(result / RECORD) as file:
                file.write((json.dumps(record, indent=1) + "\n").encode())
            if out.is_dir():
                out.rmdir()
            os.replace(result, out)
            sync_folder(out.absolute().parent)
            self._place.remove()

        barrier()  # all tables are written
        on_rank_0(publish)
        return sentence(record)


def with_levels(wish: Wish, levels: str, without: str = "") -> Wish:
    """The wish with `--levels` and `--without` as they are written, such as 1000000,50000,1000.

    Raises:
        InputError: not numbers.
    """
    return replace(wish, levels=_numbers("--levels", levels), without=_numbers("--without", without))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part.replace("_", "")) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(f"{option}={text}: expected numbers with commas between them, such as 10000,500") from error
