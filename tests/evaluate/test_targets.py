"""A run that goes on saves and removes checkpoints while one of them is measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale.checkpoint.folder import Checkpoint, find_latest
from largescale.config import Config
from largescale.evaluate import features
from largescale.evaluate.extract import load_method
from largescale.evaluate.made_from import weights_stamp
from largescale.evaluate.protocols import PROTOCOLS
from largescale.evaluate.results import read_results, write_result
from largescale.evaluate.subject import Subject
from largescale.evaluate.targets import read_newest
from largescale.methods import Method
from shards.ground.errors import InputError
from tests.helpers.checkpoints import OWN, config_of, save_checkpoint
from tests.helpers.results import record


@pytest.fixture
def config() -> Config:
    return config_of(OWN, "evaluate.size=16", "evaluate.resize=16", "data.workers=0")


def of_step(run: Path, config: Config, step: int, seed: int = 0) -> dict[str, Any]:
    """A result of a step's checkpoint."""
    path = save_checkpoint(run, config, step, seed)
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint is not None and checkpoint.path == path
    found = record(step / 100)
    found["made_from"]["weights"] = weights_stamp(checkpoint)
    return {**found, "checkpoint_step": step}


def newest(run: Path) -> int:
    return read_results(run).newest["knn"]["checkpoint_step"]


def test_a_result_is_the_newest_until_one_of_a_later_checkpoint_is_there(tmp_path, config):
    first, second, third = (of_step(tmp_path, config, step) for step in (10, 20, 30))
    write_result(tmp_path, first)
    write_result(tmp_path, second)  # while step 30 was saved, or because that is damaged
    assert newest(tmp_path) == 20
    write_result(tmp_path, first)
    assert newest(tmp_path) == 20
    write_result(tmp_path, third)
    shutil.rmtree(tmp_path / "checkpoints/step-00000020")
    write_result(tmp_path, second)
    assert newest(tmp_path) == 30 and len(read_results(tmp_path).all) == 3
    # The run begins again, so what is there is of another one.
    shutil.rmtree(tmp_path / "checkpoints")
    write_result(tmp_path, of_step(tmp_path, config, 10, seed=1))
    assert newest(tmp_path) == 10


def test_a_result_of_an_earlier_run_of_the_same_step_is_replaced_by_one_of_an_earlier_step(tmp_path, config):
    write_result(tmp_path, of_step(tmp_path, config, 30))
    shutil.rmtree(tmp_path / "checkpoints")
    early = of_step(tmp_path, config, 10, seed=1)
    of_step(tmp_path, config, 30, seed=1)
    write_result(tmp_path, early)
    assert newest(tmp_path) == 10


def test_the_next_checkpoint_is_taken_if_one_is_removed_before_its_weights_are_read(tmp_path, config):
    for step in (10, 20):
        save_checkpoint(tmp_path, config, step)
    tried: list[int] = []

    def read(checkpoint: Checkpoint) -> Method:
        tried.append(checkpoint.step)
        if len(tried) == 1:
            shutil.rmtree(checkpoint.path)
        return load_method(config, checkpoint)

    assert isinstance(read_newest(tmp_path, read), Method) and tried == [20, 10]


def test_what_fails_after_the_weights_were_read_is_not_tried_again(tmp_path, config):
    for step in (10, 20):
        save_checkpoint(tmp_path, config, step)
    tried: list[int] = []

    def read(checkpoint: Checkpoint) -> None:
        tried.append(checkpoint.step)
        load_method(config, checkpoint)
        shutil.rmtree(checkpoint.path)
        raise InputError("the loss is nan")

    with pytest.raises(InputError, match="the loss is nan"):
        read_newest(tmp_path, read)
    assert tried == [20]


@pytest.mark.parametrize("protocol", ["clusters", "support-neighbours"])
def test_a_checkpoint_that_is_removed_while_features_are_made_is_not_missed(
    tmp_path, monkeypatch, shard_folder, held_out_shards, protocol
):
    words = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}", "evaluate.size=16"]
    config = config_of(OWN, *words, "evaluate.resize=16", "data.workers=0")
    path, extract = save_checkpoint(tmp_path, config, 10), features.extract
    checkpoint = find_latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    subject = Subject.of(tmp_path, checkpoint, config, protocol=protocol, own_keys=(), classes=True)

    def removed(*arguments: Any, **words: Any) -> Any:
        shutil.rmtree(path, ignore_errors=True)
        return extract(*arguments, **words)

    monkeypatch.setattr(features, "extract", removed)
    by_head: list[Any] = []
    PROTOCOLS[protocol].way(lambda *given: by_head.append(given[3]) or {}, subject)
    trained, untrained, pixels = (one and (one[1] if protocol == "clusters" else one[0].features) for one in by_head)
    assert pixels is None and len(trained) > 0 and not torch.equal(trained, untrained)
