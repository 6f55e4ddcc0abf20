from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from largescale.checkpoint.saver import Saver
from largescale.cli import main
from largescale.config import load_config
from largescale.methods import build_method
from largescale.run.preflight import Findings, _disk_problems, judge, preflight
from tests.helpers.commands import ROOT, TINY
from tests.helpers.launcher import run_largescale

LABELLED = ROOT / "tests/methods/mini/paws.yaml"
GOOD = Findings("n", 8, [], 1000.0, 20e9, 0.01, 2**26)


def cluster(**changes: object) -> list[Findings]:
    """Four good nodes, the third changed."""
    nodes = [replace(GOOD, host=f"n{number}") for number in range(4)]
    nodes[2] = replace(nodes[2], **changes)
    return nodes


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"gpus": 7}, "rank 2 on n2: sees 7 GPUs, the others 8"),
        ({"clock_s": 990.0}, "rank 2 on n2: its clock is -10.0 s off; set it (chrony, ntp)"),
        ({"bandwidth": 3e9}, "rank 2 on n2: 3.00 GB/s to its neighbours, the median is 20.00"),
        ({"problems": ["runs: disk"]}, "rank 2 on n2: runs: disk"),
    ],
)
def test_the_bad_node_is_named(changes, expected):
    assert judge(cluster()) == []
    assert judge(cluster(**changes)) == [expected]


class Built(Exception):
    """A method was about to be built."""


@pytest.mark.parametrize("in_pieces", [True, False])
def test_what_is_drawn_in_pieces_is_never_whole(tiny_overrides, monkeypatch, in_pieces):
    def build(*_: object, on_meta: bool) -> None:
        assert on_meta == in_pieces
        raise Built

    monkeypatch.setattr("largescale.run.preflight.build_method", build)
    settings = ["parallel.strategy=fsdp", f"parallel.sharded_init={str(in_pieces).lower()}"]
    with pytest.raises(Built):
        preflight(load_config(TINY, tiny_overrides(*settings)))


def test_parameters_are_counted_before_a_strategy_cuts_them(tiny_overrides, monkeypatch):
    counted: list[int] = []

    def cut(method: nn.Module, *_: object) -> SimpleNamespace:
        for parameter in method.parameters():
            parameter.data = parameter.data.new_empty(0)
        return SimpleNamespace(method=method)

    monkeypatch.setattr("largescale.run.preflight.build_engine", cut)
    monkeypatch.setattr("largescale.run.preflight._disk_problems", lambda _, num: counted.append(num) or [])
    config = load_config(TINY, tiny_overrides())
    preflight(config)
    assert counted == [sum(parameter.numel() for parameter in build_method(config).parameters())]


@pytest.mark.distributed
def test_ranks_measure_each_other(tiny_overrides):
    result = run_largescale("preflight", TINY, *tiny_overrides("method.queue_start_step=13"), ranks=2)
    assert result.stderr.count("warning: method.queue_start_step=13: ") == 1
    assert result.stdout.count("GB/s") == 2 and "all-reduce of 8 MB over 2 ranks" in result.stdout


@pytest.mark.distributed
def test_a_missing_shard_and_a_full_disk_are_found(tiny_overrides, shard_folder, tmp_path):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "shards"))
    result = run_largescale(
        "preflight",
        TINY,
        *tiny_overrides(),
        f"data.shards={folder}",
        "model.backbone=regnet_y_400mf",
        "checkpoint.keep=1000000",
        check=False,
    )
    assert result.returncode == 2 and "checkpoints need" in result.stderr
    next(folder.glob("*.tar")).unlink()
    result = run_largescale("preflight", TINY, *tiny_overrides(), f"data.shards={folder}", check=False)
    assert result.returncode == 2 and ".tar" in result.stderr and "Traceback" not in result.stderr


def test_preflights_of_two_jobs_do_not_take_each_others_files(tmp_path):
    other = tmp_path / ".preflight-0.writing"
    other.mkdir()  # as what one of the same name does just now
    config = load_config(TINY, [f"data.shards={tmp_path}", f"run.dir={tmp_path}"])
    assert _disk_problems(config, 1) == [] and [*tmp_path.iterdir()] == [other]


@pytest.mark.parametrize("saved, to_come", [(0, 3), (1, 2), (2, 1), (4, 1)])
def test_checkpoints_that_are_there_need_no_more_room(one_process, tmp_path, monkeypatch, saved, to_come):
    saver = Saver(tmp_path / "checkpoints", keep=4, keep_every=0, background=False, device=torch.device("cpu"))
    for step in range(saved):
        saver.save({"model.a": torch.ones(30)}, {"step": step}, until_update=set())
    config = load_config(TINY, [f"data.shards={tmp_path}", f"run.dir={tmp_path}", "checkpoint.keep=2"])
    one = 12_000_000  # of a million parameters
    for free, fits in ((to_come * one, True), (to_come * one - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        problems = _disk_problems(config, 10**6)
        assert (problems == []) == fits and all(f"{to_come} checkpoints need" in line for line in problems)


def test_a_missing_file_of_supports_is_found(shard_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "labelled"))
    words = [f"data.shards={shard_folder}", f"method.support.shards={folder}", f"run.dir={tmp_path / 'run'}"]
    words += ["method.support.classes=10", "method.support.images=16", "data.workers=0"]
    assert main(["preflight", str(LABELLED), *words]) == 0
    missing = sorted(folder.glob("*.tar"))[-1]
    missing.unlink()
    capsys.readouterr()
    assert main(["preflight", str(LABELLED), *words]) == 2
    said = capsys.readouterr().err
    assert f"{missing}: " in said and said.count("\n") == 1, said
