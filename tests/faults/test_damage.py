"""Checkpoints that are damaged after they were written, foreign files in their place, and disks that fill up.

Covers: largescale/run/folder.py
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from largescale.checkpoint.folder import find_latest, stamp_of
from tests.helpers.commands import TINY, environment
from tests.helpers.launcher import pretrain, run_largescale
from tests.helpers.runs import assert_same_end

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shard_folder, held_out_shards) -> tuple[list[str], Path]:
    """A run of one rank with checkpoints of steps 5, 10 and 14, and its overrides but for run.dir."""
    data = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}", "checkpoint.keep=3"]
    run = tmp_path_factory.mktemp("damage") / "finished"
    pretrain([*data, f"run.dir={run}"])
    return data, run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy whose last checkpoint is gone, so that there is something left to do."""
    copy = Path(shutil.copytree(finished[1], tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints" / "step-00000014")
    return copy


def piece_of(run: Path, step: int) -> Path:
    return next((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))


def go_on(data: list[str], run: Path) -> subprocess.CompletedProcess[str]:
    return run_largescale("pretrain", TINY, *data, f"run.dir={run}", check=False)


def flip_a_bit(piece: Path) -> None:
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes(content)


def cut(piece: Path) -> None:
    piece.write_bytes(piece.read_bytes()[:-8])


def lose(piece: Path) -> None:
    piece.unlink()


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def replace_by_pickle(piece: Path) -> None:
    piece.write_bytes(pickle.dumps(Malicious(piece.parents[2] / "executed")))


@pytest.mark.parametrize(
    "damage, says",
    [
        (flip_a_bit, "is not what was written (SHA-256)"),
        (cut, "bytes instead of"),
        (lose, "No such file"),
        (replace_by_pickle, "bytes instead of"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, run, damage, says):
    data, expected = finished
    damage(piece_of(run, 10))
    result = go_on(data, run)
    assert result.returncode == 0, result.stderr
    assert "damaged checkpoint, falling back to the one before" in result.stderr and says in result.stderr
    assert not (run / "executed").exists()
    shutil.rmtree(run / "checkpoints" / "step-00000010.damaged-1")
    assert_same_end(run, expected)


def test_a_foreign_pickle_with_a_matching_checksum_is_refused_unread(finished, run):
    data, _ = finished
    piece = piece_of(run, 10)
    replace_by_pickle(piece)
    mark = piece.parent / "progress.json"
    progress = json.loads(mark.read_text())
    progress["files"] = {piece.name: vars(stamp_of(piece))}
    mark.write_text(json.dumps(progress))
    result = go_on(data, run)
    assert result.returncode == 2 and "is not safetensors" in result.stderr and "Traceback" not in result.stderr
    assert not (run / "executed").exists()


def test_where_all_are_damaged_nothing_is_overwritten(finished, run):
    for step in (5, 10):
        flip_a_bit(piece_of(run, step))
    before = (run / "metrics.jsonl").read_bytes()
    result = go_on(finished[0], run)
    assert result.returncode == 2 and "no whole checkpoint is left" in result.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def test_unreadable_marks_do_not_make_it_a_new_run(finished, run):
    for step in (5, 10):
        (piece_of(run, step).parent / "progress.json").write_text("{")
    before = (run / "metrics.jsonl").read_bytes()
    result = go_on(finished[0], run)
    assert result.returncode == 2 and "progress.json cannot be read: no whole checkpoint is left" in result.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["step-99999999\n", "../../etc\n", "\0\xff"])
def test_latest_is_for_people_and_may_say_what_it_wants(finished, run, content):
    (run / "checkpoints" / "latest").write_text(content)
    result = go_on(finished[0], run)
    assert result.returncode == 0, result.stderr
    assert_same_end(run, finished[1])


def test_a_checkpoint_of_an_earlier_order_of_the_samples_goes_on_and_says_what_changes(finished, run):
    mark = run / "checkpoints" / "step-00000010" / "progress.json"
    progress = json.loads(mark.read_text())
    assert progress.pop("order") == 2
    mark.write_text(json.dumps(progress))
    result = go_on(finished[0], run)
    assert result.returncode == 0 and "the current epoch may use some twice" in result.stderr, result.stderr


def test_batch_statistics_of_other_groups_go_on_and_say_so(finished, run):
    mark = run / "checkpoints" / "step-00000010" / "progress.json"
    progress = json.loads(mark.read_text())
    progress["world_size"], progress["config"]["parallel.batchnorm_group_size"] = 4, 2
    mark.write_text(json.dumps(progress))
    result = go_on(finished[0], run)
    assert result.returncode == 0, result.stderr
    assert "BatchNorm statistics were over 8 images and now are over 16 (4 ranks, now 1)" in result.stderr


def test_a_changed_configuration_is_refused_by_key(finished, run):
    result = go_on([*finished[0], "optim.lr=0.1"], run)
    assert result.returncode == 2
    assert "cannot continue, optim.lr was 0.5 and is now 0.1; set it back" in result.stderr


FULL_DISK = """
mount -t tmpfs -o size={size} none {run}/checkpoints && {python} -m largescale pretrain {arguments}
code=$?; cp -a {run}/checkpoints {run}/after; exit $code
"""


def pretrain_on_small_disk(data: list[str], run: Path, size: str) -> subprocess.CompletedProcess[str]:
    """Pretrain with a file system of that size for the checkpoints; what was on it is in `after` then."""
    (run / "checkpoints").mkdir(parents=True)
    arguments = " ".join(map(str, [TINY, *data, f"run.dir={run}", "checkpoint.every_steps=2", "train.steps=14"]))
    script = FULL_DISK.format(run=run, size=size, python=sys.executable, arguments=arguments)
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_full_disk_costs_no_earlier_checkpoint(finished, tmp_path):
    data, expected = finished
    size = piece_of(expected, 14).stat().st_size
    run = tmp_path / "run"
    # Room for two and a half checkpoints: the third does not fit, since none may go before the next one stands.
    result = pretrain_on_small_disk(data, run, str(int(2.5 * size)))
    assert result.returncode == 3, result.stderr
    assert result.stderr.count("could not save") >= 2
    assert "No space left on device" in result.stderr and "Traceback" not in result.stderr
    assert "make room there and run the same command again" in result.stderr
    assert find_latest(run / "after").step == 4
    assert not list((run / "after").glob(".*"))
