"""Clips in a conversion: what a piece writes and hashes of videos, where it takes images otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, BinaryIO

import xxhash

from shards.cleaning.rules import Cleaning
from shards.clips.clip import Clip, ClipSettings
from shards.clips.cutting import clip_of_pair, clips_of_video
from shards.clips.library import pyav
from shards.conversion.conversion_plan import Row, printable
from shards.format.clip_writer import ClipWriter
from shards.ground.errors import InputError
from shards.images.reading import ImageError
from shards.sources.clip_source import ClipSource

UNREADABLE = "a video that cannot be decoded"
_HASHED_AT_ONCE = 2**22


def clip_settings_in(settings: dict[str, Any]) -> ClipSettings | None:
    """How a plan's settings say that clips are cut; None for images."""
    if not settings.get("clips"):
        return None
    return ClipSettings(**{field.name: settings[field.name] for field in fields(ClipSettings)})


def add_clips(
    writer: ClipWriter, source: ClipSource, rows: list[Row], settings: ClipSettings, cleaning: Cleaning
) -> list[dict[str, str]]:
    """Cut the files of these rows into clips and write them; returns what was left out, and why."""
    skipped: list[dict[str, str]] = []
    for row in rows:
        name = printable(source.name(row.place))

        def note(reason: str, name: str = name) -> None:
            skipped.append({"source": name, "reason": reason})

        facts = {**source.columns(row.place), "source": name}
        try:
            for clip in _clips_of(source, row, settings, cleaning, note):
                writer.add_clip(f"{row.key}/{clip.number:05d}", clip, facts, row.label)
        except InputError:
            raise
        except ImageError as error:
            note(str(error))
        except pyav().FFmpegError:  # some are OSErrors or MemoryErrors too, and all are the file's fault
            note(UNREADABLE)
        except MemoryError:
            raise
        except OSError as error:
            note(f"cannot be read: {error.strerror or error}")
        except Exception:  # what else a file's bytes can make a library raise
            note(UNREADABLE)
    return skipped


def _clips_of(
    source: ClipSource, row: Row, settings: ClipSettings, cleaning: Cleaning, note: Callable[[str], None]
) -> Iterator[Clip]:
    if source.is_pair(row.place):
        with source.open(row.place) as file:
            image = file.read()
        yield clip_of_pair(
            image,
            partial(source.open_sound, row.place),
            settings,
            quality=cleaning.quality,
            check=cleaning.check_size,
            max_pixels=cleaning.max_pixels,
            note=note,
        )
        return
    yield from clips_of_video(
        partial(source.open, row.place), settings, quality=cleaning.quality, check=cleaning.check_size, note=note
    )


def file_hashes(source: ClipSource, place: str) -> tuple[int, int, int] | None:
    """xxh3-128, in two halves, of a file's bytes, of a pair those of both, and 0; None for one that cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        with source.open(place) as file:
            _add(digest, file)
        if source.is_pair(place):
            with source.open_sound(place) as file:
                _add(digest, file)
    except OSError:
        return None  # reported when its piece is written
    return digest.intdigest() & (2**64 - 1), digest.intdigest() >> 64, 0


def _add(digest: xxhash.xxh3_128, file: BinaryIO) -> None:
    while block := file.read(_HASHED_AT_ONCE):
        digest.update(block)
