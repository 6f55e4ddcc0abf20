"""What goes into a conversion, what comes out of it, and how one is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from shards.cli import main
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file but those of the plan."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def stored_images(folder: Path) -> dict[str, bytes]:
    """Bytes of every image by key, found through the indexes."""
    manifest = read_manifest(folder)
    found = {}
    for number in range(len(manifest.shards)):
        index, tar = read_index(manifest.index_path(number)), manifest.tar_path(number).read_bytes()
        for row in range(len(index)):
            start = int(index.offset[row])
            found[index.key(row)] = tar[start : start + int(index.size[row])]
    return found


def put(tar: tarfile.TarFile, name: str, payload: bytes = b"", **fields: object) -> None:
    """Add a member, with any fields of its header."""
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(payload))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files by their paths in a folder; returns the folder."""
    for name, payload in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(payload)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command is refused with."""
    assert main([str(argument) for argument in arguments]) == 2
    [line] = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    return line
