"""What a manifest may say: names, never paths, since whoever serves shards could have them written anywhere."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from shards.format.manifest import MANIFEST_NAME, parse_manifest
from shards.ground.errors import InputError
from shards.inspection.index import index_folder
from tests.helpers.conversions import write
from tests.helpers.images import PNG


def parsed(folder: Path, **changes: object) -> str:
    """The name that a manifest with these changes has."""
    content = json.loads((folder / MANIFEST_NAME).read_text())
    return parse_manifest(json.dumps({**content, **changes}).encode(), Path(), where="http://store/manifest.json").name


@pytest.mark.parametrize("name", ["/etc/cron.d/x", "../../x", "a/b", "a/", "/", ".", "a\0b"])
def test_a_name_that_is_a_path_is_refused(shard_folder, name):
    with pytest.raises(InputError, match=r"http://store/manifest\.json: its name .* is not a plain name"):
        parsed(shard_folder, name=name)
    with pytest.raises(InputError, match=r"http://store/manifest\.json: shard name .* is not a plain file name"):
        parsed(shard_folder, shards=[{"name": f"{name}/a.tar", "samples": 1, "bytes": 1, "checksum": ""}])


@pytest.mark.parametrize("name", ["photos", "photos 2024", "caf\u00e9", "v1.2", ".photos", ""])
def test_any_other_is_taken(shard_folder, name):
    assert parsed(shard_folder, name=name) == name


def test_tars_that_are_indexed_from_inside_their_folder_are_read(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": PNG[0]})
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    monkeypatch.chdir(tmp_path)
    index_folder(Path(), workers=1)
    assert parsed(tmp_path) == ""
