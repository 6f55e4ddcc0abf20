"""`largescale.load`: of a run and of a checkpoint, also those of an earlier version."""

from __future__ import annotations

import shutil

import pytest
import torch

import largescale
from largescale.evaluate.network import Network, load
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.runs import final_state

FIXTURE = ROOT / "tests/fixtures/run_before_contract"
"""A run in fp64 under fsdp of 2 ranks, written by an earlier version."""

CHECKPOINT = FIXTURE / "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def network() -> Network:
    return load(FIXTURE)


def test_it_holds_the_weights_of_the_checkpoint(network):
    assert network.step == 4 and network.num_features == 16
    saved = {
        name.removeprefix("model."): tensor.float()
        for name, tensor in final_state(FIXTURE).items()
        if name.startswith("model.")
    }
    found = network.method.state_dict()
    assert saved and all(torch.equal(found[name].float(), tensor) for name, tensor in saved.items())


def test_it_is_in_evaluation_mode_and_takes_no_gradient(network):
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    images = torch.randn(3, 3, 28, 28)
    features = network.encode(images)
    assert features.shape == (3, 16) and features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features, network(images))
    assert torch.allclose(features[:1], network.encode(images[:1]), atol=1e-6)  # no statistics of the batch


def test_a_checkpoint_is_as_good_as_its_run(network, tmp_path):
    images = torch.randn(2, 3, 28, 28)
    alone = shutil.copytree(CHECKPOINT, tmp_path / "best")  # moved to where no run is
    for place in (str(CHECKPOINT), alone):
        assert torch.equal(largescale.load(place).encode(images), network.encode(images))


def test_loading_leaves_the_callers_random_numbers_alone():
    state = torch.get_rng_state()
    load(CHECKPOINT)
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_prepared_as_evaluation_does(network):
    prepared = network.prepare(torch.full((3, 40, 60), 255, dtype=torch.uint8))
    size = network.config.evaluate.size
    expected = (1 - torch.tensor(network.config.data.mean)) / torch.tensor(network.config.data.std)
    assert prepared.shape == (3, size, size) and torch.allclose(prepared[:, 0, 0], expected)


def test_what_is_neither_or_damaged_is_a_line(tmp_path):
    with pytest.raises(InputError, match="no run and no checkpoint here"):
        load(tmp_path)
    with pytest.raises(InputError, match="no run and no checkpoint here"):
        load(tmp_path / "nothing")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="no whole checkpoint"):
        load(tmp_path / "empty")
    damaged = shutil.copytree(CHECKPOINT, tmp_path / "damaged")
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"has \d+ bytes instead of"):
        load(damaged)
