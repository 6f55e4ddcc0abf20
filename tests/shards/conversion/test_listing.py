"""Classes of any source, odd lists, and updates of what was written anew.

Covers: shards/format/labels.py
"""

from __future__ import annotations

import csv
import json
import os
import resource
import tarfile

import pytest
import webdataset

from shards.cli import main
from shards.conversion.convert import Options, convert
from shards.format.labels import class_names
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index
from shards.ground.errors import InputError
from shards.inspection.index import index_folder
from tests.helpers.conversions import put, refusal, stored_images, write
from tests.helpers.images import PNG

# -- Classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, before, numbers, names",
    [
        (["2", "0"], (), True, ("0", "1", "2")),
        (["10", "3"], ("0", "1"), True, tuple(map(str, range(11)))),
        (["002", "000"], (), True, ("000", "002")),
        (["3000000", "7"], (), True, ("3000000", "7")),
        (["9" * 5000], (), True, ("9" * 5000,)),
        (["\u0663", "1"], (), True, ("1", "\u0663")),
        (["10", "2"], (), False, ("10", "2")),
        (["10", "2"], ("7",), False, ("7", "10", "2")),
        ([""], (), True, ()),
    ],
)
def test_class_names(texts, before, numbers, names):
    assert class_names(texts, before, numbers=numbers) == names


def test_folders_and_columns_with_numbers_are_names(tmp_path):
    source = write(tmp_path / "pile", {f"{name}/a.png": PNG[place] for place, name in enumerate(("001", "3000000"))})
    assert convert(source, tmp_path / "one", Options("one", labels="folder")).classes == ("001", "3000000")
    (tmp_path / "list.csv").write_text("path,kind\npile/001/a.png,01\npile/3000000/a.png,2\n")
    assert convert(tmp_path / "list.csv", tmp_path / "two", Options("two", labels="column:kind")).classes == ("01", "2")


def test_cls_members_with_leading_zeros_keep_their_labels(tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        for number in range(2):
            put(tar, f"{number}.png", PNG[number])
            put(tar, f"{number}.cls", b"00%d\n" % number)
    assert convert(tmp_path / "tars", tmp_path / "out", Options("out", labels="cls")).classes == ("000", "001")
    manifest = index_folder(tmp_path / "tars", workers=1)
    assert manifest.classes == ("000", "001")
    assert read_index(manifest.index_path(0)).label.tolist() == [0, 1]


def test_folders_that_differ_in_what_is_no_text_are_classes_of_their_own(tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe8")]
    source = write(tmp_path / "pile", {f"{name}/a.png": PNG[place] for place, name in enumerate(names)})
    assert convert(source, tmp_path / "out", Options("out", labels="folder")).classes == ("caf\\xe8", "caf\\xe9")


def test_classes_are_the_first_folders_of_members_and_of_relative_paths(tmp_path):
    write(tmp_path / "pile", {"cat/a.png": PNG[0], "dog/b.png": PNG[1]})
    (tmp_path / "pile" / "list.csv").write_text("path\n./cat/a.png\ndog/b.png\n")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        tar.add(tmp_path / "pile", ".", filter=lambda member: None if member.name.endswith("csv") else member)
    for number, source in enumerate((tmp_path / "pile" / "list.csv", tmp_path / "tars")):
        out = tmp_path / f"out{number}"
        assert convert(source, out, Options("out", labels="folder")).classes == ("cat", "dog")


@pytest.mark.parametrize(
    "labels, path",
    [
        ("folder", "{tmp}/pile/cat/a.png"),
        ("folder", "https://host.invalid/a/b.png"),
        ("folder", "../pile/cat/a.png"),
        ("cls", "cat/a.png"),
    ],
)
def test_labels_that_a_source_does_not_have_are_refused(tmp_path, capsys, labels, path):
    source = write(tmp_path / "pile", {"cat/a.png": PNG[0]})
    (source / "list.csv").write_text(f"path\n{path.format(tmp=tmp_path)}\n")
    line = refusal(capsys, "convert", source / "list.csv", tmp_path / "out", "--labels", labels)
    assert "is not in a class folder" in line or "--labels cls does not fit" in line


# -- Lists ------------------------------------------------------------------------------------------------------------


def test_a_list_of_a_spreadsheet_and_of_file_urls(tmp_path):
    names = ["a b.png", "c.png"]
    write(tmp_path / "pile", {name: PNG[place] for place, name in enumerate(names)})
    with (tmp_path / "list.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["path"], *([(tmp_path / "pile" / name).as_uri()] for name in names)])
    convert(tmp_path / "list.csv", tmp_path / "out", Options("out"))
    assert sorted(stored_images(tmp_path / "out").values()) == sorted(PNG[:2])


def test_rows_with_paths_that_cannot_be_are_listed(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG[0])
    rows = [
        {"path": "a\0.png"},
        {"path": "b\ud800.png"},
        {"path": "c\ud800.txt"},
        {"path": "a.png", "text": "half a \ud83d, whole \u00e9"},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = convert(tmp_path / "list.jsonl", tmp_path / "out", Options("out"))
    assert manifest.skipped == {"cannot be read: not a possible path": 2, "not an image file": 1}
    [sample] = webdataset.WebDataset(str(tmp_path / "out" / "out-000000.tar"), shardshuffle=False)
    assert json.loads(sample["json"]) == {"text": "half a \ud83d, whole \u00e9"}


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.csv", "", "lists no files; expected a row for each"),
        ("a.csv", "path\n", "lists no files; expected a row for each"),
        ("a.jsonl", "\n", "lists no files; expected a row for each"),
        ("a.csv", 'path\n"a.png\nb.png\n', "line 3: unexpected end of data; is there an unclosed quote?"),
        ("a.csv", 'path,text\na.png,"b"c\n', "line 2: ',' expected after"),
        ("a.csv", "path,text\na.png,b, and c\n", "line 2: more columns than the header has"),
        (
            "a.jsonl",
            '{"path": "a.png", "x": ' + "[" * 5000 + "]" * 5000 + "}",
            "cannot be read (maximum recursion depth",
        ),
        ("a.csv", "path\nhttp://[bad/a.png\n", "http://[bad: malformed URL"),
        ("p.tar.gz", "x", "neither a folder nor a file that can be converted; pass a folder of images or of tars"),
    ],
)
def test_lists_that_cannot_be_used_are_one_line(tmp_path, capsys, name, content, says):
    (tmp_path / name).write_text(content)
    assert says in refusal(capsys, "convert", tmp_path / name, tmp_path / "out")


def test_a_malformed_url_is_refused_at_once(tmp_path, capsys):
    assert "malformed URL" in refusal(capsys, "convert", "http://[bad", tmp_path / "out")


# -- Updates ----------------------------------------------------------------------------------------------------------


def test_updating_from_another_source_is_refused(tmp_path, capsys):
    for name in ("one", "two"):
        write(tmp_path / name, {"a.png": PNG[0]})
    convert(tmp_path / "one", tmp_path / "out", Options("out"))
    line = refusal(capsys, "convert", tmp_path / "two", tmp_path / "out", "--update")
    assert f"was made from {tmp_path / 'one'}" in line and f"cannot add {tmp_path / 'two'}" in line
    assert main(["convert", f"{tmp_path / 'one'}/", str(tmp_path / "out"), "--update"]) == 0


def test_updates_of_a_list(tmp_path, capsys):
    write(tmp_path, {f"{number}.png": PNG[number] for number in range(4)})

    def update(rows: list[str]) -> str:
        (tmp_path / "list.csv").write_text("\n".join(["path,text", *rows, ""]))
        convert(tmp_path / "list.csv", tmp_path / "out", Options("out", update=True))
        return capsys.readouterr().err

    update(["0.png,x", "1.png,x", "late.png,x", "0.png,twice"])
    with pytest.raises(InputError, match=r"1\.png is not as it was listed \(other columns"):
        update(["0.png,x", "1.png,y"])
    assert read_manifest(tmp_path / "out").num_samples == 3
    (tmp_path / "1.png").unlink()
    write(tmp_path, {"late.png": PNG[5]})
    rows = ["0.png,x", "1.png,x", "late.png,x", "0.png,twice", "2.png,x"]
    # A row of what is gone is of a file that is gone; what a row was too early for has come.
    assert "2 new files; 2 of the 4 listed before are gone" in update(rows)
    assert "0 new files; 2 of the 6 listed before are gone" in update(rows)
    assert sorted(stored_images(tmp_path / "out").values()) == sorted([PNG[0], PNG[0], PNG[1], PNG[2], PNG[5]])


def test_a_tar_that_was_written_anew_is_refused_and_another_one_added(tmp_path):
    def pack(name: str, numbers: list[int]) -> None:
        with tarfile.open(tmp_path / "tars" / name, "w") as tar:
            for number in numbers:
                put(tar, f"{number}.png", PNG[number])

    (tmp_path / "tars").mkdir()
    pack("b.tar", [1, 2])
    convert(tmp_path / "tars", tmp_path / "out", Options("out"))
    pack("a.tar", [3])
    pack("b.tar", [1, 2, 4])
    assert convert(tmp_path / "tars", tmp_path / "out", Options("out", update=True)).num_samples == 4
    pack("b.tar", [4, 1, 2])
    with pytest.raises(InputError, match=r"b\.tar:4\.png is not as it was listed .*another place in the tar"):
        convert(tmp_path / "tars", tmp_path / "out", Options("out", update=True))
    assert read_manifest(tmp_path / "out").num_samples == 4


def test_a_plan_that_there_is_no_room_for_names_its_folder(tmp_path):
    write(tmp_path / "pile", {"0.png": PNG[0], "1.png": PNG[1]})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError) as full:
            convert(tmp_path / "pile", tmp_path / "out", Options("out", workers=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.value.filename == str(tmp_path / "out" / ".plan.writing") and not os.path.exists(full.value.filename)
