"""A clip: some seconds of a video, or an image with a sound, as it is stored. And how videos are cut into clips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from shards.ground.errors import InputError

_HIGHEST_RATE = 192_000


@dataclass(frozen=True)
class ClipSettings:
    """How clips are cut.

    Attributes:
        frame_rate: frames per second that are kept; a video of fewer keeps all of its own.
        frame_side: pixels of a frame's shorter side; smaller ones are not enlarged. 0 keeps the size.
        clip_seconds: length of a clip; the last one of a video may be shorter.
        min_frames: clips of fewer frames are left out.
        sound_rate: samples per second of the sound, in mono; 0 leaves it out.

    Raises:
        InputError: a value that makes no sense.
    """

    frame_rate: float = 8.0
    frame_side: int = 256
    clip_seconds: float = 10.0
    min_frames: int = 1
    sound_rate: int = 48_000

    def __post_init__(self) -> None:
        for key in ("frame_rate", "clip_seconds"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"--{key.replace('_', '-')}={getattr(self, key)}: expected a number above 0")
        if self.frame_rate * self.clip_seconds < 1:
            raise InputError(
                f"--clip-seconds={self.clip_seconds}: is shorter than a frame of --frame-rate={self.frame_rate}; "
                f"raise one of them"
            )
        if self.frame_side < 0:
            raise InputError(f"--frame-side={self.frame_side}: expected pixels; 0 keeps the size")
        if not 1 <= self.min_frames <= self.frames_per_clip:
            raise InputError(
                f"--min-frames={self.min_frames}: expected 1 to {self.frames_per_clip}, the most that a clip has"
            )
        if self.sound_rate and not 1000 <= self.sound_rate <= _HIGHEST_RATE:
            raise InputError(f"--sound-rate={self.sound_rate}: expected 1000 to {_HIGHEST_RATE}; 0 leaves sound out")

    @property
    def rate(self) -> Fraction:
        """Frames per second, exactly as written."""
        return Fraction(str(self.frame_rate))

    @property
    def frames_per_clip(self) -> int:
        """The most frames that a clip has."""
        return max(1, round(self.rate * Fraction(str(self.clip_seconds))))


@dataclass(frozen=True)
class ClipSound:
    """The sound of a clip, mono.

    Attributes:
        flac: its file; empty for none.
        rate: samples per second.
        start: seconds from the clip's start to the first sample.
        num_samples: how many there are.
    """

    flac: bytes = b""
    rate: int = 0
    start: float = 0.0
    num_samples: int = 0


@dataclass(frozen=True)
class Clip:
    """A clip.

    Attributes:
        number: in its video, from 0.
        start: seconds from the first frame of the video to the clip's start.
        frames: JPEG files [F], all of one size.
        times: seconds from the clip's start to each frame [F].
        motion: mean absolute change of luma (0 to 255) from the frame before, kept or in the clip before [F]; 0 for the
            first frame of a video.
        width, height: of the frames, in pixels.
        sound: what is heard meanwhile.
    """

    number: int
    start: float
    frames: list[bytes]
    times: list[float]
    motion: list[float]
    width: int
    height: int
    sound: ClipSound = ClipSound()
