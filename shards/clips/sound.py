"""The sound of a file in mono at a rate, stretch after stretch, and FLAC, in which it is stored."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from shards.clips.clip import ClipSound
from shards.clips.clock import FAR_S
from shards.clips.library import pyav, read_with_ffmpeg
from shards.clips.pictures import decoded, sound_stream
from shards.ground.errors import InputError
from shards.images.reading import ImageError

DAMAGED_SOUND = "damaged sound, of which parts are left out"

_LOWEST_RATE = 1000
"""Samples per second below which a header is wrong; to resample them takes any amount of memory."""

_GAP_S = 0.05
"""Where a frame of sound begins later than the one before it ends by less than this, that is rounding."""

_TOGETHER = 32
"""Frames of sound that are resampled at once."""

_IN_NUMPY = {name + plane for name in ("u8", "s16", "s32", "flt", "dbl") for plane in ("", "p")}
"""Forms of samples that PyAV makes arrays of, and the other way round."""


class Sound:
    """Sound on the clock of a video. Memory: that of one stretch.

    Args:
        container: the open file; its first stream of sound is taken.
        rate: samples per second.
        origin: the time, on the container's clock, from which seconds count; None counts from the first sound.

    Attributes:
        is_damaged: whether something could not be decoded, or brought to the rate.
        jumps_back: whether sound was left out because its clock jumps back.
        end: of what was decoded until now, in seconds.
    """

    def __init__(self, container: Any, rate: int, origin: Fraction | None) -> None:
        self._rate, self._origin = rate, origin
        self.is_damaged, self.jumps_back, self.end = False, False, 0.0
        stream = sound_stream(container)
        self._blocks = iter(()) if stream is None else self._usable(container, stream)
        self._held: list[tuple[int, np.ndarray]] = []

    def take(self, start: Fraction, stop: Fraction) -> ClipSound:
        """What is heard from one time to another, in seconds; silence in its gaps. Stretches are asked for in order."""
        first, last = round(start * self._rate), round(stop * self._rate)
        while not self._held or self._held[-1][0] + len(self._held[-1][1]) < last:
            block = next(self._blocks, None)
            if block is None:
                break
            if block[0] + len(block[1]) > first:
                self._held.append(block)
        inside = [(place, samples) for place, samples in self._held if place < last and place + len(samples) > first]
        self._held = [(place, samples) for place, samples in self._held if place + len(samples) > last]
        if not inside or first >= last:
            return ClipSound()
        begin = max(first, inside[0][0])
        whole = np.zeros(min(last, inside[-1][0] + len(inside[-1][1])) - begin, np.int16)
        for place, samples in inside:
            skipped = max(0, begin - place)
            part = samples[skipped : last - place]
            whole[place + skipped - begin :][: len(part)] = part
        return ClipSound(to_flac(whole, self._rate), self._rate, (begin - first) / self._rate, len(whole))

    def _note_damage(self) -> None:
        self.is_damaged = True

    def _usable(self, container: Any, stream: Any) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks up to one that no resampler takes: of nine channels, of a rate that is none."""
        damage = (pyav().FFmpegError, ValueError)
        try:
            yield from self._resampled(container, stream)
        except InputError:
            raise
        except damage:
            self._note_damage()

    def _resampled(self, container: Any, stream: Any) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of samples with the place of the first one; places only rise."""
        base, end = float(stream.time_base), None
        origin = None if self._origin is None else float(self._origin)
        resampler, setup, place, is_behind = None, None, 0, False

        def out(frames: list[Any]) -> Iterator[tuple[int, np.ndarray]]:
            nonlocal place
            for frame in frames:
                samples = np.frombuffer(frame.planes[0], np.int16, frame.samples)
                new = samples[max(0, done - place) :]
                place += len(samples)
                self.end = place / self._rate
                if len(new):
                    yield place - len(new), new

        done = -(2**62)
        for frame in decoded(container, stream, self._note_damage):
            if frame.sample_rate < _LOWEST_RATE:
                if resampler is not None:
                    yield from out(resampler.finish())
                raise ValueError("samples so rare are no sound")
            if origin is None:
                origin = float(Fraction(frame.pts or 0) * stream.time_base)
            expected = 0.0 if end is None else end
            time = expected if frame.pts is None else frame.pts * base - origin
            own = (frame.format.name, frame.layout.name, frame.sample_rate)
            if resampler is None or own != setup or abs(time - expected) > _GAP_S:
                if resampler is not None:
                    yield from out(resampler.finish())
                    done = max(done, place)
                if abs(time - expected) > _GAP_S:
                    is_behind = time < done / self._rate - FAR_S
                resampler = None if is_behind else _Resampler(self._rate)
                setup, place, expected = own, round(time * self._rate), time
            end = expected + frame.samples / frame.sample_rate
            if resampler is None:  # it would come to lie over other pictures
                self.jumps_back = True
                continue
            yield from out(resampler.add(frame))
        if resampler is not None:
            yield from out(resampler.finish())


class _Resampler:
    """Frames of one setup to mono at a rate. Many are handed on together, which takes half the time."""

    def __init__(self, rate: int) -> None:
        self._resampler = pyav().AudioResampler("s16", "mono", rate)
        self._waiting: list[Any] = []

    def add(self, frame: Any) -> list[Any]:
        """Take a frame; returns those that are ready."""
        self._waiting.append(frame)
        return self._hand_on() if len(self._waiting) == _TOGETHER else []

    def finish(self) -> list[Any]:
        """The rest."""
        return [*self._hand_on(), *self._resampler.resample(None)]

    def _hand_on(self) -> list[Any]:
        waiting, self._waiting = self._waiting, []
        ready = []
        for frame in _joined(waiting):
            frame.pts = None  # whoever asks counts places
            ready += self._resampler.resample(frame)
        return ready


def _joined(frames: list[Any]) -> list[Any]:
    """Frames of one setup as one, where their samples are numbers that NumPy knows."""
    if len(frames) < 2 or frames[0].format.name not in _IN_NUMPY:
        return frames
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    whole = pyav().AudioFrame.from_ndarray(samples, format=frames[0].format, layout=frames[0].layout)
    whole.sample_rate = frames[0].sample_rate
    return [whole]


def to_flac(samples: np.ndarray, rate: int) -> bytes:
    """Mono samples, int16 [T], as a FLAC file."""
    av, stored = pyav(), io.BytesIO()
    with av.open(stored, "w", format="flac", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("flac", rate=rate)
        stream.codec_context.layout, stream.codec_context.format = "mono", "s16"
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return stored.getvalue()


def from_flac(payload: bytes) -> tuple[np.ndarray, int]:
    """Mono samples, int16 [T], and samples per second of what `to_flac` wrote.

    Raises:
        ImageError: damaged.
    """
    damage: list[bool] = []
    try:
        with read_with_ffmpeg(io.BytesIO(payload)) as container:
            stream = container.streams.audio[0]
            blocks = [
                frame.to_ndarray().reshape(-1) for frame in decoded(container, stream, partial(damage.append, True))
            ]
            rate = int(stream.rate)
    except (pyav().FFmpegError, ValueError, IndexError) as error:
        raise ImageError("damaged sound") from error
    if damage or not any(map(len, blocks)):
        raise ImageError("damaged sound")
    return np.concatenate(blocks), rate
