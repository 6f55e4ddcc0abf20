"""What `largescale curate` is asked for, and what of it cannot be done."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from largescale.curate.hierarchy import Resampling
from shards.ground.errors import InputError

LEAVES = ("random", "nearest")

_LEAST_EPSILON = 1e-6
_OF_A_CENTROID, _FEWEST, _INSIDE = 64, 4096, 8
"""Images that coarse clusters are found on, per cluster and at least; clusters of the first level in a coarse one."""
_SMALL = 20_000
"""Images that are compared all with all in seconds, unless told otherwise."""


@dataclass(frozen=True)
class Wish:
    """How a pile is to be curated.

    Attributes:
        levels: clusters of each level, falling; none only drops duplicates.
        target: images to keep; 0 keeps all that are not duplicates.
        epsilon: images of a cosine of 1 - epsilon or more are duplicates; 0 keeps them.
        fraction: part of the images to drop as duplicates, for which epsilon is looked for; 0 for none.
        seed: of everything that is drawn.
        rounds, nearest, iterations: see `Resampling`.
        leaves: one of LEAVES: which images of a cluster are taken.
        repeat: times that an image may be taken where a cluster has too few; 1 for none.
        coarse: clusters within which duplicates are looked for and the first level is clustered; 0 chooses.
        without: clusters of the top level that give nothing, as the page numbers them.
    """

    levels: tuple[int, ...] = ()
    target: int = 0
    epsilon: float = 0.0
    fraction: float = 0.0
    seed: int = 0
    rounds: int = 10
    nearest: int = 0
    iterations: int = 20
    leaves: str = "random"
    repeat: int = 1
    coarse: int = 0
    without: tuple[int, ...] = ()

    @property
    def resampling(self) -> Resampling:
        """Of levels above the first."""
        return Resampling(self.rounds, self.nearest, self.iterations)

    @property
    def deduplicates(self) -> bool:
        """Whether duplicates are dropped."""
        return self.epsilon > 0 or self.fraction > 0

    def num_coarse(self, num_images: int) -> int:
        """Coarse clusters: about as many as images in each, and fewer than clusters of the first level. One for a
        small pile, since no duplicates are found across coarse clusters, and their centroids lie where copies are."""
        if self.coarse:
            return self.coarse
        if num_images <= _SMALL:
            return 1
        most = max(1, self.levels[0] // _INSIDE) if self.levels else num_images
        return max(1, min(math.isqrt(num_images), most))

    def num_sampled(self, num_images: int) -> int:
        """Images on which coarse clusters are found."""
        return min(num_images, max(_FEWEST, _OF_A_CENTROID * self.num_coarse(num_images)))

    def stamp(self) -> dict[str, Any]:
        """All that the result depends on beside the features."""
        told = {**asdict(self), "levels": list(self.levels), "without": sorted(set(self.without))}
        if not self.without:
            del told["without"]
        return told

    def check(self, num_images: int) -> None:
        """Refuse what cannot be done.

        Raises:
            InputError: says what, and what can.
        """
        if not self.levels and not self.deduplicates:
            raise InputError("nothing to do; pass --levels, --dedup, or both")
        if self.target and not self.levels:
            raise InputError(f"--target={self.target}: needs --levels, whose clusters the images are taken from")
        for before, after in zip(self.levels, self.levels[1:], strict=False):
            if after >= before:
                raise InputError(f"--levels: {after} clusters of {before}; each level must be smaller than the last")
        if any(level < 1 for level in self.levels):
            raise InputError("--levels: expected numbers of clusters of 1 or more")
        for cluster in self.without:
            if not self.levels or not 0 <= cluster < self.levels[-1]:
                top = f"0 to {self.levels[-1] - 1}, those of the last of --levels" if self.levels else "--levels"
                raise InputError(f"--without: {cluster} is no cluster of the top level; expected {top}")
        if self.levels and len(set(self.without)) == self.levels[-1]:
            raise InputError(f"--without: all {self.levels[-1]} clusters of the top level; leave one that gives images")
        if self.levels and self.levels[0] > num_images:
            raise InputError(f"--levels: {self.levels[0]:,} clusters of {num_images:,} images; choose fewer")
        if self.target < 0 or self.target > num_images * self.repeat:
            raise InputError(f"--target={self.target}: there are {num_images:,} images; choose at most as many")
        if not 0 <= self.epsilon < 1 or not 0 <= self.fraction < 1:
            raise InputError("--dedup and --dedup-fraction: expected 0 or more, below 1")
        if self.epsilon and self.fraction:
            raise InputError("--dedup and --dedup-fraction: choose one, the other follows from it")
        if 0 < self.epsilon < _LEAST_EPSILON:
            raise InputError(f"--dedup={self.epsilon:g}: expected {_LEAST_EPSILON:g} or more, as cosines are exact")
        if self.repeat > 1 and not self.target:
            raise InputError(f"--repeat={self.repeat}: needs --target, which images repeat to reach")
        if self.leaves != "random" and not self.levels:
            raise InputError(f"--leaves={self.leaves}: needs --levels, whose clusters the images are taken from")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed={self.seed}: expected 0 to 2^63 - 1")
        if self.leaves not in LEAVES:
            raise InputError(f"--leaves={self.leaves}: expected {' or '.join(LEAVES)}")
        for name, value, least in (
            ("--repeat", self.repeat, 1),
            ("--rounds", self.rounds, 0),
            ("--nearest", self.nearest, 0),
            ("--iterations", self.iterations, 1),
            ("--coarse", self.coarse, 0),
        ):
            if value < least:
                raise InputError(f"{name}={value}: expected {least} or more")
        for name, value, usual in (("--rounds", self.rounds, Wish.rounds), ("--nearest", self.nearest, Wish.nearest)):
            if value != usual and len(self.levels) < 2:
                raise InputError(f"{name}={value}: needs two --levels or more, since the first is not resampled")
        if self.coarse > num_images or (self.levels and self.coarse > self.levels[0]):
            raise InputError(f"--coarse={self.coarse}: expected at most as many as images and as the first of --levels")
