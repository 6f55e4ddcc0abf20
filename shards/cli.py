"""The `shards` command: convert, merge, index, verify, info."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shards import public
from shards.cleaning.rules import Cleaning
from shards.conversion.conversion_plan import HOLDOUT
from shards.conversion.convert import PLAN_ALONE, merge
from shards.conversion.outcome import costly_reasons, summary
from shards.format.labels import read_names
from shards.format.ledger import SKIPPED_NAME
from shards.format.manifest import Manifest
from shards.ground import terminal
from shards.ground.errors import InputError, line_of
from shards.inspection.info import gather, summary_of
from shards.inspection.repair import repair
from shards.stores.locate import manifest_at

USER_ERROR, DAMAGED = 2, 1
"""Exit codes: the input has to be fixed; `verify` found damage."""

_SHOWN_PROBLEMS = 50


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return terminal.run(_main, argv)


def _main(argv: list[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return terminal.fail_line("interrupted; run the same command again", 130)
    except BrokenPipeError:
        raise
    except (InputError, OSError) as error:
        if arguments.debug:
            raise
        return terminal.fail_line(_line(error), USER_ERROR)
    except MemoryError:
        if arguments.debug:
            raise
        return terminal.fail_line(
            "out of memory; lower --workers, then run the same command again: finished work is kept", USER_ERROR
        )


def _line(error: Exception) -> str:
    """An error in a line for the user."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.filename or 'files'}: {error.strerror}; raise the limit (`ulimit -n`), or use fewer --workers"
    if isinstance(error, OSError) and error.errno == errno.EAGAIN:
        return line_of(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{line_of(error)}; make room or fix permissions, then run the same command again: finished work is kept"
    return str(error)


def _say(text: str) -> None:
    # File names need not be valid text.
    sys.stdout.write(text.encode("utf-8", "replace").decode() + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shards", description="Make and inspect WebDataset shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(
        commands,
        "convert",
        _convert,
        "turn a pile of images into shards",
        "shards convert photos/ data/photos --shuffle 0",
    )
    command.add_argument(
        "source",
        metavar="SRC",
        type=_location,
        help="folder of images (searched recursively) or of tars, a .tar, a .zip, or a list: .csv, "
        ".jsonl, .parquet with a column `path`; a path, or a URL such as s3://bucket/folder",
    )
    command.add_argument("out", metavar="OUT", type=_location, help="folder for the shards, or its URL")
    command.add_argument(
        "--work",
        metavar="DIR",
        type=_path,
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
    _class_names(command)
    command.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="default 10000")
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
    _workers(command)
    _cleaning(command)

    command = _command(
        commands,
        "merge",
        _merge,
        "finish a conversion written by tasks: write the manifest",
        "shards merge data/photos",
    )
    command.add_argument(
        "folder", metavar="OUT", type=_path, help="folder of the shards; if they go to a URL, the --work folder"
    )

    command = _command(
        commands,
        "index",
        _index,
        "index tars made by other tools, so that they can be streamed",
        "shards index data/laion",
    )
    command.add_argument("folder", metavar="DIR", type=_path, help="folder of tars")
    _class_names(command)
    _workers(command)

    command = _command(
        commands, "verify", _verify, "check that shards are intact and every image decodes", "shards verify data/photos"
    )
    command.add_argument("folder", metavar="DIR", type=_location, help="shard folder, or its URL")
    command.add_argument("--no-decode", action="store_true", help="check checksums only, without decoding the images")
    command.add_argument("--repair", action="store_true", help="rewrite damaged shards from their source")
    command.add_argument("--source", type=_location, metavar="SRC", help="where the source is now, if it was moved")
    _workers(command)

    command = _command(commands, "info", _info, "show what a shard folder holds", "shards info data/photos")
    command.add_argument("folder", metavar="DIR", type=_location, help="shard folder, or its URL")
    command.add_argument("--html", type=_path, metavar="FILE", help="also write an HTML page with plots and images")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    # launch/slurm/convert looks for options by their full names; it would miss abbreviated ones.
    command = commands.add_parser(
        name, help=summary, description=summary, epilog=f"example: {example}", allow_abbrev=False
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


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


def _location(text: str) -> str:
    return os.path.expanduser(text.removeprefix("file://"))  # where the shell did not, as in quotes


def _path(text: str) -> Path:
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


def _class_names(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--class-names", type=_path, metavar="FILE", help="names for numbered classes: one per line, class 0 first"
    )


def _workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of processes (default: one per core)",
    )


def _convert(arguments: argparse.Namespace) -> int:
    out: str = arguments.out
    manifest = public.convert(
        arguments.source,
        out,
        name=arguments.name or "",
        labels=arguments.labels,
        class_names=_names(arguments),
        samples_per_shard=arguments.samples_per_shard,
        shuffle=arguments.shuffle,
        holdout=arguments.holdout,
        update=arguments.update,
        force=arguments.force,
        work=arguments.work,
        task=arguments.task,
        duplicates=arguments.duplicates,
        radius=arguments.radius,
        min_side=arguments.min_side,
        max_pixels=arguments.max_pixels,
        max_aspect=arguments.max_aspect,
        no_blank=arguments.no_blank,
        no_animated=arguments.no_animated,
        max_side=arguments.max_side,
        quality=arguments.quality,
        plain=arguments.plain,
        srgb=arguments.srgb,
        decode=not arguments.no_decode,
        workers=arguments.workers,
    )
    if manifest is None:
        home = arguments.work or out
        number, count = arguments.task
        done = f"task {number} of {count} is done; when all are, run `shards merge {home}`"
        _say(f"{out}: {'the plan is made; --task I/N writes part I' if arguments.task == PLAN_ALONE else done}")
    else:
        _say_finished(manifest, out)
    return 0


def _names(arguments: argparse.Namespace) -> list[str]:
    return read_names(arguments.class_names) if arguments.class_names else []


def _merge(arguments: argparse.Namespace) -> int:
    manifest = merge(arguments.folder)
    if manifest is None:
        _say(f"{arguments.folder}: duplicates are known now; run the same tasks again, then merge again")
    else:
        _say_finished(manifest, str(arguments.folder))
    return 0


def _index(arguments: argparse.Namespace) -> int:
    manifest = public.index(arguments.folder, workers=arguments.workers, class_names=_names(arguments))
    _say_finished(manifest, str(arguments.folder))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    # What is held out is a shard folder of its own.
    results = [_verify_folder(arguments, folder) for folder in (arguments.folder, *_held_out(arguments.folder))]
    return max(results)


def _held_out(location: str) -> list[str]:
    folder = f"{location.rstrip('/')}/{HOLDOUT}"
    with suppress(InputError):
        return [folder] if manifest_at(location).settings.get("holdout") and manifest_at(folder) else []
    return []


def _verify_folder(arguments: argparse.Namespace, folder: str) -> int:
    problems = public.verify(folder, workers=arguments.workers, decode=not arguments.no_decode)
    for problem in problems[:_SHOWN_PROBLEMS]:
        _say(str(problem))
    if problems and arguments.repair:
        for name in repair(folder, problems, arguments.source):
            _say(f"{name}: rewritten")
        problems = public.verify(folder, workers=arguments.workers, decode=not arguments.no_decode)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        hidden = f" ({more} not shown)" if more > 0 else ""
        what = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        _say(f"{folder}: {what}{hidden}; restore the files, or run `shards verify {folder} --repair`")
        return DAMAGED
    manifest = manifest_at(folder)
    _say(f"{folder}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards are intact")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    facts = gather(public.open(arguments.folder))
    _say(summary_of(facts))
    if arguments.html is not None:
        from shards.inspection.page import write_page  # matplotlib takes its time

        write_page(facts, arguments.html)
        _say(f"page: {arguments.html}")
    return 0


def _say_finished(manifest: Manifest, location: str) -> None:
    _say(summary(manifest, location))
    _warn(manifest, location)
    held_out = f"{location.rstrip('/')}/{HOLDOUT}"
    with suppress(InputError):  # there is none, or it is in a store, and this is the work folder
        if manifest.settings.get("holdout"):
            _say(summary(manifest_at(held_out), held_out))


def _warn(manifest: Manifest, location: str) -> None:
    for line in costly_reasons(manifest, location):
        sys.stderr.write(f"warning: {line}\n")
