"""`largescale prune`: what is there stays, protocols, stopping together, and what is refused.

Covers: largescale/prune/arguments.py, largescale/prune/same_network.py, largescale/prune/wish.py
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from largescale.checkpoint import folder
from largescale.checkpoint.folder import stamp_of
from largescale.checkpoint.mask_file import write_mask
from largescale.distributed import stopping
from largescale.evaluate.measure import evaluate
from largescale.evaluate.protocols import check_settings
from largescale.prune import command, find
from largescale.prune.trained import last_checkpoint
from largescale.prune.wish import Wish
from tests.helpers.prunings import HALF, weights_written
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow


def test_what_is_there_stays_and_more_rounds_can_be_added(run, pruned, tmp_path, say):
    out = tmp_path / "pruning"
    before = weights_written(pruned)
    code, said = say(run, *HALF, "--rounds", 2, "--rewind", 2)
    assert code == 0 and weights_written(pruned) == before
    code, said = say(run, *HALF, "--rounds", 1, "--rewind", 2, "--out", out, "--evaluate", "knn")
    assert code == 0 and "knn" in said.splitlines()[-3]
    assert weights_written(out) == {name: data for name, data in before.items() if name.startswith("round-01")}
    points = json.loads((out / "curve.json").read_text())
    assert [point["round"] for point in points] == [0, 1] and all("knn" in point["accuracies"] for point in points)
    page = (out / "pruning.html").read_text()
    assert "<svg" in page and "50%" in page
    code, said = say(run, *HALF, "--rounds", 2, "--rewind", 2, "--out", out)
    assert code == 0 and weights_written(out) == before and "round 1 of" not in said


def test_each_protocol_gets_its_own_settings(run, pruned, say, monkeypatch):
    called = []
    monkeypatch.setattr(command, "evaluate", lambda protocol, run, overrides: called.append((protocol, overrides)))
    keys = ["evaluate.finetune_epochs=20", "evaluate.linear_epochs=3", "evaluate.batch=8"]
    named = ["--evaluate", "linear", "--evaluate", "finetune"]
    code, said = say(run, *HALF, "--rounds", 1, "--rewind", 2, *named, *keys)
    assert code == 0, said
    assert called == 2 * [("linear", keys[1:]), ("finetune", [keys[0], keys[2]])]
    for protocol, overrides in called:
        check_settings([protocol], overrides)


def test_what_was_measured_otherwise_is_measured_again(
    run, pruned, say, monkeypatch, shard_folder, held_out_shards, tmp_path
):
    called = []

    def counted(protocol, place, overrides):
        called.append(place.name)
        return evaluate(protocol, place, overrides=overrides)

    monkeypatch.setattr(command, "evaluate", counted)
    moved = shutil.copytree(held_out_shards, tmp_path / "moved")
    both, few = ["run", "round-01"], "evaluate.knn_neighbours=[3]"
    for settings, measured in (
        ([few, "evaluate.baselines=false"], both),
        ([few], []),
        ([few, f"data.eval_shards={moved}"], []),
        ([few, f"data.eval_shards={shard_folder}"], both),
        ([f"evaluate.train_shards={moved}"], both),
        ([], both),
    ):
        called.clear()
        code, said = say(run, *HALF, "--rounds", 1, "--rewind", 2, "--evaluate", "knn", *settings)
        assert code == 0 and called == measured, (settings, said)


def test_all_rounds_share_one_time_limit(monkeypatch):
    pruning = SimpleNamespace(rounds=lambda: iter([one, one]), run=Path(), out=Path())
    one = SimpleNamespace(number=1, folder=Path(), config="config", prepare=lambda: None)
    started = []
    for name, value in {
        "_begin": lambda *_: pruning,
        "_together": lambda _: nullcontext(),
        "_is_complete": lambda _: False,
        "_write_curve": lambda _: None,
        "_measure": lambda *_: None,
        "leave_together": lambda _: None,
        "points_of": lambda *_: [],
        "told": lambda _: "",
        "pretrain": lambda config, since: started.append(since),
    }.items():
        monkeypatch.setattr(command, name, value)
    command.prune(command.Places(Path()), Wish())
    assert len(started) == 2 and started[0] == started[1] > 0


def on_two_ranks(run: Path) -> tuple[list[str], str, int]:
    """Files that this rank hashed, why it stopped though only the other was asked to, and collectives of a draw."""
    hashed: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(folder, "stamp_of", lambda path: hashed.append(path.name) or stamp_of(path))
        last_checkpoint(run, "")
    if dist.get_rank() == 1:
        stopping._received.append("SIGTERM")
        stopping._since.append(0.0)
    try:
        command.leave_together("round 1 was to begin")
        why = "went on"
    except stopping.StoppedInOrder as stop:
        why = str(stop)
    weight = distribute_tensor(torch.ones(4, 3, 2, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    with CommDebugMode() as counted:
        find._drawn(weight, 0, "w")
    return hashed, why, counted.get_total_counts()


@pytest.mark.distributed
def test_ranks_share_checksums_and_stop_together(run):
    (first, *rest), (second, *others) = run_ranks(on_two_ranks, 2, run)
    there = [path.name for path in (run / "checkpoints" / "step-00000006").glob("*.safetensors")]
    assert sorted([*first, *second]) == sorted(there)
    assert rest == others == ["stopped by SIGTERM while round 1 was to begin", 0]


def test_mistakes_are_one_line(run, pruned, tmp_path, say):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("pruning*"))
    (unfinished / "status.json").write_text(json.dumps({"state": "stopped", "step": 2, "steps": 6}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out, misfit = ["--out", tmp_path / "r"], tmp_path / "misfit" / "round-01"
    misfit.mkdir(parents=True)
    write_mask(misfit / "mask.safetensors", {"fc.weight": torch.ones(2, 2, dtype=torch.bool)}, {})
    for words, says in (
        ([tmp_path / "absent"], "no run here (config.yaml is missing)"),
        ([unfinished], "stopped, 2 of 6 steps"),
        ([run, "--rate", "1.5"], "--rate=1.5: expected a number between 0 and 1"),
        ([run, "--rounds", "0"], "--rounds=0: expected at least 1"),
        ([run, "--rewind", "3"], f"--rewind=3: {run} has no checkpoint of that step, but of 2, 4, 6; "),
        ([run, "--rewind", "6"], "--rewind=6: expected a step before 6, the last of"),
        ([run, "--rewind", "-1"], "--rewind=-1: expected a step of the run"),
        ([run, "--random", "--one-shot"], "--one-shot: --random weights prunes no trained weights"),
        ([run, "--random", "--rewind", "2"], "--rewind: --random weights begins with weights drawn again"),
        ([run, "--masks", tmp_path, "--one-shot"], "--one-shot finds masks of its own; leave one of them out"),
        ([run, "--masks", tmp_path, "--random", "masks"], "--random masks finds masks of its own"),
        ([run, "--rewind", "2"], "was made with --rate=0.5, and is now to go on with 0.2"),
        ([run, *HALF, "--rewind", "2", "--masks", "m", "--out", pruned], "was made with --masks=, and is now to go on"),
        ([run, "--random", "--masks", tmp_path, *out], "round-01/mask.safetensors: no such mask"),
        ([run, "--random", "--masks", pruned, "--rounds", "3", *out], "masks of 2 rounds; pass --rounds=2"),
        ([run, "--masks", misfit.parent, "--rounds", "1", *out], "fc.weight: no parameter of this backbone"),
        ([run, *out, "model.width=16"], "model.width=16: the run that is pruned has 8; leave it out"),
        ([run, *out, "--rewind", "2", "optim.name=adamw"], "optim.name=adamw: --rewind=2 goes on with what"),
        ([run, *out, "--rewind", "2", "train.global_batch=8"], "train.global_batch=8: --rewind=2 goes on with what"),
        ([run, *out, "--evaluate", "knn", "evaluate.finetune_epochs=2"], "used by --evaluate finetune alone"),
        ([run, *HALF, "--rewind", "2", "optim.lr=9"], "was made with optim.lr=0.5, and is now to go on with 9"),
        ([run, "--out", tmp_path / "full"], "holds something else than a pruning"),
        ([run, "run.dir=x"], "run.dir=x: each round has its own run.dir"),
        ([run, "--evaluate", "nothing"], "nothing: expected"),
    ):
        code, said = say(*words)
        assert code == 2 and said.count("\n") == 1 and says in said, said
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words", [["--random", "runs/demo"], ["runs/demo", "--random", "layers"]])
def test_what_to_draw_is_no_run(say, capsys, words):
    with pytest.raises(SystemExit) as left:
        say(*words)
    said = capsys.readouterr().err
    assert left.value.code == 2 and f"argument --random: invalid choice: '{words[-1]}'" in said and "RUN" not in said
