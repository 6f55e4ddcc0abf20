"""Frames of a video at a rate, one after the other: each kept at most once, upright, small, with its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from shards.clips.clip import ClipSettings
from shards.clips.clock import RisingClock
from shards.clips.library import pyav
from shards.clips.planes import Planes, Shrinker
from shards.clips.spared import Spared
from shards.images.reading import ImageError

NO_PICTURES = "no moving pictures in it"
UNKNOWN_CODEC = "a video of a codec that is not known"
DAMAGED_PARTS = "a video with damaged parts, which are left out"
CUT = "a video that ends before its header says"

_EARLY = 1 / 8
"""Share of the step between frames by which one may come too early: containers round times to milliseconds."""


@dataclass(frozen=True)
class Picture:
    """A frame that is kept.

    Attributes:
        number: on the grid of frames.
        time: seconds from the first frame.
        planes: of a JPEG.
    """

    number: int
    time: float
    planes: Planes


def video_stream(container: Any) -> Any:
    """The stream of moving pictures; the cover of a song is none.

    Raises:
        ImageError: there is none, or none that can be decoded.
    """
    attached = pyav().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        raise ImageError(NO_PICTURES)
    if streams[0].codec_context is None:
        raise ImageError(UNKNOWN_CODEC)
    return streams[0]


def sound_stream(container: Any) -> Any:
    """The first stream of sound that can be decoded; None if there is none."""
    return next((stream for stream in container.streams.audio if stream.codec_context is not None), None)


def decoded(
    container: Any, stream: Any, damaged: Callable[[], None], send: Callable[[Any], None] | None = None
) -> Iterator[Any]:
    """Frames of a stream, of what can be decoded; `damaged` is called where something cannot, `send` with each packet.

    Raises:
        OSError, InputError: the file cannot be read any more, which says nothing of what is in it.
    """
    stream.thread_type = "NONE"  # videos are converted side by side
    error = pyav().FFmpegError
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except error:
            return damaged()
        if packet is None:
            return None
        if send is not None:
            send(packet)
        try:
            frames = packet.decode()
        except (error, ValueError):
            damaged()
            continue
        yield from frames


class Pictures:
    """The frames of a video that are kept; to be iterated once.

    Args:
        container: the open video.
        settings: rate and size.
        check: raises ImageError for frames of a width and height, in pixels, that are not wanted.

    Attributes:
        has_sound: whether the file has a stream of sound.
        origin: the time of the first frame on the container's clock, in seconds, once that is decoded.
        is_damaged: whether something could not be decoded.
        clock: of its frames, in seconds from the first.
    """

    def __init__(self, container: Any, settings: ClipSettings, check: Callable[[int, int], None]) -> None:
        self._container, self._settings, self._check = container, settings, check
        self._stream = video_stream(container)
        self._shrinker = Shrinker()
        self.has_sound = sound_stream(container) is not None
        self._size = (0, 0, 0, 0)
        self.origin = Fraction(0)
        self._first: int | None = None
        self._base = Fraction(self._stream.time_base).as_integer_ratio()  # whole numbers divide exactly, and fast
        self._step = 1 / float(self._stream.average_rate or 25)
        self._spared = Spared(self._stream, lambda ticks: self._number(self._time_of(ticks)))
        self.is_damaged, self.clock = False, RisingClock()
        check(self._stream.width or 1, self._stream.height or 1)  # before it is decoded

    def is_cut(self, end_of_sound: float | None) -> bool:
        """Whether the file is shorter than its header says.

        Args:
            end_of_sound: in seconds from the first frame; None if it is not known.
        """
        stream, container = self._stream, self._container
        end = self.clock.end
        if stream.duration is not None:
            said = float(stream.duration * stream.time_base)
        elif container.duration is not None and (end_of_sound is not None or not self.has_sound):
            said = container.duration / pyav().time_base
            end = max(end, end_of_sound or end) + max(0.0, float(self.origin))  # it counts from the file's zero
        else:
            return False
        return end + max(1.0, said / 50) < said

    def __iter__(self) -> Iterator[Picture]:
        last, per_clip = -1, self._settings.frames_per_clip
        for time, frame in self.clock.follow(self._stamped()):
            number = self._number(time)
            if number > last and frame is not None:
                if number // per_clip > last // per_clip:
                    self._size = (0, 0, 0, 0)  # a clip has one size, that of its first frame
                last = number
                yield Picture(number, time, self._planes(frame))

    def _stamped(self) -> Iterator[tuple[float | None, float, Any]]:
        """Seconds from the first frame as the file has them, length, and frame; None for one that is spared."""
        for frame in decoded(self._container, self._stream, self._note_damage, self._spared.send):
            if frame.is_corrupt:
                self._note_damage()
            if frame.pts is None or frame.interlaced_frame or self.clock.has_wrong_times:
                self._spared.stop()
            yield from self._not_decoded(frame.pts)
            if frame.is_corrupt:
                continue
            if self._first is None:
                self._first = frame.pts or 0
                self.origin = self._first * self._stream.time_base
            yield None if frame.pts is None else self._time_of(frame.pts), self._length_of(frame.duration), frame
        yield from self._not_decoded(None)

    def _not_decoded(self, before: int | None) -> Iterator[tuple[float, float, None]]:
        for ticks, duration in self._spared.before(before):
            yield self._time_of(ticks), self._length_of(duration), None

    def _time_of(self, ticks: int) -> float:
        """Seconds from the first frame."""
        seconds, ticks_in_them = self._base
        return (ticks - (self._first or 0)) * seconds / ticks_in_them

    def _length_of(self, duration: int | None) -> float:
        seconds, ticks_in_them = self._base
        return duration * seconds / ticks_in_them if duration else self._step

    def _number(self, time: float) -> int:
        """On the grid."""
        return int(time * self._settings.frame_rate + _EARLY)

    def _note_damage(self) -> None:
        self.is_damaged = True
        self._spared.stop()

    def _planes(self, frame: Any) -> Planes:
        """A frame upright and small, see `Picture`."""
        if self._size[:2] != (frame.width, frame.height):
            self._size = self._size_of(frame)
        return self._shrinker.planes(frame, *self._size[2:])

    def _size_of(self, frame: Any) -> tuple[int, int, int, int]:
        """Width and height of a frame, and those that it is scaled to, before it is turned."""
        aspect = self._stream.sample_aspect_ratio or 1  # of a pixel
        width, height = max(1, round(frame.width * aspect)), frame.height
        self._check(width, height)
        if self._size[2]:
            return frame.width, frame.height, *self._size[2:]
        side = self._settings.frame_side
        scale = min(Fraction(1), Fraction(side, min(width, height))) if side else Fraction(1)
        return frame.width, frame.height, max(1, round(width * scale)), max(1, round(height * scale))
