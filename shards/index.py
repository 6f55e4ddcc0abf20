"""`shards index`: an index and a manifest for tars that others wrote (webdataset, img2dataset, tar)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards.errors import InputError
from shards.labels import class_names, named
from shards.ledger import SKIPPED_NAME, write_ledger
from shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, index_path, write_index, write_manifest
from shards.processes import over
from shards.tar import TarContents, file_checksum, index_tar


def index_folder(folder: Path, *, workers: int, given_names: list[str] | None = None) -> Manifest:
    """Index every tar of a folder and write its manifest.

    Members `KEY.cls` become labels: class numbers are kept (and called by `given_names`), other texts are numbered in
    sorted order.

    Raises:
        InputError: no tars, ones that were converted, or a damaged one (named; nothing is written then).
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pass the folder that holds the tars")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise InputError(f"{folder}: no .tar files in it; `shards convert` makes them from images")
    if (folder / "plan").is_dir():
        raise InputError(f"{folder}: was made by `shards convert`, and would lose the classes' names and what was left "
                         f"out; `shards verify {folder} --repair` mends it")
    results = list(tqdm(over(_read, tars, workers), total=len(tars), unit="shard", desc="index", leave=False))
    classes = class_names([text for contents, _ in results for text in contents.label_texts], numbers=True)
    names = named(classes, given_names or [])
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    entries = []
    for tar, (contents, checksum) in zip(tars, results, strict=True):
        number = {name: place for place, name in enumerate(classes)}
        labels = np.array([number[text] if text else -1 for text in contents.label_texts], np.int32)
        write_index(replace(contents.index, label=labels), index_path(tar))
        entries.append(ShardEntry(tar.name, len(contents.index), tar.stat().st_size, checksum,
                                  file_checksum(index_path(tar))))
    skipped = ({"source": f"{tar.name}:{key}", "reason": reason}
               for tar, (contents, _) in zip(tars, results, strict=True) for key, reason in contents.skipped)
    counts = write_ledger(folder / SKIPPED_NAME, skipped)
    settings = {"labels": bool(classes)}
    manifest = Manifest(folder, folder.name, tuple(entries), names, "tars", settings, dict(counts))
    if manifest.num_samples == 0:
        raise InputError(f"{folder}: no sample of its {len(tars)} tars has a readable image")
    write_manifest(manifest)
    return manifest


def _read(tar: Path) -> tuple[TarContents, str]:
    return index_tar(tar), file_checksum(tar)
