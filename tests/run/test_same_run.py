"""What belongs to another run is neither continued nor replaced, wherever it lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from largescale.checkpoint.folder import Checkpoint
from largescale.checkpoint.mirror import Mirror, OfAnotherRun
from largescale.cli import main
from largescale.config import flatten, load_config
from largescale.run.resume import check_same_run
from largescale.run.same_run import other_run
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

TINY = str(ROOT / "tests" / "tiny.yaml")


def progress(*overrides: str, step: int = 5, data: str = "these") -> dict:
    config = load_config(TINY, ["data.shards=x", *overrides])
    return {"step": step, "data": data, "config": flatten(config), "files": {"a.safetensors": {"size": 1}}}


def before_groups_had_augmentation() -> dict:
    settings = progress()["config"]
    groups = [{key: value for key, value in group.items() if key != "augment"} for group in settings["data.crops"]]
    return {**progress(), "config": {**settings, "data.crops": groups}}


def before_there_was(key: str, *overrides: str) -> dict:
    settings = progress(*overrides)["config"]
    return {**progress(), "config": {name: value for name, value in settings.items() if name != key}}


def mixture(*weights: float, places: str = "ab", data: str = "these") -> dict:
    mixed = [{"path": place, "weight": weight} for place, weight in zip(places, weights, strict=True)]
    return {**progress(data=data), "config": {**progress()["config"], "data.shards": mixed}}


@pytest.mark.parametrize(
    "there, expected",
    [
        (mixture(1, 2), "weights in data.shards are [1.0, 2.0] there and [1.0, 3.0] here"),
        (mixture(2, 6), "trained on other shards"),  # of the same names, and in the same ratio
        (mixture(1, 2, places="ac"), "trained on other shards"),
        (progress(), "trained on other shards"),
    ],
)
def test_weights_alone_that_differ_are_named(there, expected):
    here = load_config(TINY, ["data.shards=[{path: a}, {path: b, weight: 3}]"])
    assert other_run(there, here, "others") == expected
    checkpoint = Checkpoint(Path("runs/a/checkpoints/step-00000005"), there)
    with pytest.raises(InputError) as refused:
        check_same_run(checkpoint, here, "others")
    says = "cannot continue, weights in data.shards were [1.0, 2.0] and are now [1.0, 3.0]; set them back"
    assert (says in str(refused.value)) == (expected != "trained on other shards")


@pytest.mark.parametrize(
    "there, expected",
    [
        (progress(), ""),
        (before_groups_had_augmentation(), ""),
        (progress("name=other", "run.dir=elsewhere", "parallel.strategy=fsdp", "checkpoint.keep=7"), ""),
        (before_there_was("train.loss_spans"), ""),
        (before_there_was("checkpoint.keep"), ""),
        (before_there_was("optim.lr"), "optim.lr is 4.8 there and 0.5 here"),  # if it came later: its default
        ({**progress(), "config": {"run.seed": 1}}, "data.augment.blur_sigma is [0.1, 2.0] there and [0.1, 0.8] here"),
        (progress("optim.lr=0.25"), "optim.lr is 0.25 there and 0.5 here"),
        (progress("init_from=runs/a"), "init_from is runs/a there and  here"),
        (progress(data="others"), "trained on other shards"),
        (progress(data="these and others"), "trained with other labelled images"),
        (progress("optim.lr=0.25", data="these and others"), "optim.lr is 0.25 there and 0.5 here"),
        ({"step": 5}, "not a checkpoint of this version"),
        ([], "not a checkpoint of this version"),
    ],
)
def test_another_run_is_told_by_what_decides_its_result(there, expected):
    assert other_run(there, load_config(TINY, ["data.shards=x"]), "these") == expected


def test_a_run_with_other_views_is_another():
    assert other_run(progress("data.crops.0.augment.blur=1"), load_config(TINY, ["data.shards=x"]), "these").startswith(
        "data.crops is [{"
    )


def test_a_run_with_the_mirror_of_another_stops_before_it_touches_either(shard_folder, tmp_path, capsys):
    there = tmp_path / "mirror" / "step-00000005"
    there.mkdir(parents=True)
    mark = json.dumps(progress("optim.lr=0.25"))
    (there / "progress.json").write_text(mark)
    code = main(
        [
            "pretrain",
            TINY,
            f"data.shards={shard_folder}",
            f"run.dir={tmp_path / 'run'}",
            f"checkpoint.mirror={tmp_path / 'mirror'}",
        ]
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and f"checkpoint.mirror={tmp_path / 'mirror'}: step-00000005 there belongs to another run" in line
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (there / "progress.json").read_text() == mark


def test_copies_of_another_run_that_come_later_stay_as_well(tmp_path):
    """Two runs that began with the same empty mirror: whoever copies first has it."""
    mirror = Mirror(str(tmp_path), other_run=lambda progress: f"seed {progress['seed']}" if progress["seed"] else "")
    for step, seed in ((5, 0), (7, 1)):
        (tmp_path / f"step-0000000{step}").mkdir()
        (tmp_path / f"step-0000000{step}" / "progress.json").write_text(json.dumps({"step": step, "seed": seed}))
    with pytest.raises(OfAnotherRun, match="step-00000007 there belongs to another run: seed 1"):
        mirror.remove_but({9})
    assert len(list(tmp_path.glob("step-*/progress.json"))) == 2
