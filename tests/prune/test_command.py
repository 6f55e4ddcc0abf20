"""`largescale prune` on a run of seconds: masks, rewinding, going on after a stop, controls, and what is refused.

Covers: largescale/prune/arguments.py, largescale/prune/copied.py, largescale/prune/curve.py, largescale/prune/find.py,
largescale/prune/page.py, largescale/prune/record.py, largescale/prune/rewind.py, largescale/prune/rounds.py,
largescale/prune/same_network.py, largescale/prune/trained.py, largescale/prune/wish.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import prune

from largescale.checkpoint import folder, sharded
from largescale.checkpoint.folder import Checkpoint, find_latest, open_checkpoint, stamp_of
from largescale.checkpoint.mask_file import write_mask
from largescale.cli import main
from largescale.config import load_config
from largescale.distributed import stopping
from largescale.evaluate.protocols import check_settings
from largescale.methods import build_method
from largescale.prune import command, find
from largescale.prune.curve import points_of
from largescale.prune.rounds import Pruning, Round
from largescale.prune.trained import last_checkpoint
from largescale.prune.wish import Wish
from tests.helpers.commands import TINY, environment
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

RUN = [
    "train.steps=6",
    "train.precision=fp32",
    "checkpoint.every_steps=2",
    "checkpoint.keep_every=2",
    "data.audit=false",
    "optim.warmup_epochs=0",
]
HALF = ["--rate", "0.5"]


@pytest.fixture(scope="module")
def run(shard_folder, held_out_shards, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prune") / "run"
    shards = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}"]
    assert main(["pretrain", str(TINY), *shards, f"run.dir={path}", *RUN]) == 0
    return path


@pytest.fixture(scope="module")
def pruned(run) -> Path:
    assert main(["prune", str(run), *HALF, "--rounds", "2", "--rewind", "2"]) == 0
    return run / "pruning"


@pytest.fixture
def say(capsys) -> Callable[..., tuple[int, str]]:
    """Runs the command; returns its exit code and what it said."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["prune", *map(str, words)])
        said = capsys.readouterr()
        return code, said.err + said.out

    return run


def state_of(folder: Path, step: int = 0) -> dict[str, Tensor]:
    path = folder / "checkpoints"
    checkpoint = open_checkpoint(path / f"step-{step:08d}") if step else find_latest(path)
    assert checkpoint is not None
    state = {name: torch.zeros(shape) for name, shape in sharded.shapes(checkpoint).items()}
    sharded.load(checkpoint, state, no_dist=True)
    return state


def masks_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "mask.safetensors")


def by_torch(state: dict[str, Tensor], masks: dict[str, Tensor], amount: float | int) -> dict[str, Tensor]:
    modules = {name: nn.Module() for name in masks}
    for name, module in modules.items():
        module.register_parameter("w", nn.Parameter(state[f"model.backbone.{name}"]))
        prune.custom_from_mask(module, "w", masks[name])
    prune.global_unstructured(
        [(module, "w") for module in modules.values()], pruning_method=prune.L1Unstructured, amount=amount
    )
    return {name: dict(module.named_buffers())["w_mask"].bool() for name, module in modules.items()}


def left(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def weights_written(out: Path) -> dict[str, bytes]:
    """Bytes of all masks and newest checkpoints."""
    files = [path for path in out.rglob("*.safetensors") if "eval" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_masks_are_those_of_torch_and_weights_those_of_the_step(run, pruned):
    whole = {name: torch.ones_like(mask) for name, mask in masks_of(pruned / "round-01").items()}
    assert len(whole) == sum(
        name.startswith("model.backbone") and value.dim() == 4 for name, value in state_of(run).items()
    )
    before, source = whole, run
    for name in ("round-01", "round-02"):
        masks = masks_of(pruned / name)
        expected = by_torch(state_of(source), before, 0.5)
        assert all(torch.equal(masks[key], mask) for key, mask in expected.items())
        rewound, step = state_of(pruned / name, 2), state_of(run, 2)
        assert rewound.keys() == step.keys()
        for key, value in step.items():
            of = key.removeprefix("model.").removeprefix("optimizer.").removeprefix("backbone.")
            mask = next((mask for part, mask in masks.items() if of in (part, f"{part}.momentum_buffer")), None)
            assert torch.equal(rewound[key], value if mask is None else value * mask), key
        after = state_of(pruned / name)
        for key, mask in masks.items():
            assert not after[f"model.backbone.{key}"][~mask].any()
            assert not after[f"optimizer.backbone.{key}.momentum_buffer"][~mask].any()
            assert not torch.equal(after[f"model.backbone.{key}"], step[f"model.backbone.{key}"] * mask)
        before, source = masks, pruned / name
    total = left(whole)
    assert left(before) == (total - round(total / 2)) - round((total - round(total / 2)) / 2)
    first = json.loads((pruned / "round-01" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 2


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


def test_killed_and_continued_it_is_the_same(run, pruned, tmp_path, say, monkeypatch):
    out = tmp_path / "pruning"
    words = [run, *HALF, "--rounds", 2, "--rewind", 2, "--out", out]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "pretrain", killed)  # the mask and the step to begin with are there, and nothing else
        code, _ = say(*words)
        assert code != 0 and (out / "round-01" / "mask.safetensors").exists()
    with monkeypatch.context() as patched:
        patched.setattr("largescale.prune.rounds.write_rewound", killed)  # the second mask is there alone
        code, _ = say(*words)
        assert code != 0 and not (out / "round-02" / "checkpoints").exists()
    with monkeypatch.context() as patched:
        patched.setattr("largescale.run.folder.RunFolder.end", killed)
        code, _ = say(*words)
        assert code != 0
        shutil.rmtree(out / "round-02" / "checkpoints" / "step-00000006")  # as if it had not come so far
    code, said = say(*words)
    assert code == 0 and "from step 4" in said
    assert weights_written(out) == weights_written(pruned)


def spoil(checkpoint: Path) -> None:
    """Change one byte of its weights."""
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_rounds_follow_from_no_earlier_step_than_the_last(run, pruned, tmp_path, say):
    broken, out = tmp_path / "run", tmp_path / "pruning"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("pruning*"))
    last = broken / "checkpoints" / "step-00000006"
    spoil(last)
    code, said = say(broken, *HALF)
    assert code == 2 and said.count("\n") == 1 and f"{last}: shard-" in said and "largescale pretrain" in said, said
    shutil.rmtree(last)
    code, said = say(broken, *HALF)
    assert code == 2 and said.count("\n") == 1 and f"{last}: no such checkpoint" in said, said
    assert not (broken / "pruning").exists()

    shutil.copytree(pruned, out)
    shutil.rmtree(out / "round-02")
    last = out / "round-01" / "checkpoints" / "step-00000006"
    spoil(last)
    words = (run, *HALF, "--rounds", 2, "--rewind", 2, "--out", out)
    code, said = say(*words)
    assert code == 2 and f"{last}: shard-" in said and f"remove {last} and run the same command" in said, said
    assert not (out / "round-02" / "mask.safetensors").exists()
    shutil.rmtree(last)
    code, said = say(*words)
    assert code == 0 and weights_written(out) == weights_written(pruned)


def test_a_run_with_a_mask_and_first_weights_of_another(run, pruned, tmp_path, say, shard_folder):
    """Round 0 has what that mask leaves; weights drawn again are not those that the run started from."""
    again, first = tmp_path / "again", pruned / "round-01" / "mask.safetensors"
    short = ["train.steps=2", "optim.lr=1e-30", f"init_from={run}", f"model.mask={first}"]
    assert main(["pretrain", str(TINY), f"data.shards={shard_folder}", f"run.dir={again}", *RUN, *short]) == 0
    code, said = say(again, *HALF, "--rounds", 1)
    assert code == 0, said
    points = json.loads((again / "pruning" / "curve.json").read_text())
    shares = [left(masks_of(path / "round-01")) for path in (pruned, again / "pruning")]
    assert [point["left"] for point in points] == shares
    code, said = say(run, *HALF, "--rounds", 1, "--masks", again / "pruning", "--out", tmp_path / "taken")
    assert code == 0, said
    points = json.loads((tmp_path / "taken" / "curve.json").read_text())
    assert [point["left"] for point in points] == [points[0]["weights"], shares[1]]

    code, said = say(again, *HALF, "--rounds", 1, "--random")
    assert code == 0, said
    drawn = again / "pruning-random-weights" / "round-01"
    config, masks, found = load_config(drawn / "config.yaml"), masks_of(drawn), state_of(drawn)
    torch.manual_seed(load_config(run / "config.yaml").run.seed + 2**32)
    for name, value in build_method(config).named_parameters():
        expected = value.detach().float() * masks.get(name.removeprefix("backbone."), torch.tensor(True))
        torch.testing.assert_close(found[f"model.{name}"], expected, rtol=0, atol=1e-6)

    source = shutil.copy(first, again / "pruning" / "round-01" / "mask.safetensors")
    code, said = say(again, *HALF, "--rounds", 1, "--random")
    assert code == 2 and f"{drawn}/mask.safetensors: another mask than {source}" in said, said


def test_weights_drawn_again_start_from_no_file():
    config = load_config(TINY, ["data.shards=x", "run.dir=y"])
    config = replace(config, init_from="run", model=replace(config.model, weights="file"))
    for random, expected in (("weights", ("", "")), ("masks", ("run", "file"))):
        pruning = Pruning(Path("y"), Path("y/p"), None, Checkpoint(Path(), {}), None, Wish(random=random), config)
        one = Round(pruning, 1).config
        assert (one.init_from, one.model.weights) == expected


def test_each_protocol_gets_its_own_settings(run, pruned, say, monkeypatch):
    called = []
    monkeypatch.setattr(command, "evaluate", lambda protocol, run, overrides: called.append((protocol, overrides)))
    keys = ["evaluate.finetune_epochs=20", "evaluate.linear_epochs=3", "evaluate.batch=8"]
    named = ["--evaluate", "linear", "--evaluate", "finetune"]
    code, said = say(run, *HALF, "--rounds", 1, "--rewind", 2, *named, *keys)
    assert code == 0, said
    assert called == 2 * [("linear", keys[1:]), ("finetune", [keys[0], keys[2]])]
    for protocol, overrides in called:
        check_settings(protocol, overrides)


def test_a_curve_reads_no_masks(run, pruned, monkeypatch):
    expected = [left(masks_of(pruned / name)) for name in ("round-01", "round-02")]
    monkeypatch.setattr("largescale.prune.curve.read_state", None)
    points = points_of(run, pruned)
    assert points[0].left == points[0].weights and [point.left for point in points[1:]] == expected


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


@pytest.mark.distributed
def test_two_ranks_under_another_strategy_find_the_same_masks(run, pruned, tmp_path):
    out = tmp_path / "pruning"
    words = [str(run), *HALF, "--rounds", "2", "--rewind", "2", "--out", str(out), "parallel.strategy=fsdp"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "largescale"]
    done = subprocess.run([*launch, "prune", *words], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    mine, theirs = weights_written(out), weights_written(pruned)
    assert mine["round-01/mask.safetensors"] == theirs["round-01/mask.safetensors"]
    for step in (2,):
        one, other = state_of(out / "round-01", step), state_of(pruned / "round-01", step)
        assert all(torch.equal(one[name], value) for name, value in other.items())
    # What follows from sums in another order differs in the last bits, and so may a few weights of the next mask.
    one, other = masks_of(out / "round-02"), masks_of(pruned / "round-02")
    assert left(one) == left(other)
    assert sum(int((one[name] != mask).sum()) for name, mask in other.items()) <= 0.02 * left(other)
    for name, mask in one.items():
        assert not state_of(out / "round-02")[f"model.backbone.{name}"][~mask].any()


def test_one_shot_and_controls(run, pruned, say):
    code, said = say(run, *HALF, "--rounds", 2, "--rewind", 2, "--one-shot", "--evaluate", "knn")
    assert code == 0, said
    shot = run / "pruning-one-shot"
    found = masks_of(shot / "round-02")
    assert left(found) == left(masks_of(pruned / "round-02"))
    for name in ("round-01", "round-02"):
        found = masks_of(shot / name)
        whole = {key: torch.ones_like(mask) for key, mask in found.items()}
        expected = by_torch(state_of(run), whole, left(whole) - left(found))
        assert all(torch.equal(found[key], mask) for key, mask in expected.items())

    code, said = say(run, *HALF, "--rounds", 1, "--random")
    assert code == 0, said
    again = run / "pruning-random-weights" / "round-01"
    assert (again / "mask.safetensors").read_bytes() == (pruned / "round-01" / "mask.safetensors").read_bytes()
    first = state_of(again, 2)
    assert any(not torch.equal(value, state_of(pruned / "round-01", 2)[name]) for name, value in first.items())

    code, said = say(run, *HALF, "--rounds", 1, "--masks", pruned, "--rewind", 4)
    assert code == 0, said
    other = run / "pruning-masks" / "round-01"
    assert (other / "mask.safetensors").read_bytes() == (pruned / "round-01" / "mask.safetensors").read_bytes()
    for name, mask in masks_of(other).items():
        assert torch.equal(
            state_of(other, 4)[f"model.backbone.{name}"], state_of(run, 4)[f"model.backbone.{name}"] * mask
        )

    code, said = say(run, *HALF, "--rounds", 1, "--random", "masks")
    assert code == 0, said
    drawn = masks_of(run / "pruning-random-masks" / "round-01")
    assert left(drawn) == left(masks_of(pruned / "round-01"))
    assert any(not torch.equal(mask, masks_of(pruned / "round-01")[name]) for name, mask in drawn.items())
    share = [float(mask.float().mean()) for mask in drawn.values() if mask.numel() > 500]
    assert share and all(abs(value - 0.5) < 0.1 for value in share)


def test_the_weights_and_the_mask_are_exported(pruned, tmp_path, capsys):
    for name, format_name in (("own", "safetensors"), ("onnx", "torch_export")):
        out = tmp_path / f"{name}{'.pt2' if format_name == 'torch_export' else '.safetensors'}"
        assert main(["export", str(pruned / "round-02"), str(out), "--format", format_name]) == 0
        masks = safetensors.torch.load_file(out.with_suffix(".mask.safetensors"))
        assert masks.keys() == {f"backbone.{key}" for key in masks_of(pruned / "round-02")}
    weights = safetensors.torch.load_file(tmp_path / "own.safetensors")
    assert all(not weights[key][~mask].any() and weights[key][mask].all() for key, mask in masks.items())
    moved = shutil.copytree(pruned / "round-02", tmp_path / "moved")
    (moved / "mask.safetensors").write_bytes((pruned / "round-01" / "mask.safetensors").read_bytes())
    config = moved / "checkpoints" / "step-00000006" / "progress.json"
    config.write_text(config.read_text().replace(str(pruned), "/not/there"))
    assert main(["export", str(moved), str(tmp_path / "other.safetensors"), "--format", "safetensors"]) == 2
    assert "not the mask that" in capsys.readouterr().err
    assert not (tmp_path / "other.safetensors").exists()


def test_labels_train_what_is_left(pruned, tmp_path):
    out, masks = tmp_path / "labelled.safetensors", masks_of(pruned / "round-02")
    words = ["--protocol", "finetune", "evaluate.finetune_epochs=1"]
    assert main(["finetune", str(pruned / "round-02"), str(out), *words]) == 0
    found, before = safetensors.torch.load_file(out), state_of(pruned / "round-02")
    for name, mask in masks.items():
        [weight] = [value for key, value in found.items() if key.endswith(f"backbone.{name}")]
        assert not weight[~mask].any() and not torch.equal(weight, before[f"model.backbone.{name}"])


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
        ([run, "--random", "layers"], "--random=layers: expected weights or masks"),
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
