"""A machine is this one, or another one that is described; what cannot be is refused."""

from __future__ import annotations

import pytest
import torch

from largescale.propose.machine import Machine, machine
from shards.ground.errors import InputError


def test_this_machine_without_its_gpus():
    here = machine(None, 0)
    assert here.here and here.gpus == 0 and here.cores >= 1 and here.host_gb > 0
    assert str(here).startswith("no GPU, ")


def test_gpus_that_are_not_to_be_used_are_hidden():
    hidden = Machine(0, "", 0.0, here=True, cores=2, host_gb=8.0, hidden=True)
    assert hidden.environment == {"CUDA_VISIBLE_DEVICES": ""} and str(hidden).startswith("no GPU of those here, 2 CPU")
    assert machine(None, 0).hidden == torch.cuda.is_available()
    assert machine("h100", 1).environment == {}


def test_another_machine():
    there = machine("v100-32", 4)
    assert (there.gpus, there.gpu_gb, there.here) == (4, 32, False)
    assert machine("h100", None).gpus == 1 and str(there) == "4 x v100-32 of 32 GB"


@pytest.mark.parametrize(
    "kind, gpus, expected",
    [
        (None, -1, "--gpus -1: expected 0 or more"),
        (None, 1000, "for another machine pass --gpu KIND too"),
        ("h100", 0, "--gpus 0 --gpu h100: expected at least one GPU"),
        ("h1000", 1, "--gpu h1000: expected one of v100-16"),
    ],
)
def test_machines_that_are_not_there(kind, gpus, expected):
    with pytest.raises(InputError) as error:
        machine(kind, gpus)
    assert expected in str(error.value)
