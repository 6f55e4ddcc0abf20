"""PyAV, which carries FFmpeg: an extra that only clips need."""

from __future__ import annotations

import gc
import os
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, BinaryIO

from shards.ground.errors import InputError

_FORMATS = "mov,matroska,avi,gif,ogg,mpeg,mpegts,asf,flv,mp3,wav,flac,aac,aiff"
"""What a file may be. A playlist under the name of a video would make FFmpeg read whatever it names."""

_READ_AT_ONCE = 2**18


def pyav() -> Any:
    """The module `av`.

    A process that is forked later must not inherit what waits to be collected: FFmpeg would free it there, and wait for
    threads that no fork takes along. So garbage is collected before a fork, from the first use on.

    Raises:
        InputError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise InputError("clips need PyAV: pip install 'largescale[clips]'") from error
    _collect_before_forks()
    av.logging.set_level(None)  # what is wrong with a file is listed; FFmpeg's lines name no file
    return av


@cache
def _collect_before_forks() -> None:
    os.register_at_fork(before=gc.collect)


def read_with_ffmpeg(file: BinaryIO) -> AbstractContextManager[Any]:
    """A container on an open file, to be closed by `with`; the file itself stays open.

    Raises:
        av.FFmpegError, ValueError: damaged, or nothing that is read here.
        InputError: PyAV is not installed.
    """
    container: AbstractContextManager[Any] = pyav().open(
        file, container_options={"format_whitelist": _FORMATS}, buffer_size=_READ_AT_ONCE, metadata_errors="replace"
    )
    return container
