"""`largescale features`: embeddings of every image of a shard folder, one file per shard, for other programs.

Ranks under torchrun share the shards. A shard that is done stays done: what is killed goes on with the next one, and
only what was made from other weights, images or settings is made again. Batches never span two shards, so the files are
the same for any number of ranks.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from largescale.config import Config
from largescale.data.centre_crops import CentreCropMaker
from largescale.data.corpora import Corpus, open_corpus
from largescale.evaluate import feature_files
from largescale.evaluate.extract import Extracted, Network, check_finite, features_of, is_readable
from largescale.evaluate.feature_files import DTYPES, FORMS, ShardFeatures
from largescale.evaluate.made_from import VERSION, Stamp, images_stamp, network_stamp, weights_stamp
from largescale.evaluate.published import any_target_at
from largescale.evaluate.weights import Published, Weights, exemplars_of, method_of
from largescale.methods import Method
from largescale.processes import from_rank_0, on_rank_0, rank, together, world_size
from shards.ground.errors import InputError
from shards.ground.files import at_work_in, remove_partial_files
from shards.stores.store import is_url

_THUMBNAIL = "thumbnail"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """How features are to be written.

    Attributes:
        form: one of `feature_files.FORMS`.
        dtype: one of `feature_files.DTYPES`.
        assign: whether to add what the method assigns each image to, and its score.
        thumbnails: side in pixels of a JPEG of each image, for viewers; 0 for none.
    """

    form: str = "parquet"
    dtype: str = "fp16"
    assign: bool = False
    thumbnails: int = 0

    def check(self, config: Config, weights: Weights) -> None:
        """Refuse what cannot be done.

        Raises:
            InputError: says what, and what can.
        """
        if self.form not in FORMS:
            raise InputError(f"--format={self.form}: expected {' or '.join(FORMS)}")
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype={self.dtype}: expected {' or '.join(DTYPES)}")
        if self.assign and exemplars_of(config, weights) is None:
            if isinstance(weights, Published):
                raise InputError(f"--assign: {weights.path} is read without its heads; leave it out")
            raise InputError(
                f"--assign: method.name={config.method.name} assigns images to nothing (it learns no "
                f"clusters); leave it out"
            )
        if not 0 <= self.thumbnails <= config.evaluate.size:
            raise InputError(f"--thumbnails={self.thumbnails}: expected 0 to evaluate.size={config.evaluate.size}")


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
    """

    num_images: int
    num_shards: int
    num_kept: int
    num_unreadable: int
    num_features: int
    step: int | None
    seconds: float

    def __str__(self) -> str:
        step = "" if self.step is None else f", checkpoint of step {self.step}"
        kept = f", {self.num_kept} of them kept from before" if self.num_kept else ""
        left_out = f", {self.num_unreadable:,} unreadable images left out" if self.num_unreadable else ""
        return (
            f"features of {self.num_images:,} images in {self.num_shards} files{kept}{left_out}; "
            f"{self.num_features} numbers per image{step}, {self.seconds:.0f} s"
        )


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

    Collectives: every rank must call it; three broadcasts of an object, and an exchange of what went wrong.
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
        found: list[int] = []
        on_rank_0(lambda: found.extend(plan.stale()))
        stale = from_rank_0(found)
        together(lambda: plan.make(stale[rank() :: world_size()]))
        on_rank_0(plan.check)
    names = [entry.name for entry in corpus.manifest.shards]
    written = [feature_files.about(feature_files.path_of(out, name)) for name in names]
    return Written(
        sum(one["num_images"] for one in written),
        len(written),
        len(written) - len(stale),
        sum(one["num_unreadable"] for one in written),
        written[0]["num_features"] if written else 0,
        weights.step,
        time.perf_counter() - started,
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
        return sum(one.crops.num_unreadable for one in self.found)

    def features(self, network: str, width: int) -> Tensor:
        """Of all batches, float32 [N, width]."""
        return torch.cat([torch.empty(0, width), *(one.features[network] for one in self.found if one.features)])


class Plan:
    """What the files of all shards are to be, and how they are made."""

    def __init__(self, config: Config, weights: Weights, corpus: Corpus, out: Path, wish: Wish) -> None:
        self._config, self._weights, self._corpus, self._out, self._wish = config, weights, corpus, out, wish
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def stamp(self, shard: int) -> Stamp:
        """What the features of a shard depend on."""
        entry = self._corpus.manifest.shards[shard]
        return {
            "version": [feature_files.VERSION, VERSION],
            "run": self._config.name,
            "step": self._weights.step,
            "layer": "features",
            "transform": images_stamp(self._config),
            "network": network_stamp(self._config, self._weights),
            "weights": weights_stamp(self._weights),
            "shard": {"tar": entry.checksum, "index": entry.index_checksum, "samples": entry.num_samples},
            "format": self._wish.form,
            "dtype": self._wish.dtype,
            "assign": self._wish.assign,
            "thumbnails": self._wish.thumbnails,
            "batch": self._config.evaluate.batch,
        }

    def stale(self) -> list[int]:
        """Shards whose features are missing or of something else; a line says why those are made again."""
        reasons: dict[str, list[str]] = {}
        stale = []
        for shard, path in enumerate(self._paths()):
            if path.is_file():
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
            _log.warning("%s: also holds %d files of other shards, such as %s", self._out, len(others), others[0])
        return stale

    def check(self) -> None:
        """Check that every shard's file is there and as it must be.

        Raises:
            InputError: naming one that is not.
        """
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
        method = method_of(self._config, self._weights).to(self._device)
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
        return writer.submit(feature_files.write, self._out, self._wish.form, rows, about)

    def _rows(self, done: _OpenShard, method: Method) -> ShardFeatures:
        manifest, name = self._corpus.manifest, self._corpus.manifest.shards[done.number].name
        features = done.features("pretrained", method.num_features)
        check_finite("pretrained", features, name)
        embeddings = features.numpy().astype(DTYPES[self._wish.dtype])
        if not np.isfinite(embeddings).all():
            largest = float(features.abs().max())
            raise InputError(f"{name}: features of up to {largest:.3g} do not fit into fp16; use --dtype fp32")
        assigned = None
        if self._wish.assign and method.exemplars is not None:
            with torch.no_grad():
                scores, numbers = method.exemplar_scores(features.to(self._device)).float().max(dim=1)
            assigned = method.exemplars.name, numbers.cpu().numpy(), scores.cpu().numpy()
        return ShardFeatures(
            name,
            done.keys,
            done.ids.numpy() - int(self._corpus.first_samples[done.number]),
            embeddings,
            done.labels.numpy() if manifest.classes else None,
            tuple(manifest.classes),
            assigned,
            _jpegs(done, self._wish.thumbnails) if self._wish.thumbnails else None,
        )

    def _networks(self, method: Method) -> dict[str, Network]:
        networks: dict[str, Network] = {"pretrained": method.encode}
        if self._wish.thumbnails:
            networks[_THUMBNAIL] = _thumbnails(self._config, self._wish.thumbnails)
        return networks

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


def _thumbnails(config: Config, side: int) -> Network:
    """A network whose features are the small image itself, [B, 3 * side * side] from 0 to 255."""

    def shrink(images: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, device=images.device)[:, None, None] for values in (config.data.mean, config.data.std)
        )
        return (interpolate(images * std + mean, (side, side), mode="area") * 255).round().clamp(0, 255).flatten(1)

    return shrink


def _jpegs(done: _OpenShard, side: int) -> list[bytes]:
    small = done.features(_THUMBNAIL, 3 * side * side).to(torch.uint8).view(-1, 3, side, side).permute(0, 2, 3, 1)
    return [_jpeg(pixels) for pixels in small.numpy()]


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
