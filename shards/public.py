"""What `import shards` gives: the commands as functions. The `shards` command calls these, too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shards.cleaning.rules import Cleaning
from shards.clips.clip import ClipSettings
from shards.conversion.conversion_plan import printable
from shards.conversion.convert import Options
from shards.conversion.convert import convert as convert_with
from shards.format.manifest import Manifest
from shards.ground.errors import InputError
from shards.inspection.index import index_folder
from shards.inspection.repair import repair as rewrite_damaged
from shards.inspection.shard_folder import ShardFolder
from shards.inspection.verify import Problem
from shards.inspection.verify import verify as compare_with_manifest
from shards.stores.store import is_url


def convert(
    source: str | Path,
    out: str | Path,
    *,
    name: str = "",
    labels: str = "none",
    class_names: Sequence[str] = (),
    samples_per_shard: int | None = None,
    shuffle: int | None = None,
    holdout: float = 0.0,
    update: bool = False,
    force: bool = False,
    work: str | Path | None = None,
    task: tuple[int, int] | None = None,
    duplicates: str = "keep",
    radius: int = 3,
    min_side: int = 0,
    max_pixels: int = Cleaning.max_pixels,
    max_aspect: float = 0.0,
    no_blank: bool = False,
    no_animated: bool = False,
    max_side: int = 0,
    quality: int = 90,
    plain: bool = False,
    srgb: bool = False,
    decode: bool = True,
    clips: bool = False,
    frame_rate: float = ClipSettings.frame_rate,
    frame_side: int = ClipSettings.frame_side,
    clip_seconds: float = ClipSettings.clip_seconds,
    min_frames: int = ClipSettings.min_frames,
    sound_rate: int = ClipSettings.sound_rate,
    workers: int | None = None,
) -> Manifest | None:
    """Turn a pile of images, or of videos, into shards, or go on with it where it was interrupted.

    Args:
        source: path or URL of a folder of images or tars, a .tar, a .zip, or a list (.csv, .jsonl, .parquet).
        out: path or URL of the shard folder.
        name: first part of the shards' names; empty is the name of `out`.
        labels: "none", "folder" (the first one below `source` is the class), "cls" (the tars' own) or "column:NAME".
        class_names: of classes that are numbers, that of class 0 first.
        samples_per_shard: files listed for one shard; None is 10,000, of videos 100.
        shuffle: seed of a permutation of the files over the shards; None keeps them sorted.
        holdout: share of the images for OUT/holdout, by a hash of their names.
        update: add shards of the images that `source` has got since it was listed.
        force: replace shards that `out` holds already.
        work: where `out` is a URL: local folder for the plan, and for shards until they are uploaded.
        task: (i, n) writes the i-th of n parts and leaves the manifest to `shards merge`; (0, 0) makes the plan alone.
        duplicates: "exact" leaves out files with the bytes of another, "near" also those that look like another.
        radius: of near ones, how many of the 64 bits of their hashes may differ.
        min_side, max_pixels, max_aspect: smaller, larger, and longer images are left out; 0 leaves out none.
        no_blank, no_animated: leave out images of a single colour, or of several frames.
        max_side, quality: larger images are made smaller, as JPEGs of this quality; 0 keeps all as they are.
        plain: store what is not plain (CMYK, 16 bits, palette, transparent, turned, animated) as upright RGB.
        srgb: store what has a colour profile as sRGB.
        decode: decode also what keeps its bytes, to find damage.
        clips: cut videos, and images that have a sound of their name beside them, into clips; needs PyAV.
        frame_rate, frame_side: frames per second of a clip, and pixels of their shorter side; 0 keeps the size.
        clip_seconds, min_frames: length of a clip, and frames below which one is left out.
        sound_rate: samples per second of a clip's sound; 0 leaves it out.
        workers: processes; None is one for each core.

    Returns:
        The manifest; None for a task.

    Raises:
        InputError: nothing to convert, values that mean nothing, a source or settings that changed since the conversion
            began, or a target that must not be overwritten.
        OSError: the target cannot be written; what is finished stays, and the same call goes on.
    """
    if shuffle is not None and shuffle < 0:
        raise InputError(f"--shuffle={shuffle}: expected a seed of 0 or more")
    if labels not in ("none", "folder", "cls") and not labels.startswith("column:"):
        raise InputError(f"--labels={labels}: expected none, folder, cls or column:NAME")
    cut = ClipSettings(float(frame_rate), frame_side, float(clip_seconds), min_frames, sound_rate)
    return convert_with(
        _location(source),
        _location(out),
        Options(
            name=name or _name_of(_location(out)),
            labels=labels,
            class_names=list(class_names),
            holdout=holdout,
            update=update,
            work=None if work is None else Path(work).expanduser(),
            samples_per_shard=(100 if clips else 10_000) if samples_per_shard is None else samples_per_shard,
            clips=cut if clips else None,
            workers=_processes(workers),
            shuffle=shuffle,
            force=force,
            task=task,
            duplicates=duplicates,
            radius=radius,
            cleaning=Cleaning(
                min_side=min_side,
                max_pixels=max_pixels,
                max_aspect=max_aspect,
                blank=no_blank,
                animated=no_animated,
                max_side=max_side,
                quality=quality,
                plain=plain,
                srgb=srgb,
                decode=decode,
            ),
        ),
    )


def index(folder: str | Path, *, class_names: Sequence[str] = (), workers: int | None = None) -> Manifest:
    """Index tars that others wrote (webdataset, img2dataset, tar), so that they can be streamed; they stay as they are.

    Args:
        folder: of the tars; indexes and manifest are written beside them.
        class_names: of classes that are numbers, that of class 0 first.
        workers: processes; None is one for each core.

    Raises:
        InputError: no tars, ones that were converted, or none with a readable image; nothing is written then.
        OSError: the folder cannot be written to.
    """
    return index_folder(Path(folder).expanduser(), workers=_processes(workers), given_names=list(class_names))


def verify(location: str | Path, *, decode: bool = True, workers: int | None = None) -> list[Problem]:
    """Compare a shard folder with its manifest: sizes, checksums, counts, indexes, and every image.

    Args:
        location: path or URL of the folder. What was held out is a folder of its own.
        decode: also decode the images.
        workers: processes; None is one for each core.

    Returns:
        What is wrong, by shard and key; empty if the folder is whole.

    Raises:
        InputError: no readable manifest.
    """
    _, problems = compare_with_manifest(_location(location), workers=_processes(workers), decode=decode)
    return problems


def repair(
    folder: str | Path, *, source: str | Path | None = None, decode: bool = True, workers: int | None = None
) -> list[str]:
    """Rewrite the shards of a converted folder in which `verify` finds something wrong, and only those.

    Args:
        folder: that `convert` wrote; on a store, remove the damaged shards and convert again.
        source: where the images are now; None is where they were.
        decode: find damage by decoding the images, too.
        workers: processes; None is one for each core.

    Returns:
        The names of the rewritten shards; each has the checksum that the manifest names.

    Raises:
        InputError: no readable manifest or plan, a tar that does not belong there, or images that have changed.
    """
    problems = verify(folder, decode=decode, workers=workers)
    return rewrite_damaged(_location(folder), problems, None if source is None else _location(source))


def open(location: str | Path) -> ShardFolder:
    """A shard folder as a sequence of samples: `len(folder)`, `folder[7].image`, `for sample in folder`.

    Args:
        location: path or URL of the folder.

    Raises:
        InputError: no finished shard folder, or files that are not as its manifest says.
    """
    return ShardFolder(_location(location))


def _location(place: str | Path) -> str:
    """A path or URL as text; `~` is the user's home folder, which a shell does not replace in quotes."""
    return os.path.expanduser(str(place).removeprefix("file://"))


def _name_of(out: str) -> str:
    """The first part of the names of shards that go to a place."""
    name = out.rstrip("/").rpartition("/")[2] if is_url(out) else Path(out).resolve().name
    return printable(name.replace(".", "_"))  # names of folders need not be text


def _processes(workers: int | None) -> int:
    if workers is None:
        return os.cpu_count() or 1
    if workers < 1:
        raise InputError(f"--workers={workers}: expected at least 1")
    return workers
