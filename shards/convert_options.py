"""The options of `shards convert`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from shards.cleaning.rules import Cleaning
from shards.clips.clip import ClipSettings
from shards.format.ledger import SKIPPED_NAME


def add_convert_options(command: argparse.ArgumentParser) -> None:
    """All of them but --workers."""
    command.add_argument(
        "source",
        metavar="SRC",
        type=location_of,
        help="folder of images or videos (searched recursively) or of tars, a .tar, a .zip, or a list: .csv, "
        ".jsonl, .parquet with a column `path`; a path, or a URL such as s3://bucket/folder",
    )
    command.add_argument("out", metavar="OUT", type=location_of, help="folder for the shards, or its URL")
    command.add_argument(
        "--work",
        metavar="DIR",
        type=path_of,
        help="if OUT is a URL: local folder for the plan, and for shards until they are uploaded",
    )
    command.add_argument("--name", help="first part of the shards' names (default: the name of OUT)")
    command.add_argument(
        "--labels",
        type=_labels,
        default="none",
        metavar="FROM",
        help="folder: the first folder below SRC; cls: the tars' own; column:NAME: of a list",
    )
    add_class_names(command)
    command.add_argument(
        "--samples-per-shard", type=int, metavar="N", help="files listed for one (default 10000; 100 with --clips)"
    )
    command.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="shuffle the files over the shards (folders are ordered, shards should not be)",
    )
    command.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="F",
        help="fraction of the images for OUT/holdout, by a hash of their names: stable as more come",
    )
    command.add_argument(
        "--update", action="store_true", help="add shards for the images added to SRC since it was listed"
    )
    command.add_argument("--force", action="store_true", help="replace the shards in OUT, or start over")
    command.add_argument(
        "--task",
        type=_task,
        metavar="I/N",
        help="write part I of N (from 0); `shards merge OUT` finishes when all are written; 0/0 only makes the plan",
    )
    _cleaning(command)
    _clips(command)


def _cleaning(command: argparse.ArgumentParser) -> None:
    rules = command.add_argument_group(f"which images to keep, and how ({SKIPPED_NAME} lists the others)")
    rules.add_argument("--min-side", type=int, default=0, metavar="PX", help="leave out images narrower or lower")
    rules.add_argument(
        "--max-pixels",
        type=int,
        default=Cleaning.max_pixels,
        metavar="N",
        help="leave out larger images without decoding them (default %(default)s; 0: no limit)",
    )
    rules.add_argument("--max-aspect", type=float, default=0.0, metavar="R", help="leave out longer or wider images")
    rules.add_argument("--no-blank", action="store_true", help="leave out images of a single colour")
    rules.add_argument("--no-animated", action="store_true", help="leave out images with several frames")
    rules.add_argument(
        "--duplicates",
        choices=["keep", "exact", "near"],
        default="keep",
        help="exact: leave out exact copies of another file; near: also images that look like another",
    )
    rules.add_argument(
        "--radius",
        type=int,
        default=3,
        metavar="BITS",
        help="near: how many of the 64 bits of two images' hashes may differ (default 3)",
    )
    rules.add_argument(
        "--max-side", type=int, default=0, metavar="PX", help="shrink larger images; all others keep their bytes"
    )
    rules.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="JPEG quality of the images written then (default 90)"
    )
    rules.add_argument(
        "--plain",
        action="store_true",
        help="store CMYK, 16-bit, palette, transparent, rotated and animated images as upright RGB",
    )
    rules.add_argument(
        "--srgb",
        action="store_true",
        help="re-encode images with a colour profile (all that is re-encoded is converted to sRGB)",
    )
    rules.add_argument(
        "--no-decode",
        action="store_true",
        help="do not decode images that keep their bytes: faster, but damage shows only in training",
    )


def _clips(command: argparse.ArgumentParser) -> None:
    rules = command.add_argument_group("clips of videos, and of images with a sound of the same name beside them")
    rules.add_argument(
        "--clips",
        action="store_true",
        help="SRC holds videos (mp4, mkv, webm, avi, mov, ogv, gif ...): store clips of frames and sound",
    )
    rules.add_argument(
        "--frame-rate",
        type=float,
        default=ClipSettings.frame_rate,
        metavar="R",
        help="frames per second that are kept (default %(default)g); slower videos keep all of theirs",
    )
    rules.add_argument(
        "--frame-side",
        type=int,
        default=ClipSettings.frame_side,
        metavar="PX",
        help="shrink frames to this shorter side (default %(default)s; 0: keep their size)",
    )
    rules.add_argument(
        "--clip-seconds",
        type=float,
        default=ClipSettings.clip_seconds,
        metavar="S",
        help="longer videos become several clips of this length (default %(default)g)",
    )
    rules.add_argument(
        "--min-frames",
        type=int,
        default=ClipSettings.min_frames,
        metavar="N",
        help="leave out clips of fewer frames (default %(default)s)",
    )
    rules.add_argument(
        "--sound-rate",
        type=int,
        default=ClipSettings.sound_rate,
        metavar="HZ",
        help="samples per second of the sound, in mono (default %(default)s; 0: leave it out)",
    )


def location_of(text: str) -> str:
    """A path or URL; in quotes, `~` is not replaced by the shell."""
    return os.path.expanduser(text.removeprefix("file://"))


def path_of(text: str) -> Path:
    """A path."""
    return Path(text).expanduser()


def _labels(text: str) -> str:
    if text in ("none", "folder", "cls") or text.startswith("column:"):
        return text
    raise argparse.ArgumentTypeError("expected none, folder, cls or column:NAME")


def _task(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError("expected I/N, such as 0/8")
    return int(number), int(count)


def add_class_names(command: argparse.ArgumentParser) -> None:
    """Names for classes that are numbers."""
    command.add_argument(
        "--class-names", type=path_of, metavar="FILE", help="names for numbered classes: one per line, class 0 first"
    )
