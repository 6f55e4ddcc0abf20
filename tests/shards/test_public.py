"""`import shards`: functions that do what the commands do, and cost nothing until they are used."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys

import pytest

import shards
from shards.cli import _parser, main
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

NAMES = ["convert", "index", "open", "repair", "verify"]


@pytest.fixture(scope="module")
def images(tmp_path_factory, sample_images):
    folder = tmp_path_factory.mktemp("images") / "pile"
    for number, path in enumerate(sorted((sample_images / "test").rglob("*.png"))[:40]):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.parent.name / f"{number}.png")
    return folder


def test_it_offers_what_it_says():
    assert sorted(shards.__all__) == NAMES and set(NAMES) <= set(dir(shards))
    for name in NAMES:
        function = getattr(shards, name)
        assert inspect.isfunction(function) and "Raises:" in function.__doc__
        optional = [one for one in inspect.signature(function).parameters.values() if one.default is not one.empty]
        assert all(one.kind is one.KEYWORD_ONLY for one in optional)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = shards.nothing


def test_importing_it_is_cheap():
    script = "import sys, shards; assert not {'numpy', 'pyarrow', 'PIL', 'fsspec'} & set(sys.modules); shards.convert"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=600)


def test_functions_write_what_commands_write(images, tmp_path):
    manifest = shards.convert(
        images, tmp_path / "a" / "photos", labels="folder", shuffle=3, samples_per_shard=16, workers=1
    )
    assert (
        main(
            [
                "convert",
                str(images),
                str(tmp_path / "b" / "photos"),
                "--labels",
                "folder",
                "--shuffle",
                "3",
                "--samples-per-shard",
                "16",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert manifest.num_samples == 40 and len(manifest.shards) == 3
    for path in sorted((tmp_path / "a/photos").glob("photos-*")):
        assert path.read_bytes() == (tmp_path / "b/photos" / path.name).read_bytes()
    folder = shards.open(str(tmp_path / "a/photos"))
    assert len(folder) == 40 and folder.manifest == manifest

    assert shards.repair(tmp_path / "a/photos", workers=1) == []
    damaged = sorted((tmp_path / "a/photos").glob("*.tar"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-600])
    assert shards.repair(tmp_path / "a/photos", workers=1) == [damaged.name]
    assert damaged.read_bytes() == (tmp_path / "b/photos" / damaged.name).read_bytes()

    (tmp_path / "tars").mkdir()
    for tar in (tmp_path / "a/photos").glob("*.tar"):
        shutil.copy(tar, tmp_path / "tars")
    assert shards.index(tmp_path / "tars", workers=1).num_samples == 40
    assert shards.verify(tmp_path / "tars", workers=1) == []
    tar = next((tmp_path / "tars").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-600])
    assert {problem.shard for problem in shards.verify(tmp_path / "tars", workers=1)} == {tar.name}


def test_every_option_of_the_command_is_an_argument():
    def options(name: str) -> set[str]:
        command = _parser()._subparsers._group_actions[0].choices[name]
        return {action.dest for action in command._actions} - {"help", "debug"}

    def arguments(name: str) -> set[str]:
        return set(inspect.signature(getattr(shards, name)).parameters)

    assert options("convert") - {"no_decode"} == arguments("convert") - {"decode"}
    assert options("index") == arguments("index")
    assert options("verify") - {"folder", "no_decode", "repair", "source"} == arguments("verify") - {
        "location",
        "decode",
    }


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda at: shards.convert(at, at.parent / "out", workers=0), "--workers=0: expected at least 1"),
        (lambda at: shards.convert(at, at.parent / "out", shuffle=-1), "--shuffle=-1: expected a seed"),
        (lambda at: shards.convert(at, at.parent / "out", labels="names"), "--labels=names: expected none, folder"),
        (lambda at: shards.convert(at / "nothing", at.parent / "out"), "no such"),
        (lambda at: shards.index(at, workers=1), "no .tar files in it"),
        (lambda at: shards.index(at, workers=-1), "--workers=-1: expected at least 1"),
        (lambda at: shards.verify(at), "images and not shards; make shards of them"),
        (lambda at: shards.open(at), "images and not shards; make shards of them"),
        (lambda at: shards.repair(at), "images and not shards; make shards of them"),
    ],
)
def test_what_cannot_be_done_is_an_input_error(images, call, expected):
    with pytest.raises(InputError) as error:
        call(images)
    assert expected in str(error.value)
    assert not (images.parent / "out").exists()
