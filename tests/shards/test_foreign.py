"""What others made, or broke: odd archives and folders lose nothing without a row that says why.

Covers: shards/format/ledger.py, shards/format/tar.py, shards/sources/archives.py, shards/sources/found.py
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from shards.cli import main
from shards.conversion.convert import Options, convert
from shards.format.ledger import read_ledger
from shards.inspection.index import index_folder
from shards.inspection.verify import verify
from shards.sources import archives
from tests.helpers.conversions import put, refusal, stored_images, write
from tests.helpers.images import PNG, image_bytes


def tar_of(name: str, payload: bytes) -> bytes:
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as tar:
        put(tar, name, payload)
    return stored.getvalue()


def ledger(folder: Path) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in read_ledger(folder / "skipped.parquet")}


# -- Tars -------------------------------------------------------------------------------------------------------------


def test_tars_whose_names_clean_to_the_same_text_have_keys_of_their_own(tmp_path):
    (tmp_path / "tars").mkdir()
    for number, name in enumerate(("x.1.tar", "x_1.tar")):
        with tarfile.open(tmp_path / "tars" / name, "w") as tar:
            put(tar, "a.png", PNG[number])
    convert(tmp_path / "tars", tmp_path / "out", Options("out"))
    assert sorted(stored_images(tmp_path / "out").values()) == sorted(PNG[:2])


@pytest.fixture
def odd_tar(tmp_path: Path) -> Path:
    """A tar with all that a member can be; a hard link leads to 0, 2 is a second image of the sample of 1."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "odd.tar", "w") as tar:
        put(tar, "d", type=tarfile.DIRTYPE)
        put(tar, "d/0.png", PNG[0])
        put(tar, "d/hard.png", type=tarfile.LNKTYPE, linkname="./d/0.png")
        put(tar, "d/soft.png", type=tarfile.SYMTYPE, linkname="0.png")
        put(tar, "d/lost.png", type=tarfile.LNKTYPE, linkname="d/nothing.png")
        put(tar, "d/pipe.png", type=tarfile.FIFOTYPE)
        put(tar, "d/1.png", PNG[1])
        put(tar, "d/1.mask.png", PNG[2])
        put(tar, "d/1.json", b"{}")
        put(tar, "d/notes.txt", b"no image")
        put(
            tar,
            "d/sparse.png",
            PNG[3],
            pax_headers={
                "GNU.sparse.map": f"0,{len(PNG[3])}",
                "GNU.sparse.size": "5000",
                "GNU.sparse.name": "d/sparse.png",
            },
        )
    return tmp_path / "tars"


LOST = {
    "odd.tar:d/soft.png": "a symbolic link in a tar",
    "odd.tar:d/pipe.png": "not a regular file",
    "odd.tar:d/lost.png": "a hard link in a tar that leads to no file before it",
    "odd.tar:d/1.mask.png": "one more image of a sample",
    "odd.tar:d/sparse.png": "a sparse member of a tar",
}


def test_every_member_of_a_tar_is_converted_or_listed(odd_tar, tmp_path):
    convert(odd_tar, tmp_path / "out", Options("out"))
    assert sorted(stored_images(tmp_path / "out").values()) == sorted([PNG[0], PNG[0], PNG[1]])
    assert ledger(tmp_path / "out") == {**LOST, "odd.tar:d/notes.*": "not an image file"}


def test_every_member_of_a_tar_is_indexed_or_listed(odd_tar):
    index_folder(odd_tar, workers=1)
    stored = stored_images(odd_tar)
    assert stored == {"d/0": PNG[0], "d/hard": PNG[0], "d/1": PNG[1]}
    assert ledger(odd_tar) == {**LOST, "odd.tar:d/notes": "no image"}
    assert not verify(odd_tar, workers=1, decode=True)[1]


def test_a_gnu_sparse_member_is_listed(tmp_path):
    # As `tar --sparse` stores a file of zeros with an image behind them: a header with the stretches that are data.
    (tmp_path / "tars").mkdir()
    member = tarfile.TarInfo("a.png")
    member.size, member.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (4096, 512)
    header[483:495] = b"%011o\0" % (4096 + 512)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        put(tar, "b.png", PNG[0])
    (tmp_path / "tars" / "a.tar").write_bytes(bytes(header) + PNG[1].ljust(512, b"\0")[:512] + plain.getvalue())
    convert(tmp_path / "tars", tmp_path / "out", Options("out"))
    assert stored_images(tmp_path / "out") == {"a/b": PNG[0]}
    assert ledger(tmp_path / "out") == {"a.tar:a.png": "a sparse member of a tar"}


def test_what_was_converted_can_be_converted(tmp_path):
    source = write(tmp_path / "pile", {f"{'cat' if n % 3 else 'dog'}/{n}.png": PNG[n] for n in range(12)})
    options = Options("pile", labels="folder", samples_per_shard=4, holdout=0.3)
    convert(source, tmp_path / "one", options)
    (tmp_path / "one" / "_tmp").mkdir()
    again = convert(tmp_path / "one", tmp_path / "two", Options("two", labels="folder"))
    assert set(stored_images(tmp_path / "two").values()) == set(stored_images(tmp_path / "one").values())
    assert again.classes == ("cat", "dog")
    skipped = ledger(tmp_path / "two")
    assert {skipped[name] for name in ("plan", "holdout", "_tmp")} == {"a folder beside tars"}
    assert set(skipped) == {path.name for path in (tmp_path / "one").iterdir() if path.suffix != ".tar"}


@pytest.mark.parametrize("other, says", [("a.png", "the image a.png"), ("more/a.png", "the folder more")])
def test_images_beside_tars_are_refused(odd_tar, tmp_path, capsys, other, says):
    write(odd_tar, {other: PNG[0]})
    line = refusal(capsys, "convert", odd_tar, tmp_path / "out")
    assert f"holds tars (odd.tar) and also {says}; move one of them elsewhere" in line


# -- Zips -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_a_zip_with_one_name_are_all_there(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(3):
            archive.writestr("x/a.png", PNG[number])
    convert(tmp_path / "a.zip", tmp_path / "out", Options("out"))
    assert stored_images(tmp_path / "out") == {"x/a": PNG[0], "x/a~2": PNG[1], "x/a~3": PNG[2]}


def test_reasons_of_damaged_members_are_counted_together(tmp_path):
    path = tmp_path / "a.zip"
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
    with zipfile.ZipFile(path, "w") as archive:
        for number, method in enumerate(methods):
            archive.writestr(f"{number}.png", image_bytes(40, 40, seed=number), method)
        archive.writestr("whole.png", PNG[0])
        starts = [archive.getinfo(f"{number}.png").header_offset for number in range(len(methods))]
    content = bytearray(path.read_bytes())
    for start in starts:
        content[start + 60 : start + 120] = b"\xff" * 60
    path.write_bytes(content)
    manifest = convert(path, tmp_path / "out", Options("out"))
    assert manifest.num_samples == 1 and sum(manifest.skipped.values()) == 5
    assert manifest.skipped["cannot be read: damaged in the archive"] >= 4  # bzip2 has words of its own


def test_a_zip_with_names_that_are_not_what_they_say_is_one_line(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("\u00e9.png", PNG[0])
    path = tmp_path / "a.zip"
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xff\xff"))
    assert "not a whole zip archive" in refusal(capsys, "convert", path, tmp_path / "out")


def test_members_of_a_zip_that_are_bombs_are_listed_and_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(10_001))
        archive.writestr("a.png", PNG[0])
    convert(tmp_path / "a.zip", tmp_path / "out", Options("out"))
    assert ledger(tmp_path / "out") == {"bomb.png": "unpacks to more than 10,000 bytes"}


# -- Folders ----------------------------------------------------------------------------------------------------------


def test_pipes_devices_and_links_to_folders_are_listed(tmp_path):
    source = write(tmp_path / "pile", {"a.png": PNG[0], "x/b.png": PNG[1]})
    os.mkfifo(source / "pipe.png")
    (source / "device.png").symlink_to("/dev/zero")
    (source / "linked.png").symlink_to("x/b.png")
    (source / "folder").symlink_to("x")
    convert(source, tmp_path / "out", Options("out"))
    assert sorted(stored_images(tmp_path / "out").values()) == sorted([PNG[0], PNG[1], PNG[1]])
    assert ledger(tmp_path / "out") == {
        "pipe.png": "not a regular file",
        "device.png": "not a regular file",
        "folder": "a link to a folder",
    }


def test_a_conversion_that_leaves_out_links_to_folders_names_them(tmp_path, capsys):
    source = write(tmp_path / "pile", {"x/b.png": PNG[1]})
    (source / "more").symlink_to("x")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert "a link to a folder: more; links to folders are not followed" in capsys.readouterr().err
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "cat").symlink_to(source / "x")
    line = refusal(capsys, "convert", tmp_path / "subset", tmp_path / "none")
    assert "no images below this folder (1 other files: 1 x a link to a folder; cat); links to folders are not" in line


def test_links_that_lead_nowhere_are_named_and_added_once_they_lead_somewhere(tmp_path, capsys):
    source = write(tmp_path / "pile", {"a.png": PNG[0]})
    links = {"b.png": "../later/b.png", "c": "../later", "loop": ".", "x.png": "y.png", "y.png": "x.png"}
    for name, target in links.items():
        (source / name).symlink_to(target)
    command = ["convert", str(source), str(tmp_path / "out")]
    assert main(command) == 0
    nowhere = "a link that leads nowhere"
    assert f"{nowhere}: b.png, c, x.png, y.png; bring back what they lead to, then add" in capsys.readouterr().err
    assert ledger(tmp_path / "out") == {
        **dict.fromkeys(("b.png", "c", "x.png", "y.png"), nowhere),
        "loop": "a link to a folder",
    }
    write(tmp_path / "later", {"b.png": PNG[1]})
    assert main([*command, "--update"]) == 0 and main(["verify", str(tmp_path / "out")]) == 0
    assert stored_images(tmp_path / "out") == {"a": PNG[0], "b": PNG[1]}
    assert ledger(tmp_path / "out") == {
        **dict.fromkeys(("x.png", "y.png"), nowhere),
        **dict.fromkeys(("c", "loop"), "a link to a folder"),
    }


def test_links_among_tars(tmp_path, capsys):
    """Those to tars are tars, for `index` and `convert` alike; others cost none of the tars."""
    tars = write(tmp_path / "tars", {"a.tar": tar_of("a.png", PNG[0])})
    write(tmp_path / "elsewhere", {"b.tar": tar_of("b.png", PNG[1])})
    links = {"b.tar": "../elsewhere/b.tar", "broken.tar": "gone.tar", "folder.tar": "../elsewhere"}
    for name, target in links.items():
        (tars / name).symlink_to(target)
    assert main(["convert", str(tars), str(tmp_path / "out")]) == 0
    assert ledger(tmp_path / "out") == {"broken.tar": "a link that leads nowhere", "folder.tar": "a link to a folder"}
    assert main(["index", str(tars)]) == 0
    assert "a link that leads nowhere: broken.tar; bring back" in capsys.readouterr().err
    assert ledger(tars) == {"broken.tar": "a link that leads nowhere"}
    for folder in (tmp_path / "out", tars):
        (tmp_path / "linked").unlink(missing_ok=True)
        (tmp_path / "linked").symlink_to(folder)
        assert sorted(stored_images(folder).values()) == sorted(PNG[:2])
        assert main(["verify", str(tmp_path / "linked")]) == 0 and main(["info", str(tmp_path / "linked")]) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_folders_of_programs_are_no_classes(tmp_path, packed):
    files = {
        "cat/1.png": PNG[0],
        "dog/1.png": PNG[1],
        "__MACOSX/cat/._1.png": PNG[2],
        ".hidden/1.png": PNG[3],
        ".ipynb_checkpoints/1.png": PNG[4],
        "cat/.ipynb_checkpoints/1.png": PNG[5],
    }
    source = tmp_path / "pile.zip" if packed else write(tmp_path / "pile", files)
    if packed:
        with zipfile.ZipFile(source, "w") as archive:
            for name, payload in files.items():
                archive.writestr(name, payload)
    manifest = convert(source, tmp_path / "out", Options("out", labels="folder"))
    assert manifest.classes == ("cat", "dog") and sorted(stored_images(tmp_path / "out").values()) == sorted(PNG[:2])
    assert set(ledger(tmp_path / "out")) == set(files) - {"cat/1.png", "dog/1.png"}
    plain = convert(source, tmp_path / "plain", Options("plain"))  # without classes a hidden folder is a folder
    assert plain.num_samples == 3


def test_pipes_and_devices_of_a_list_are_listed(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "a.png").write_bytes(PNG[0])
    (tmp_path / "list.csv").write_text("path\npipe.png\nzero.png\na.png\n")
    manifest = convert(tmp_path / "list.csv", tmp_path / "out", Options("out"))
    assert manifest.num_samples == 1 and manifest.skipped == {"cannot be read: not a regular file": 2}


def test_a_folder_that_cannot_be_listed_is_listed(tmp_path, monkeypatch):
    source = write(tmp_path / "pile", {"a/a.png": PNG[0], "b/b.png": PNG[1], "c/c.png": PNG[2]})
    scandir = os.scandir

    def guarded(path: str) -> object:
        if str(path).rstrip("/").endswith("pile/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", guarded)
        convert(source, tmp_path / "out", Options("out"))
    assert set(stored_images(tmp_path / "out")) == {"a/a", "c/c"}
    assert ledger(tmp_path / "out") == {"b/": "folder cannot be listed"}


def test_paths_that_are_no_text(tmp_path):
    source = write(tmp_path / os.fsdecode(b"pile\xe9"), {"a.png": PNG[0]})
    out = tmp_path / os.fsdecode(b"out\xe8")
    for arguments in (["convert", source, out], ["convert", source, out, "--update"], ["verify", out]):
        subprocess.run([sys.executable, "-m", "shards", *map(str, arguments)], check=True)
    assert stored_images(out) == {"a": PNG[0]}
