"""The mirror follows the run's folder behind the training, whatever happens to the store.

Covers: largescale/distributed/bounded.py
"""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from largescale.checkpoint.copier import Copier
from largescale.checkpoint.folder import newest_first
from largescale.checkpoint.mirror import Mirror
from largescale.checkpoint.saver import Saver
from largescale.distributed.bounded import TookTooLong, within
from tests.helpers.ranks import run_ranks


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def disturbed(folder: str) -> dict[str, object]:
    """Saves on every rank while the store comes and goes; what was found on the way."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("largescale").addHandler(handler)
    here, there = Path(folder) / "checkpoints", Path(folder) / "store" / "run"
    mirror = Mirror(f"file://{there}", answer_s=0.5)
    copier = Copier(mirror, here, keep=2, keep_every=0)
    saver = Saver(here, keep=2, keep_every=0, background=True, device=torch.device("cpu"))
    found: dict[str, object] = {}

    def save(step: int, value: float = 1.0) -> str:
        saver.save(
            {"model.a": torch.full((40,), value), f"model.{dist.get_rank()}": torch.ones(3)},
            {"step": step},
            until_update=set(),
        )
        saver.wait()
        copier.begin()
        return copier.wait()

    def on_rank_0(action) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            action()
        dist.barrier()

    found["copied"] = save(10), names(there) == names(here) - {"latest"}
    on_rank_0(lambda: (there.parent.rename(Path(folder) / "gone"), there.parent.touch()))
    found["away"] = save(20)
    found["passed over"] = save(30)  # until its pause is over
    on_rank_0(lambda: (there.parent.unlink(), (Path(folder) / "gone").rename(there.parent)))
    copier.begin(insist=True)
    # Both that it missed; the first is no longer kept here, nor there.
    found["made up for"] = copier.wait(), names(there) == names(here) - {"latest"}, sorted(mirror.steps())
    hangs = threading.Event()
    put_file, mirror._fs.put_file = mirror._fs.put_file, lambda *_: hangs.wait()
    found["hangs"] = save(40)
    mirror._fs.put_file = put_file
    copier._next_try = 0.0
    save(40, value=2.0)  # another one of the same step
    found["replaced"] = [mirror.holds(checkpoint) for checkpoint in newest_first(here)]
    hangs.set()
    found["lines"] = lines
    return found


@pytest.mark.distributed
def test_the_mirror_makes_up_for_what_it_missed(tmp_path):
    found, other = run_ranks(disturbed, 2, str(tmp_path))
    lines = found.pop("lines")
    assert found == {key: value for key, value in other.items() if key != "lines"}
    assert found["copied"] == ("", True)
    assert found["away"].startswith(f"checkpoint.mirror=file://{tmp_path}/store/run: ") and "(rank 0)" in found["away"]
    assert found["passed over"] == ""
    assert found["made up for"] == ("", True, [20, 30])
    assert "no answer for 0 s" in found["hangs"] or "no answer for 1 s" in found["hangs"]
    assert found["replaced"] == [True, True]
    warnings = [line for line in lines if "training continues" in line]
    assert len(warnings) == 2 and all("tries again and copies what is missing" in line for line in warnings)


@pytest.fixture
def copier(one_process, tmp_path) -> Copier:
    """Of a folder with one checkpoint."""
    saver = Saver(tmp_path / "checkpoints", keep=2, keep_every=0, background=False, device=torch.device("cpu"))
    saver.save({"model.a": torch.ones(3)}, {"step": 10}, until_update=set())
    return Copier(Mirror(f"file://{tmp_path}/store/run"), saver.folder, keep=2, keep_every=0)


@pytest.mark.parametrize(
    "keep, keep_every, left", [(2, 0, [40, 45]), (3, 20, [20, 35, 40, 45]), (1, 10, [10, 20, 40, 45])]
)
def test_a_machine_that_took_over_leaves_the_copies_that_the_rule_keeps(one_process, tmp_path, keep, keep_every, left):
    here, mirror = tmp_path / "checkpoints", Mirror(f"file://{tmp_path}/store/run")
    saver = Saver(here, keep=100, keep_every=0, background=False, device=torch.device("cpu"))
    for step in (5, 10, 20, 35, 40):
        saver.save({"model.a": torch.ones(3)}, {"step": step}, until_update=set())
    first = Copier(mirror, here, keep=100, keep_every=0)
    first.begin(insist=True)
    assert first.wait() == "" and sorted(mirror.steps()) == [5, 10, 20, 35, 40]
    for step in (5, 10, 20, 35):  # of which it fetched the newest alone
        shutil.rmtree(here / f"step-{step:08d}")
    copier = Copier(mirror, here, keep=keep, keep_every=keep_every)
    copier.begin(insist=True)
    assert copier.wait() == "" and {40, *(step for step in left if step != 45)} <= set(mirror.steps())
    saver.save({"model.a": torch.ones(3)}, {"step": 45}, until_update=set())
    copier.begin(insist=True)
    assert copier.wait() == "" and sorted(mirror.steps()) == left


@pytest.mark.parametrize("url", ["file://{}/run-[1]?*", "memory://{}/run-[1]?*"])
def test_half_copies_go_once_newer_ones_are_whole(one_process, tmp_path, url):
    """A name of a mirror is no pattern: these characters mean themselves."""
    here, mirror = tmp_path / "checkpoints", Mirror(url.format(tmp_path))
    store, there = mirror._fs, mirror._root
    saver = Saver(here, keep=1, keep_every=0, background=False, device=torch.device("cpu"))
    copier = Copier(mirror, here, keep=2, keep_every=10)
    for step in (20, 30):
        saver.save({"model.a": torch.ones(3)}, {"step": step}, until_update=set())
        copier.begin(insist=True)
        assert copier.wait() == ""
    for half in ("step-00000010", "step-00000040", "mine"):  # 40: maybe of a machine that comes after this one
        store.makedirs(f"{there}/{half}")
        store.pipe_file(f"{there}/{half}/shard-00001-model-00001-of-00001.safetensors", b"half")
    assert mirror.steps() == [30, 20]
    copier.begin(insist=True)
    assert copier.wait() == "" and mirror.steps() == [30, 20]
    left = {path.rstrip("/").split("/")[-1] for path in store.ls(there, detail=False)}
    assert left == {"step-00000020", "step-00000030", "step-00000040", "mine"}
    mirror.remove_but({30})
    assert mirror.steps() == [30]


def test_credentials_that_were_renewed_are_read_again(copier, monkeypatch):
    def denied(*_: object, **more: object) -> None:
        raise PermissionError("The provided token has expired.")

    monkeypatch.setattr(copier.mirror._fs, "ls", denied)  # of this client, which has read the old ones
    copier.begin()
    assert "The provided token has expired" in copier.wait()
    copier._next_try = 0.0
    copier.begin()
    assert copier.wait() == ""


def test_a_wait_has_its_limit_and_a_long_one_shows_that_it_goes_on(copier, monkeypatch):
    answers = threading.Event()
    steps = copier.mirror.steps
    monkeypatch.setattr(copier.mirror, "steps", lambda: (answers.wait(), steps())[1])
    copier.begin()
    assert "not all is copied" in copier.wait(limit_s=0.01)
    assert copier.wait(beat=answers.set) == ""
    assert steps() == [10]


def test_what_a_run_leaves_out_is_copied_without_the_weights_again(copier, monkeypatch):
    copied: list[str] = []
    put_file = copier.mirror._fs.put_file
    monkeypatch.setattr(copier.mirror._fs, "put_file", lambda *names: (copied.append(names[0]), put_file(*names)))
    here, there = copier.folder, Path(copier.mirror._root)
    for rollbacks in ("", "left out\n", "left out\nmore\n", ""):
        mark = here / "step-00000010" / "rollbacks.jsonl"
        mark.write_text(rollbacks) if rollbacks else mark.unlink(missing_ok=True)
        copier.begin(insist=True)
        assert copier.wait() == "" and names(there) == names(here) - {"latest"}
        assert not rollbacks or (there / "step-00000010" / "rollbacks.jsonl").read_text() == rollbacks
    assert len(copied) == 1


def test_a_broken_group_is_said(copier, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise RuntimeError("Timed out waiting 1800000ms for recv operation to complete")

    monkeypatch.setattr("largescale.checkpoint.copier.on_first", broken)
    copier.begin()
    assert "Timed out waiting" in copier.wait() and "Timed out waiting" in caplog.text


def test_an_action_has_its_time():
    assert within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}[1])
    with pytest.raises(TimeoutError, match="its own"):
        within(5, lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    release = threading.Event()
    with pytest.raises(TookTooLong, match="no answer"):
        within(0.01, release.wait)
    release.set()
