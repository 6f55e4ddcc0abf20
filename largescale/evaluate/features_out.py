"""`largescale features` and `largescale assign`: what a network makes of every image of a shard folder, one file per
shard, for other programs.

Ranks under torchrun share the shards. A shard that is done stays done: what is killed goes on with the next one, and
only what was made from other weights, images or settings is made again. Batches never span two shards, so the files are
the same for any number of ranks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from largescale.config import Config
from largescale.data.centre_crops import CentreCropMaker
from largescale.data.corpora import Corpus, open_corpus
from largescale.evaluate import assignments, feature_files
from largescale.evaluate.extract import Extracted, Network, check_finite, extract, features_of, is_readable
from largescale.evaluate.feature_files import DTYPES, ShardFeatures
from largescale.evaluate.features_wish import Wish
from largescale.evaluate.made_from import VERSION, Stamp, difference, images_stamp, network_stamp, weights_stamp
from largescale.evaluate.projection import Projection, check_components, of_folder
from largescale.evaluate.published import any_target_at
from largescale.evaluate.thumbnails import jpegs, shrinking
from largescale.evaluate.weights import Weights, method_of
from largescale.methods import Method
from largescale.parallel.precision import without_tf32
from largescale.processes import on_rank_0, rank, together, world_size
from shards.ground.errors import InputError
from shards.ground.files import at_work_in, remove_partial_files
from shards.stores.store import is_url

_THUMBNAIL = "thumbnail"
_MOST_COMPARED = 1000
"""Files of other shards whose stamps are read."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What is in the output folder.

    Attributes:
        num_images, num_shards: in it now, all of them of the wanted weights and settings.
        num_kept: shards that were there before.
        num_unreadable: images left out.
        num_features: width of an embedding.
        step: of the checkpoint; None for a file of weights.
        seconds: that it took.
        paths: of its Parquet, one per shard.
    """

    num_images: int
    num_shards: int
    num_kept: int
    num_unreadable: int
    num_features: int
    step: int | None
    seconds: float
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        step = "" if self.step is None else f", checkpoint of step {self.step}"
        kept = f", {self.num_kept} of them kept from before" if self.num_kept else ""
        left_out = f", {self.num_unreadable:,} unreadable images left out" if self.num_unreadable else ""
        what = f"{self.num_features} numbers per image" if self.num_features else "every head"
        kind = "features" if self.num_features else "assignments"
        return (
            f"{kind} of {self.num_images:,} images in {self.num_shards} files{kept}{left_out}; "
            f"{what}{step}, {self.seconds:.0f} s"
        )


@without_tf32()
def write_features(run: str | Path, shards: str, out: Path, wish: Wish, overrides: Sequence[str] = ()) -> Written:
    """Write the features of all images of a shard folder, with or without labels.

    Args:
        run: folder of a run, whose newest whole checkpoint is taken, RUN/checkpoints/step-..., or a file of weights.
        shards: folder, or URL, of the shards.
        out: folder to write to; what it has already is kept where it fits.
        wish: what to write.
        overrides: `key=value` replacements of the run's configuration.

    Raises:
        InputError: no checkpoint; shards or output folder cannot be used; features are not finite.

    Collectives: every rank must call it; 3 broadcasts of an object, one of errors; with `dim`, `extract`'s and 2 more.
    """
    started, target = time.perf_counter(), any_target_at(run, overrides)
    weights, config, warnings = target.agreed(list(overrides))
    for line in warnings:
        _log.warning("%s", line)
    wish.check(config, weights)
    corpus = open_corpus(shards, config.data)
    together(lambda: corpus.check_files(rank(), world_size()))
    on_rank_0(lambda: _check_out(out, shards))
    plan = Plan(config, weights, corpus, out, wish)
    with at_work_in(out, with_others=True):
        if wish.dim:
            plan.project()
        stale = on_rank_0(plan.stale)
        together(lambda: plan.make(stale[rank() :: world_size()]))
        on_rank_0(plan.check)
    paths = tuple(feature_files.path_of(out, entry.name) for entry in corpus.manifest.shards)
    written = [feature_files.about(path) for path in paths]
    return Written(
        sum(one["num_images"] for one in written),
        len(written),
        len(written) - len(stale),
        sum(one["num_unreadable"] for one in written),
        written[0]["num_features"] if written else 0,
        weights.step,
        time.perf_counter() - started,
        paths,
    )


def _check_out(out: Path, shards: str) -> None:
    for folder in (out.absolute(), *out.absolute().parents):
        if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
            raise InputError(f"{out}: is in the folder of the run {folder}; choose a folder of its own for features")
        if (folder / "manifest.json").is_file():
            raise InputError(f"{out}: is in the shard folder {folder}; choose a folder of its own for features")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; pass a folder")
    if not is_url(shards) and Path(shards).resolve() == out.resolve():
        raise InputError(f"{out}: is where the shards are; choose a folder of its own for features")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise InputError(f"{out}: cannot be written to; choose another folder, or change its permissions")
    with at_work_in(out, with_others=False):
        remove_partial_files(out)


@dataclass
class _OpenShard:
    """Features of one shard, batch by batch."""

    number: int
    found: list[Extracted] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        return [key for one in self.found for key in one.crops.keys]

    @property
    def ids(self) -> Tensor:
        return torch.cat([one.crops.ids for one in self.found])

    @property
    def labels(self) -> Tensor:
        return torch.cat([one.crops.labels for one in self.found])

    @property
    def num_unreadable(self) -> int:
        return sum(len(one.crops.skipped) for one in self.found)

    def features(self, network: str, width: int) -> Tensor:
        """Of all batches, float32 [N, width]."""
        return torch.cat([torch.empty(0, width), *(one.features[network] for one in self.found if one.features)])


class Plan:
    """What the files of all shards are to be, and how they are made."""

    def __init__(self, config: Config, weights: Weights, corpus: Corpus, out: Path, wish: Wish) -> None:
        self._config, self._weights, self._corpus, self._out, self._wish = config, weights, corpus, out, wish
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._method: Method | None = None
        self._projection: Projection | None = None
        self._num_exemplars: dict[str, int] = {}

    @property
    def method(self) -> Method:
        """With the weights that are asked, built when it is first needed: what is there already needs none."""
        if self._method is None:
            self._method = method_of(self._config, self._weights).to(self._device)
            if self._wish.assign or self._wish.assignments:
                assignments.require_exemplars(self._method)
        return self._method

    def project(self) -> None:
        """Have all files hold components of one projection: that of the output folder, or one fitted on the shards.

        Raises:
            InputError: it is damaged or cannot be written, or the features have not as many components.

        Collectives: every rank must call it; those of `of_folder` and `extract`.
        """

        def features(ids: np.ndarray) -> Tensor:
            check_components(self._wish.dim, self.method.num_features)
            networks = {"pretrained": self.method.encode}
            sets = extract(self._corpus, self._config, networks, self._device, ids=ids, labelled=False)
            return sets["pretrained"].features if sets else torch.empty(0, self.method.num_features)

        self._projection = of_folder(
            self._out, self._wish.dim, self._corpus, self._of_network(), features, whiten=self._wish.whiten
        )

    def _of_network(self) -> Stamp:
        """What features depend on, but for the images."""
        return {
            "layer": "features",
            "transform": images_stamp(self._config),
            "network": network_stamp(self._config, self._weights),
            "weights": weights_stamp(self._weights),
        }

    def _shared(self) -> Stamp:
        """What must be alike for features to be compared."""
        return {**self._of_network(), **({"projection": self._projection.stamp()} if self._projection else {})}

    def stamp(self, shard: int) -> Stamp:
        """What the features of a shard depend on."""
        entry = self._corpus.manifest.shards[shard]
        return {
            "version": [feature_files.VERSION, VERSION],
            "run": self._config.name,
            "step": self._weights.step,
            **self._shared(),
            "shard": {"tar": entry.checksum, "index": entry.index_checksum, "samples": entry.num_samples},
            "format": self._wish.form,
            "dtype": self._wish.dtype,
            "assign": "every head" if self._wish.assignments else self._wish.assign,
            "thumbnails": self._wish.thumbnails,
            "batch": self._config.evaluate.batch,
        }

    def stale(self) -> list[int]:
        """Shards whose features are missing or of something else; a line says why those are made again."""
        reasons: dict[str, list[str]] = {}
        stale = []
        for shard, path in enumerate(self._paths()):
            if path.is_file():
                self._require_same_kind(path)
                why = feature_files.difference_to(path, self._wish.form, self.stamp(shard))
                if not why and self._can_be_completed(shard, path):
                    why = "images that could not be read before can be read now"
                if not why:
                    continue
                reasons.setdefault(why, []).append(path.name)
            stale.append(shard)
        for why, names in reasons.items():
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            _log.info("%s: making %s%s again: %s", self._out, ", ".join(names[:3]), rest, why)
        if others := sorted(
            {path.name for path in self._out.glob("*.parquet")} - {path.name for path in self._paths()}
        ):
            for name in others[:_MOST_COMPARED]:
                self._require_same_kind(self._out / name)
            _log.warning("%s: also holds %d files of other shards, such as %s", self._out, len(others), others[0])
            if why := next(filter(None, map(self._not_like, others[:_MOST_COMPARED])), ""):
                _log.warning("%s: do not compare features of these files with the new ones: %s", self._out, why)
        return stale

    def _require_same_kind(self, path: Path) -> None:
        """Neither features nor assignments may take the place of the others."""
        try:
            found = feature_files.about(path).get("assign") == "every head"
        except InputError:
            return  # damaged, and made again
        if found != self._wish.assignments:
            kinds = ("assignments", "features") if found else ("features", "assignments")
            raise InputError(f"{path}: holds {kinds[0]}; choose another folder for {kinds[1]}")

    def _not_like(self, name: str) -> str:
        """How the features of a file that may be of other shards were made otherwise than these; empty if alike."""
        try:
            found = feature_files.about(self._out / name)
        except InputError:
            return ""  # of another program
        alike = ("layer", "transform", "network", "weights", "projection")
        why = difference(*({key: one[key] for key in alike if key in one} for one in (found, self._shared())))
        return f"{name}: {why}" if why else ""

    def check(self) -> None:
        """Check that every shard's file is there and as it must be.

        Raises:
            InputError: naming one that is not.
        """
        if self._projection and Projection.load(self._out).stamp() != self._projection.stamp():
            raise InputError(f"{self._out}: another command has put another projection there; run this one again")
        for shard, path in enumerate(self._paths()):
            if not path.is_file():
                raise InputError(f"{path}: is missing though a rank wrote it; do all ranks share {self._out}?")
            if why := feature_files.difference_to(path, self._wish.form, self.stamp(shard)):
                raise InputError(f"{path}: {why}; another command may have written there; run this one again")

    def make(self, shards: Sequence[int]) -> None:
        """Make the files of these shards, one after the other; each is written while the next one is computed.

        Raises:
            InputError: the shards are away, or features are not finite.
        """
        if not shards:
            return
        method = self.method
        batches, owners = self._batches(shards)
        bar = tqdm(total=sum(map(len, batches)), unit="image", leave=False, mininterval=1, disable=rank() > 0)
        source = features_of([self._corpus], self._config, self._networks(method), batches, self._device, keys=True)
        with closing(source), bar, ThreadPoolExecutor(1) as writer:
            open_shard, writing = _OpenShard(shards[0]), None
            for found in source:
                if owners[found.crops.number] != open_shard.number:
                    writing = self._hand_over(open_shard, method, writer, writing)
                    open_shard = _OpenShard(owners[found.crops.number])
                open_shard.found.append(found)
                bar.update(len(batches[found.crops.number]))
            self._hand_over(open_shard, method, writer, writing).result()

    def _hand_over(
        self, done: _OpenShard, method: Method, writer: ThreadPoolExecutor, writing: Future[None] | None
    ) -> Future[None]:
        if writing is not None:
            writing.result()  # one file at a time, so that memory holds two shards at most
        rows, about = self._rows(done, method), {**self.stamp(done.number), "num_unreadable": done.num_unreadable}
        about["num_shards"] = len(self._corpus.manifest.shards)
        if self._num_exemplars:
            about["num_exemplars"] = self._num_exemplars
        return writer.submit(feature_files.write, self._out, self._wish.form, rows, about)

    def _rows(self, done: _OpenShard, method: Method) -> ShardFeatures:
        manifest, name = self._corpus.manifest, self._corpus.manifest.shards[done.number].name
        features = done.features("pretrained", method.num_features)
        check_finite("pretrained", features, name)
        assigned: dict[str, pa.Array] = {}
        if self._wish.assignments:
            assigned, self._num_exemplars = assignments.every_head(method, features, self._device)
        elif self._wish.assign:
            assigned = assignments.first_head(method, features, self._device)
        return ShardFeatures(
            name,
            done.keys,
            done.ids.numpy() - int(self._corpus.first_samples[done.number]),
            None if self._wish.assignments else self._embeddings(features, name),
            done.labels.numpy() if manifest.classes else None,
            tuple(manifest.classes),
            assigned,
            self._pictures(done),
        )

    def _embeddings(self, features: Tensor, name: str) -> np.ndarray:
        """As they are written."""
        written = self._projection.of(features) if self._projection else features
        embeddings: np.ndarray = written.numpy().astype(DTYPES[self._wish.dtype])
        if not np.isfinite(embeddings).all():
            largest = float(written.abs().max())
            raise InputError(f"{name}: features of up to {largest:.3g} do not fit into fp16; use --dtype fp32")
        return embeddings

    def _networks(self, method: Method) -> dict[str, Network]:
        networks: dict[str, Network] = {"pretrained": method.encode}
        if self._wish.thumbnails:
            networks[_THUMBNAIL] = shrinking(self._config, self._wish.thumbnails)
        return networks

    def _pictures(self, done: _OpenShard) -> list[bytes] | None:
        side = self._wish.thumbnails
        return jpegs(done.features(_THUMBNAIL, 3 * side * side), side) if side else None

    def _batches(self, shards: Sequence[int]) -> tuple[list[np.ndarray], list[int]]:
        """Batches of sample ids, and the shard of each."""
        first, batch = self._corpus.first_samples, self._config.evaluate.batch
        batches, owners = [], []
        for shard in shards:
            ids = np.arange(first[shard], first[shard + 1])
            for start in range(0, max(1, len(ids)), batch):
                batches.append(ids[start : start + batch])
                owners.append(shard)
        return batches, owners

    def _paths(self) -> list[Path]:
        return [feature_files.path_of(self._out, entry.name) for entry in self._corpus.manifest.shards]

    def _can_be_completed(self, shard: int, path: Path) -> bool:
        """Whether an image that had to be left out can be read by now."""
        if not feature_files.about(path)["num_unreadable"]:
            return False
        first = self._corpus.first_samples
        missing = np.setdiff1d(np.arange(first[shard + 1] - first[shard]), feature_files.rows_of(path))
        maker = CentreCropMaker([self._corpus], self._config)
        return any(is_readable(maker, int(first[shard] + row)) for row in missing)
