"""The `shards` command: convert, merge, index, verify, info."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from shards import public
from shards.conversion.conversion_plan import HOLDOUT, open_plan
from shards.conversion.convert import PLAN_ALONE, merge
from shards.conversion.outcome import costly_reasons, summary
from shards.convert_options import add_class_names, add_convert_options, location_of, path_of
from shards.format.labels import read_names
from shards.format.manifest import Manifest
from shards.ground import terminal
from shards.ground.arguments import Parser
from shards.ground.errors import InputError, line_of
from shards.inspection.info import gather, summary_of
from shards.inspection.repair import advice, repair
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
    if isinstance(error, IsADirectoryError):
        return f"{error.filename}: is a folder; name a file"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{line_of(error)}; make room or fix permissions, then run the same command again: finished work is kept"
    return str(error)


def _say(text: str) -> None:
    # File names need not be valid text.
    sys.stdout.write(text.encode("utf-8", "replace").decode() + "\n")


def _parser() -> Parser:
    parser = Parser(prog="shards", description="Make and inspect WebDataset shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(
        commands,
        "convert",
        _convert,
        "turn a pile of images into shards",
        "shards convert photos/ data/photos --shuffle 0",
    )
    add_convert_options(command)
    _workers(command)

    command = _command(
        commands,
        "merge",
        _merge,
        "finish a conversion written by tasks: write the manifest",
        "shards merge data/photos",
    )
    command.add_argument(
        "folder", metavar="OUT", type=path_of, help="folder of the shards; if they go to a URL, the --work folder"
    )

    command = _command(
        commands,
        "index",
        _index,
        "index tars made by other tools, so that they can be streamed",
        "shards index data/laion",
    )
    command.add_argument("folder", metavar="DIR", type=path_of, help="folder of tars")
    add_class_names(command)
    _workers(command)

    command = _command(
        commands, "verify", _verify, "check that shards are intact and every image decodes", "shards verify data/photos"
    )
    command.add_argument("folder", metavar="DIR", type=location_of, help="shard folder, or its URL")
    command.add_argument("--no-decode", action="store_true", help="check checksums only, without decoding the images")
    command.add_argument("--repair", action="store_true", help="rewrite damaged shards from their source")
    command.add_argument("--source", type=location_of, metavar="SRC", help="where the source is now, if it was moved")
    _workers(command)

    command = _command(commands, "info", _info, "show what a shard folder holds", "shards info data/photos")
    command.add_argument("folder", metavar="DIR", type=location_of, help="shard folder, or its URL")
    command.add_argument("--html", type=path_of, metavar="FILE", help="also write an HTML page with plots and images")
    return parser


def _command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
) -> Parser:
    # launch/slurm/convert looks for options by their full names; it would miss abbreviated ones.
    command = commands.add_parser(
        name, help=summary, description=summary, epilog=f"example: {example}", allow_abbrev=False
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


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
        clips=arguments.clips,
        frame_rate=arguments.frame_rate,
        frame_side=arguments.frame_side,
        clip_seconds=arguments.clip_seconds,
        min_frames=arguments.min_frames,
        sound_rate=arguments.sound_rate,
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
        _say_finished(manifest, open_plan(arguments.folder).target or str(arguments.folder))
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
        _say(f"{folder}: {what}{hidden}; {advice(folder, problems)}")
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
