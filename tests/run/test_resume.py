"""Which checkpoint a run continues from, here or in the mirror, where some are damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from largescale.checkpoint.copier import Copier
from largescale.checkpoint.folder import ROLLBACKS, Checkpoint, newest_first
from largescale.checkpoint.mirror import Mirror, MirrorAway
from largescale.checkpoint.saver import Saver
from largescale.cli import main
from largescale.config import flatten, load_config
from largescale.run.resume import newest_checkpoint, settle_precision
from shards.ground.errors import InputError
from tests.helpers.commands import TINY

CPU = torch.device("cpu")


@pytest.fixture
def folder(one_process, tmp_path) -> Path:
    """Checkpoints of steps 10 and 20."""
    saver = Saver(tmp_path / "checkpoints", keep=3, keep_every=0, background=False, device=CPU)
    for step in (10, 20):
        saver.save({"model.a": torch.ones(30)}, {"step": step}, until_update=set())
    return saver.folder


@pytest.fixture
def mirror(folder, tmp_path) -> Mirror:
    """A store that has both."""
    shutil.copytree(folder, tmp_path / "store", ignore=shutil.ignore_patterns("latest"))
    return Mirror(f"file://{tmp_path}/store")


def flip_a_bit(checkpoint: Path) -> None:
    [piece] = checkpoint.glob("*.safetensors")
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)


def garble_the_mark(checkpoint: Path) -> None:
    (checkpoint / "progress.json").write_text("{")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("damage", [flip_a_bit, garble_the_mark])
@pytest.mark.parametrize("steps", [[20], [10, 20]])
def test_what_is_damaged_here_comes_from_the_mirror(folder, mirror, damage, steps):
    for step in steps:
        damage(folder / f"step-{step:08d}")
    found = newest_checkpoint(folder, mirror, CPU)
    assert found.step == 20 and not found.damage()
    assert names(folder) == ["latest", "step-00000010", "step-00000020", "step-00000020.damaged-1"]
    again = newest_checkpoint(folder, mirror, CPU)
    assert again == found and len(names(folder)) == 4


@pytest.mark.parametrize("damage", [flip_a_bit, garble_the_mark])
def test_without_a_mirror_the_one_before_is_the_newest(folder, damage, caplog):
    damage(folder / "step-00000020")
    assert newest_checkpoint(folder, None, CPU).step == 10
    assert names(folder) == ["latest", "step-00000010", "step-00000020.damaged-1"]
    assert (folder / "latest").read_text() == "step-00000010\n"
    assert "step-00000020.damaged-1: damaged; this run never reads it again" in caplog.text


def test_where_all_are_damaged_everything_stays_and_the_mirror_is_asked(folder, mirror, tmp_path):
    for step in (10, 20):
        flip_a_bit(folder / f"step-{step:08d}")
    before = names(folder)
    with pytest.raises(InputError, match="no whole checkpoint is left"):
        newest_checkpoint(folder, None, CPU)
    shutil.rmtree(tmp_path / "store" / "step-00000010")
    shutil.rmtree(tmp_path / "store" / "step-00000020")
    with pytest.raises(InputError, match="no whole checkpoint is left"):
        newest_checkpoint(folder, mirror, CPU)
    assert names(folder) == before


@pytest.mark.parametrize("newer", [False, True])
def test_checksums_are_compared_again_only_of_what_was_fetched(folder, mirror, monkeypatch, newer):
    if newer:
        shutil.rmtree(folder / "step-00000020")
    compared, damage = [], Checkpoint.damage
    monkeypatch.setattr(Checkpoint, "damage", lambda self, *of: compared.append(self.step) or damage(self, *of))
    assert newest_checkpoint(folder, mirror, CPU).step == 20
    assert compared == ([10, 20, 20] if newer else [20])  # also of a copy, before it counts as one


@pytest.mark.parametrize(
    "ours, theirs, left",
    [
        ("", "4\n", "4\n"),
        ("4\n", "4\n8\n", "4\n8\n"),
        ("6\n", "4\n", "4\n"),  # two histories; that of the machine that came later is there
        ("4\n8\n", "4\n", "4\n8\n"),  # not copied yet
        ("4\n", "", "4\n"),
    ],
)
def test_a_machine_that_comes_back_leaves_out_what_another_one_did(folder, mirror, tmp_path, ours, theirs, left):
    """The run went on elsewhere, went back to the same checkpoint, and has saved none since."""
    here, there = folder / "step-00000020", tmp_path / "store" / "step-00000020"
    for path, rows in ((here, ours), (there, theirs)):
        if rows:
            (path / ROLLBACKS).write_text(rows)
    assert newest_checkpoint(folder, mirror, CPU).step == 20
    assert (here / ROLLBACKS).read_text() == left
    copier = Copier(mirror, folder, keep=3, keep_every=0)
    copier.begin(insist=True)
    assert copier.wait() == "" and (there / ROLLBACKS).read_text() == left


def test_rollbacks_of_another_checkpoint_of_the_same_step_are_not_ours(folder, mirror, tmp_path):
    there = tmp_path / "store" / "step-00000020"
    (there / ROLLBACKS).write_text("4\n")
    (there / "progress.json").write_text((there / "progress.json").read_text() + "\n")
    assert newest_checkpoint(folder, mirror, CPU).step == 20
    assert not (folder / "step-00000020" / ROLLBACKS).exists()


def test_a_fetch_goes_on_where_it_was_interrupted(folder, mirror, tmp_path, monkeypatch):
    saver = Saver(tmp_path / "store", keep=3, keep_every=0, background=False, device=CPU)
    saver.save({f"model.{name}": torch.ones(2**10) for name in "ab"}, {"step": 30}, until_update=set())
    source = next((tmp_path / "store" / "step-00000030").glob("*.safetensors"))
    shutil.rmtree(folder)
    get_file, fetched = mirror._fs.get_file, []

    def killed(*words: object) -> None:
        get_file(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(mirror._fs, "get_file", killed)
    with pytest.raises(KeyboardInterrupt):
        newest_checkpoint(folder, mirror, CPU)
    [part] = names(folder)
    monkeypatch.setattr(mirror._fs, "get_file", lambda *words: (fetched.append(words), get_file(*words)))
    (folder / ".fetching-step-00000007.elsewhere").mkdir()
    assert newest_checkpoint(folder, mirror, CPU).step == 30
    assert part.startswith(".fetching-step-00000030") and not fetched and source.exists()
    assert names(folder) == ["step-00000030"] and [one.step for one in newest_first(folder)] == [30]


def settled(run: Path, *overrides: str) -> str:
    config = load_config(TINY, ["data.shards=x", f"run.dir={run}", "train.precision=auto", *overrides])
    return settle_precision(config, CPU).train.precision


def save_in(precision: str, run: Path, step: int) -> None:
    progress = {"step": step, "config": flatten(load_config(TINY, ["data.shards=x", f"train.precision={precision}"]))}
    saver = Saver(run / "checkpoints", keep=3, keep_every=0, background=False, device=CPU)
    saver.save({"model.a": torch.ones(3)}, progress, until_update=set())


def test_auto_is_the_precision_of_the_checkpoint_here_or_in_the_mirror(one_process, tmp_path):
    run, there = tmp_path / "run", tmp_path / "elsewhere"
    assert settled(run) == settled(run, f"checkpoint.mirror={tmp_path}/empty") == "fp32"
    save_in("bf16", there, 10)
    mirror = f"checkpoint.mirror={there}/checkpoints"
    assert settled(run, mirror) == "bf16"
    assert settled(run, mirror, "train.precision=fp64") == "fp64"
    save_in("fp16", run, 5)
    assert settled(run, mirror) == settled(run) == "fp16"
    garble_the_mark(run / "checkpoints" / "step-00000005")
    assert settled(run, mirror) == "bf16"


def test_without_a_checkpoint_here_a_mirror_that_is_away_leaves_the_precision_open(one_process, tmp_path, monkeypatch):
    def away(mirror: Mirror) -> list[int]:
        raise MirrorAway("TimeoutError")

    monkeypatch.setattr(Mirror, "steps", away)
    with pytest.raises(InputError, match=r"checkpoint.mirror=.*cannot be read .* holds no whole checkpoint"):
        settled(tmp_path / "run", f"checkpoint.mirror={tmp_path}/store")


def test_a_run_that_began_on_another_device_goes_on_by_the_same_command(shard_folder, tmp_path, capsys):
    command = ["pretrain", str(TINY), f"data.shards={shard_folder}", f"run.dir={tmp_path}/run", "train.steps=2"]
    assert main([*command, "train.precision=bf16"]) == 0
    assert main([*command, "train.precision=auto"]) == 0, capsys.readouterr().err
    assert "precision: bf16" in (tmp_path / "run" / "config.yaml").read_text()
