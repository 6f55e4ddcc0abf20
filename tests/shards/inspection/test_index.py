"""`shards index` over tars as others leave them: torn, unsorted, joined, with names that are no text."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from shards.cli import main
from shards.format import tar
from shards.format.ledger import read_ledger
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index
from shards.ground.errors import InputError
from shards.images import reading
from shards.inspection import index
from shards.inspection.index import index_folder
from shards.inspection.verify import verify
from shards.sources import archives
from shards.sources.found import SCATTERED
from tests.helpers.conversions import put
from tests.helpers.images import PNG

Members = list[tuple[str, bytes]]


def make_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as file:
        for name, payload in members:
            put(file, name, payload)
    return path


def labels_of(folder: Path) -> dict[str, str]:
    """Class by key."""
    manifest, found = read_manifest(folder), {}
    for number in range(len(manifest.shards)):
        rows = read_index(manifest.index_path(number))
        found |= {
            rows.key(row): manifest.classes[label] if label >= 0 else ""
            for row, label in enumerate(rows.label.tolist())
        }
    return found


def ledger(folder: Path) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in read_ledger(folder / "skipped.parquet")}


def labelled(first: int, last: int) -> Members:
    return [
        member
        for number in range(first, last)
        for member in ((f"{number}.png", PNG[number]), (f"{number}.cls", b"cat" if number % 2 else b"dog"))
    ]


class Watched(io.BytesIO):
    """A file that counts what is read of it."""

    num_read = largest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.num_read, self.largest = self.num_read + len(content), max(self.largest, len(content))
        return content


CLASSES = {str(number): "cat" if number % 2 else "dog" for number in range(6)}


@pytest.mark.parametrize("command", ["index", "convert"])
def test_torn_tars_are_named_and_the_others_go_on(tmp_path, capsys, command):
    source = tmp_path / "tars"
    for number in range(4):
        path = make_tar(source / f"{number}.tar", labelled(number, number + 2))
        if number in (1, 2):
            path.write_bytes(path.read_bytes()[: 2048 if number == 1 else 700])
    out = source if command == "index" else tmp_path / "out"
    assert main([command, str(source)] + ([str(out), "--labels", "cls"] if command == "convert" else [])) == 0
    stderr = capsys.readouterr().err
    assert "a torn tar: what follows in it is lost: 1.tar, 2.tar; restore them" in stderr
    found = {key.rpartition("/")[2]: label for key, label in labels_of(out).items()}
    assert found == {number: CLASSES[number] for number in ("0", "1", "3", "4")}
    assert ledger(out) == dict.fromkeys(("1.tar", "2.tar"), "a torn tar: what follows in it is lost")


def test_of_a_tar_with_a_damaged_header_the_rest_is_not_read(tmp_path):
    path = make_tar(tmp_path / "0.tar", [*labelled(0, 1), ("large.png", bytes(2**22)), *labelled(1, 2)])
    content = bytearray(path.read_bytes())
    content[content.index(b"large.png")] ^= 255
    file = Watched(content)
    with pytest.raises(InputError, match=r"0\.tar: torn or damaged near byte"):
        list(tar.walk(file, path))
    assert file.num_read < 2**16


@pytest.mark.parametrize(
    "zeros, then, is_whole",
    [(2, b"", True), (2**13, b"", True), (1, b"", False), (0, b"", False), (2, b"x", False), (2**13, b"x", False)],
)
def test_a_whole_tar_ends_in_zeros_alone(tmp_path, zeros, then, is_whole):
    content = make_tar(tmp_path / "0.tar", labelled(0, 1)).read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512 + 512 * zeros) + then
    file = Watched(content)
    if is_whole:
        assert [sample.key for sample in tar.walk(file, "a tar")] == ["0"]
    else:
        with pytest.raises(InputError, match="a tar: "):
            list(tar.walk(file, "a tar"))
    assert file.largest <= 2**20


def test_too_little_memory_leaves_no_tar_out(tmp_path, monkeypatch):
    make_tar(tmp_path / "0.tar", labelled(0, 2))

    def lacking(payload: bytes, name: str) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(reading, "_open", lacking)
        with pytest.raises(InputError, match=r"0\.tar: not enough memory for an image"):
            index_folder(tmp_path, workers=1)
    assert index_folder(tmp_path, workers=1).num_samples == 2


def test_where_all_are_torn_nothing_is_written(tmp_path):
    path = make_tar(tmp_path / "0.tar", labelled(0, 2))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=r"no sample of its 1 tars has a readable image \(0\.tar: a torn tar"):
        index_folder(tmp_path, workers=1)
    assert not (tmp_path / "manifest.json").exists()


def test_a_killed_index_goes_on_with_the_tars_that_are_left(tmp_path, monkeypatch):
    for number in range(3):
        make_tar(tmp_path / f"{number}.tar", labelled(number, number + 1))
    read, looked = index.index_tar, []

    def killed_at_the_last(path: Path) -> object:
        looked.append(path.name)
        if looked == ["0.tar", "1.tar", "2.tar"]:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(index, "index_tar", killed_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        index_folder(tmp_path, workers=1)
    assert not (tmp_path / "manifest.json").exists()
    os.utime(tmp_path / "1.tar", ns=(1, 1))  # it may be another one now
    index_folder(tmp_path, workers=1)
    assert looked[3:] == ["1.tar", "2.tar"]
    assert labels_of(tmp_path) == {number: CLASSES[number] for number in "012"}
    assert not (tmp_path / ".index").exists()


def test_names_that_are_no_text_are_spelled_out(tmp_path):
    odd = b"caf\xe9".decode("utf-8", "surrogateescape")
    make_tar(tmp_path / "0.tar", [(f"{odd}.png", PNG[0]), (f"{odd}2.txt", b"x"), ("b.png", PNG[1])])
    index_folder(tmp_path, workers=1)
    assert set(labels_of(tmp_path)) == {r"caf\xe9", "b"} and ledger(tmp_path) == {r"0.tar:caf\xe92": "no image"}
    assert not verify(tmp_path, workers=1, decode=True)[1]


APART = {
    "images first": [("0.png", PNG[0]), ("1.png", PNG[1]), ("0.cls", b"dog"), ("1.cls", b"cat")],
    "labels first": [("1.cls", b"cat"), ("0.cls", b"dog"), ("0.png", PNG[0]), ("1.png", PNG[1])],
    "in turns": [("0.png", PNG[0]), ("1.cls", b"cat"), ("0.cls", b"dog"), ("1.png", PNG[1])],
}


@pytest.mark.parametrize("members", APART.values(), ids=APART)
def test_members_that_lie_apart_find_each_other(tmp_path, members):
    make_tar(tmp_path / "in" / "0.tar", members)
    index_folder(tmp_path / "in", workers=1)
    assert labels_of(tmp_path / "in") == {"0": "dog", "1": "cat"} and not ledger(tmp_path / "in")
    assert not verify(tmp_path / "in", workers=1, decode=True)[1]
    (tmp_path / "in" / "manifest.json").unlink()
    assert main(["convert", str(tmp_path / "in" / "0.tar"), str(tmp_path / "out"), "--labels", "cls"]) == 0
    assert sorted(labels_of(tmp_path / "out").values()) == ["cat", "dog"]


@pytest.mark.parametrize("members", [APART["images first"], APART["labels first"]])
def test_members_too_far_apart_are_named_never_dropped_without_a_word(tmp_path, monkeypatch, members):
    monkeypatch.setattr(tar, "HELD_SAMPLES", 1)
    make_tar(tmp_path / "in" / "0.tar", members)
    make_tar(tmp_path / "in" / "1.tar", labelled(2, 4))
    index_folder(tmp_path / "in", workers=1)
    [reason] = ledger(tmp_path / "in").values()
    assert "more than 1 samples apart; pack the tar again" in reason and labels_of(tmp_path / "in").keys() == {"2", "3"}
    with pytest.raises(InputError, match=r"0\.tar: members of the sample \d lie more than 1 samples apart"):
        for _ in tar.walk((tmp_path / "in" / "0.tar").open("rb"), tmp_path / "in" / "0.tar"):
            pass


FAR_APART = {"soon": APART["images first"], "late": [*APART["in turns"][:1], *labelled(2, 6), ("0.cls", b"dog")]}


@pytest.mark.parametrize("members", FAR_APART.values(), ids=FAR_APART)
def test_a_tar_of_members_too_far_apart_is_left_out_of_a_conversion_as_a_whole(tmp_path, capsys, monkeypatch, members):
    monkeypatch.setattr(tar, "HELD_SAMPLES", 1)
    monkeypatch.setattr(archives, "HELD_SAMPLES", 1)
    for number in range(3):
        make_tar(tmp_path / "in" / f"{number}.tar", members if number == 1 else labelled(number, number + 3))
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--labels", "cls"]) == 0
    assert "too far apart: 1.tar; pack them again in the order of the names" in capsys.readouterr().err
    assert ledger(tmp_path / "out") == {"1.tar": SCATTERED}
    labels = {f"{tar}/{key}": CLASSES[str(key)] for tar in (0, 2) for key in range(tar, tar + 3)}
    assert labels_of(tmp_path / "out") == labels
    make_tar(tmp_path / "in" / "1.tar", sorted(members))
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--labels", "cls", "--update"]) == 0
    assert not ledger(tmp_path / "out") and labels_of(tmp_path / "out").keys() > labels.keys()


def test_repeated_names_of_joined_tars_are_samples_of_their_own(tmp_path):
    make_tar(tmp_path / "0.tar", [("a.png", PNG[0]), ("a.txt", b"old"), ("b.png", PNG[1]), ("a.png", PNG[2])])
    manifest = index_folder(tmp_path, workers=1)
    assert manifest.num_samples == 3
    assert not verify(tmp_path, workers=1, decode=True)[1]


def test_a_folder_that_cannot_be_written_to_is_noticed_before_the_work(tmp_path, monkeypatch, capsys):
    make_tar(tmp_path / "0.tar", labelled(0, 1))
    (tmp_path / ".index").write_text("in the way of the drafts")
    monkeypatch.setattr(index, "index_tar", None)  # would fail if it came to that
    assert main(["index", str(tmp_path)]) == 2
    assert f"error: {tmp_path / '.index'}: File exists" in capsys.readouterr().err
