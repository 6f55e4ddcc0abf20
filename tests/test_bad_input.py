"""A user's mistake gets one clear line and an exit code, never a traceback.

Covers: largescale/cli.py, largescale/command_examples.py, largescale/run/start.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from largescale.cli import main
from largescale.evaluate.protocols import PROTOCOLS
from tests.helpers.commands import ROOT, TINY, run_python
from tests.helpers.launcher import run_largescale

pytestmark = pytest.mark.slow


@pytest.fixture
def error_of(capsys) -> Callable[..., str]:
    """Runs the command's entry point and returns the one line that it prints; an exception would pass through."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) != 0
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    return run


@pytest.fixture
def pretrain_error(error_of) -> Callable[[list[str]], str]:
    return lambda overrides: error_of("pretrain", TINY, *overrides)


@pytest.fixture
def copied_shards(shard_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folder, tmp_path / "copied"))


@pytest.mark.parametrize(
    "override, expected",
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("model.prototype=3", "did you mean method.prototypes?"),
        ("lr=1", "did you mean optim.lr?"),
        ("optim.lr=fast", "optim.lr"),
        ("optim=3", "optim is a group of keys"),
        ("train.precision=fp8", "expected auto, fp32, tf32, bf16, fp16 or fp64"),
        ("model.backbone=resnet51", "expected one of resnet"),
        ("method.name=siamese", "expected one of swav"),
        ("optim.name=adam", "expected one of lars"),
        ("parallel.strategy=zero9", "expected one of ddp, fsdp, zero1"),
        ("parallel={strategy: fsdp, replicate: 2}", "expected 1 ranks in all"),
        ("parallel={strategy: fsdp, shard: 2}", "expected 1 ranks in all"),
        ("parallel.batchnorm_group_size=-1", "parallel.batchnorm_group_size=-1: expected 0 or more"),
        ("parallel.strategy=zero1", "train.precision=fp64"),
        ("train.accumulate=3", "a divisor of train.global_batch=16"),
        ("model.recompute_stages=[3]", "expected stages from 1 to 2"),
        ("model.compile_stages=[3]", "model.compile_stages=[3]: expected stages from 1 to 2"),
        ("model={compile_stages: [1], recompute_stages: [1]}", "expected none of model.recompute_stages"),
        ("data.crops=[{num: 2, size: 0}]", "data.crops[0]"),
        ("data.crops=[{num:2]", "not readable as YAML"),
        ("method.queue=17", "a multiple of train.global_batch=16"),
        ("optim.lr", "expected key=value"),
        ("run.dir=/proc/no/run", "error: /proc/no: No such file or directory"),
    ],
)
def test_configuration(pretrain_error, tiny_overrides, override, expected):
    assert expected in pretrain_error(tiny_overrides(override))


@pytest.mark.parametrize("batch, accumulate", [(1, 1), (2, 2)])
def test_batchnorm_of_a_single_image(capsys, shard_folder, tmp_path, batch, accumulate):
    one = [f"train.global_batch={batch}", f"train.accumulate={accumulate}", "data.streams=1", "data.workers=0"]
    places = [f"data.shards={shard_folder}", f"run.dir={tmp_path}", "model.width=4", "train.steps=1"]
    assert main(["pretrain", str(ROOT / "configs/small/byol.yaml"), *places, *one]) == 2
    lines = capsys.readouterr().err.splitlines()
    begins = f"error: train.global_batch={batch}, train.accumulate={accumulate} on 1 rank: BatchNorm has no statistics"
    assert lines[-1].startswith(begins) and not any("Traceback" in line for line in lines)


def test_fewer_samples_than_a_batch(pretrain_error, tiny_overrides):
    assert "lower train.global_batch" in pretrain_error(tiny_overrides("train.global_batch=400", "method.queue=0"))


def test_missing_configuration_file(error_of):
    assert "no such configuration file" in error_of("pretrain", "configs/nothing.yaml")


def test_missing_shard_folder(pretrain_error, tiny_overrides, tmp_path):
    assert "no such folder" in pretrain_error([*tiny_overrides(), f"data.shards={tmp_path / 'nothing'}"])


def test_empty_shard_folder(pretrain_error, tiny_overrides, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "shards index" in pretrain_error([*tiny_overrides(), f"data.shards={tmp_path / 'empty'}"])


def test_a_shard_cut_in_half(pretrain_error, tiny_overrides, copied_shards):
    tar = sorted(copied_shards.glob("*.tar"))[2]
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    message = pretrain_error([*tiny_overrides(), f"data.shards={copied_shards}"])
    assert tar.name in message and "truncated or replaced" in message


def test_a_missing_shard(pretrain_error, tiny_overrides, copied_shards):
    tar = sorted(copied_shards.glob("*.tar"))[2]
    tar.unlink()
    message = pretrain_error([*tiny_overrides(), f"data.shards={copied_shards}"])
    assert tar.name in message and "missing" in message


def test_a_manifest_that_disagrees_with_its_tars(pretrain_error, tiny_overrides, copied_shards):
    path = copied_shards / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        shard["samples"] += 1
    path.write_text(json.dumps(manifest))
    message = pretrain_error([*tiny_overrides(), f"data.shards={copied_shards}"])
    assert "40 samples, the manifest says 41" in message


def test_a_manifest_that_names_a_path(pretrain_error, tiny_overrides, copied_shards):
    path = copied_shards / "manifest.json"
    path.write_text(path.read_text().replace('"name": "train-000000.tar"', '"name": "../train-000000.tar"'))
    assert "not a plain file name" in pretrain_error([*tiny_overrides(), f"data.shards={copied_shards}"])


def test_a_batch_that_ranks_do_not_divide(tiny_overrides):
    result = run_largescale("pretrain", TINY, *tiny_overrides(), ranks=3, check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1
    assert "train.global_batch=16 is not divisible by 3 ranks" in errors[0]


def test_resuming_with_another_configuration(pretrain_error, tiny_overrides):
    assert main(["pretrain", str(TINY), *tiny_overrides("train.steps=2")]) == 0
    assert "optim.lr was 0.5 and is now 0.25" in pretrain_error(tiny_overrides("train.steps=2", "optim.lr=0.25"))


def last_line(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What a run that ends after its start says last, below what it has logged."""
    assert main(["pretrain", str(TINY), *overrides]) in (2, 3)
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_fails_on_the_way_says_so_in_its_status(tiny_overrides, copied_shards, tmp_path, capsys):
    for tar in copied_shards.glob("*.tar"):
        tar.write_bytes(b"\1" * tar.stat().st_size)
    message = last_line(capsys, *tiny_overrides(), f"data.shards={copied_shards}", "data.max_skipped_in_row=3")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("failed", 0, 14)
    assert "3 consecutive samples cannot be read" in status["reason"] and status["reason"] in message
    assert main(["status", str(tmp_path / "run")]) == 85
    assert "failed, 0 of 14 steps" in capsys.readouterr().out


def test_unreadable_images_end_a_run_as_a_share_of_the_batch(tiny_overrides, copied_shards, tmp_path, capsys):
    for tar in sorted(copied_shards.glob("*.tar"))[1:]:
        tar.write_bytes(b"\1" * tar.stat().st_size)
    message = last_line(capsys, *tiny_overrides(), f"data.shards={copied_shards}")
    share = int(message.split("%")[0].split()[-1])
    assert 50 < share <= 100 and "of the last images could not be read" in message
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "data.max_skipped_rate" in status["reason"]


def test_evaluating_what_is_no_run(error_of, tmp_path):
    assert "no run here" in error_of("evaluate", "knn", tmp_path)


def test_evaluating_by_what_is_no_protocol_is_said_before_the_run_is_read(error_of, tmp_path):
    (tmp_path / "config.yaml").write_text("name: [")
    assert error_of("evaluate", "knm", tmp_path) == (
        f"error: largescale evaluate knm: expected one of {', '.join(PROTOCOLS)}; did you mean knn?\n"
    )


def test_evaluating_on_shards_that_do_not_fit(error_of, tiny_overrides, tmp_path, sample_images, shard_folder):
    assert main(["pretrain", str(TINY), *tiny_overrides("train.steps=1")]) == 0
    evaluate = ("evaluate", "knn", tmp_path / "run")
    assert "data.eval_shards is not set" in error_of(*evaluate, 'data.eval_shards=""')
    assert "no such folder" in error_of(*evaluate, "data.eval_shards=nothing")
    fewer, unlabelled = tmp_path / "fewer", tmp_path / "unlabelled"
    shutil.copytree(sample_images / "test", tmp_path / "images", ignore=shutil.ignore_patterns("bag"))
    run_python("-m", "shards", "convert", tmp_path / "images", fewer, "--labels", "folder")
    said = error_of(*evaluate, f"data.eval_shards={fewer}")
    assert f"bag is only in one of them, {shard_folder}); convert both from images of the same classes" in said
    run_python("-m", "shards", "convert", tmp_path / "images", unlabelled)
    assert "have no labels" in error_of(*evaluate, f"data.eval_shards={unlabelled}")


def test_overrides_may_stand_behind_an_option(shard_folder, capsys):
    shards_and_steps = [f"data.shards={shard_folder}", "train.steps=7"]
    for words in ([TINY, "--print", *shards_and_steps], [TINY, shards_and_steps[0], "--print", shards_and_steps[1]]):
        assert main(["pretrain", *map(str, words)]) == 0
        assert "steps: 7" in capsys.readouterr().out
    for words in (["--prnt", "train.steps=7"], ["--print", "other.yaml"]):
        with pytest.raises(SystemExit) as left:
            main(["pretrain", str(TINY), *words])
        assert left.value.code == 2 and "Traceback" not in capsys.readouterr().err
