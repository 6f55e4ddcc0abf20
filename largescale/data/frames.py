"""Which frames of a clip are the views of a sample, for methods that ask for tuples of frames.

A tuple is k frames in ascending time, neighbours of which are `least_gap_s` to `most_gap_s` apart with motion of at
least `least_motion` between them. It is drawn frame by frame from what the index knows of a clip: the first one by the
motion after it, each further one evenly among those from which the rest can follow. So every tuple that is possible has
a chance, a clip that has one never fails, and nothing is read that is not shown.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from largescale.config import Config
from largescale.config.frame_settings import MOTION, WantedFrames
from largescale.data.clip_facts import ClipFacts
from largescale.data.corpora import Corpus
from largescale.data.reader import SampleError
from shards.ground.errors import InputError

_ROUNDING_S = 0.002
"""Containers round times, such as Matroska to milliseconds."""

_LEAST_WEIGHT = 1e-3
"""Of a frame that no motion follows, so that every tuple that is possible has a chance."""

REMEDIES = {
    "method.frames.least_gap_s": "lower it, or convert longer clips",
    "method.frames.most_gap_s": "raise it, or convert more frames per second",
    "method.frames.least_motion": "lower it",
}
"""What to do by the setting that a clip does not meet."""


class FrameSampler:
    """Draws the frames that the views of a sample show.

    Args:
        wanted: by the method.
    """

    def __init__(self, wanted: WantedFrames) -> None:
        self.wanted = wanted
        self.num_draws = wanted.drawn + 1
        self._orders = np.array(wanted.orders)
        self._bounds = np.cumsum(wanted.chances)[:-1] / np.sum(wanted.chances)

    def __call__(self, clip: ClipFacts, draws: np.ndarray) -> np.ndarray:
        """Numbers of the frames that the views show, view by view: int64 [V].

        Args:
            clip: what the index knows.
            draws: uniform numbers, float64 [num_draws].

        Raises:
            SampleError: the clip has no such tuple.
        """
        times, moved = clip.times.astype(np.float64), clip.motion.astype(np.float64).cumsum()
        first, end = self._next(times, moved, self.wanted.config.least_motion)
        rest = self._rest(first, end)
        if not rest[-1].any():
            raise SampleError(self._why_none(times, moved))
        found = [_pick(rest[-1] * self._weights(times, moved), draws[0])]
        for usable, draw in zip(rest[-2::-1], draws[1:], strict=False):
            frames = slice(first[found[-1]], end[found[-1]])
            found.append(frames.start + _pick(usable[frames], draw))
        return np.array(found)[self._orders[np.searchsorted(self._bounds, draws[-1], side="right")]]

    def _next(self, times: np.ndarray, moved: np.ndarray, least_motion: float) -> tuple[np.ndarray, np.ndarray]:
        """The first frame that may follow each, and the first one behind it that may not."""
        config = self.wanted.config
        first = np.maximum(
            np.searchsorted(times, times + config.least_gap_s - _ROUNDING_S),
            np.searchsorted(moved, moved + least_motion),
        )
        first = np.maximum(first, np.arange(1, len(times) + 1))
        end = np.searchsorted(times, times + config.most_gap_s + _ROUNDING_S, side="right")
        return first, np.maximum(first, end)

    def _rest(self, first: np.ndarray, end: np.ndarray) -> list[np.ndarray]:
        """Whether 0, 1, ... drawn - 1 frames can follow each."""
        rest = [np.ones(len(first), bool)]
        for _ in range(self.wanted.drawn - 1):
            before = np.concatenate([[0], rest[-1].cumsum()])
            rest.append(before[end] > before[first])
        return rest

    def _weights(self, times: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """How likely each frame is the first one, of those that can be."""
        config = self.wanted.config
        if config.start != MOTION:
            return np.ones(len(times))
        longest = (self.wanted.drawn - 1) * config.most_gap_s
        weights = moved[np.searchsorted(times, times + longest, side="right") - 1] - moved
        return np.maximum(weights, _LEAST_WEIGHT)

    def _why_none(self, times: np.ndarray, moved: np.ndarray) -> str:
        drawn, config = self.wanted.drawn, self.wanted.config
        if times[-1] - times[0] < (drawn - 1) * config.least_gap_s - _ROUNDING_S:
            return f"too short for {drawn} frames with method.frames.least_gap_s={config.least_gap_s:g}"
        if not self._rest(*self._next(times, moved, 0.0))[-1].any():
            return f"no {drawn} of its frames fit method.frames.most_gap_s={config.most_gap_s:g}"
        return f"too still for {drawn} frames with method.frames.least_motion={config.least_motion:g}"


def _pick(weights: np.ndarray, draw: float) -> int:
    """A place, as likely as its weight; not all may be 0."""
    sums = weights.astype(np.float64).cumsum()
    place = int(np.searchsorted(sums, draw * sums[-1], side="right"))
    return min(place, int(np.searchsorted(sums, sums[-1])))  # a product that was rounded up to the sum


def require_clips(config: Config, corpora: Iterable[Corpus]) -> None:
    """Check that shards hold clips where the method wants frames of them.

    Raises:
        InputError: they hold images.
    """
    if config.method.frame_tuples() is None:
        return
    for corpus in corpora:
        if not corpus.manifest.settings.get("clips"):
            raise InputError(
                f"{corpus.where}: holds images, but method.name={config.method.name} sees frames of clips; "
                f"make them of videos with `shards convert VIDEOS OUT --clips`"
            )
