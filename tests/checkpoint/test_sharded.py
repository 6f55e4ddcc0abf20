"""Covers: largescale/checkpoint/saver.py, largescale/checkpoint/together.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import find_latest
from largescale.checkpoint.saver import Saver
from shards.ground.errors import InputError
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.arange(35.0).view(7, 5),
        "model.b": torch.arange(3.0, dtype=torch.float64),
        "extra.step": torch.tensor(5),
    }


def save_on_this_rank(folder: str, step: int, keep: int = 3, keep_every: int = 0) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = tensors()
    state = {
        "model.a": distribute_tensor(whole["model.a"], mesh, [Shard(0)]),
        "model.b": distribute_tensor(whole["model.b"], mesh, [Replicate()]),
        "extra.step": whole["extra.step"],
    }
    saver = Saver(Path(folder), keep=keep, keep_every=keep_every, background=True, device=torch.device("cpu"))
    saver.save(state, {"step": step, "skipped": 0}, until_update=set(state))
    saver.wait_staged()
    for value in state.values():  # the training goes on
        (value.to_local() if isinstance(value, DTensor) else value).zero_()
    saver.wait()


def load_on_this_rank(folder: str) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {
        "model.a": distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)]),
        "model.b": torch.zeros(3, dtype=torch.float64),
        "extra.step": torch.tensor(0),
    }
    checkpoint = sharded.agree_on_latest(Path(folder), torch.device("cpu"))
    assert checkpoint is not None
    sharded.load(checkpoint, state)
    return {**state, "model.a": state["model.a"].full_tensor()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 10 and 20, each written by two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    for step in (10, 20):
        run_ranks(save_on_this_rank, 2, str(folder), step)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_loads_what_two_have_saved(saved, world_size):
    for state in run_ranks(load_on_this_rank, world_size, str(saved)):
        for name, value in tensors().items():
            assert torch.equal(state[name], value) and state[name].dtype == value.dtype


def test_every_rank_writes_its_own_safetensors_and_nothing_is_pickled(saved):
    names = sorted(path.name for path in (saved / "step-00000020").iterdir())
    pieces = [name for name in names if name.endswith(".safetensors")]
    assert len(pieces) == 2
    assert all(name.endswith((".safetensors", ".json")) for name in names), names
    assert (saved / "latest").read_text() == "step-00000020\n"


def cut(folder: Path) -> None:
    piece = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    piece.write_bytes(piece.read_bytes()[:-8])


def lose_a_piece(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def lose_the_mark(folder: Path) -> None:
    (folder / "progress.json").unlink()


def garble_the_mark(folder: Path) -> None:
    (folder / "progress.json").write_text("{")


@pytest.mark.parametrize("damage", [cut, lose_a_piece, lose_the_mark, garble_the_mark])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(copied, damage):
    damage(copied / "step-00000020")
    checkpoint = find_latest(copied)
    assert checkpoint is not None and checkpoint.step == 10


def test_half_written_folders_do_not_count(copied):
    (copied / "step-00000020").rename(copied / ".step-00000030.0.writing")
    assert find_latest(copied).step == 10
    run_ranks(save_on_this_rank, 1, str(copied), 30)  # goes through although the name is taken
    assert find_latest(copied).step == 30
    assert not list(copied.glob(".step-*"))


def test_keeps_the_newest_k(copied):
    run_ranks(save_on_this_rank, 2, str(copied), 30, 2)
    assert sorted(path.name for path in copied.glob("step-*")) == ["step-00000020", "step-00000030"]


def test_none_where_nothing_was_saved(tmp_path):
    assert find_latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "name, shape, expected",
    [("model.a", (7, 4), r"model.a is \(7, 5\) there and \(7, 4\)"), ("model.c", (1,), "model.c is missing there")],
)
def test_another_network_is_refused_by_name(saved, name, shape, expected):
    with pytest.raises(InputError, match=expected):
        sharded.load(find_latest(saved), {name: torch.zeros(shape)}, no_dist=True)


def test_headers_are_read_once(saved, monkeypatch):
    reads: list[str] = []
    read = HuggingFaceStorageReader.read_metadata
    monkeypatch.setattr(
        HuggingFaceStorageReader, "read_metadata", lambda self: (reads.append(str(self.path)), read(self))[1]
    )
    sharded.load(find_latest(saved), {"model.a": torch.zeros(7, 5)}, no_dist=True)
    assert reads == [str(saved / "step-00000020")]


def test_progress_is_kept(saved):
    progress = json.loads((saved / "step-00000010/progress.json").read_text())
    assert (progress["step"], progress["skipped"]) == (10, 0)
