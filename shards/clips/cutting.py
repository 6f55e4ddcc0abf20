"""Clips of a video, and of an image with a sound: one after the other, in the memory of one clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import groupby
from typing import BinaryIO

import numpy as np
from PIL import Image

from shards.clips.clip import Clip, ClipSettings, ClipSound
from shards.clips.clock import JUMPS_BACK
from shards.clips.library import pyav, read_with_ffmpeg
from shards.clips.pictures import CUT, DAMAGED_PARTS, Picture, Pictures
from shards.clips.planes import jpeg_of, planes_of
from shards.clips.sound import DAMAGED_SOUND, Sound
from shards.ground.errors import InputError
from shards.images.reading import ImageError, read_rgb

TOO_FEW = "a clip of fewer frames than --min-frames"
LONG_SOUND = "a sound that is longer than a clip: the rest is left out"
NO_SOUND = "an image whose sound cannot be read"
_UNREADABLE = "damaged, cut, or of an unknown format"

_COARSE = 4
"""Pixels whose luma is averaged before changes are measured, so that noise is not taken for motion."""


def clips_of_video(
    open_file: Callable[[], BinaryIO],
    settings: ClipSettings,
    *,
    quality: int,
    check: Callable[[int, int], None],
    note: Callable[[str], None],
) -> Iterator[Clip]:
    """The clips of a video.

    Args:
        open_file: opens it; called once for its pictures and once for its sound, so that neither waits for the other.
        settings: how to cut.
        quality: of the JPEGs.
        check: raises ImageError for frames of a width and height that are not wanted.
        note: called with what is left out of the video, as a reason.

    Raises:
        ImageError: none of it can be used; the message is the reason.
        OSError, InputError: it cannot be read.
    """
    with ExitStack() as stack:
        pictures = Pictures(_opened(open_file, stack), settings, check)
        wants_sound = settings.sound_rate > 0 and pictures.has_sound
        sound: Sound | None = None
        num_clips, per_clip = 0, settings.frames_per_clip
        encoder = _Encoder(quality)
        for number, inside in groupby(pictures, lambda picture: picture.number // per_clip):
            if sound is None and wants_sound:  # the first frame says when it begins
                sound = Sound(_opened(open_file, stack), settings.sound_rate, pictures.origin)
            start = number * per_clip / settings.rate
            clip = encoder.clip(number, start, inside)
            num_clips += 1
            if len(clip.frames) < settings.min_frames:
                note(TOO_FEW)
                continue
            if sound is None:
                yield clip
                continue
            stop = min((number + 1) * per_clip / settings.rate, Fraction(pictures.clock.end))
            if pictures.clock.jump is not None:  # from there on, sound is on another clock
                stop = min(stop, Fraction(pictures.clock.jump))
            heard = sound.take(start, max(stop, start))
            yield Clip(**{**vars(clip), "sound": heard})
        if not num_clips:
            raise ImageError(_UNREADABLE)
        if pictures.is_damaged:
            note(DAMAGED_PARTS)
        elif pictures.is_cut(sound.end if sound is not None else None):
            note(CUT)
        if sound is not None and sound.is_damaged:
            note(DAMAGED_SOUND)
        if pictures.clock.has_wrong_times or (sound is not None and sound.jumps_back):
            note(JUMPS_BACK)


def clip_of_pair(
    image: bytes,
    open_sound: Callable[[], BinaryIO],
    settings: ClipSettings,
    *,
    quality: int,
    check: Callable[[int, int], None],
    max_pixels: int,
    note: Callable[[str], None],
) -> Clip:
    """An image and a sound as a clip of one frame.

    Raises:
        ImageError: one of them is damaged.
        OSError, InputError: the sound cannot be read.
    """
    pixels = read_rgb(image, max_pixels=max_pixels)
    check(pixels.shape[1], pixels.shape[0])
    encoder = _Encoder(quality)
    clip = encoder.clip(0, Fraction(0), iter([Picture(0, 0.0, planes_of(_smaller(pixels, settings.frame_side)))]))
    if not settings.sound_rate:
        return clip
    length = settings.frames_per_clip / settings.rate
    with ExitStack() as stack:
        try:
            sound = Sound(_opened(open_sound, stack), settings.sound_rate, None)
        except ImageError as error:
            raise ImageError(NO_SOUND) from error
        heard = sound.take(Fraction(0), length)
        if not heard.num_samples:
            raise ImageError(NO_SOUND)
        if sound.is_damaged:
            note(DAMAGED_SOUND)
        if sound.jumps_back:
            note(JUMPS_BACK)
        if sound.take(length, length + 1).num_samples:
            note(LONG_SOUND)
    return Clip(**{**vars(clip), "sound": heard})


def _opened(open_file: Callable[[], BinaryIO], stack: ExitStack) -> object:
    file = stack.enter_context(open_file())
    if not file.read(1):
        raise ImageError("empty file")
    file.seek(0)
    try:
        return stack.enter_context(read_with_ffmpeg(file))
    except InputError:  # of a store that cannot be reached: the file may be whole
        raise
    except (pyav().FFmpegError, ValueError) as error:
        raise ImageError(_UNREADABLE) from error


class _Encoder:
    """Frames to JPEGs, and how much each differs from the one before."""

    def __init__(self, quality: int) -> None:
        self._quality = quality
        self._before: np.ndarray | None = None

    def clip(self, number: int, start: Fraction, pictures: Iterator[Picture]) -> Clip:
        frames: list[bytes] = []
        times: list[float] = []
        coarse: list[np.ndarray] = []
        size = (0, 0)
        for picture in pictures:
            size = picture.planes[0].shape
            coarse.append(_coarse(picture.planes[0]))
            times.append(max(0.0, picture.time - float(start)))
            frames.append(jpeg_of(picture.planes, self._quality))
        motion = self._changes(coarse)
        return Clip(number, float(start), frames, times, motion, size[1], size[0], ClipSound())

    def _changes(self, coarse: list[np.ndarray]) -> list[float]:
        """Of each image from the one before it; 0 for the first one, and where the size is another."""
        first = coarse[0] if self._before is None else self._before
        self._before = coarse[-1]
        changes: list[float] = []
        for _, alike in groupby([first, *coarse], key=np.shape):  # a phone may be turned within a clip
            luma = np.stack(list(alike)).astype(np.int16)
            changes += [0.0, *np.abs(np.diff(luma, axis=0)).mean((1, 2)).tolist()]
        return changes[len(changes) - len(coarse) :]


def _coarse(luma: np.ndarray) -> np.ndarray:
    """Luma averaged over _COARSE x _COARSE pixels, where there are that many."""
    image = Image.fromarray(np.ascontiguousarray(luma))
    return np.asarray(image.reduce(_COARSE) if min(image.size) >= _COARSE else image)


def _smaller(pixels: np.ndarray, side: int) -> np.ndarray:
    """An image whose shorter side is no more than `side`; 0 keeps it."""
    height, width = pixels.shape[:2]
    if not side or min(height, width) <= side:
        return np.ascontiguousarray(pixels)
    scale = side / min(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
