"""A file that one node lacks ends all ranks with the same line, before the first step."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from largescale.config import load_config
from largescale.data.length import Length
from largescale.methods import build_method
from largescale.methods.taught import taught_by
from largescale.parallel.strategies import build_engine
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks
from tests.helpers.teachers import teacher

pytestmark = pytest.mark.distributed
MINI = ROOT / "tests/methods/mini/distillation.yaml"


def what_ranks_say(shards: Path, known: Path) -> list[str]:
    """What building an engine and what beginning to train says, where rank 1 finds no teacher."""
    settings = [f"data.shards={shards}", "data.streams=1", "train.global_batch=4", "data.workers=0"]
    settings += ["method.label_weight=0", *taught_by(known)]
    config = load_config(MINI, [*settings, *(["method.teacher=nowhere"] if dist.get_rank() == 1 else [])])
    device, said, training = torch.device("cpu"), [], import_module("largescale.pretrain")

    def went_on(*_: object, **__: object) -> None:
        raise InputError("went on")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "build_method", went_on)
        for begin in (
            lambda: build_engine(build_method(config, Length(18, 3, 40)), config, device),
            lambda: training._train(config, device, 0.0, None),
        ):
            try:
                begin()
                said.append("built")
            except InputError as error:
                said.append(str(error))
    return said


def test_a_teacher_that_one_node_lacks_ends_all_ranks(shard_folder):
    one, other = run_ranks(what_ranks_say, 2, shard_folder, teacher())
    assert one == other and all("nowhere" in line for line in one), (one, other)
