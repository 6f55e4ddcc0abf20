"""A plan knows what kind of source it lists: who only needs the plan does not look for the source, nor through it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import webdataset

from shards.cli import main
from shards.conversion.convert import Options, convert, merge
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError
from shards.stores.folders import Entry, LocalFolder
from tests.helpers.conversions import contents, stored_images
from tests.helpers.images import image_bytes

IMAGES = {f"{number:02d}.png": image_bytes(seed=number) for number in range(12)}
KINDS = {"pile": "folder", "tars": "tars", "tars/0.tar": "tar", "pile.zip": "zip", "list.csv": "list"}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    for folder in ("pile", "tars"):
        (root / folder).mkdir(parents=True)
    for name, payload in IMAGES.items():
        (root / "pile" / name).write_bytes(payload)
    for number in range(2):
        with webdataset.TarWriter(str(root / "tars" / f"{number}.tar")) as writer:
            for name in list(IMAGES)[6 * number : 6 * number + 6]:
                writer.write({"__key__": name.partition(".")[0], "png": IMAGES[name]})
    shutil.make_archive(str(root / "pile"), "zip", root / "pile")
    (root / "list.csv").write_text("\n".join(["path", *(f"pile/{name}" for name in IMAGES)]))
    return root


def options(**changes: object) -> Options:
    return Options("out", samples_per_shard=3, **changes)


@pytest.mark.parametrize("source", KINDS)
def test_tasks_are_merged_where_the_source_is_not(sources, tmp_path, source):
    convert(sources / source, tmp_path / "expected", options())
    out = tmp_path / "out"
    for task in range(2):
        convert(sources / source, out, options(task=(task, 2)))
    assert json.loads((out / "plan" / "plan.json").read_text())["kind"] == KINDS[source]
    sources.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no such folder or file"):  # else all its images would be left out
        convert(sources / source, out, options(task=(1, 2)))
    assert merge(out) == read_manifest(out)
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.parametrize("source", ["pile", "tars"])
def test_a_task_does_not_look_through_the_folder(sources, tmp_path, monkeypatch, source):
    convert(sources / source, tmp_path / "expected", options())
    convert(sources / source, tmp_path / "out", options(task=(0, 2)))

    def look(*_: object) -> list[Entry]:
        raise AssertionError("a stat of each of millions of files")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "entries", look)
        convert(sources / source, tmp_path / "out", options(task=(1, 2)))
        merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_plan_that_does_not_say_the_kind_is_read_by_looking(sources, tmp_path):
    convert(sources / "tars", tmp_path / "out", options(task=(0, 2)))
    path = tmp_path / "out" / "plan" / "plan.json"
    content = json.loads(path.read_text())
    del content["kind"]
    path.write_text(json.dumps(content))
    convert(sources / "tars", tmp_path / "out", options(task=(1, 2)))
    assert merge(tmp_path / "out").num_samples == 12
    assert sorted(stored_images(tmp_path / "out").values()) == sorted(IMAGES.values())


def test_another_source_is_looked_at(sources, tmp_path):
    convert(sources / "pile", tmp_path / "out", options(task=(0, 2)))
    shutil.copytree(sources / "pile", tmp_path / "moved")
    convert(tmp_path / "moved", tmp_path / "out", options())
    assert sorted(stored_images(tmp_path / "out").values()) == sorted(IMAGES.values())
    convert(sources / "pile", tmp_path / "two", options(task=(0, 2)))
    with pytest.raises(InputError, match=r"has changed since .* was made \(12 images then, 6 now"):
        convert(sources / "tars" / "0.tar", tmp_path / "two", options())


def test_a_moved_source_repairs_though_its_old_place_is_gone(sources, tmp_path, capsys):
    convert(sources / "pile", tmp_path / "out", options())
    expected = contents(tmp_path / "out")
    (tmp_path / "out" / "out-000001.tar").write_bytes(b"damaged")
    sources.rename(tmp_path / "elsewhere")
    assert main(["verify", str(tmp_path / "out"), "--repair", "--workers", "1"]) != 0
    assert "no such folder or file" in capsys.readouterr().err
    moved = str(tmp_path / "elsewhere" / "pile")
    assert main(["verify", str(tmp_path / "out"), "--repair", "--source", moved, "--workers", "1"]) == 0
    assert contents(tmp_path / "out") == expected
