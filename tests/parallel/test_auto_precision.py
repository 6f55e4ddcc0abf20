from __future__ import annotations

import pytest
import torch

from largescale.config import load_config
from largescale.parallel.auto_precision import of_device, of_ranks
from largescale.processes import rank
from tests.helpers.commands import TINY
from tests.helpers.ranks import run_ranks

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("capability, expected", [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")])
@pytest.mark.parametrize("resolve", [of_device, of_ranks])
def test_gpus_train_in_the_half_precision_that_they_compute_in(monkeypatch, resolve, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = load_config(TINY, ["data.shards=x", "train.precision=auto"])
    assert resolve(config, GPU).train.precision == expected
    assert resolve(config, torch.device("cpu")).train.precision == "fp32"
    config = load_config(TINY, ["data.shards=x", "train.precision=bf16"])
    assert resolve(config, GPU).train.precision == "bf16"


@pytest.mark.parametrize(
    "strategy, expected",
    [("ddp", "fp16"), ("fsdp", "fp16"), ("fairscale", "fp16"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16")],
)
def test_a_strategy_that_cannot_train_in_fp16_trains_in_bf16_on_any_gpu(monkeypatch, strategy, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    config = load_config(TINY, ["data.shards=x", "train.precision=auto", f"parallel.strategy={strategy}"])
    assert of_device(config, GPU).train.precision == of_ranks(config, GPU).train.precision == expected


def on_unlike_gpus(capabilities: list[tuple[int, int]]) -> str:
    torch.cuda.get_device_capability = lambda device: capabilities[rank()]
    return of_ranks(load_config(TINY, ["data.shards=x", "train.precision=auto"]), GPU).train.precision


@pytest.mark.distributed
@pytest.mark.parametrize("capabilities, expected", [([(8, 0), (7, 0)], "fp16"), ([(9, 0), (8, 0)], "bf16")])
def test_ranks_on_unlike_gpus_train_in_one_precision(capabilities, expected):
    assert run_ranks(on_unlike_gpus, 2, capabilities) == [expected, expected]
