"""The settings of tuples of frames: several frames of a clip as views of a sample, for methods that ask for them."""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config.setting import setting

MOTION = "motion"


@dataclass
class FrameConfig:
    """Which frames of a clip a sample shows, and what they have in common."""

    least_gap_s: float = setting(
        0.6, "Least seconds from one frame of a tuple to the next in time.", above=0, at_most=3600
    )
    most_gap_s: float = setting(
        1.2, "Most seconds from one frame of a tuple to the next in time.", above=0, at_most=3600
    )
    start: str = setting(
        MOTION,
        "How the first frame is drawn: `motion` in proportion to the motion after it, as far as a tuple may reach, or "
        "`uniform`.",
        one_of=(MOTION, "uniform"),
    )
    least_motion: float = setting(
        1.0,
        "Least motion from one frame of a tuple to the next: change of luma (0 to 255), averaged over the frame and "
        "summed over the frames between. A clip without such a tuple is replaced as an unreadable image is.",
        at_least=0,
        at_most=1e6,
    )
    shared_boxes: bool = setting(
        True, "All frames of a sample are cropped alike; otherwise each has a box of its own, as views have."
    )
    shared_augment: bool = setting(
        True, "All frames of a sample are flipped and changed alike; otherwise each by its own draws, as views are."
    )


@dataclass(frozen=True)
class WantedFrames:
    """What a method wants of a clip: frames in ascending time are drawn, of which a sample shows some in some order.

    Attributes:
        drawn: how many frames there are in a tuple.
        orders: of each sample one of these: the places in the tuple, from 0, that its views show.
        chances: of each order.
        config: the settings.
    """

    drawn: int
    orders: tuple[tuple[int, ...], ...]
    chances: tuple[float, ...]
    config: FrameConfig

    @property
    def shown(self) -> int:
        """Views of a sample."""
        return len(self.orders[0])
