"""Fewer numbers per image: the principal components of features, one projection for all files of a folder.

    _projection.safetensors   mean [D], components [N, D], variance [N] (share of each component), float64

It is fitted on rank 0, on features of at most 10,000 images (ten per component, if that is more), evenly spread over at
most 64 shards that are evenly spread themselves: the same images for any number of ranks. An image becomes
(features - mean) @ components.T; if they are whitened, components are divided by a power of the standard deviation of
what they give: of the first power, so that it is 1, or of less. What is there serves any shards: it is fitted again
only if it is of other weights, another network, or images transformed otherwise.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from torch import Tensor

from largescale.data.corpora import Corpus
from largescale.evaluate.made_from import Stamp, difference
from largescale.processes import on_rank_0
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

NAME = "_projection.safetensors"
"""Begins as files do that readers of a folder of Parquet pass over."""

VERSION = 1
"""Of the file and of how it is fitted."""

_FEWEST_IMAGES, _IMAGES_PER_COMPONENT, _MOST_SHARDS = 10_000, 10, 64
_WIDEST = 4096
"""Features up to which all singular vectors are computed; of wider ones a randomised method finds those wanted."""
_LEAST = 1e-6
"""Of the largest standard deviation: a component of less is rounding, and not whitened."""
_ABOUT = "about"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Projection:
    """Principal components.

    Attributes:
        mean: of the features, float64 [D].
        components: orthonormal rows, of falling variance, each divided by a power of its standard deviation if they are
            whitened, float64 [N, D].
        variance: share of the variance that each has, float64 [N].
        about: what they were fitted on.
    """

    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    about: Stamp

    def of(self, features: Tensor) -> Tensor:
        """Features [M, D] in components, float32 [M, N]."""
        with threadpool_limits(1):  # so that the number of threads does not decide the last bit
            found = (features.double().cpu().numpy() - self.mean) @ self.components.T
        return torch.from_numpy(found.astype(np.float32))

    def stamp(self) -> Stamp:
        """Identifies it, for files of features."""
        digest = xxhash.xxh3_128()
        for values in (self.mean, self.components):
            digest.update(np.ascontiguousarray(values).data)
        return {"components": len(self.components), "hash": digest.hexdigest()}

    def save(self, out: Path) -> None:
        """Write it into a folder, atomically."""
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in ("mean", "components", "variance")}
        with atomic_write(out / NAME) as file:
            file.write(save(tensors, metadata={_ABOUT: json.dumps(self.about)}))

    @staticmethod
    def load(out: Path) -> Projection:
        """Read what `save` wrote.

        Raises:
            InputError: missing, damaged, or of another program.
        """
        try:
            with safe_open(out / NAME, framework="np") as file:
                mean, components, variance = (file.get_tensor(name) for name in ("mean", "components", "variance"))
                about = dict(json.loads(file.metadata()[_ABOUT]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{out / NAME}: not a projection that largescale wrote ({error}); remove it") from error
        if components.ndim != 2 or mean.shape != components.shape[1:] or variance.shape != components.shape[:1]:
            raise InputError(f"{out / NAME}: its arrays do not fit each other; remove it")
        return Projection(mean, components, variance, about)


def of_folder(
    out: Path,
    num_components: int,
    corpus: Corpus,
    made_from: Stamp,
    features: Callable[[np.ndarray], Tensor],
    *,
    whiten: float = 0.0,
) -> Projection:
    """The projection of an output folder; where it has none that fits, one is fitted and put there.

    Args:
        out: the folder, which all ranks share.
        num_components: N.
        corpus: whose images it is fitted on.
        made_from: what decides features, but for the images.
        features: those of samples by their ids, [M, D] on rank 0; called on all ranks or on none.
        whiten: power of its standard deviation that each component is divided by; 1 makes all variances 1.

    Raises:
        InputError: it is damaged or cannot be written, or the features have not as many components.

    Collectives: every rank must call it; two broadcasts of an object, and those of `features`.
    """
    wanted = {"version": VERSION, "components": num_components, "whitened": float(whiten), **made_from}
    why = on_rank_0(lambda: _why_fitted(out, wanted))
    if why is not None:
        _log.info("%s: fitting a projection%s", out, f" again: {why}" if why else "")
        found = features(chosen_images(corpus, num_components))
        on_rank_0(lambda: _fit(out, found, num_components, wanted, corpus, whiten=whiten))
    return Projection.load(out)


def _why_fitted(out: Path, wanted: Stamp) -> str | None:
    """Why a projection is to be fitted, empty if there is none; None if there is one that fits."""
    if not (out / NAME).is_file():
        return ""
    found = Projection.load(out)
    about = {"whitened": 0.0, **found.about}  # files of before there was a choice do not say
    return difference({key: value for key, value in about.items() if key in wanted}, wanted) or None


def _fit(out: Path, features: Tensor, num_components: int, wanted: Stamp, corpus: Corpus, *, whiten: float) -> None:
    images = {"name": corpus.manifest.name, "fingerprint": corpus.fingerprint(), "num_images": len(features)}
    found = fitted(features, num_components, {**wanted, "fitted_on": images}, whiten=whiten)
    found.save(out)
    share = f"{100 * float(found.variance.sum()):.1f}%"
    _log.info("%s: %d components, %s of the variance of %d images", out, num_components, share, len(features))


def chosen_images(corpus: Corpus, num_components: int) -> np.ndarray:
    """Sample ids that a projection is fitted on, ascending, int64."""
    return spread_over(corpus, max(_FEWEST_IMAGES, _IMAGES_PER_COMPONENT * num_components), _MOST_SHARDS)


def spread_over(corpus: Corpus, num_images: int, most_shards: int) -> np.ndarray:
    """At most so many sample ids, evenly spread over at most so many shards that are evenly spread: ascending, int64.

    Shards in a store are fetched whole, so they are few.
    """
    first, sizes = corpus.first_samples, corpus.shard_sizes()
    filled = np.flatnonzero(sizes)
    shards = filled[_spread(len(filled), most_shards)]
    there = np.concatenate([np.empty(0, np.int64), *(np.arange(first[shard], first[shard + 1]) for shard in shards)])
    return there[_spread(len(there), num_images)]


def check_components(num_components: int, width: int) -> None:
    """Refuse more components than features have.

    Raises:
        InputError: not within 1 to `width`.
    """
    if not 1 <= num_components <= width:
        raise InputError(f"--dim={num_components}: expected 1 to {width}, the numbers per image of this network")


def fitted(features: Tensor, num_components: int, about: Stamp, *, whiten: float = 0.0) -> Projection:
    """The first principal components of features [M, D].

    Args:
        features: of the chosen images.
        num_components: N.
        about: what they were made from.
        whiten: power of its standard deviation that each component is divided by; one that has none becomes zeros.

    Raises:
        InputError: N is not within what the features have.
    """
    num_images, width = features.shape
    check_components(num_components, width)
    if num_images < num_components:
        raise InputError(
            f"--dim={num_components}: fitted on {num_images} images, which have no more than {num_images} components; "
            f"use a smaller one, or copy {NAME} from a folder of features of more images"
        )
    solver = "full" if width <= _WIDEST else "randomized"
    # One thread, so that their number does not decide the last bit; features that are all equal have no variance.
    with threadpool_limits(1), np.errstate(invalid="ignore", divide="ignore"):
        found = PCA(num_components, svd_solver=solver, random_state=0).fit(features.double().numpy())
    variance = np.nan_to_num(found.explained_variance_ratio_)
    components = found.components_
    if whiten:
        deviation = np.sqrt(np.nan_to_num(found.explained_variance_))[:, None]
        there = deviation > _LEAST * deviation.max(initial=0)
        components = np.divide(components, deviation**whiten, where=there, out=np.zeros_like(components))
    return Projection(found.mean_, components, variance, about)


def _spread(num: int, wanted: int) -> np.ndarray:
    """At most `wanted` of `num` positions, evenly spread."""
    return np.arange(num) if num <= wanted else np.arange(wanted, dtype=np.int64) * num // wanted
