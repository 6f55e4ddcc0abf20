"""What methods with clusters say of them: of what a phase found, and in every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from largescale.clustering.agreement import agreement
from largescale.clustering.fixed_point import NotFinite
from largescale.config import Config
from largescale.config.setting import setting
from largescale.data.device_random import uniform
from largescale.data.length import Length
from largescale.methods.choice import Choice
from largescale.methods.method import Panel
from largescale.methods.symptom import Row, Symptom
from largescale.processes import world_size
from shards.ground.errors import InputError

_MOST_IN_ONE = 0.5
_UNIFORM = 0.98
"""Of ln K: predictions say nothing."""
_IMAGES_PER_CLUSTER = 10
_PERCENTILES = (10, 50, 90)


def max_phase_setting() -> float:
    """The limit of what a phase holds: a field of a dataclass."""
    found: float = setting(
        16.0,
        "Largest size in GB on a rank of what clusters and finding them take; more is refused before anything is read.",
        above=0,
        at_most=1e9,
        free=True,
    )
    return found


def misfit_of(clusters: int | Sequence[int], images: int, size: int, max_gb: float) -> str:
    """Why so many images cannot be clustered, in a line; empty if they can.

    Args:
        clusters: their number, or numbers.
        images: of the corpus.
        size: bytes that a rank holds.
        max_gb: the limit, `method.max_phase_gb`.
    """
    most = clusters if isinstance(clusters, int) else max(clusters)
    if most > images:
        return f"method.clusters={clusters}: {most:,} clusters for {images:,} images; lower it"
    if size <= max_gb * 1e9:
        return ""
    ranks = world_size()
    return (
        f"method.max_phase_gb={max_gb:g}: clusters of {images:,} images take {size / 1e9:.3g} GB on each of {ranks} "
        f"rank{'s' * (ranks > 1)}; use more ranks or fewer clusters, or raise it"
    )


def kmeans_seed(seed: int, step: int, *which: int) -> int:
    """Of a k-means before a step.

    Args:
        seed, step: of the run.
        which: tell it from others of that step, and its numbers from those of other purposes.
    """
    return int(uniform(seed, step, *which, num=1, device=torch.device("cpu")) * 2**53)


@contextmanager
def blaming(clusters: int | Sequence[int], step: int) -> Iterator[None]:
    """Turn the refusal of so many clusters into a user's mistake. Numbers that are not finite are none.

    Raises:
        InputError: what is done within raises a ValueError.
        NotFinite: what is done within raises it.
    """
    try:
        yield
    except NotFinite:
        raise
    except ValueError as error:
        raise InputError(f"method.clusters={clusters}, before step {step}: {error}") from error


def found(
    before: Tensor, after: Tensor, sizes: Sequence[Tensor], beat: Callable[[str], None] = lambda what: None
) -> dict[str, float]:
    """What is logged of a phase: means over sets of clusters.

    Args:
        before, after: clusters of this rank's images in each set, -1 for none, [n, M].
        sizes: images of all ranks in each cluster of each of the M sets, int64 [K].
        beat: as that of `Method.phase`.

    Returns:
        `clusters_used`, the share that have images; `cluster_size_10`, `_50` and `_90`, percentiles of their sizes over
        the mean size; and, where images had clusters before, `cluster_nmi`, how alike both clusterings are, and
        `reassigned`, the share of images that have left the largest part of their former cluster.

    Collectives: those of `agreement`, for each set.
    """
    values: dict[str, list[float]] = {"clusters_used": [float((own > 0).double().mean()) for own in sizes]}
    for percent in _PERCENTILES:
        values[f"cluster_size_{percent}"] = [
            float(own.sort().values[percent * (len(own) - 1) // 100] / own.double().mean()) for own in sizes
        ]
    for number, own in enumerate(sizes):
        if alike := agreement(before[:, number].long(), after[:, number].long(), len(own), len(own), beat):
            values.setdefault("cluster_nmi", []).append(alike.nmi)
            values.setdefault("reassigned", []).append(1 - alike.kept)
    return {name: sum(ones) / len(ones) for name, ones in values.items()}


@torch.no_grad()
def same_cluster(assigned: Tensor, counts: Sequence[int]) -> Tensor:
    """Share of pairs of different places of a batch whose images are in one cluster, a mean over sets of clusters:
    1 / K for K equal ones. 0 for a single image. Collectives: none.

    Args:
        assigned: clusters of the images of all ranks in each set, -1 for none, [B, M]. Those without one are left out.
        counts: K of each set.
    """
    shares = []
    for own, count in zip(assigned.T.long(), counts, strict=True):
        places = torch.where(own >= 0, own, count)
        ones = torch.ones(len(own), dtype=torch.float64, device=own.device)
        sizes = ones.new_zeros(count + 1).index_add_(0, places, ones)[:count]
        total = sizes.sum()
        shares.append((sizes * (sizes - 1)).sum() / (total * (total - 1)).clamp_min(1))
    return torch.stack(shares).mean()


def one_for_most(remedy: str, clusters: Sequence[int], column: str = "same_cluster", what: str = "cluster") -> Symptom:
    """That one cluster holds most images: of how likely two are in one, what is more than for equal clusters.

    Args:
        remedy: what to try.
        clusters: their number in each set.
        column: of how likely two are in one.
        what: one of them is called.
    """
    equal = sum(1 / count for count in clusters) / len(clusters)
    return Symptom(
        f"one {what} for most images",
        sign=lambda row: (row[column] - equal) / (1 - equal) if column in row else None,
        sick=(_MOST_IN_ONE, 1),
        recovery="down",
        seen=lambda row: f"two images are in one {what} with a probability of {row[column]:.0%}",
        remedy=remedy,
        by_rate=True,
    )


def not_learnt(
    config: Config,
    remedy: str = "",
    *,
    what: str = "clusters",
    column: str = "loss_over_ln_k",
    uniform: tuple[float, str] = (1.0, "ln K"),
) -> Symptom:
    """That the loss stays that of uniform predictions.

    Args:
        config: of the run.
        remedy: what to try; by default a lower rate, a longer warm-up or fewer clusters.
        what: they are called.
        column: of the loss.
        uniform: what the column says of uniform predictions, and a name for it.
    """
    value, name = uniform
    return Symptom(
        f"{what} are not learnt",
        sign=lambda row: row[column] / value if column in row else None,
        sick=(_UNIFORM, math.inf),
        recovery="down",
        seen=lambda row: f"predictions are no better than uniform (loss {row[column] / value:.0%} of {name})",
        remedy=remedy
        or f"Try, in another run.dir, optim.lr={config.optim.lr / 2:.2g}, a longer optim.warmup_epochs, or fewer "
        "method.clusters",
        meaning=f"views do not tell the {what} of their images",
        by_rate=True,
    )


def uniform_loss(clusters: Sequence[int]) -> float:
    """Mean over sets of clusters of ln K."""
    return sum(map(math.log, clusters)) / len(clusters)


def brief(row: Row, uniform: str = "ln K") -> str:
    """What a console line adds: the loss as a share of that of uniform predictions, which is called `uniform`."""
    return f" ({row['loss_over_ln_k']:.0%} of {uniform})" if "loss_over_ln_k" in row else ""


def suited(clusters: Sequence[int], length: Length) -> dict[str, Choice]:
    """At most one cluster for every ten images."""
    share = min(1.0, length.num_samples / _IMAGES_PER_CLUSTER / max(clusters))
    fewer = [max(2, int(share * count)) for count in clusters]
    return {"clusters": Choice(fewer, f"at most one for every {_IMAGES_PER_CLUSTER} images")}


def panels(picked: str = "share of views that pick their image's cluster") -> list[Panel]:
    """Clusters in steps and in phases; `picked` says what `cluster_picked` is."""
    return [
        Panel(
            "Clusters",
            {picked: "cluster_picked", "probability that two images are in one": "same_cluster"},
            limits=(0, 1.05),
        ),
        Panel(
            "Clusters from phase to phase",
            {
                "share of clusters with images": "clusters_used",
                "normalised mutual information with the last ones": "cluster_nmi",
                "share of images reassigned": "reassigned",
            },
            limits=(0, 1.05),
        ),
    ]
