"""Which folders are the checkpoints of a run."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from largescale.checkpoint.folder import find_latest, make_newest, newest_first, open_checkpoint, remove_old, stamp_of
from largescale.run.init_from import source_of
from tests.helpers.permissions import as_nobody


def saved(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "a.safetensors").write_bytes(b"weights of %d" % step)
    stamp = stamp_of(path / "a.safetensors")
    (path / "progress.json").write_text(
        json.dumps({"step": step, "files": {"a.safetensors": {"size": stamp.size, "sha256": stamp.sha256}}})
    )
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints of steps 5, 10 and 100,000,000 and copies that somebody made of the first."""
    folder = tmp_path / "checkpoints"
    first = saved(folder, 5)
    for step in (10, 10**8):
        saved(folder, step)
    for name in ("step-best", "step-00000005.old", "step-00000005 (copy)", "step-5", "step-00000099"):
        shutil.copytree(first, folder / name)
    return folder


def test_copies_under_other_names_are_not_the_newest(folder):
    assert [checkpoint.step for checkpoint in newest_first(folder)] == [10**8, 10, 5]
    shutil.rmtree(folder / "step-100000000")
    assert find_latest(folder).path == source_of(str(folder.parent)).path == folder / "step-00000010"
    assert find_latest(folder / "step-best") is None


def test_the_one_just_published_is_left_whatever_is_newer(folder):
    remove_old(folder, published=10, keep=1, keep_every=0)
    assert [checkpoint.step for checkpoint in newest_first(folder)] == [10**8, 10]


def test_what_a_run_cannot_continue_from_is_none_of_its_checkpoints(folder):
    shutil.rmtree(folder / "step-00000099")
    for time in (1, 2):
        [aside] = make_newest(open_checkpoint(folder / "step-00000010"))
        assert aside == folder / f"step-100000000.damaged-{time}" and aside.is_dir()
        assert [checkpoint.step for checkpoint in newest_first(folder)] == [10, 5]
        assert (folder / "latest").read_text() == "step-00000010\n"
        saved(folder, 10**8)


def test_copies_under_other_names_are_neither_counted_nor_removed(folder):
    remove_old(folder, published=10**8, keep=2, keep_every=0)
    assert [checkpoint.step for checkpoint in newest_first(folder)] == [10**8, 10]
    assert (folder / "step-best").is_dir() and (folder / "step-00000005.old").is_dir()


def test_what_may_not_be_read_is_not_taken_for_damaged_or_none(open_folder):
    """A run would begin again, or go on from an older checkpoint, where its user's rights are what is to be fixed."""
    newest = saved(open_folder, 10)
    for path in (saved(open_folder, 5), newest):
        path.chmod(0o755)
    for path, mode in ((newest / "a.safetensors", 0o200), (newest / "progress.json", 0o200), (open_folder, 0o300)):
        before = path.stat().st_mode
        path.chmod(mode)
        with as_nobody(), pytest.raises(PermissionError) as denied:
            find_latest(open_folder)
        assert denied.value.filename == str(path)
        path.chmod(before)
    assert find_latest(open_folder).path == newest


@pytest.mark.parametrize("name", ["a.safetensors", "progress.json"])
def test_a_file_system_that_fails_for_a_moment_damages_nothing(tmp_path, monkeypatch, name):
    newest = [saved(tmp_path, step) for step in (5, 10)][-1]
    fails: list[int] = []
    opened = Path.open

    def failing(path: Path, *words: object, **more: object) -> object:
        if path == newest / name and fails:
            raise OSError(fails.pop(), "Input/output error")
        return opened(path, *words, **more)

    monkeypatch.setattr(Path, "open", failing)
    monkeypatch.setattr("largescale.checkpoint.folder._AGAIN_S", 0)
    fails[:] = [errno.EIO]
    assert find_latest(tmp_path).path == newest and not fails
    fails[:] = [errno.EIO, errno.ESTALE]
    assert find_latest(tmp_path).step == 5 and not fails, "what stays so is damage, and the one before is there"
