"""Conversion from stores and to stores, with real S3 and HTTP servers: the bytes of a conversion on the disk.

Covers: shards/conversion/targets.py, shards/stores/locate.py, shards/stores/store.py,
shards/stores/store_errors.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import fsspec
import pytest
import webdataset

from shards.cli import main
from shards.conversion.convert import Options, convert, merge
from shards.ground.errors import InputError
from shards.stores import store as store_module
from shards.stores.folders import StoreFolder
from tests.helpers.commands import ROOT
from tests.helpers.conversions import stored_images
from tests.helpers.images import image_bytes
from tests.helpers.servers import S3Server, StoreServer, WebServer, gcs_server, s3_server, web_server

pytestmark = pytest.mark.slow

OPTIONS = ["--labels", "folder", "--samples-per-shard", "9", "--shuffle", "5", "--holdout", "0.2", "--name", "photos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pile/`: 60 images in three folders, one of them damaged; the same as pile.zip, tars/ and list.csv."""
    root = tmp_path_factory.mktemp("stored")
    rows = ["path,kind"]
    for number in range(60):
        path = root / "pile" / f"class {number % 3}" / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(image_bytes(90, 80, "JPEG", seed=number)[: 700 if number == 17 else None])
        rows.append(f"pile/class {number % 3}/{number:03d}.jpg,{number % 4}")
    (root / "pile" / "notes.txt").write_text("no image")
    (root / "list.csv").write_text("\n".join([*rows, "pile/gone.jpg,1"]))
    shutil.make_archive(str(root / "pile"), "zip", root / "pile")
    (root / "tars").mkdir()
    with webdataset.ShardWriter(str(root / "tars" / "web-%03d.tar"), maxcount=25, verbose=0) as writer:
        for path in sorted((root / "pile").rglob("*.jpg")):
            writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": 3, "json": {"name": path.name}})
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, bytes]:
    assert main(["convert", str(folder / "pile"), str(folder / "expected"), *OPTIONS]) == 0
    return files_below(folder / "expected")


def files_below(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "plan" not in path.relative_to(root).parts
    }


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[S3Server]:
    with s3_server() as server:
        server.upload(folder, "raw")
        server.client().mkdir("out")
        yield server


@pytest.fixture
def web(folder: Path) -> Iterator[WebServer]:
    with web_server(folder) as server:
        yield server


def objects(server: StoreServer, prefix: str) -> dict[str, bytes]:
    client = server.client()
    return {name.removeprefix(f"{prefix}/"): client.cat_file(name) for name in client.find(prefix)}


def test_between_buckets_of_google(folder, tmp_path, expected):
    with gcs_server() as gcs:
        gcs.upload(folder / "pile", "raw")
        gcs.client().mkdir("out")
        command = ["convert", "gs://raw", "gs://out/photos", "--work", str(tmp_path), "--workers", "2", *OPTIONS]
        assert main(command) == 0
        found = objects(gcs, "out/photos")
        assert main(["verify", "gs://out/photos", "--workers", "2"]) == 0
    # The source is called `raw` here.
    assert {name for name in expected if found[name] != expected[name]} == {"manifest.json", "holdout/manifest.json"}
    assert json.loads(found["manifest.json"])["shards"] == json.loads(expected["manifest.json"])["shards"]


@pytest.mark.parametrize("workers", [1, 2])
def test_from_a_bucket_to_a_bucket(s3, tmp_path, expected, workers, capsys):
    out = f"s3://out/{workers}/photos"
    command = ["convert", "s3://raw/pile", out, "--work", str(tmp_path), "--workers", str(workers), *OPTIONS]
    assert main(command) == 0, capsys.readouterr().err
    assert "images in 6 shards" in capsys.readouterr().out
    assert objects(s3, f"out/{workers}/photos") == expected
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]
    assert main(command) == 2
    assert "holds finished shards" in capsys.readouterr().err


def test_keys_that_no_folder_could_have_are_converted(s3, tmp_path):
    images = {
        key: image_bytes(seed=number)
        for number, key in enumerate(("a.png", "/b.png", "/2020/c.png", "sub//d.png", "e.png", "e.png/f.png"))
    }
    for key, payload in images.items():
        s3.client().pipe_file(f"out/odd/{key}", payload)
    manifest = convert("s3://out/odd", tmp_path / "out", Options("odd"))
    assert sorted(stored_images(tmp_path / "out").values()) == sorted(images.values()) and not manifest.skipped


def test_tasks_write_to_a_bucket_and_what_is_lost_there_is_written_again(s3, folder, tmp_path, expected, capsys):
    command = ["convert", str(folder / "pile"), "s3://out/tasks", "--work", str(tmp_path), "--workers", "1", *OPTIONS]
    for task in (0, 2, 1):
        assert main([*command, "--task", f"{task}/3"]) == 0
    s3.client().rm("out/tasks/photos-000002.tar")
    assert main(["merge", str(tmp_path)]) == 2
    assert "photos-000002.tar or its index is missing there" in capsys.readouterr().err
    assert main([*command, "--task", "2/3"]) == 0
    assert main(["merge", str(tmp_path)]) == 0
    assert objects(s3, "out/tasks") == expected
    other = [str(tmp_path / "other") if part == str(tmp_path) else part for part in command]
    s3.client().rm("out/tasks/manifest.json")
    assert main(other) == 2
    assert "pass the --work of their conversion" in capsys.readouterr().err
    assert main([*other, "--force"]) == 0
    assert objects(s3, "out/tasks") == expected


def test_kills_leave_no_trace_in_a_bucket(s3, tmp_path, expected):
    command = [
        sys.executable,
        "-m",
        "shards",
        "convert",
        "s3://raw/pile",
        "s3://out/killed",
        "--work",
        str(tmp_path),
        "--workers",
        "2",
        *OPTIONS,
    ]
    chance, met = random.Random(0), 0
    while met < 3:
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            time.sleep(chance.uniform(1.0, 3.0))
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
            met += 1
    assert met > 0
    if "manifest.json" not in objects(s3, "out/killed"):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert objects(s3, "out/killed") == expected
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]


def test_commands_look_into_a_bucket(s3, folder, expected, tmp_path, capsys):
    s3.upload(folder / "expected", "looked")
    verify = ["verify", "s3://looked", "--workers", "1"]
    assert main(verify) == 0
    assert main(["info", "s3://looked", "--html", str(tmp_path / "page.html")]) == 0
    assert "jpeg" in capsys.readouterr().out and (tmp_path / "page.html").read_text().count("<figure>") > 20
    name = "looked/photos-000001.tar"
    content = bytearray(s3.client().cat_file(name))
    content[3000] ^= 1
    s3.client().pipe_file(name, bytes(content))
    assert main(verify) == 1
    assert "photos-000001.tar: checksum of the file differs" in capsys.readouterr().out
    assert main([*verify, "--repair"]) == 2
    capsys.readouterr()
    s3.client().rm("looked/photos-000002.index.safetensors")
    assert main(verify) == 1
    said = capsys.readouterr().out
    assert "photos-000002.tar: photos-000002.index.safetensors: not a readable index" in said
    assert "tmp" not in said and "run the same conversion again" in said and "--repair" not in said
    assert main(["verify", "s3://nothing-there"]) == 2


def test_what_may_have_cost_much_is_named_though_the_list_of_it_is_in_a_bucket(s3, tmp_path, capsys):
    (tmp_path / "pile/a").mkdir(parents=True)
    (tmp_path / "pile/a/0.png").write_bytes(image_bytes(seed=0))
    (tmp_path / "pile/b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for out, task in (("s3://out/linked", []), ("s3://out/linked-tasks", ["--task", "0/1"])):
        work = tmp_path / out.rpartition("/")[2]
        assert main(["convert", str(tmp_path / "pile"), out, "--work", str(work), *task]) == 0
        if task:
            assert main(["merge", str(work)]) == 0
        said = capsys.readouterr()
        assert said.err.count("warning: ") == 1 and f"warning: {out}: a link that leads nowhere: b" in said.err
        assert f"(see {out}/skipped.parquet)" in said.out


@pytest.mark.parametrize("fault", ["resets", "cuts"])
@pytest.mark.parametrize("source", ["pile", "pile.zip", "tars", "list.csv"])
def test_a_web_server_that_fails_now_and_then_gives_the_bytes_of_the_disk(web, folder, tmp_path, source, fault):
    options = Options(
        "photos",
        samples_per_shard=25,
        shuffle=1,
        labels={"tars": "cls", "list.csv": "column:kind"}.get(source, "folder"),
    )
    convert(folder / source, tmp_path / "expected", options)
    setattr(web, fault, 5)
    convert(f"{web.url}/{source}", tmp_path / "out", options)
    assert web.answers > 5
    found, wanted = files_below(tmp_path / "out"), files_below(tmp_path / "expected")
    assert sorted(found) == sorted(wanted)
    assert {name for name in found if found[name] != wanted[name]} == set()


def test_a_web_server_that_is_gone_ends_the_conversion_which_goes_on_later(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module.Store.__init__, "__kwdefaults__", {"patience_s": 1.0, "stall_s": 5.0})
    options = Options("photos", samples_per_shard=9)
    with web_server(folder) as server:
        convert(f"{server.url}/pile", tmp_path / "out", Options("photos", samples_per_shard=9, task=(0, 2)))
        port = server.url.rpartition(":")[2]
    with pytest.raises(InputError, match=r"no answer for 1 s .* is the store up"):
        convert(f"http://127.0.0.1:{port}/pile", tmp_path / "out", options)
    assert not list((tmp_path / "out").glob(".*")) and not (tmp_path / "out" / "manifest.json").exists()


def test_a_list_may_lead_to_several_stores(s3, web, folder, tmp_path):
    paths = [
        f"{web.url}/pile/class%200/000.jpg",
        "s3://raw/pile/class 1/001.jpg",
        "pile/class 2/002.jpg",
        "s3://raw/pile/gone.jpg",
        f"{web.url}/gone.jpg",
    ]
    (folder / "mixed.jsonl").write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
    manifest = convert(folder / "mixed.jsonl", tmp_path / "out", Options("out"))
    assert manifest.num_samples == 3 and manifest.skipped == {"cannot be read: No such file or directory": 2}


def test_urls_of_a_list_are_asked_for_as_they_are_spelled(web, tmp_path):
    spelled = {
        "/o/images%2Fa.png?alt=media&token=1": "/o/images%2Fa.png?alt=media&token=1",
        "/b.png?v=123": "/b.png?v=123",
        "/c d.png": "/c%20d.png",
        "/e%20f.png#top": "/e%20f.png",
        "/100%.png": "/100%25.png",
        "/ü.png?of=ü": "/%C3%BC.png?of=%C3%BC",
        "/g.png?credential=k/day/s3&signature=a%2Bb%3D": "/g.png?credential=k/day/s3&signature=a%2Bb%3D",
    }
    images = {asked: image_bytes(seed=number) for number, asked in enumerate(spelled.values())}

    def answer(request: SimpleHTTPRequestHandler) -> None:
        if request.path not in images:
            request.send_error(404)
            return
        request.send_response(200)
        request.send_header("Content-Length", str(len(images[request.path])))
        request.end_headers()
        request.wfile.write(images[request.path])

    web.answer = answer
    rows = [json.dumps({"path": f"{web.url}{path}"}) for path in spelled]
    (tmp_path / "list.jsonl").write_text("\n".join(rows), encoding="utf-8")
    manifest = convert(tmp_path / "list.jsonl", tmp_path / "out", Options("out"))
    assert not manifest.skipped and sorted(stored_images(tmp_path / "out").values()) == sorted(images.values())
    keys = {key.partition("_")[2] for key in stored_images(tmp_path / "out")}
    assert keys == {"images_2Fa", "b", "c d", "e_20f", "100_", "ü", "g"}


def test_memory(folder, tmp_path, expected):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder / "pile"), "memory://raw/pile", recursive=True)
    options = Options("photos", labels="folder", samples_per_shard=9, shuffle=5, holdout=0.2, work=tmp_path, workers=4)
    convert("memory://raw/pile", "memory://out", options)
    assert {name.removeprefix("/out/"): memory.cat_file(name) for name in memory.find("/out")} == expected


def test_files_of_a_store_read_as_on_the_disk(web, folder):
    content = (folder / "pile.zip").read_bytes()
    chance = random.Random(1)
    with StoreFolder(web.url).open("pile.zip") as file:
        assert file.read() == content
        for _ in range(200):
            start = chance.randrange(len(content))
            file.seek(start)
            assert file.read(300) == content[start : start + 300]


@pytest.mark.parametrize(
    "source, out, more, says",
    [
        ("{pile}", "s3://out/x", [], "needs --work DIR, a local folder"),
        ("{pile}", "{tmp}/out", ["--work", "{tmp}/work"], "only for an OUT that is a URL"),
        ("{pile}", "{web}/out", ["--work", "{tmp}/work"], "cannot be written to; choose a folder, or an object store"),
        ("s3://raw/nothing", "{tmp}/out", [], "no such file; pass the URL of a folder"),
        ("s3://raw/pile", "s3://raw/pile/out", ["--work", "{tmp}/work"], "lies inside s3://raw/pile"),
        ("pipe:cat {name}", "{tmp}/out", [], "a command cannot be listed"),
        ("nostore://raw", "{tmp}/out", [], "nostore"),
        ("{web}/pile/notes.txt", "{tmp}/out", [], "error"),
    ],
)
def test_bad_input_is_one_line(s3, web, folder, tmp_path, capsys, source, out, more, says):
    texts = [
        text.replace("{pile}", str(folder / "pile")).replace("{tmp}", str(tmp_path)).replace("{web}", web.url)
        for text in (source, out, *more)
    ]
    assert main(["convert", *texts]) == 2
    [line] = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1:]
    assert line.startswith("error: ") and says in line


def test_merging_needs_the_work_folder(tmp_path):
    with pytest.raises(InputError, match="no conversion was planned here"):
        merge(tmp_path)
