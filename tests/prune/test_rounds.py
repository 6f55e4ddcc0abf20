"""Rounds: their masks, the step that they begin with, and going on after a stop.

Covers: largescale/prune/record.py, largescale/prune/rewind.py,
largescale/prune/trained.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from largescale.checkpoint.folder import Checkpoint, find_latest, stamp_of
from largescale.checkpoint.saver import Saver
from largescale.config import load_config
from largescale.prune import command
from largescale.prune.rounds import Pruning, Round
from largescale.prune.same_network import require_same_start
from largescale.prune.wish import Wish
from largescale.run.init_from import sha256_of
from shards.ground.errors import InputError
from tests.helpers.commands import TINY
from tests.helpers.prunings import HALF, by_torch, left, masks_of, spoil, state_of, weights_written

pytestmark = pytest.mark.slow


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


def test_rewound_rounds_go_on_in_the_precision_of_the_step_where_it_is_auto(run, tmp_path, say):
    out = tmp_path / "pruning"
    words = [run, *HALF, "--rounds", "1", "--rewind", "2", "--out", out, "train.precision=auto"]
    for _ in range(2):
        code, said = say(*words)
        assert code == 0, said
    checkpoint = find_latest(out / "round-01" / "checkpoints")
    assert checkpoint is not None and checkpoint.progress["config"]["train.precision"] == "fp32"


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


def test_rounds_begin_from_the_weights_that_the_run_began_from(one_process, tmp_path):
    saver = Saver(tmp_path / "other", keep=3, keep_every=0, background=False, device=torch.device("cpu"))
    saver.save({"model.a": torch.ones(3)}, {"step": 5}, until_update=set())
    source = find_latest(saver.folder)
    config = load_config(TINY, ["data.shards=x", "run.dir=y", f"init_from={tmp_path}/run"])
    init = {"init_from": config.init_from, "checkpoint": str(source.path), "sha256": sha256_of(source)}
    trained = Checkpoint(Path("y"), {"init": init})
    for rewound, expected in ((None, str(source.path)), (trained, config.init_from)):
        pruning = Pruning(Path("y"), Path("y/p"), None, trained, rewound, Wish(), config)
        assert Round(pruning, 1).config.init_from == expected
    require_same_start(trained, config)
    require_same_start(trained, replace(config, init_from="elsewhere"))  # asked for
    saver.save({"model.a": torch.zeros(3)}, {"step": 5}, until_update=set())
    with pytest.raises(InputError, match="has other weights by now"):
        require_same_start(trained, config)
    shutil.rmtree(source.path)
    with pytest.raises(InputError, match="is gone"):
        require_same_start(trained, config)


def test_a_file_of_weights_that_holds_others_by_now_is_refused(tmp_path):
    path = tmp_path / "backbone.safetensors"
    save_file({"a": torch.ones(3)}, path)
    config = load_config(TINY, ["data.shards=x", "run.dir=y", f"model.weights={path}"])
    began = {"weights": config.model.weights, "sha256": stamp_of(path).sha256}
    trained = Checkpoint(Path("y"), {"init": began})
    require_same_start(trained, config)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"model.weights=.*: the run .* began from this file, which has other weights"):
        require_same_start(trained, config)
    require_same_start(trained, replace(config, model=replace(config.model, weights="elsewhere")))  # asked for
    path.unlink()
    with pytest.raises(InputError, match=r"backbone\.safetensors: "):
        require_same_start(trained, config)


def test_weights_drawn_again_start_from_no_file():
    config = load_config(TINY, ["data.shards=x", "run.dir=y"])
    config = replace(config, init_from="run", model=replace(config.model, weights="file"))
    for random, expected in (("weights", ("", "")), ("masks", ("run", "file"))):
        pruning = Pruning(Path("y"), Path("y/p"), None, Checkpoint(Path(), {}), None, Wish(random=random), config)
        one = Round(pruning, 1).config
        assert (one.init_from, one.model.weights) == expected
