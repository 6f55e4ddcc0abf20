"""Covers: shards/format/shard_index.py, shards/images/names.py"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import webdataset

from shards.cli import main
from shards.conversion.convert import Options, convert
from shards.format.ledger import read_ledger
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index
from shards.ground.errors import InputError
from shards.ground.files import at_work_in
from shards.images.names import IMAGE_FORMATS
from shards.inspection.index import index_folder
from tests.helpers.commands import ROOT
from tests.helpers.conversions import contents, stored_images
from tests.helpers.images import image_bytes


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, nested folders, several formats and awkward names, and files that are no images."""
    source = tmp_path / "photos"
    files = {
        "cat/a.png": image_bytes(seed=1),
        "cat/a.jpg": image_bytes(file_format="JPEG", seed=2),
        "cat/old/b.c.webp": image_bytes(5, 30, "WEBP", seed=3),
        "dog/ümläut 1.PNG": image_bytes(seed=4),
        "dog/.hidden.bmp": image_bytes(file_format="BMP", seed=5),
        "dog/same+name.png": image_bytes(seed=6),
        "dog/same-name.png": image_bytes(seed=7),
        "dog/same=name.png": image_bytes(seed=8),
        "cat/notes.txt": b"not an image",
        "dog/empty.png": b"",
        "dog/text.jpg": b"<html>404</html>",
        "dog/cut.jpg": image_bytes(64, 64, "JPEG")[:900],
    }
    for name, payload in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(payload)
    (source / "dog" / os.fsdecode(b"latin\xe9.png")).write_bytes(image_bytes(seed=9))
    return source


def test_keeps_the_bytes_of_every_readable_image_and_lists_the_others(photos, tmp_path):
    manifest = convert(photos, tmp_path / "out", Options("photos", labels="folder", samples_per_shard=4, shuffle=0))
    originals = {path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    bad = {b"not an image", b"", b"<html>404</html>", (photos / "dog/cut.jpg").read_bytes()}
    stored = stored_images(tmp_path / "out")
    assert set(stored.values()) == originals - bad
    assert len(stored) == manifest.num_samples == 9
    skipped = list(read_ledger(tmp_path / "out/skipped.parquet"))
    assert {row["source"]: row["reason"] for row in skipped} == {
        "dog/empty.png": "empty file",
        "dog/text.jpg": "not an image",
        "dog/cut.jpg": "damaged or cut image",
        "cat/notes.txt": "not an image file",
    }
    assert sum(manifest.skipped.values()) == 4


def test_index_says_size_format_and_class(photos, tmp_path):
    convert(photos, tmp_path / "out", Options("photos", labels="folder"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == ("cat", "dog")
    index = read_index(manifest.index_path(0))
    rows = {index.key(row): row for row in range(len(index))}
    row = rows["cat/old/b_c"]
    assert (index.width[row], index.height[row], index.label[row]) == (5, 30, 0)
    assert IMAGE_FORMATS[index.format[row]] == "webp"
    assert index.label[rows["dog/ümläut 1"]] == 1


def test_equal_stems_stay_separate_samples(photos, tmp_path):
    convert(photos, tmp_path / "out", Options("photos"))
    keys = set(stored_images(tmp_path / "out"))
    assert {"cat/a", "cat/a~2", "dog/same_name", "dog/same_name~2"} <= keys
    with tarfile.open(tmp_path / "out/photos-000000.tar") as tar:
        assert all(member.name.rsplit("/", 1)[-1].count(".") == 1 for member in tar)


def test_bytes_do_not_depend_on_workers_or_time(photos, tmp_path):
    once, again = tmp_path / "one", tmp_path / "two"
    convert(photos, once, Options("photos", samples_per_shard=2, workers=1, shuffle=3))
    for path in photos.rglob("*"):
        os.utime(path, (1, 1))
    convert(photos, again, Options("photos", samples_per_shard=2, workers=3, shuffle=3))
    assert contents(once) == contents(again)
    assert len(read_manifest(once).shards) > 2


def test_tars_are_those_of_webdatasets_writer(photos, tmp_path):
    convert(photos, tmp_path / "out", Options("photos", labels="folder"))
    samples = list(webdataset.WebDataset(str(tmp_path / "out/photos-000000.tar"), shardshuffle=False))
    assert len(samples) == 9
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write({key: value for key, value in sample.items() if not key.startswith("__") or key == "__key__"})
    assert (tmp_path / "theirs.tar").read_bytes() == (tmp_path / "out/photos-000000.tar").read_bytes()


def test_webdataset_decodes_what_was_converted(shard_folder):
    tars = [str(path) for path in sorted(shard_folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls"))
    manifest = read_manifest(shard_folder)
    assert len(samples) == manifest.num_samples == 200
    assert {image.shape for _, image, _ in samples} == {(28, 28, 3)}
    assert all(key.startswith(manifest.classes[label] + "/") for key, _, label in samples)


@pytest.mark.parametrize("mtime", [0, 1234567890.75])
def test_shards_of_webdatasets_own_writer_are_read_after_index(tmp_path, mtime):
    folder = tmp_path / "theirs"
    folder.mkdir()
    payloads = {f"sample/{'long' * 40}/{number:04d}": image_bytes(seed=number) for number in range(30)}
    with webdataset.ShardWriter(str(folder / "s-%04d.tar"), maxcount=8, verbose=0, mtime=mtime) as writer:
        for number, (key, payload) in enumerate(payloads.items()):
            writer.write({"__key__": key, "png": payload, "cls": number % 3, "json": {"caption": key}})
    manifest = index_folder(folder, workers=2)
    assert (manifest.num_samples, len(manifest.shards), manifest.classes) == (30, 4, ("0", "1", "2"))
    assert stored_images(folder) == payloads
    labels = [int(label) for shard in range(4) for label in read_index(manifest.index_path(shard)).label]
    assert labels == [number % 3 for number in range(30)]


def test_tars_made_by_tar_are_read_after_index(photos, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    subprocess.run(["tar", "-C", photos, "-cf", folder / "all.tar", "cat"], check=True)
    manifest = index_folder(folder, workers=1)
    # One sample a key: a.png and a.jpg belong together, the first image counts; the text file has no image.
    assert set(stored_images(folder)) == {"cat/a", "cat/old/b"}
    assert manifest.skipped == {"no image": 1, "one more image of a sample": 1}


def test_no_torch_is_imported():
    modules = "shards.cli, shards.conversion.convert, shards.inspection.verify"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def is_written_to(folder: Path) -> bool:
    """Whether a process holds a folder: workers of a killed one do until they are gone, a while on a loaded machine."""
    try:
        with at_work_in(folder, with_others=False):
            return False
    except InputError:
        return True


def test_a_killed_conversion_leaves_no_manifest_and_goes_through_the_second_time(tmp_path):
    source, out = tmp_path / "many", tmp_path / "out"
    source.mkdir()
    payload = image_bytes(600, 600)
    for number in range(300):
        (source / f"{number:04d}.png").write_bytes(payload)
    command = [
        sys.executable,
        "-m",
        "shards",
        "convert",
        str(source),
        str(out),
        "--samples-per-shard",
        "10",
        "--workers",
        "2",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 600
        while len(list(out.glob("*.tar"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    for tar in out.glob("*.tar"):
        with tarfile.open(tar) as whole:
            assert len(whole.getnames()) == 10
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert read_manifest(out).num_samples == 300
    assert not list(out.glob(".*.writing"))


@pytest.mark.parametrize(
    "prepare, arguments, expected",
    [
        (None, ["convert", "{tmp}/nothing", "{tmp}/out"], "no such folder"),
        ("empty", ["convert", "{tmp}/empty", "{tmp}/out"], "no images below this folder"),
        ("text", ["convert", "{tmp}/text", "{tmp}/out"], "1 other files"),
        ("broken", ["convert", "{tmp}/broken", "{tmp}/out"], "none of 1 images can be used (not an image)"),
        ("loose", ["convert", "{tmp}/loose", "{tmp}/out", "--labels", "folder"], "is not in a class folder"),
        ("loose", ["convert", "{tmp}/loose", "{tmp}/loose/out"], "choose a folder outside the images"),
        ("loose", ["convert", "{tmp}/loose", "{tmp}/out", "--workers", "0"], "--workers=0: expected at least 1"),
        ("loose", ["convert", "{tmp}/loose", "{tmp}/out", "--name", "a/b"], "without dots or slashes"),
        ("converted", ["convert", "{tmp}/loose", "{tmp}/out"], "or --force to replace them"),
        ("foreign", ["convert", "{tmp}/loose", "{tmp}/out"], "tars of unknown origin (x.tar)"),
        (None, ["index", "{tmp}/nothing"], "no such folder"),
        ("empty", ["index", "{tmp}/empty"], "no .tar files"),
        ("zero", ["index", "{tmp}/zero"], "empty file"),
        ("empty", ["verify", "{tmp}/empty"], "no manifest.json"),
        ("empty", ["info", "{tmp}/empty"], "no manifest.json"),
        ("loose", ["info", "{tmp}/loose"], "images and not shards; make shards of them with `shards convert"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, prepare, arguments, expected):
    for folder in ("empty", "text", "broken", "loose", "zero"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text/a.txt").write_text("x")
    (tmp_path / "broken/a.png").write_text("x")
    (tmp_path / "loose/a.png").write_bytes(image_bytes())
    (tmp_path / "zero/a.tar").write_bytes(b"")
    if prepare == "converted":
        convert(tmp_path / "loose", tmp_path / "out", Options("out"))
    if prepare == "foreign":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/x.tar").write_bytes(b"theirs")
    before = contents(tmp_path / "out") if (tmp_path / "out").exists() else None
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0]
    if before is not None:
        assert contents(tmp_path / "out") == before
