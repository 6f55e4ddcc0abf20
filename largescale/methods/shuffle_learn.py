"""Shuffle and Learn: do three frames of a clip come in order? (Misra et al., arXiv 1603.08561)

The naive loop::

    for i in clips:
        a, b, c, d, e = five frames of i in ascending time, where things move
        frames = (b, c, d) for a quarter of the clips, else (b, a, d) or (b, e, d)
        frames = frames or reversed(frames), each for half of them
        z = [embedding(backbone(frame)) for frame in frames]
        loss += -log softmax(head(concatenated z))[1 if the second is between the others else 0] / B

The first and the last frame are alike in all three, so that only what lies between tells. Reversed frames are as much
in order as others.

Departures from the published code: motion is the change of luma that the index has of each frame, not optical flow, and
is asked for between all neighbours in time, in place of comparing pixels; all neighbours are as far apart, not a from b
and d from e at least and b from d at most; BatchNorm in the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from largescale.config import Config, WantedFrames
from largescale.config.setting import setting
from largescale.data.task_views.frames import drawn_reversals, reordered
from largescale.data.views import Views
from largescale.methods.embedding_method import Named
from largescale.methods.frame_task import FrameSettings, FrameTask, settings_of
from largescale.models.heads import hidden_widths, projection_head

_IN_ORDER, _TOO_EARLY, _TOO_LATE = (1, 2, 3), (1, 0, 3), (1, 4, 3)
"""Of five frames in ascending time, those that are shown."""


@dataclass
class Settings(FrameSettings):
    """Shuffle and Learn's keys under `method`."""

    facts: ClassVar[tuple[str, ...]] = ("times_us",)

    in_order: float = setting(0.25, "Share of clips whose frames come in order.", above=0, below=1)
    hidden: list[int] = hidden_widths((), of="the head on all frames")

    def frame_tuples(self) -> WantedFrames:
        """Three of five frames."""
        other = (1 - self.in_order) / 2
        return WantedFrames(5, (_IN_ORDER, _TOO_EARLY, _TOO_LATE), (self.in_order, other, other), self.frames)


class ShuffleLearn(FrameTask):
    """Backbone, embedding of frames, and a head over three of them."""

    title = "Shuffle and Learn"
    reference = "pretext/shuffle_learn"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings, self._seed = _settings(config), config.run.seed
        self._num_frames = settings.frame_tuples().shown
        self.head = projection_head(self._num_frames * settings.embedding[-1], settings.hidden, 2, batchnorm=True)

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """In order or not."""
        return 2

    @classmethod
    def class_shares(cls, config: Config) -> list[float]:
        """Out of order, and in order."""
        share = _settings(config).in_order
        return [1 - share, share]

    def task_views(self, views: Views, step: int) -> Views:
        """Frames as they are, or the last one first."""
        return reordered(views, drawn_reversals(views.ids, self._num_frames, seed=self._seed, step=step))

    def embed(self, views: Views) -> Named:
        """`logits` [1, B, 2]: out of order, in order."""
        return {"logits": self.head(self.embedded(views).flatten(1))[None]}

    def targets(self, views: Views) -> Named:
        """`wanted`, whether the second frame is between the others in time, int64 [1, B]."""
        first, second, third = views.facts["times_us"]
        return {"wanted": ((second - first).sign() * (third - second).sign() > 0).long()[None]}


def _settings(config: Config) -> Settings:
    settings = settings_of(config)
    assert isinstance(settings, Settings)
    return settings
