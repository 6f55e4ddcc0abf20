"""Covers: shards/inspection/repair.py"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.cli import main
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index
from shards.images import reading
from shards.inspection.verify import verify
from tests.helpers.conversions import contents, refusal


@pytest.fixture
def folder(shard_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folder, tmp_path / "copy"))


def test_whole_shards_have_no_problems(folder, capsys):
    assert verify(folder, workers=2, decode=True)[1] == []
    assert main(["verify", str(folder)]) == 0
    assert "200 samples in 5 shards are intact" in capsys.readouterr().out


def test_what_a_disk_cannot_read_is_listed_and_the_rest_is_looked_at(folder, monkeypatch):
    read = os.pread
    damaged = (folder / "train-000001.tar").stat().st_ino

    def failing(descriptor: int, size: int, start: int) -> bytes:
        if os.fstat(descriptor).st_ino == damaged and start > 9000:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, size, start)

    monkeypatch.setattr(os, "pread", failing)
    flip_a_byte_of_a_header(folder)
    (folder / "train-000003.tar").unlink()
    problems = [str(problem) for problem in verify(folder, workers=1, decode=False)[1]]
    assert problems == [
        "train-000001.tar: checksum of the file differs from the manifest",
        "train-000001.tar: cannot be read (Input/output error)",
        "train-000003.tar: missing",
    ]


def test_too_little_memory_is_no_damage(folder, monkeypatch, capsys):
    def lacking(payload: bytes, name: str) -> None:
        raise MemoryError

    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_open", lacking)
        line = refusal(capsys, "verify", folder, "--repair", "--workers", "1")
    assert "train-000000.tar: not enough memory for an image" in line and "fewer --workers" in line
    assert contents(folder) == before and verify(folder, workers=1, decode=True)[1] == []


def flip_a_byte_of_an_image(folder: Path) -> None:
    index = read_index(folder / "train-000001.index.safetensors")
    tar = bytearray((folder / "train-000001.tar").read_bytes())
    tar[int(index.offset[7]) + 100] ^= 1
    (folder / "train-000001.tar").write_bytes(tar)


def flip_a_byte_of_a_header(folder: Path) -> None:
    tar = bytearray((folder / "train-000001.tar").read_bytes())
    tar[0] ^= 1
    (folder / "train-000001.tar").write_bytes(tar)


def cut_in_half(folder: Path) -> None:
    tar = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").write_bytes(tar[: len(tar) // 2])


def cut_between_samples(folder: Path) -> None:
    # The 20th sample's header is 512 bytes before its image: all before it is a sequence of whole members.
    index = read_index(folder / "train-000001.index.safetensors")
    tar = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").write_bytes(tar[: int(index.offset[20]) - 1024 - 512])


def cut_inside_a_sample(folder: Path) -> None:
    index = read_index(folder / "train-000001.index.safetensors")
    tar = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").write_bytes(tar[: int(index.offset[20]) - 512])


def zero_a_block(folder: Path) -> None:
    tar = bytearray((folder / "train-000001.tar").read_bytes())
    tar[10 * 512 : 11 * 512] = bytes(512)
    (folder / "train-000001.tar").write_bytes(tar)


def remove_a_tar(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


def remove_an_index(folder: Path) -> None:
    (folder / "train-000001.index.safetensors").unlink()


def damage_an_index(folder: Path) -> None:
    (folder / "train-000001.index.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")


def swap_two_shards(folder: Path) -> None:
    for suffix in (".tar", ".index.safetensors"):
        first, second = folder / f"train-000001{suffix}", folder / f"train-000002{suffix}"
        first.rename(folder / "kept")
        second.rename(first)
        (folder / "kept").rename(second)


def count_wrongly(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][1]["samples"] -= 1
    (folder / "manifest.json").write_text(json.dumps(content))


def change_a_label(folder: Path) -> None:
    tar = bytearray((folder / "train-000001.tar").read_bytes())
    assert tar[512:514] in (bytes([48 + label, 0]) for label in range(10))  # the first member is a cls
    tar[512] = 48 + (tar[512] - 47) % 10
    (folder / "train-000001.tar").write_bytes(tar)


def flip_a_byte_of_an_image_header(folder: Path) -> None:
    index = read_index(folder / "train-000001.index.safetensors")
    tar = bytearray((folder / "train-000001.tar").read_bytes())
    tar[int(index.offset[7]) - 500] ^= 1
    (folder / "train-000001.tar").write_bytes(tar)


def add_a_stranger(folder: Path) -> None:
    shutil.copy(folder / "train-000001.tar", folder / "train-000099.tar")


@pytest.mark.parametrize(
    "damage, expected",
    [
        (flip_a_byte_of_an_image, "bytes of the image differ from the index"),
        (flip_a_byte_of_a_header, "checksum of the file differs"),
        (change_a_label, "{key0}: its cls is not the label of the index"),
        (flip_a_byte_of_an_image_header, "{key7}: its header in the tar is damaged"),
        (cut_in_half, "the manifest says"),
        (cut_between_samples, "the manifest says"),
        (cut_inside_a_sample, "the manifest says"),
        (zero_a_block, "checksum of the file differs"),
        (remove_a_tar, "missing"),
        (remove_an_index, "not a readable index"),
        (damage_an_index, "not a readable index"),
        (swap_two_shards, "train-000002.tar"),
        (count_wrongly, "its index lists 40 samples, the manifest says 39"),
        (add_a_stranger, "not in the manifest"),
    ],
)
def test_every_damage_is_found_and_named(folder, capsys, damage: Callable[[Path], None], expected):
    index = read_index(folder / "train-000001.index.safetensors")
    expected = expected.format(key0=index.key(0), key7=index.key(7))
    damage(folder)
    assert main(["verify", str(folder), "--workers", "1"]) == 1
    captured = capsys.readouterr()
    assert expected in captured.out and "Traceback" not in captured.err
    named = {"add_a_stranger": "train-000099.tar"}.get(damage.__name__, "train-000001.tar")
    assert named in captured.out


REPAIRABLE = [
    flip_a_byte_of_an_image,
    change_a_label,
    flip_a_byte_of_an_image_header,
    flip_a_byte_of_a_header,
    cut_in_half,
    cut_between_samples,
    cut_inside_a_sample,
    zero_a_block,
    remove_a_tar,
    remove_an_index,
    damage_an_index,
    swap_two_shards,
]


@pytest.mark.parametrize("damage", REPAIRABLE)
def test_every_damage_of_a_shard_is_repaired_from_the_source(folder, shard_folder, capsys, damage):
    damage(folder)
    assert main(["verify", str(folder), "--workers", "1", "--repair"]) == 0
    assert "train-000001.tar: rewritten" in capsys.readouterr().out
    assert contents(folder) == contents(shard_folder)
    assert not list(folder.glob(".*"))


def test_what_is_held_out_is_verified_and_repaired_too(sample_images, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(sample_images / "train"), str(out), "--holdout", "0.2"]) == 0
    [tar] = (out / "holdout").glob("*.tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1])
    assert main(["verify", str(out)]) == 1
    said = capsys.readouterr().out
    assert f"{tar.name}: {len(whole) - 1:,} bytes" in said and f"`shards verify {out}/holdout --repair`" in said
    assert main(["verify", str(out), "--repair"]) == 0 and tar.read_bytes() == whole


def test_the_index_of_a_converted_shard_is_mended_by_the_plan_alone(folder, capsys):
    remove_an_index(folder)
    assert main(["verify", str(folder), "--workers", "1"]) == 1
    assert f"run `shards verify {folder} --repair`" in capsys.readouterr().out


def test_a_command_that_would_be_refused_is_not_advised(folder, sample_images, tmp_path, capsys):
    add_a_stranger(folder)
    assert main(["verify", str(folder), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert "move away what is not in the manifest, such as " in said and "--repair" not in said
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(folder / "train-000000.tar", foreign / "0.tar")
    assert main(["index", str(foreign)]) == 0
    (foreign / "0.tar").write_bytes((foreign / "0.tar").read_bytes()[:-2048])
    assert main(["verify", str(foreign), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert f"`shards index {foreign}`, which leaves out what is damaged" in said and "--repair" not in said
    assert main(["index", str(foreign)]) == 0


def test_a_source_that_changed_repairs_nothing(folder, sample_images, tmp_path, capsys):
    moved = Path(shutil.copytree(sample_images / "train", tmp_path / "moved"))
    cut_in_half(folder)
    before = contents(folder)
    picture = sorted(moved.rglob("*.png"))[0]
    for other in moved.rglob("*.png"):
        other.write_bytes(picture.read_bytes())
    assert main(["verify", str(folder), "--workers", "1", "--repair", "--source", str(moved)]) == 2
    assert "train-000001.tar: cannot be made again" in capsys.readouterr().err
    assert contents(folder) == before and not list(folder.glob(".*"))


def test_an_index_with_other_samples_than_the_tar(folder):
    shutil.copy(folder / "train-000002.index.safetensors", folder / "train-000001.index.safetensors")
    problems = verify(folder, workers=1, decode=False)[1]
    assert problems and {problem.shard for problem in problems} == {"train-000001.tar"}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"version": 1}', b'{"version": 7}', b"\xff\xfe"])
def test_a_damaged_manifest_is_one_line(folder, capsys, content):
    (folder / "manifest.json").write_bytes(content)
    assert main(["verify", str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "manifest.json" in message


def test_info_says_what_is_there(folder, capsys):
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    manifest = read_manifest(folder)
    assert f"200 in 5 shards, {manifest.num_bytes:,} bytes" in text
    assert "png 200" in text and "28 / 28 / 28 wide" in text and "ankle-boot 20" in text
