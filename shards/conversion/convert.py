"""`shards convert`: a pile of images to WebDataset shards, in pieces that any process on any node may write.

The source is listed once into a plan; a piece of it becomes one shard, written whole or not at all. Pieces that are
written already are passed over, so a conversion that was killed goes on where it was. The number of processes and
tasks never changes a byte. The manifest is written last: without it a folder is not finished.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from shards.cleaning.rules import Cleaning
from shards.clips.clip import ClipSettings
from shards.clips.library import pyav
from shards.conversion.conversion_plan import (
    PLAN,
    TRAIN,
    Plan,
    check_settings,
    open_plan,
    planned_source,
    rename_classes,
    source_for,
)
from shards.conversion.listing import check_listing, make_plan, update_plan
from shards.conversion.pieces import scan_pieces, shard_name, write_pieces, write_shard
from shards.conversion.targets import SPLITS, LocalTarget, StoreTarget, Target
from shards.format.labels import named
from shards.format.ledger import SKIPPED_NAME, write_ledger
from shards.format.manifest import MANIFEST_NAME, Manifest, ShardEntry, write_manifest
from shards.format.shard_index import index_path
from shards.ground.errors import InputError
from shards.ground.files import at_work_in, remove_partial_files
from shards.sources.source import Source
from shards.stores.locate import manifest_at
from shards.stores.store import is_url

PLAN_ALONE = (0, 0)
"""The task that makes the plan and writes nothing."""


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        name: first part of the shards' names.
        labels: "folder" takes the first folder below the source as the class, "cls" the `cls` member of a tar's sample,
            "column:NAME" a column of a list, "none" writes no labels.
        class_names: of classes that are numbers, that of class 0 first; empty leaves them numbers.
        samples_per_shard: files listed for one shard.
        workers: processes.
        shuffle: seed of a permutation of the listing, None to keep it sorted.
        force: replace a finished folder, or start over.
        cleaning: which images are kept, and how.
        clips: how clips are cut of videos; None for images.
        duplicates: "exact" leaves out files with the bytes of another, "near" also pictures that look like another;
            "keep" looks for none.
        radius: Hamming distance of the hashes of near ones, see `shards/cleaning/duplicates.py`.
        holdout: share of the images that goes to a folder `holdout` of its own, chosen by a hash of the key: the same
            ones when more come.
        update: add what the source has got since it was listed; a task with n > 0 goes on with what was added.
        work: folder for the plan, and for shards until they are uploaded, where OUT is a URL; all tasks share it.
        task: (i, n) writes every n-th piece from number i on, and leaves the manifest to `merge`; None does it all.
            Task 0 makes the plan, if there is none yet; n = 0 makes it and writes nothing.
    """

    name: str
    labels: str = "none"
    class_names: list[str] = field(default_factory=list)
    samples_per_shard: int = 10_000
    workers: int = 1
    shuffle: int | None = None
    force: bool = False
    cleaning: Cleaning = field(default_factory=Cleaning)
    clips: ClipSettings | None = None
    duplicates: str = "keep"
    radius: int = 3
    holdout: float = 0.0
    update: bool = False
    work: Path | None = None
    task: tuple[int, int] | None = None


def convert(location: str | Path, out: str | Path, options: Options) -> Manifest | None:
    """Convert a folder of images, an archive, tars or a list (see `sources/source.py`), or go on with it.

    Args:
        location: path or URL of the source.
        out: path or URL of the shard folder.
        options: how.

    Returns:
        The manifest of the training split; None for a task, which leaves it to `merge`.

    Raises:
        InputError: nothing to convert, a source or options that changed, or a target that must not be overwritten.
    """
    _check_options(options)
    target = _open_target(str(out), options)
    _check_target(str(location), target, options)
    find = source_for if options.force else partial(planned_source, target.home)
    source = find(location, _settings(options))
    is_task = options.task not in (None, PLAN_ALONE)
    with at_work_in(target.home, with_others=is_task):
        return _convert(source, target, options)


def _convert(source: Source, target: Target, options: Options) -> Manifest | None:
    plan = _plan(source, target, options)
    named(plan.classes, plan.settings.get("class_names", []))
    if options.task == PLAN_ALONE:
        return None
    first, step = options.task or (0, 1)
    pieces = range(first, plan.num_pieces, step)
    if options.duplicates != "keep" and not plan.are_duplicates_known():
        scan_pieces(plan, pieces, options.workers)
        if options.task:
            return None
        _find_duplicates(plan)
    write_pieces(plan, target, pieces, options.cleaning, options.workers)
    return None if options.task else _merge(target.home)


def merge(home: Path) -> Manifest | None:
    """Finish what the tasks of a conversion did: write the manifests.

    Args:
        home: the shard folder, or the work folder of one that goes to a store.

    Returns:
        The manifest of the training split; None after the first of two rounds of tasks that leave out duplicates: what
        they found is known now, and their commands are to be given again.

    Raises:
        InputError: pieces are missing, a task is at work, or none of the images could be read.
    """
    with at_work_in(home, with_others=False) if home.is_dir() else nullcontext():
        return _merge(home)


def _merge(home: Path) -> Manifest | None:
    plan = open_plan(home)
    target = StoreTarget(plan.target, home) if plan.target else LocalTarget(home)
    if plan.settings["duplicates"] != "keep" and not plan.are_duplicates_known():
        missing = [piece for piece in range(plan.num_pieces) if not plan.scan_file(piece).exists()]
        _require_all(home, missing, plan.num_pieces, "looked at")
        _find_duplicates(plan)
        return None
    entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    missing, why = [], "all were held out"
    for number in range(plan.num_pieces):
        written = plan.written(number)
        if written is None:
            missing.append(number)
        elif written.entry is not None:
            entries[plan.split(number)].append(written.entry)
        elif written.skipped:
            why = written.skipped[0]["reason"]
    _require_all(home, missing, plan.num_pieces, "written")
    if not entries[TRAIN]:
        raise InputError(
            f"{plan.source.location}: none of {plan.num_rows} images can be used ({why}); nothing was written"
        )
    manifests = {split: _finish(plan, target, split, entries[split]) for split in SPLITS if entries[split]}
    plan.remove_leftovers()
    return manifests[TRAIN]


def _finish(plan: Plan, target: Target, split: str, entries: list[ShardEntry]) -> Manifest:
    """Write the ledger and the manifest of a split."""
    folder = target.folder(split)
    remove_partial_files(folder)  # all pieces are written, so no process is at work
    counts = write_ledger(folder / SKIPPED_NAME, _all_skipped(plan, split))
    settings = {key: value for key, value in plan.settings.items() if key not in ("name", "class_names")}
    names = plan.settings.get("class_names", [])
    if names:
        settings["class_names"] = True  # the classes are these names
    classes = named(plan.classes, names)
    manifest = Manifest(
        folder,
        shard_name(plan, split),
        tuple(entries),
        classes,
        _last_name(plan.source.location),
        settings,
        dict(counts),
    )
    target.check(manifest, split)
    write_manifest(manifest)
    target.publish(split, [folder / SKIPPED_NAME, folder / MANIFEST_NAME])
    return manifest


def rewrite(manifest: Manifest, name: str, source: str | None) -> None:
    """Rewrite one shard of a finished conversion.

    Args:
        manifest: of the conversion.
        name: of the shard.
        source: where the images are now; None is where they were.

    Raises:
        InputError: no plan, or the images are not those that the shard was made of; it is left as it was then.
    """
    plan = open_plan(manifest.root)
    settings = plan.settings
    place = plan.source.location if source is None else source
    plan = open_plan(manifest.root, planned_source(plan.folder.parent, place, settings))
    piece = int(name.removesuffix(".tar").rpartition("-")[2])
    cleaning = Cleaning(**{key: settings[key] for key in vars(Cleaning())})
    tar = manifest.root / name
    rows = plan.rows(piece)
    work = manifest.root / ".repair.writing"
    shutil.rmtree(work, ignore_errors=True)
    try:
        written = write_shard(plan, work / name, rows, cleaning)
        [listed] = [entry for entry in manifest.shards if entry.name == name]
        if written.entry is None or written.entry.checksum != listed.checksum:
            raise InputError(
                f"{tar}: cannot be made again, {plan.source.location} no longer has the images it was made from; "
                f"restore them, or convert again with --force"
            )
        for path in (index_path(tar), tar):
            (work / path.name).replace(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _require_all(out: Path, missing: list[int], total: int, done: str) -> None:
    if missing:
        raise InputError(
            f"{out}: {len(missing)} of {total} pieces are not {done}, such as piece {missing[0]}; run their tasks "
            f"again (with --task I/N, piece P belongs to task P modulo N)"
        )


def _all_skipped(plan: Plan, split: str) -> Iterator[dict[str, str]]:
    for number in range(plan.num_pieces):
        written = plan.written(number)
        if written and plan.split(number) == split:
            yield from written.skipped
    if split == TRAIN:
        yield from plan.others()


def _find_duplicates(plan: Plan) -> None:
    plan.find_duplicates(plan.settings["radius"] if plan.settings["duplicates"] == "near" else None)


def _open_target(out: str, options: Options) -> Target:
    if not is_url(out):
        if options.work is not None:
            raise InputError(f"--work={options.work}: only for an OUT that is a URL; leave it out")
        return LocalTarget(Path(out))
    if out.startswith(("http:", "https:", "pipe:")):
        raise InputError(f"{out}: cannot be written to; choose a folder, or an object store such as s3://bucket/folder")
    if options.work is None:
        raise InputError(
            f"{out}: needs --work DIR, a local folder (all tasks share it) for the plan, and for shards until they are "
            f"uploaded"
        )
    return StoreTarget(out, options.work)


def _plan(source: Source, target: Target, options: Options) -> Plan:
    settings, home = _settings(options), target.home
    url = target.location if isinstance(target, StoreTarget) else ""
    first_task = options.task is None or options.task[0] == 0
    exists = (home / PLAN / "plan.json").exists()
    if first_task and (options.force or not exists):
        if options.update and target.is_finished() and not options.force:
            raise InputError(f"{home}: has no {PLAN}/ for --update to add to; start over with --force")
        unnamed = {**_worth_keeping(settings), "class_names": []}  # until it is known that the names fit
        return rename_classes(make_plan(source, home, unnamed, url, target.clear), options.class_names)
    plan = open_plan(home, source)
    check_settings(plan, settings)
    if plan.target != url:
        raise InputError(f"{plan.folder}: is for shards that go to {plan.target}, not to {url}; choose another --work")
    if not first_task:
        return plan
    plan = rename_classes(plan, options.class_names)
    if not options.update:
        check_listing(plan)
        return plan
    if options.task not in (None, PLAN_ALONE):
        sys.stderr.write(f"{source.location}: goes on with the plan; --task 0/0 is the one that adds with --update\n")
        return plan
    updated, gone = update_plan(plan)
    sys.stderr.write(
        f"{source.location}: {updated.num_rows - plan.num_rows:,} new files; {gone:,} of the "
        f"{plan.num_rows:,} listed before are gone, but their samples are kept\n"
    )
    return updated


def _worth_keeping(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a plan has them: one of images does not speak of clips."""
    return {key: value for key, value in settings.items() if key != "clips" or value}


def _check_options(options: Options) -> None:
    for key in ("samples_per_shard", "workers"):
        if getattr(options, key) < 1:
            raise InputError(f"--{key.replace('_', '-')}={getattr(options, key)}: expected at least 1")
    if "/" in options.name or "." in options.name or not options.name:
        raise InputError(f"--name={options.name}: expected a name without dots or slashes")
    if options.clips is not None:
        _check_clip_options(options)
    if options.duplicates not in ("keep", "exact", "near"):
        raise InputError(f"--duplicates={options.duplicates}: expected keep, exact or near")
    if not 0 <= options.radius <= 7:
        raise InputError(f"--radius={options.radius}: expected 0 to 7")
    if not 0 <= options.holdout < 1:
        raise InputError(f"--holdout={options.holdout}: expected a fraction from 0 to less than 1")
    if options.force and options.task not in (None, PLAN_ALONE):
        raise InputError(
            "--force with --task I/N would start over under the other tasks; pass it to --task 0/0, which "
            "makes the plan, and to no other"
        )
    if options.force and options.update:
        raise InputError("--force starts over, --update adds: choose one")
    if options.task not in (None, PLAN_ALONE) and not 0 <= options.task[0] < options.task[1]:
        raise InputError(f"--task={options.task[0]}/{options.task[1]}: expected I/N with I from 0 to N - 1")


def _check_clip_options(options: Options) -> None:
    pyav()
    if options.duplicates == "near":
        raise InputError("--duplicates=near: only for images; with --clips, exact finds videos of the same bytes")
    if options.labels == "cls":
        raise InputError("--labels=cls: only for tars; with --clips use folder, or column:NAME of a list")
    for key in ("animated", "blank", "max_side", "plain", "srgb"):
        if getattr(options.cleaning, key):
            option = {"animated": "no-animated", "blank": "no-blank"}.get(key, key.replace("_", "-"))
            raise InputError(f"--{option}: only for images; leave it out with --clips")
    if not options.cleaning.decode:
        raise InputError("--no-decode: with --clips videos are decoded in any case; leave it out")


def _check_target(source: str, target: Target, options: Options) -> None:
    out, planned = target.location, (target.home / PLAN).exists()
    if _lies_in(out, source) or (not is_url(source) and _lies_in(str(target.home), source)):
        raise InputError(f"{out}: lies inside {source}; choose a folder outside the images")
    if not is_url(source) and _lies_in(source, str(target.home)):
        raise InputError(f"{source}: lies inside {target.home}, which the shards go to; choose another folder for them")
    if not (options.force or options.update) and target.is_finished():
        raise InputError(
            f"{out}: holds finished shards; choose another folder, pass --update to add what is new, or --force to "
            f"replace them"
        )
    if options.force and not planned and target.is_finished() and _is_of_others(target):
        raise InputError(
            f"{out}: holds tars that were indexed, not converted, which --force would remove; choose another folder"
        )
    may_clear = options.force and isinstance(target, StoreTarget)
    if not planned and not may_clear and (strangers := target.strangers()):
        other = f", or pass the --work of their conversion (not {target.home})" if is_url(out) else ""
        raise InputError(f"{out}: holds tars of unknown origin ({strangers[0]}); choose another folder{other}")


def _is_of_others(target: Target) -> bool:
    try:
        return "samples_per_shard" not in manifest_at(target.location).settings
    except InputError:  # damaged: then its plan, which only conversions have, would be needed to tell
        return True


def _lies_in(folder: str, source: str) -> bool:
    if is_url(folder) or is_url(source):
        return f"{folder.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    path, parent = Path(folder).resolve(), Path(source).resolve()
    return path == parent or parent in path.parents


def _last_name(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


def _settings(options: Options) -> dict[str, Any]:
    """The options that decide about bytes."""
    return {
        "name": options.name,
        "labels": options.labels,
        "samples_per_shard": options.samples_per_shard,
        "shuffle": options.shuffle,
        "duplicates": options.duplicates,
        "radius": options.radius,
        "holdout": options.holdout,
        "class_names": options.class_names,
        **asdict(options.cleaning),
        **({"clips": True, **asdict(options.clips)} if options.clips else {"clips": None}),
    }
