"""A pile of videos, pairs and other files to shards of clips, and back.

Covers: shards/convert_options.py, shards/format/clip_index.py, shards/format/clip_writer.py,
shards/inspection/films.py, shards/inspection/thumbnail.py, shards/inspection/verify_clips.py
"""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset
import xxhash
from PIL import Image

from shards.cli import main
from shards.clips.clip import ClipSettings
from shards.clips.sound import from_flac
from shards.conversion import clip_pieces
from shards.conversion.convert import Options, convert
from shards.format.ledger import read_ledger
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index, write_index
from shards.ground.errors import InputError
from shards.inspection.films import films
from shards.inspection.info import Example, gather
from shards.inspection.shard_folder import ShardFolder
from shards.stores.folders import LocalFolder
from tests.helpers.commands import ROOT
from tests.helpers.conversions import contents, refusal
from tests.helpers.images import image_bytes
from tests.helpers.videos import moving_square, tone, write_sound, write_video

CUT = ClipSettings(frame_rate=5.0, clip_seconds=1.0, sound_rate=16_000)


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos in two folders, one of them twice, a pair, and what is neither."""
    source = tmp_path_factory.mktemp("videos")
    for number in range(4):
        frames = [moving_square(place, step=1 + number) for place in range(20 + 25 * number)]
        heard = tone(len(frames) / 25, hertz=300 * (1 + number)) if number % 2 else None
        write_video(source / f"class{number % 2}" / f"{number}.x.mp4", frames, sound=heard)
    shutil.copy(source / "class1/3.x.mp4", source / "class1/again.mp4")
    (source / "class0/dog.png").write_bytes(image_bytes(60, 40))
    write_sound(source / "class0/dog.ogg", tone(0.5), "libopus")
    write_sound(source / "class0/dog.wav", tone(0.2), "pcm_s16le")
    (source / "class0/alone.jpg").write_bytes(image_bytes(60, 40, "JPEG"))
    (source / "class1/speech.flac").write_bytes(b"")
    (source / "class1/notes.txt").write_text("notes")
    (source / "class1/empty.webm").write_bytes(b"")
    return source


def options(**changes: object) -> Options:
    return Options("pile", **{"labels": "folder", "samples_per_shard": 2, "shuffle": 5, "clips": CUT} | changes)


@pytest.fixture(scope="module")
def out(pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(pile, out, options())
    return out


def test_members_index_and_json_say_the_same_and_webdataset_reads_them(out):
    manifest, found = read_manifest(out), {}
    for number, shard in enumerate(manifest.shards):
        index, tar = read_index(manifest.index_path(number)), manifest.tar_path(number).read_bytes()
        samples = list(webdataset.WebDataset(str(out / shard.name), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [index.key(row) for row in range(len(index))]
        for row, sample in enumerate(samples):
            found[index.key(row)] = len(index.clips.frames(row))
            facts = json.loads(sample["json"])
            frames = index.clips.frames(row)
            assert len(facts["times"]) == len(frames) and facts["start"] == index.clips.start[row]
            for frame, time, change, place in zip(frames, facts["times"], facts["motion"], range(99), strict=False):
                start, size = int(index.clips.offset[frame]), int(index.clips.size[frame])
                payload = sample[f"{place:03d}.jpg"]
                assert tar[start : start + size] == payload
                assert xxhash.xxh3_64_intdigest(payload) == index.clips.checksum[frame]
                assert Image.open(io.BytesIO(payload)).size == (index.width[row], index.height[row])
                assert abs(index.clips.time[frame] - time) < 1e-5 and abs(index.clips.motion[frame] - change) < 0.1
            middle = frames[len(frames) // 2]
            assert (index.offset[row], index.size[row]) == (index.clips.offset[middle], index.clips.size[middle])
            start, size = int(index.clips.sound_offset[row]), int(index.clips.sound_size[row])
            assert tar[start : start + size] == sample.get("flac", b"")
            if size:
                samples_of_sound, rate = from_flac(sample["flac"])
                assert (len(samples_of_sound), rate) == (index.clips.sound_samples[row], index.clips.sound_rate[row])
                assert facts["sound"]["samples"] == len(samples_of_sound)
            assert int(sample["cls"]) == index.label[row] and manifest.classes[index.label[row]] in facts["source"]
    lengths = {"class0/0_x": [4], "class1/1_x": [5, 4], "class0/2_x": [5, 5, 4], "class1/3_x": [5, 5, 5, 4]}
    lengths |= {"class1/again": lengths["class1/3_x"], "class0/dog": [1]}
    assert found == {f"{key}/{n:05d}": count for key, counts in lengths.items() for n, count in enumerate(counts)}
    assert manifest.num_samples == len(found) and manifest.settings["clips"] and manifest.settings["frame_rate"] == 5


def test_what_is_left_out_is_listed(out):
    rows = {row["source"]: row["reason"] for row in read_ledger(out / "skipped.parquet")}
    assert rows == {
        "class0/dog.wav": "a second sound of an image",
        "class0/alone.jpg": "an image without a sound of its name beside it",
        "class1/speech.flac": "a sound without an image of its name beside it",
        "class1/notes.txt": "no video, and no image with a sound of its name beside it",
        "class1/empty.webm": "empty file",
    }


def test_memory_that_ffmpeg_does_not_get_is_the_fault_of_the_file(pile, tmp_path, monkeypatch):
    """FFmpeg asks for as much as a header says; its error is a MemoryError too."""
    error: BaseException = av.error.MemoryError(12, "Cannot allocate memory")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(clip_pieces, "clips_of_video", fails)
    manifest = convert(pile, tmp_path / "out", options(workers=1))
    assert manifest.skipped[clip_pieces.UNREADABLE] == 6 and manifest.num_samples == 1
    error = MemoryError()
    with pytest.raises((MemoryError, InputError)):
        convert(pile, tmp_path / "again", options(workers=1))


def test_processes_and_tasks_do_not_change_a_byte(pile, out, tmp_path):
    convert(pile, tmp_path / "out", options(workers=2))
    assert contents(tmp_path / "out") == contents(out)
    for task in ((0, 0), (1, 2), (0, 2)):
        convert(pile, tmp_path / "tasks", options(task=task))
    assert main(["merge", str(tmp_path / "tasks")]) == 0
    assert contents(tmp_path / "tasks") == contents(out)


_KILLED = """
import os, signal, sys
from shards.format.clip_writer import ClipWriter
from shards.cli import main
add, left = ClipWriter.add_clip, int(sys.argv.pop(1))
def add_and_die(*arguments):
    global left
    add(*arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
ClipWriter.add_clip = add_and_die
main(sys.argv[1:])
"""


def test_killed_in_the_middle_of_a_video_and_continued_it_gives_the_same_bytes(pile, out, tmp_path):
    command = ["convert", str(pile), str(tmp_path / "out"), "--clips", "--name", "pile", "--labels", "folder"]
    command += ["--samples-per-shard", "2", "--shuffle", "5", "--workers", "1"]
    command += ["--frame-rate", "5", "--clip-seconds", "1", "--sound-rate", "16000"]
    killed = subprocess.run([sys.executable, "-c", _KILLED, "9", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out/manifest.json").exists()
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(out) and not list((tmp_path / "out").rglob(".*"))


def test_copies_are_found_and_the_first_is_kept(pile, tmp_path):
    manifest = convert(pile, tmp_path / "out", options(duplicates="exact", shuffle=None))
    rows = [row for row in read_ledger(tmp_path / "out/skipped.parquet") if row["repeats"]]
    assert rows == [{"source": "class1/again.mp4", "reason": "a duplicate", "repeats": "class1/3.x.mp4"}]
    assert manifest.num_samples == 11


def test_new_videos_are_added(pile, out, tmp_path):
    source = Path(shutil.copytree(pile, tmp_path / "source"))
    (source / "class1/again.mp4").unlink()
    convert(source, tmp_path / "out", options())
    before = contents(tmp_path / "out")
    shutil.copy(pile / "class1/again.mp4", source / "class1/again.mp4")
    manifest = convert(source, tmp_path / "out", options(update=True))
    after = contents(tmp_path / "out")
    assert manifest.num_samples == read_manifest(out).num_samples
    assert all(after[name] == payload for name, payload in before.items() if name.endswith((".tar", ".safetensors")))


def test_verify_finds_each_kind_of_damage_and_repairs_it(pile, out, tmp_path, capsys):
    folder = Path(shutil.copytree(out, tmp_path / "out"))
    whole = contents(folder)
    assert main(["verify", str(folder), "--workers", "1"]) == 0
    manifest = read_manifest(folder)
    number = next(n for n in range(len(manifest.shards)) if read_index(manifest.index_path(n)).clips.sound_size.any())
    index, tar = read_index(manifest.index_path(number)), manifest.tar_path(number)
    row = int(np.flatnonzero(index.clips.sound_size)[0])
    first, sound = int(index.clips.offset[index.clips.frames(row)[0]]), int(index.clips.sound_offset[row])
    for place, what in (
        (first + 30, "bytes of frame 0 differ from the index"),
        (sound + 60, "bytes of the sound differ from the index"),
        (first - 512 + 20, "damaged"),
    ):
        content = bytearray(whole[tar.name])
        content[place] ^= 0xFF
        tar.write_bytes(content)
        assert main(["verify", str(folder), "--workers", "1"]) == 1
        assert what in capsys.readouterr().out
    assert main(["verify", str(folder), "--repair", "--workers", "1"]) == 0 and contents(folder) == whole
    index.clips.sound_samples[row] += 1
    write_index(index, manifest.index_path(number))
    assert main(["verify", str(folder), "--workers", "1"]) == 1
    assert "its sound has" in capsys.readouterr().out
    assert main(["verify", str(folder), "--repair", "--workers", "1"]) == 0 and contents(folder) == whole


def test_without_pyav_clips_are_checked_by_their_checksums_alone(out, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'largescale[clips]'" in refusal(capsys, "verify", out)
    assert main(["verify", str(out), "--no-decode", "--workers", "1"]) == 0


def test_info_tells_frames_and_sound_and_shows_films(out, tmp_path, capsys):
    assert main(["info", str(out), "--html", str(tmp_path / "page.html")]) == 0
    said, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert "frames    66 in all; 1 / 5 / 5 per clip" in said and "sound     of 11 clips" in said
    assert page.count('<figure class="film">') == 15 and page.count("<path d=") >= 11
    assert page.count("data:image/jpeg") == 67 and "class0/dog/00000" in page and ", without sound" in page
    still = tmp_path / "still"
    write_video(still / "a.gif", [moving_square(0)])
    assert main(["convert", str(still), str(tmp_path / "gifs"), "--clips"]) == 0
    assert main(["info", str(tmp_path / "gifs"), "--html", str(tmp_path / "page.html")]) == 0
    assert "sound     none" in capsys.readouterr().out


def test_a_film_without_sound_reads_its_frames_alone(monkeypatch, out):
    """An empty stretch at 0 would make a store send all that lies before the frames."""
    asked: list[list[tuple[int, int]]] = []

    def read_spans(_self: LocalFolder, _name: str, spans: list[tuple[int, int]]) -> list[bytes]:
        asked.append(spans)
        return [image_bytes(6, 4, "JPEG") for _ in spans]

    monkeypatch.setattr(LocalFolder, "read_spans", read_spans)
    silent = Example("a.tar", 0, "key", (900, 5), [(900, 5), (910, 5)])
    page = films(replace(gather(ShardFolder(out)), examples=[silent]))
    assert asked == [[(900, 5), (910, 5)]] and page.count("data:image/jpeg") == 2 and "without sound" in page


def test_clips_are_not_indexed_as_images(out, tmp_path, capsys):
    folder = Path(shutil.copytree(out, tmp_path / "out"))
    shutil.rmtree(folder / "plan")
    before = contents(folder)
    assert "holds clips" in refusal(capsys, "index", folder)
    assert contents(folder) == before
    (folder / "manifest.json").unlink()
    assert "holds clips" in refusal(capsys, "index", folder)


def test_a_list_names_videos_and_pairs_and_keeps_its_other_columns(pile, tmp_path):
    image, sounds = str(pile / "class0/dog.png"), (str(pile / "class0/dog.ogg"), str(pile / "class0/dog.wav"))
    rows = [{"path": str(pile / "class1/1.x.mp4"), "title": "one", "kind": "b", "sound": None}]
    rows += [{"path": str(pile / "class1/gone.mp4"), "title": "two", "kind": "a"}]
    rows += [{"path": image, "title": "three", "kind": "a", "sound": sound} for sound in (*sounds, "gone.wav", "")]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = convert(tmp_path / "list.jsonl", tmp_path / "out", options(labels="column:kind", samples_per_shard=9))
    assert manifest.num_samples == 4 and manifest.classes == ("a", "b")
    reasons = [row["reason"] for row in read_ledger(tmp_path / "out/skipped.parquet")]
    no_pair = "no video, and no image with a sound of its name beside it"
    assert sorted(reasons) == ["cannot be read: No such file or directory"] * 2 + [no_pair]
    with tarfile.open(tmp_path / "out" / manifest.shards[0].name) as tar:
        names = [name for name in tar.getnames() if name.endswith("json")]
        facts = [json.loads(tar.extractfile(name).read()) for name in names]
    assert {one["title"] for one in facts} == {"one", "three"} and not any("path" in one for one in facts)
    assert sorted(one["sound"]["samples"] for one in facts if one["title"] == "three") == [3200, 8000]


def test_a_row_with_half_a_character_keeps_its_video_and_reserved_names_are_refused(pile, tmp_path, capsys):
    row = {"path": str(pile / "class1/1.x.mp4"), "title": "\ud83d"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    manifest = convert(tmp_path / "list.jsonl", tmp_path / "out", options(labels="none"))
    with tarfile.open(tmp_path / "out" / manifest.shards[0].name) as tar:
        facts = [json.loads(tar.extractfile(name).read()) for name in tar.getnames() if name.endswith("json")]
    assert not manifest.skipped and {one["title"] for one in facts} == {"\ud83d"}
    for name in ("start", "clip", "times", "motion", "source"):
        (tmp_path / "list.jsonl").write_text(json.dumps({"path": row["path"], name: 1}))
        line = refusal(capsys, "convert", tmp_path / "list.jsonl", tmp_path / name, "--clips")
        assert f"column `{name}`" in line and "rename it" in line


def test_what_does_not_fit_is_refused_in_a_line(pile, out, tmp_path, capsys):
    for more, line in (
        (["--plain"], "--plain: only for images"),
        (["--no-blank"], "--no-blank: only for images"),
        (["--no-decode"], "--no-decode: with --clips"),
        (["--duplicates", "near"], "--duplicates=near: only for images"),
        (["--labels", "cls"], "--labels=cls: only for tars"),
        (["--frame-rate", "0"], "--frame-rate=0.0: expected a number above 0"),
    ):
        assert line in refusal(capsys, "convert", pile, tmp_path / "out", "--clips", *more)
    assert "unpack archives first" in refusal(capsys, "convert", out / "manifest.json", tmp_path / "out", "--clips")
    assert "a video: convert those with --clips" in refusal(capsys, "convert", pile / "class1", tmp_path / "out")


def test_a_folder_of_images_alone_is_told_to_leave_out_clips(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(image_bytes(30, 20))
    assert main(["convert", str(tmp_path / "photos"), str(tmp_path / "out"), "--clips"]) == 2
    line = capsys.readouterr().err
    assert "no videos, and no images with a sound each, below this folder" in line
    assert line.endswith("or leave out --clips to convert images\n")


def test_a_conversion_of_clips_and_one_of_images_do_not_continue_each_other(pile, tmp_path, capsys):
    convert(pile, tmp_path / "clips", options(task=(0, 0)))
    images = Options("pile", labels="folder", samples_per_shard=2, shuffle=5)
    convert(pile, tmp_path / "images", Options(**{**vars(images), "task": (0, 0)}))
    line = refusal(capsys, "convert", pile, tmp_path / "clips", "--labels", "folder", "--samples-per-shard", 2)
    assert "was made with" in line
    with pytest.raises(Exception, match="was made with --clips=None, now it is True"):
        convert(pile, tmp_path / "images", options())
    with pytest.raises(Exception, match="was made with --clips=True, now it is None"):
        convert(pile, tmp_path / "clips", images)
    with pytest.raises(Exception, match=r"was made with --frame-rate=5\.0, now it is 6\.0"):
        convert(pile, tmp_path / "clips", options(clips=ClipSettings(6.0, clip_seconds=1.0, sound_rate=16_000)))
