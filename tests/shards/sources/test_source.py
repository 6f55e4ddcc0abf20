"""Archives, tars and lists convert like folders; nothing of them becomes a path.

Covers: shards/ground/open_file.py, shards/sources/tables.py
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pytest
import webdataset
from pyarrow import parquet

from shards.cli import main
from shards.conversion.convert import Options, convert
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index
from shards.ground.errors import InputError
from tests.helpers.conversions import contents, stored_images
from tests.helpers.images import image_bytes

IMAGES = {
    f"{name}/{number}.png": image_bytes(seed=10 * place + number)
    for place, name in enumerate(("cat", "dog"))
    for number in range(6)
}


def labels(folder: Path) -> dict[str, str]:
    manifest = read_manifest(folder)
    found = {}
    for number in range(len(manifest.shards)):
        index = read_index(manifest.index_path(number))
        found |= {index.key(row): manifest.classes[index.label[row]] for row in range(len(index))}
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "pile"
    for name, payload in IMAGES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(payload)
    (source / "cat" / "readme.txt").write_text("cats")
    return source


def test_a_zip_archive_gives_the_shards_of_its_folder(folder, tmp_path):
    archive = Path(shutil.make_archive(str(tmp_path / "pile-packed"), "zip", folder))
    options = Options("pile", labels="folder", samples_per_shard=5, shuffle=2)
    for source, out in ((folder, "one"), (archive, "two")):
        convert(source, tmp_path / out, options)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name: data for name, data in one.items() if name != "manifest.json"} == {
        name: data for name, data in two.items() if name != "manifest.json"
    }
    assert (
        convert(
            archive, tmp_path / "three", Options("pile", labels="folder", samples_per_shard=5, shuffle=2, workers=3)
        ).num_samples
        == 12
    )
    assert contents(tmp_path / "three") == two


@pytest.mark.parametrize("select", ["cls", "none"])
def test_tars_of_webdataset_keep_what_comes_with_an_image(tmp_path, select):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with webdataset.ShardWriter(str(theirs / "web-%03d.tar"), maxcount=5, verbose=0) as writer:
        for number, (name, payload) in enumerate(IMAGES.items()):
            writer.write(
                {
                    "__key__": f"{number % 5:04d}",
                    "png": payload,
                    "cls": 7 + number % 2,
                    "json": {"caption": name},
                    "txt": f"a picture of {name}",
                }
            )
    manifest = convert(theirs, tmp_path / "out", Options("out", labels=select, samples_per_shard=4, shuffle=0))
    assert manifest.num_samples == 12 and len(manifest.shards) == 3
    assert set(stored_images(tmp_path / "out").values()) == set(IMAGES.values())
    samples = list(
        webdataset.WebDataset([str(path) for path in sorted((tmp_path / "out").glob("*.tar"))], shardshuffle=False)
    )
    for sample in samples:
        name = json.loads(sample["json"])["caption"]
        assert sample["png"] == IMAGES[name] and sample["txt"].decode() == f"a picture of {name}"
        assert ("cls" in sample) == (select == "cls")
    assert len({sample["__key__"] for sample in samples}) == 12  # theirs repeat between tars
    if select == "cls":
        assert set(labels(tmp_path / "out").values()) == {"7", "8"}


def write_list(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_lists_name_files_labels_and_what_else_is_known(folder, tmp_path, suffix):
    rows = [{"path": f"pile/{name}", "species": name.split("/")[0], "caption": f"ein Bild, {name}"} for name in IMAGES]
    rows.append({"path": "pile/cat/gone.png", "species": "cat", "caption": ""})
    path = write_list(tmp_path / f"list{suffix}", rows)
    manifest = convert(path, tmp_path / "out", Options("out", labels="column:species", samples_per_shard=5, shuffle=3))
    assert manifest.num_samples == 12 and manifest.skipped == {"cannot be read: No such file or directory": 1}
    found = {payload: key for key, payload in stored_images(tmp_path / "out").items()}
    species = labels(tmp_path / "out")
    assert {species[found[payload]] for name, payload in IMAGES.items() if name.startswith("dog")} == {"dog"}
    tars = [str(tar) for tar in sorted((tmp_path / "out").glob("*.tar"))]
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        assert IMAGES[json.loads(sample["json"])["caption"].removeprefix("ein Bild, ")] == sample["png"]


def test_names_in_archives_never_become_paths(tmp_path):
    evil = ["../../evil.png", "/absolute/evil.png", "a/../../evil.png", "a/..evil.png"]
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for number, name in enumerate(evil):
            archive.writestr(name, image_bytes(seed=number))
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "evil.tar", "w") as tar:
        for number, name in enumerate(evil):
            member = tarfile.TarInfo(name)
            payload = image_bytes(seed=number)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    for source, out in ((tmp_path / "evil.zip", "one"), (tmp_path / "tars", "two")):
        convert(source, tmp_path / "deep" / out, Options("out"))
        keys = stored_images(tmp_path / "deep" / out)
        assert set(keys.values()) == {image_bytes(seed=number) for number in range(4)}
        assert not any(".." in key or key.startswith("/") for key in keys)
    assert {path.name for path in tmp_path.iterdir()} == {"evil.zip", "tars", "deep"}


def parquet_of(rows: list[dict[str, object]]) -> bytes:
    return stored_table(pyarrow.Table.from_pylist(rows))


def stored_table(table: pyarrow.Table) -> bytes:
    parquet.write_table(table, file := io.BytesIO())
    return file.getvalue()


BYTES = parquet_of([{"path": "x.png", "raw": {"inner": [b"\0"]}}])
NO_DATE = pyarrow.table({"path": ["x.png"], "when": pyarrow.array([2**50], pyarrow.timestamp("s"))})


def test_empty_numbers_of_a_table_are_null_in_json(folder, tmp_path):
    name = next(iter(IMAGES))
    (tmp_path / "list.parquet").write_bytes(
        parquet_of([{"path": f"pile/{name}", "score": math.nan, "more": {"a": [1.5, math.inf]}}])
    )
    convert(tmp_path / "list.parquet", tmp_path / "out", Options("out"))
    [sample] = webdataset.WebDataset([str(next((tmp_path / "out").glob("*.tar")))], shardshuffle=False)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(sample["json"], parse_constant=refuse) == {"score": None, "more": {"a": [1.5, None]}}


TEXT, BINARY = pyarrow.string(), pyarrow.binary()


@pytest.mark.parametrize(
    "columns, says",
    [
        (
            {"image": pyarrow.struct({"bytes": BINARY, "path": TEXT})},
            "has no column `path`, and column `image` holds b",
        ),
        ({"path": TEXT, "raw": pyarrow.list_(pyarrow.large_binary())}, "column `raw` holds bytes, which JSON cannot"),
        ({"path": TEXT, "raw": pyarrow.map_(TEXT, pyarrow.dictionary(pyarrow.int8(), BINARY))}, "column `raw` holds b"),
        ({"path": BINARY}, "column `path` holds bytes"),
        ({"file": TEXT}, "has no column `path`; expected a row for each image"),
    ],
)
def test_a_table_that_is_no_list_is_refused_by_its_columns_alone(tmp_path, capsys, monkeypatch, columns, says):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("gigabytes")

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", read)
    (tmp_path / "a.parquet").write_bytes(stored_table(pyarrow.schema(columns).empty_table()))
    assert main(["convert", str(tmp_path / "a.parquet"), str(tmp_path / "out")]) == 2
    assert f"a.parquet: {says}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, arguments, says",
    [
        ("a.zip", b"PK not a zip", [], "not a whole zip archive"),
        ("a.csv", b"file\nx.png\n", [], "row 1 has no `path`"),
        ("a.jsonl", b'{"path": "x.png"}\n{"path"', [], "cannot be read"),
        ("a.jsonl", b'{"path": "x.png"}\n', ["--labels", "column:kind"], "row 1 has no `kind`"),
        ("a.jsonl", b'{"path": "x.png", "kind": NaN}\n', ["--labels", "column:kind"], "row 1 has no `kind`"),
        ("a.parquet", BYTES, [], "column `raw` holds bytes, which JSON cannot hold; leave it out of the list"),
        ("a.parquet", b"PAR1 no", [], "cannot be read (Parquet file size is 7 bytes"),
        ("a.parquet", stored_table(NO_DATE), [], "cannot be read (Python int too large"),
        ("a.jsonl", b'{"path": "x.png", "n": %s}\n' % (b"9" * 5000), [], "cannot be read (Exceeds the limit"),
        ("a.jsonl", b'{"path": "x.png", "n": %s%s}\n' % (b"[" * 900, b"]" * 900), [], "row 1 is nested too deeply"),
        ("a.tar", b"x" * 2000, [], "not a whole tar"),
        ("a.docx", b"x", [], "pass a folder of images or of tars, a .zip, or a list (.csv, .jsonl, .parquet)"),
    ],
)
def test_sources_that_cannot_be_used_are_one_line(tmp_path, capsys, name, content, arguments, says):
    (tmp_path / name).write_bytes(content)
    assert main(["convert", str(tmp_path / name), str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_tar_that_changed_since_the_plan_is_refused(tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(tars / f"{number}.tar")) as writer:
            for name, payload in IMAGES.items():
                writer.write({"__key__": name.replace("/", ""), "png": payload})
    convert(tars, tmp_path / "out", Options("out", samples_per_shard=5, task=(0, 2)))
    (tars / "1.tar").unlink()
    with pytest.raises(InputError, match=r"24 images then, 12 now"):
        convert(tars, tmp_path / "out", Options("out", samples_per_shard=5))


def test_a_damaged_member_of_an_archive_is_listed(tmp_path):
    path = tmp_path / "pile.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", image_bytes(40, 40, seed=number))
        start = archive.getinfo("1.png").header_offset
    content = bytearray(path.read_bytes())
    content[start + 40 : start + 80] = b"\xff" * 40
    path.write_bytes(content)
    manifest = convert(path, tmp_path / "out", Options("out"))
    assert manifest.num_samples == 2 and sum(manifest.skipped.values()) == 1


def test_names_of_classes_may_be_completed_without_starting_over(tmp_path, capsys):
    tars, names, out = tmp_path / "tars", tmp_path / "names.txt", tmp_path / "out"
    tars.mkdir()

    def add(tar: str, classes: int) -> None:
        with webdataset.TarWriter(str(tars / tar)) as writer:
            for number in range(classes):
                image = image_bytes(40, 30, "PNG", seed=number)
                writer.write({"__key__": f"{tar[0]}{number}", "png": image, "cls": str(number)})

    convert = ["convert", str(tars), str(out), "--labels", "cls", "--class-names", str(names)]
    add("0.tar", 2)
    names.write_text("cat\n")
    assert main(convert) == 2 and "has 1 names, there is a class 1" in capsys.readouterr().err
    names.write_text("cat\ndog\n")
    assert main(convert) == 0 and read_manifest(out).classes == ("cat", "dog")
    add("1.tar", 3)
    assert main([*convert, "--update"]) == 2 and "has 2 names, there is a class 2" in capsys.readouterr().err
    names.write_text("cat\ndog\nelk\n")
    assert main([*convert, "--update"]) == 0 and read_manifest(out).classes == ("cat", "dog", "elk")
    assert read_manifest(out).num_samples == 5 and main(["verify", str(out)]) == 0


def test_classes_that_are_numbers_get_their_names(tmp_path, capsys):
    tars, names = tmp_path / "tars", tmp_path / "names.txt"
    tars.mkdir()
    with webdataset.TarWriter(str(tars / "0.tar")) as writer:
        for number in range(4):
            image = image_bytes(40, 30, "PNG", seed=number)
            writer.write({"__key__": f"{number}", "png": image, "cls": str(number % 2)})
    names.write_text("cat\ndog\nelk\n")
    convert = ["convert", str(tars), str(tmp_path / "out"), "--labels", "cls", "--class-names", str(names)]
    assert main(convert) == 0 and main(["index", str(tars), "--class-names", str(names)]) == 0
    for folder in (tmp_path / "out", tars):
        assert read_manifest(folder).classes == ("cat", "dog", "elk")
        assert main(["verify", str(folder)]) == 0
    names.write_text("cat\n")
    assert main(["index", str(tars), "--class-names", str(names)]) == 2
    assert "has 1 names, there is a class 1" in capsys.readouterr().err
    names.write_text("cat\ncat\n")
    assert main([*convert, "--force"]) == 2
    assert "expected one name per line" in capsys.readouterr().err
