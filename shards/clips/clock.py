"""Times of frames that rise, made of times in a file that may be wrong, or jump back where files were joined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

JUMPS_BACK = "times that jump back: frames go on, sound is left out where its time is not known"

FAR_S = 1.0
"""A clock that is behind by more than this has jumped back; by less, its times are imprecise (H.264 in AVI)."""

_T = TypeVar("_T")


class RisingClock:
    """Follows the times of frames.

    Attributes:
        end: end of the last frame, in seconds.
        jump: time of the first frame at which the file's clock was behind by more than FAR_S, in seconds; None for a
            clock that never was. A single wrong time between right ones does not count.
        has_wrong_times: whether a frame was given another time than the file's.
    """

    def __init__(self) -> None:
        self.end = 0.0
        self.jump: float | None = None
        self.has_wrong_times = False

    def follow(self, frames: Iterable[tuple[float | None, float, _T]]) -> Iterator[tuple[float, _T]]:
        """Frames with times that never fall.

        After a jump back, frames go on from the end of the one before, until the file's clock has returned.

        Args:
            frames: time in the file (None: not known), length, both in seconds, and the frame.
        """
        shifts, last = [0.0], float("-inf")
        for (time, length, frame), following in _with_next(frames):
            while time is not None and len(shifts) > 1 and time + shifts[-2] >= last:
                shifts.pop()  # the clock has returned
            now = self.end if time is None else time + shifts[-1]
            coming = None if following is None else following + shifts[-1]
            if time is not None and coming is not None and 0 <= last < coming and not last <= now <= coming:
                now, self.has_wrong_times = min(max(last, self.end), coming), True
            elif time is not None and now < last:
                shifts.append(shifts[-1] + self.end - now)
                now, self.has_wrong_times = self.end, True
                if self.jump is None and shifts[-1] > FAR_S:
                    self.jump = now
            self.end = max(self.end, now)  # the frame before is seen until this one
            yield now, frame
            last, self.end = now, now + length


def _with_next(
    frames: Iterable[tuple[float | None, float, _T]],
) -> Iterator[tuple[tuple[float | None, float, _T], float | None]]:
    """Frames, each with the time of the one after it."""
    held = None
    for frame in frames:
        if held is not None:
            yield held, frame[0]
        held = frame
    if held is not None:
        yield held, None
