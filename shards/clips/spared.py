"""Frames that need not be decoded: none that is kept is made of them, and they are not kept themselves."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

_CODECS = ("h264",)
"""Of which a frame that others refer to is marked for certain: HEVC's mark holds for one temporal layer alone."""

_TRUSTED = 32
"""Frames that have to come out one by one, each at the time of its packet, before one is spared."""

_STEPS = 99
"""Steps of the grid that are remembered; a frame is stored no more than 16 frames away from where it is shown."""


class Spared:
    """Has a decoder leave out frames behind the first one of their step on the grid that no other frame refers to.

    The first one is known without decoding where each packet is a frame with a time of its own, and the clock of the
    file rises. What is seen of a file says whether that is so: where a frame did not come out, or came with another
    time, or the clock fell, everything is decoded from there on.

    Args:
        stream: of pictures.
        step_of: the step that a time, in ticks of the stream, lies in; asked once a frame has come out.
    """

    def __init__(self, stream: Any, step_of: Callable[[int], int]) -> None:
        self._context, self._step_of = stream.codec_context, step_of
        self._in_order = 0 if self._context.name in _CODECS else -1
        self._last_stored = float("-inf")
        self._last_shown: int | None = None
        self._first_of: dict[int, int] = {}
        self._waiting: list[tuple[int, int, bool]] = []

    def send(self, packet: Any) -> None:
        """To be called with each packet before it is decoded."""
        is_spared = False
        if packet.pts is None or packet.dts is None:
            if packet.size:  # the last packet is empty
                self._doubt()
        elif packet.dts <= self._last_stored:
            self.stop()
        elif self._in_order >= 0 and not packet.is_discard:
            self._last_stored, is_spared = packet.dts, self._is_spared(packet.pts)
            heappush(self._waiting, (packet.pts, packet.duration or 0, is_spared))
        self._context.skip_frame = "NONREF" if is_spared else "DEFAULT"

    def _is_spared(self, time: int) -> bool:
        if self._last_shown is None:  # steps count from there
            return False
        step = self._step_of(time)
        first = self._first_of.setdefault(step, time)
        self._first_of[step] = min(first, time)
        if len(self._first_of) > _STEPS:
            del self._first_of[next(iter(self._first_of))]
        return first < time and self._in_order >= _TRUSTED

    def before(self, time: int | None) -> list[tuple[int, int]]:
        """Ticks and lengths of frames that were spared before one that comes out; None for all that are left."""
        found, has_fallen = [], time is None or (self._last_shown is not None and time < self._last_shown)
        while self._waiting and (time is None or has_fallen or self._waiting[0][0] < time):
            ticks, length, is_spared = heappop(self._waiting)
            if is_spared:
                found.append((ticks, length))
            else:
                self._doubt()
        if self._waiting and self._waiting[0][0] == time:
            heappop(self._waiting)
            self._in_order += self._in_order >= 0
        else:
            self._doubt()
        self._last_shown = time
        return found

    def _doubt(self) -> None:
        """Something is not as it should be: at the beginning of a file that may pass."""
        self._in_order = 0 if 0 <= self._in_order < _TRUSTED else -1

    def stop(self) -> None:
        """Spare none from here on."""
        self._in_order = -1
