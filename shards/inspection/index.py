"""`shards index`: an index and a manifest for tars that others wrote (webdataset, img2dataset, tar).

Each tar is read by itself, in any process, into a draft: its index, with labels that count the texts of this tar. When
all are read, the texts have their numbers, and drafts become indexes one after the other. So memory is that of the tars
at work, and a command that was killed goes on with the tars that have no draft yet.

    DIR/.index/NAME.index.safetensors      the draft of an index
    DIR/.index/NAME.json                   what else is known of the tar, see `_Draft`; written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards.format.labels import class_names, named
from shards.format.ledger import SKIPPED_NAME, write_ledger
from shards.format.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest, write_manifest
from shards.format.shard_index import index_path, read_index, write_index
from shards.format.tar import TornTar, file_checksum, index_tar
from shards.ground.errors import InputError, NotEnoughMemory
from shards.ground.files import at_work_in, atomic_write, names_in
from shards.ground.worker_processes import over
from shards.sources.found import TORN
from shards.stores.folders import BROKEN

_DRAFTS = ".index"


@dataclass(frozen=True)
class _Draft:
    """What is known of a tar.

    Attributes:
        stamp: its bytes and modification time, by which a tar that changed is read again.
        num_samples: that its index has.
        num_bytes, checksum: of the tar.
        texts: of its labels, in the order of the numbers that the draft of its index has for them.
        skipped: names and reasons of what is left out.
        trouble: why the whole tar is left out; empty if it is not.
    """

    stamp: tuple[int, int]
    num_samples: int = 0
    num_bytes: int = 0
    checksum: str = ""
    texts: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    trouble: str = ""


def index_folder(folder: Path, *, workers: int, given_names: list[str] | None = None) -> Manifest:
    """Index every tar of a folder and write its manifest.

    Members `KEY.cls` become labels: class numbers are kept (and called by `given_names`), other texts are numbered in
    sorted order. Left out and listed are tars that are torn, or hold the members of a sample too far apart, and links
    that lead nowhere.

    Raises:
        InputError: no tars, ones that were converted, ones of clips, or none with a readable image; nothing is
            written then.
        OSError: the folder cannot be written to; that is noticed before the work.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pass the folder that holds the tars")
    tars = [folder / name for name in names_in(folder) if name.endswith(".tar") and not (folder / name).is_dir()]
    if not tars:
        raise InputError(f"{folder}: no .tar files in it; `shards convert` makes them from images")
    if (folder / "plan").is_dir():
        raise InputError(
            f"{folder}: was made by `shards convert`, and would lose its class names and the list of what "
            f"was left out; `shards verify {folder} --repair` repairs it"
        )
    if _holds_clips(folder, tars):
        raise InputError(
            f"{folder}: holds clips, of which an index made here would know one image each; `shards verify {folder}` "
            f"says what is damaged, `shards convert --clips` makes them again"
        )
    (folder / _DRAFTS).mkdir(exist_ok=True)
    with at_work_in(folder, with_others=False):
        manifest = _index(folder, tars, workers, given_names or [])
        shutil.rmtree(folder / _DRAFTS)
    return manifest


def _holds_clips(folder: Path, tars: list[Path]) -> bool:
    """Whether the manifest, or the first index that can be read, says that the tars hold clips."""
    try:
        if read_manifest(folder).settings.get("clips"):
            return True
    except (InputError, OSError):
        pass  # none, or a damaged one
    for tar in tars:
        try:
            return read_index(index_path(tar)).clips is not None
        except InputError:
            continue
    return False


def _index(folder: Path, tars: list[Path], workers: int, given_names: list[str]) -> Manifest:
    texts: set[str] = set()
    num_samples = 0
    for tar in tqdm(over(_read, tars, workers), total=len(tars), unit="shard", desc="index", leave=False):
        draft = _draft_of(tar)
        texts.update(draft.texts)
        num_samples += draft.num_samples
    if num_samples == 0:
        why = next((f" ({tar.name}: {draft.trouble})" for tar in tars if (draft := _draft_of(tar)).trouble), "")
        raise InputError(f"{folder}: no sample of its {len(tars)} tars has a readable image{why}")
    classes = class_names(texts, numbers=True)
    names = named(classes, given_names)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    entries = tuple(_entries(tars, classes))
    counts = write_ledger(folder / SKIPPED_NAME, _skipped(tars))
    settings = {"labels": bool(classes), **({"class_names": True} if given_names else {})}
    manifest = Manifest(folder, folder.name, entries, names, "tars", settings, dict(counts))
    write_manifest(manifest)
    return manifest


def _entries(tars: list[Path], classes: tuple[str, ...]) -> Iterator[ShardEntry]:
    """Make the indexes of the drafts."""
    number = {name: place for place, name in enumerate(classes)}
    for tar in tars:
        draft = _draft_of(tar)
        if draft.trouble:
            index_path(tar).unlink(missing_ok=True)
            continue
        index = read_index(index_path(_place(tar)))
        numbers = np.array([*(number[text] for text in draft.texts), -1], np.int32)  # -1 picks the last one
        write_index(replace(index, label=numbers[index.label]), index_path(tar))
        yield ShardEntry(tar.name, draft.num_samples, draft.num_bytes, draft.checksum, file_checksum(index_path(tar)))


def _skipped(tars: list[Path]) -> Iterator[dict[str, str]]:
    for tar in tars:
        draft = _draft_of(tar)
        if draft.trouble:
            yield {"source": tar.name, "reason": draft.trouble}
        yield from ({"source": f"{tar.name}:{key}", "reason": reason} for key, reason in draft.skipped)


def _read(tar: Path) -> Path:
    """Make the draft of a tar, unless there is one; returns the tar."""
    try:
        facts = tar.stat()
    except OSError:
        if not tar.is_symlink():
            raise
        _write(tar, _Draft((-1, -1), trouble=BROKEN))
        return tar
    stamp = facts.st_size, facts.st_mtime_ns
    try:
        if _draft_of(tar).stamp == stamp:
            return tar
    except (OSError, ValueError, TypeError):
        pass  # none yet, or cut by a crash of the machine
    try:
        draft = _contents(tar, stamp)
    except NotEnoughMemory as error:
        raise NotEnoughMemory(f"{tar}: {error}") from error
    except TornTar:
        draft = _Draft(stamp, trouble=TORN)
    except InputError as error:
        draft = _Draft(stamp, trouble=str(error).removeprefix(f"{tar}: "))
    _write(tar, draft)
    return tar


def _write(tar: Path, draft: _Draft) -> None:
    with atomic_write(_place(tar).with_suffix(".json")) as file:
        file.write(json.dumps(asdict(draft)).encode())


def _contents(tar: Path, stamp: tuple[int, int]) -> _Draft:
    contents = index_tar(tar)
    texts = dict.fromkeys(text for text in contents.label_texts if text)
    number = {text: place for place, text in enumerate(texts)}
    labels = np.array([number.get(text, -1) for text in contents.label_texts], np.int32)
    write_index(replace(contents.index, label=labels), index_path(_place(tar)))
    return _Draft(stamp, len(labels), stamp[0], file_checksum(tar), tuple(texts), tuple(contents.skipped))


def _place(tar: Path) -> Path:
    return tar.parent / _DRAFTS / tar.name


def _draft_of(tar: Path) -> _Draft:
    content = json.loads(_place(tar).with_suffix(".json").read_bytes())
    return _Draft(**{**content, "stamp": tuple(content["stamp"])})
