"""Videos and sounds, written by PyAV: shapes that move, tones, and what goes wrong with files."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from shards.clips.library import pyav

pyav()  # makes forks safe, which other tests do in this process

CODECS = {
    "mp4": ("libx264", "aac"),
    "mov": ("libx264", "aac"),
    "mkv": ("libx264", "flac"),
    "webm": ("libvpx", "libopus"),
    "avi": ("mpeg4", "pcm_s16le"),
    "ogv": ("libvpx", "libopus"),
    "gif": ("gif", ""),
}
"""Codecs of pictures and sound by suffix, of those that PyAV's wheel can write."""


def moving_square(number: int, width: int = 64, height: int = 48, step: int = 2) -> np.ndarray:
    """A white square of 16 px on blue that moves `step` px to the right per frame: uint8 [H, W, 3]."""
    pixels = np.full((height, width, 3), (20, 40, 120), np.uint8)
    left = number * step % (width - 16)
    pixels[8:24, left : left + 16] = 255
    return pixels


def tone(seconds: float, rate: int = 48_000, hertz: float = 1000.0) -> np.ndarray:
    """A sine, int16 [T]."""
    return np.rint(20_000 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.int16)


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    rate: int = 25,
    times: list[float] | None = None,
    sound: np.ndarray | None = None,
    sound_rate: int = 48_000,
    sound_start: float = 0.0,
    options: dict[str, str] | None = None,
    matrix: str = "unspecified",
    span: str = "tv",
    pixel_width: int = 1,
) -> Path:
    """Write a video.

    Args:
        path: its suffix chooses the codecs: one of CODECS, or ts, of which files can be joined.
        frames: uint8 [H, W, 3].
        rate: frames per second.
        times: of the frames in seconds, where they do not come at a fixed rate.
        sound: int16 [T], mono; None for none.
        sound_rate: samples per second.
        sound_start: seconds by which the sound begins later.
        options: of the container.
        matrix: of colours, which the file names: bt709, or unspecified (BT.601 is used).
        span: of luma: tv or pc.
        pixel_width: by which a pixel is wider than high, for those that read it.
    """
    codec, sound_codec = CODECS["mp4" if path.suffix == ".ts" else path.suffix[1:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    form = {".ogv": "ogg", ".ts": "mpegts"}.get(path.suffix)
    with av.open(str(path), "w", format=form, container_options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.pix_fmt = {"gif": "rgb8"}.get(codec, "yuv420p")
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, rate)
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_width)
        if codec == "libx264":
            stream.codec_context.colorspace = {"unspecified": 2, "bt709": 1}[matrix]
            stream.codec_context.color_range = {"tv": 1, "pc": 2}[span]
        heard = None if sound is None else container.add_stream(sound_codec, rate=sound_rate, layout="mono")
        for number, pixels in enumerate(frames):
            if number == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if codec == "libx264":
                frame = _in_colours(frame, matrix, span)
            frame.pts = round(1000 * times[number]) if times else number
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if heard is not None and sound is not None:
            _mux_sound(container, heard, sound, sound_rate, sound_start)
    return path


def _in_colours(frame: Any, matrix: str, span: str) -> Any:
    scale = av.video.reformatter
    colours = scale.Colorspace.ITU709 if matrix == "bt709" else scale.Colorspace.ITU601
    spans = {"tv": scale.ColorRange.MPEG, "pc": scale.ColorRange.JPEG}
    return frame.reformat(
        format="yuv420p", dst_colorspace=colours, src_color_range=spans["pc"], dst_color_range=spans[span]
    )


def write_sound(path: Path, sound: np.ndarray, codec: str, *, rate: int = 48_000) -> Path:
    """Write a file of mono sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        _mux_sound(container, container.add_stream(codec, rate=rate, layout="mono"), sound, rate, 0.0)
    return path


def _mux_sound(container: Any, stream: Any, sound: np.ndarray, rate: int, start: float) -> None:
    first = round(start * rate)
    resampler = av.AudioResampler(stream.format.name, "mono", rate)
    for place in range(0, len(sound), 960):
        frame = av.AudioFrame.from_ndarray(sound[None, place : place + 960], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, first + place, Fraction(1, rate)
        for own in resampler.resample(frame):
            container.mux(stream.encode(own))
    container.mux(stream.encode(None))


def turn_mp4(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Set the display matrix (a, b, c, d) of an mp4's first track: (0, 1, -1, 0) shows it turned clockwise."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") - 4 + 48
    for number, value in zip((0, 1, 3, 4), matrix, strict=True):
        content[place + 4 * number : place + 4 * number + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(bytes(content))
