"""Conversion in pieces: by one process, by several, by tasks, by processes that are killed: the same bytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.cli import main
from shards.conversion import pieces
from shards.conversion.convert import Options, convert, merge
from shards.ground.errors import InputError
from shards.ground.files import at_work_in
from tests.helpers.commands import ROOT
from tests.helpers.conversions import contents
from tests.helpers.images import image_bytes
from tests.shards.kills import kill_again_and_again


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in three folders, one of them damaged."""
    source = tmp_path_factory.mktemp("pile")
    for number in range(60):
        path = source / f"class{number % 3}" / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes(90, 80, "JPEG", seed=number)[: 700 if number == 17 else None])
    return source


def options(**changes: object) -> Options:
    return Options("pile", labels="folder", samples_per_shard=7, shuffle=5, **changes)


@pytest.fixture(scope="module")
def expected(pile: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(pile, out, options())
    return contents(out)


def test_processes_do_not_change_a_byte(pile, tmp_path, expected):
    convert(pile, tmp_path / "out", options(workers=8))
    assert contents(tmp_path / "out") == expected


def test_tasks_in_any_order_and_a_merge_do_not_change_a_byte(pile, tmp_path, expected, capsys):
    out = tmp_path / "out"
    command = [
        "convert",
        str(pile),
        str(out),
        "--name",
        "pile",
        "--labels",
        "folder",
        "--samples-per-shard",
        "7",
        "--shuffle",
        "5",
    ]
    for task in (0, 3, 1):
        assert main([*command, "--task", f"{task}/4"]) == 0
    assert main(["merge", str(out)]) == 2
    assert "2 of 9 pieces are not written, such as piece 2" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    assert main([*command, "--task", "2/4"]) == 0 and main(["merge", str(out)]) == 0
    assert contents(out) == expected


def test_pieces_that_are_written_are_not_written_again(pile, tmp_path, expected, monkeypatch):
    out = tmp_path / "out"
    convert(pile, out, options(task=(0, 2)))
    written, write = [], pieces.write_shard

    def write_and_tell(*arguments: object) -> object:
        written.append(arguments[1].stem)
        return write(*arguments)

    monkeypatch.setattr(pieces, "write_shard", write_and_tell)
    (out / "pile-000004.tar").write_bytes(b"half")
    convert(pile, out, options())
    assert sorted(written) == [f"pile-{number:06d}" for number in (1, 3, 4, 5, 7)]
    assert contents(out) == expected


def test_a_source_or_options_that_changed_are_refused(pile, tmp_path):
    source, out = Path(shutil.copytree(pile, tmp_path / "source")), tmp_path / "out"
    convert(source, out, options(task=(0, 2)))
    with pytest.raises(InputError, match=r"plan: was made with --shuffle=5, now it is 6; pass the same options, or"):
        convert(source, out, Options("pile", labels="folder", samples_per_shard=7, shuffle=6))
    with pytest.raises(InputError, match=r"was made with --shuffle=5, now it is 6"):  # other tasks notice as well
        convert(source, out, Options("pile", labels="folder", samples_per_shard=7, shuffle=6, task=(1, 2)))
    (source / "class0" / "new.jpg").write_bytes(image_bytes(file_format="JPEG"))
    with pytest.raises(InputError, match=r"has changed since .*60 images then, 61 now"):
        convert(source, out, options())
    manifest = convert(source, out, options(force=True))
    assert manifest.num_samples == 60 and not list(out.glob(".*"))


@pytest.mark.parametrize("task", [(4, 4), (-1, 3)])
def test_tasks_that_do_not_exist_are_refused(pile, tmp_path, task):
    with pytest.raises(InputError, match="expected I/N with I from 0 to N - 1"):
        convert(pile, tmp_path / "out", options(task=task))


def test_a_task_without_a_plan_says_so(pile, tmp_path):
    with pytest.raises(InputError, match="no conversion was planned here; start with"):
        convert(pile, tmp_path / "out", options(task=(1, 4)))
    assert convert(pile, tmp_path / "out", options(task=(0, 0))) is None
    assert convert(pile, tmp_path / "out", options(task=(1, 4))) is None
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2


def test_merging_what_was_never_planned_is_refused(tmp_path):
    with pytest.raises(InputError, match="no conversion was planned here"):
        merge(tmp_path)


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(pile, tmp_path, expected):
    """A short form of `python -m tests.shards.kills`."""
    assert kill_again_and_again(pile, tmp_path / "out", kills=8, seed=1) == 8
    assert contents(tmp_path / "out") == expected


def test_force_keeps_what_is_there_until_the_new_source_is_listed(pile, tmp_path, capsys):
    out, empty = tmp_path / "out", tmp_path / "empty"
    convert(pile, out, options())
    before = contents(out)
    empty.mkdir()
    assert main(["convert", str(empty), str(out), "--force"]) == 2
    assert "no images" in capsys.readouterr().err
    assert contents(out) == before and merge(out).num_samples == 59


def test_force_removes_no_tars_of_others_and_no_source(pile, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    convert(pile, tmp_path / "out", options())
    theirs.mkdir()
    shutil.copy(tmp_path / "out" / "pile-000000.tar", theirs / "web.tar")
    assert main(["index", str(theirs)]) == 0
    before = contents(theirs)
    for source, says in ((theirs / "web.tar", "lies inside"), (pile, "were indexed, not converted")):
        assert main(["convert", str(source), str(theirs), "--force"]) == 2
        assert says in capsys.readouterr().err
    assert contents(theirs) == before


def test_a_task_does_not_begin_anew_under_the_others(pile, tmp_path, capsys):
    assert main(["convert", str(pile), str(tmp_path / "out"), "--force", "--task", "0/2"]) == 2
    assert "pass it to --task 0/0" in capsys.readouterr().err
    assert main(["convert", str(pile), str(tmp_path / "out"), "--force", "--task", "0/0"]) == 0


def test_two_at_work_in_one_folder_are_refused_and_tasks_are_not(pile, tmp_path, capsys):
    out = tmp_path / "out"
    with at_work_in(out, with_others=True):
        assert main(["convert", str(pile), str(out)]) == 2
        assert f"{out}: another command is writing to it" in capsys.readouterr().err
        assert main(["convert", str(pile), str(out), "--task", "0/2"]) == 0
    with at_work_in(out, with_others=False):
        assert main(["convert", str(pile), str(out), "--task", "1/2"]) == 2
    assert main(["convert", str(pile), str(out), "--task", "1/2"]) == 0 and main(["merge", str(out)]) == 0


def test_processes_end_with_the_command_that_started_them(pile, tmp_path):
    command = [sys.executable, "-c", SLOW, str(pile), str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


SLOW = """
import os, sys, time
from pathlib import Path
from shards.conversion import pieces
from shards.conversion.convert import Options, convert
def wait(*_):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece: two processes write to the same pipe
    time.sleep(60)
pieces.write_shard = wait
convert(Path(sys.argv[1]), Path(sys.argv[2]), Options("pile", samples_per_shard=7, workers=2))
"""


def test_what_killed_processes_left_in_the_plan_goes_with_the_merge(pile, tmp_path):
    out = tmp_path / "out"
    convert(pile, out, options(task=(0, 1)))
    for name in ("plan/pieces/.000001.json.7.writing", "plan/.plan.json.7.writing", "plan/train.new"):
        (out / name).write_bytes(b"x")
    (out / "plan" / ".duplicates").mkdir()
    merge(out)
    assert not list(out.rglob(".*")) and not list(out.rglob("*.new"))
