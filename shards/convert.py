"""`shards convert`: a folder of images to WebDataset shards, in pieces that any process on any node may write.

The source is listed once into a plan; a piece of it becomes one shard, written whole or not at all. Pieces that are
written already are passed over, so a conversion that was killed goes on where it was. The number of processes and
tasks never changes a byte. The manifest is written last: without it a folder is not finished.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.clean import Cleaning
from shards.duplicates import Fingerprints, fingerprint
from shards.errors import InputError
from shards.files import atomic_write
from shards.images import ImageError
from shards.manifest import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    check_files,
    index_path,
    write_index,
    write_manifest,
)
from shards.plan import (
    PLAN,
    PLAN_IN_WORK,
    Plan,
    Row,
    Written,
    check_listing,
    check_settings,
    label_column,
    make_plan,
    open_plan,
    printable,
)
from shards.sources import Source, open_source
from shards.tar import file_checksum, index_tar

SKIPPED_NAME = "skipped.jsonl"
PLAN_ALONE = (0, 0)
"""The task that makes the plan and writes nothing."""


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        name: first part of the shards' names.
        labels: "folder" takes the first folder below the source as the class, "cls" the `cls` member of a tar's sample,
            "column:NAME" a column of a list, "none" writes no labels.
        samples_per_shard: files listed for one shard.
        workers: processes.
        shuffle: seed of a permutation of the listing, None to keep it sorted.
        force: replace a finished folder, or begin anew.
        cleaning: which images are kept, and how.
        duplicates: "exact" leaves out files with the bytes of another, "near" also pictures that look like another;
            "keep" looks for none.
        radius: Hamming distance of the hashes of near ones, see `shards/duplicates.py`.
        task: (i, n) writes every n-th piece from number i on, and leaves the manifest to `merge`; None does it all.
            Task 0 makes the plan, if there is none yet; n = 0 makes it and writes nothing.
    """

    name: str
    labels: str = "none"
    samples_per_shard: int = 10_000
    workers: int = 1
    shuffle: int | None = None
    force: bool = False
    cleaning: Cleaning = field(default_factory=Cleaning)
    duplicates: str = "keep"
    radius: int = 3
    task: tuple[int, int] | None = None


def convert(path: Path, out: Path, options: Options) -> Manifest | None:
    """Convert a folder of images, an archive, tars or a list (see `sources.py`), or go on with it.

    Returns:
        The manifest; None for a task, which leaves it to `merge`.

    Raises:
        InputError: nothing to convert, a source or options that changed, or a target that must not be overwritten.
    """
    _check_target(path, out, options)
    source = open_source(path, label_column=label_column(options.labels))
    plan = _plan(source, out, options)
    if options.task == PLAN_ALONE:
        return None
    first, step = options.task or (0, 1)
    pieces = range(first, plan.num_pieces, step)
    if options.duplicates != "keep" and not plan.are_duplicates_known():
        _scan_pieces(plan, pieces, options)
        if options.task:
            return None
        _find_duplicates(plan)
    _write_pieces(plan, out, pieces, options)
    return None if options.task else merge(out)


def merge(out: Path) -> Manifest | None:
    """Finish what the tasks of a conversion did: write the manifest.

    Returns:
        The manifest; None after the first of two rounds of tasks that leave out duplicates: what they found is known
        now, and their commands are to be given again.

    Raises:
        InputError: pieces are missing, or none of the images could be read.
    """
    plan = open_plan(out)
    if plan.settings["duplicates"] != "keep" and not plan.are_duplicates_known():
        missing = [piece for piece in range(plan.num_pieces) if not plan.scan_file(piece).exists()]
        _require_all(out, missing, plan.num_pieces, "looked at")
        _find_duplicates(plan)
        return None
    pieces = [plan.written(number) for number in range(plan.num_pieces)]
    missing = [number for number, written in enumerate(pieces) if written is None]
    _require_all(out, missing, len(pieces), "written")
    entries = tuple(written.entry for written in pieces if written.entry is not None)
    if not entries:
        why = next(row["reason"] for written in pieces for row in written.skipped)
        raise InputError(f"{plan.source.path}: none of {plan.num_rows} images can be read ({why}); nothing was written")
    counts: Counter[str] = Counter()
    with atomic_write(out / SKIPPED_NAME) as file:
        for row in _all_skipped(plan, pieces):
            counts[row["reason"]] += 1
            file.write((json.dumps(row) + "\n").encode())
    manifest = Manifest(out, plan.settings["name"], entries, plan.classes, plan.source.path.name,
                        {key: value for key, value in plan.settings.items() if key != "name"}, dict(counts))
    check_files(manifest)
    write_manifest(manifest)
    return manifest


def rewrite(manifest: Manifest, name: str, source: Path | None) -> None:
    """Write one shard of a finished conversion anew.

    Args:
        manifest: of the conversion.
        name: of the shard.
        source: where the images are now; None is where they were.

    Raises:
        InputError: no plan, or the images are not those that the shard was made of; it is left as it was then.
    """
    plan = open_plan(manifest.root)
    settings = plan.settings
    if source is not None:
        plan = open_plan(manifest.root, open_source(source, label_column=label_column(settings["labels"])))
    piece = int(name.removesuffix(".tar").rpartition("-")[2])
    cleaning = Cleaning(**{key: settings[key] for key in vars(Cleaning())})
    tar = manifest.root / name
    rows = plan.rows(piece)
    work = manifest.root / ".repair.writing"
    shutil.rmtree(work, ignore_errors=True)
    try:
        written = _write_shard(plan.source, work / name, rows, cleaning, plan.repeated(rows))
        [listed] = [entry for entry in manifest.shards if entry.name == name]
        if written.entry is None or written.entry.checksum != listed.checksum:
            raise InputError(
                f"{tar}: cannot be made again, {plan.source.path} no longer has the images it was made of; restore "
                f"them, or convert again with --force"
            )
        for path in (index_path(tar), tar):
            (work / path.name).replace(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _require_all(out: Path, missing: list[int], total: int, done: str) -> None:
    if missing:
        raise InputError(
            f"{out}: {len(missing)} of {total} pieces are not {done}, such as piece {missing[0]}; give the command of "
            f"their task again (with --task I/N, piece P belongs to task P modulo N)"
        )


def _all_skipped(plan: Plan, pieces: list[Written]) -> Iterator[dict[str, str]]:
    for written in pieces:
        yield from written.skipped
    for path in plan.others():
        yield {"source": path, "reason": "not an image file"}


def _find_duplicates(plan: Plan) -> None:
    plan.find_duplicates(plan.settings["radius"] if plan.settings["duplicates"] == "near" else None)


def _plan(source: Source, out: Path, options: Options) -> Plan:
    settings = _settings(options)
    first_task = options.task is None or options.task[0] == 0
    exists = (out / PLAN / "plan.json").exists()
    if options.force and first_task:
        exists = False
    if not exists and first_task:
        out.mkdir(parents=True, exist_ok=True)
        _clear(out)
        return make_plan(source, out, settings)
    plan = open_plan(out, source)
    check_settings(plan, settings)
    if first_task:
        check_listing(plan, source)
    return plan


def _check_target(source: Path, out: Path, options: Options) -> None:
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise InputError(f"{out}: lies inside {source}; choose a folder outside the images")
    if (out / MANIFEST_NAME).exists() and not options.force:
        raise InputError(f"{out}: holds finished shards; choose another folder, or pass --force to replace them")
    foreign = [path.name for path in out.glob("*.tar") if not index_path(path).exists()] if out.is_dir() else []
    if foreign and not (out / PLAN).exists():
        raise InputError(f"{out}: holds tars of unknown origin ({sorted(foreign)[0]}); choose another folder")
    for key in ("samples_per_shard", "workers"):
        if getattr(options, key) < 1:
            raise InputError(f"--{key.replace('_', '-')}={getattr(options, key)}: expected at least 1")
    if "/" in options.name or "." in options.name or not options.name:
        raise InputError(f"--name={options.name}: expected a name without dots and slashes")
    if options.duplicates not in ("keep", "exact", "near"):
        raise InputError(f"--duplicates={options.duplicates}: expected keep, exact or near")
    if not 0 <= options.radius <= 7:
        raise InputError(f"--radius={options.radius}: expected 0 to 7")
    if options.task not in (None, PLAN_ALONE) and not 0 <= options.task[0] < options.task[1]:
        raise InputError(f"--task={options.task[0]}/{options.task[1]}: expected I/N with I from 0 to N - 1")


def _clear(out: Path) -> None:
    """Remove what an earlier conversion left, the manifest first."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for plan in (out / PLAN, out / PLAN_IN_WORK):
        shutil.rmtree(plan, ignore_errors=True)
    for tar in out.glob("*.tar"):
        if index_path(tar).exists():
            tar.unlink()
    for pattern in (f"*{INDEX_SUFFIX}", ".*.writing", SKIPPED_NAME):
        for path in out.glob(pattern):
            path.unlink()


def _scan_pieces(plan: Plan, pieces: range, options: Options) -> None:
    todo = [piece for piece in pieces if not plan.scan_file(piece).exists()]
    _over_pieces(partial(_scan_piece, plan, options.duplicates == "near"), plan, pieces, todo, options.workers, "scan")


def _scan_piece(plan: Plan, look: bool, piece: int) -> int:
    """Hash the images of a piece; returns how many files it had."""
    rows, found = plan.rows(piece), []
    for row in rows:
        try:
            numbers = fingerprint(plan.source.read(row.place).payload, look=look)
        except OSError:
            continue  # writing its piece will say so
        if numbers is not None:
            found.append((row.number, *numbers))
    columns = np.array(found, np.uint64).reshape(-1, 4).T
    Fingerprints(*(np.ascontiguousarray(column) for column in columns)).save(plan.scan_file(piece))
    return len(rows)


def _write_pieces(plan: Plan, out: Path, pieces: range, options: Options) -> None:
    todo = [piece for piece in pieces if not _is_written(plan, out, piece)]
    write = partial(_write_piece, plan, out, options.name, options.cleaning)
    _over_pieces(write, plan, pieces, todo, options.workers, "convert")


def _over_pieces(
    do: Callable[[int], int], plan: Plan, pieces: range, todo: list[int], workers: int, what: str
) -> None:
    """Do something for the pieces that are left, in several processes, with a bar that counts files."""
    total, left = (sum(plan.num_rows_of(piece) for piece in part) for part in (pieces, todo))
    with tqdm(total=total, initial=total - left, unit="image", desc=what, leave=False, mininterval=0.5) as bar:
        if workers == 1 or len(todo) <= 1:
            for piece in todo:
                bar.update(do(piece))
        else:
            with ProcessPoolExecutor(min(workers, len(todo))) as pool:
                for count in pool.map(do, todo):
                    bar.update(count)


def _is_written(plan: Plan, out: Path, piece: int) -> bool:
    written = plan.written(piece)
    if written is None or written.entry is None:
        return written is not None
    tar = out / written.entry.name
    return tar.exists() and tar.stat().st_size == written.entry.num_bytes and index_path(tar).exists()


def _write_piece(plan: Plan, out: Path, name: str, cleaning: Cleaning, piece: int) -> int:
    """Write the shard of a piece and say so in the plan; returns how many files it had."""
    rows = plan.rows(piece)
    tar = out / f"{name}-{piece:06d}.tar"
    for leftover in out.glob(f".{tar.stem}.*.writing"):
        leftover.unlink(missing_ok=True)
    plan.record(piece, _write_shard(plan.source, tar, rows, cleaning, plan.repeated(rows)))
    return len(rows)


def _write_shard(
    source: Source, tar_path: Path, rows: list[Row], cleaning: Cleaning, repeated: dict[int, tuple[str, str]]
) -> Written:
    """Write one tar and its index; a shard without a usable image is not written."""
    skipped: list[dict[str, str]] = []
    labels: list[int] = []
    with atomic_write(tar_path) as file:
        with tarfile.open(fileobj=file, mode="w|", bufsize=1 << 20) as tar:
            for row in rows:
                if row.number in repeated:
                    other, reason = repeated[row.number]
                    skipped.append({"source": printable(source.name(row.place)), "reason": reason, "repeats": other})
                    continue
                try:
                    content = source.read(row.place)
                    payload, suffix = cleaning.apply(content.payload, content.suffix)
                except ImageError as error:
                    skipped.append({"source": printable(source.name(row.place)), "reason": str(error)})
                    continue
                except OSError as error:
                    reason = f"cannot be read: {error.strerror}"
                    skipped.append({"source": printable(source.name(row.place)), "reason": reason})
                    continue
                _add_sample(tar, row.key, {**content.others, suffix: payload}, row.label)
                labels.append(row.label)
        if labels:
            # The index comes first: a tar with an index is known as one of ours, wherever a conversion is killed.
            file.flush()
            index = index_tar(Path(file.name)).index
            assert len(index) == len(labels), "the tar does not hold what was written to it"
            index.label[:] = labels
            write_index(index, index_path(tar_path))
    if not labels:
        tar_path.unlink()
        return Written(None, skipped)
    entry = ShardEntry(tar_path.name, len(labels), tar_path.stat().st_size, file_checksum(tar_path),
                       file_checksum(index_path(tar_path)))
    return Written(entry, skipped)


def _add_sample(tar: tarfile.TarFile, key: str, members: dict[str, bytes], label: int) -> None:
    """Add the members of a sample as webdataset's TarWriter(mtime=0) does, byte for byte (it would import torch)."""
    members = {**members, **({"cls": str(label).encode()} if label >= 0 else {})}
    for name in sorted(members):
        member = tarfile.TarInfo(f"{key}.{name}")
        member.size, member.mtime, member.mode = len(members[name]), 0, 0o444
        member.uname = member.gname = "bigdata"
        tar.addfile(member, io.BytesIO(members[name]))


def _settings(options: Options) -> dict[str, Any]:
    """The options that decide about bytes."""
    return {"name": options.name, "labels": options.labels, "samples_per_shard": options.samples_per_shard,
            "shuffle": options.shuffle, "duplicates": options.duplicates, "radius": options.radius,
            **asdict(options.cleaning)}
