from __future__ import annotations

import pytest
import torch

from largescale.config import load_config
from largescale.parallel.precision import resolve
from tests.helpers.commands import TINY


@pytest.mark.parametrize("capability, expected", [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")])
def test_gpus_train_in_the_half_precision_that_they_compute_in(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = load_config(TINY, ["data.shards=x", "train.precision=auto"])
    assert resolve(config, torch.device("cuda", 0)).train.precision == expected
    assert resolve(config, torch.device("cpu")).train.precision == "fp32"
    config = load_config(TINY, ["data.shards=x", "train.precision=bf16"])
    assert resolve(config, torch.device("cuda", 0)).train.precision == "bf16"
