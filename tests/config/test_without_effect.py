"""Covers: largescale/config/checks.py, largescale/optim/adamw.py, largescale/optim/sgd.py"""

from __future__ import annotations

import inspect
import pickle
import re
import sys
from dataclasses import fields

import pytest

from largescale.config import EvaluateConfig, load_config, without_effect
from largescale.config.checks import settings_of
from largescale.config.setting import declared
from largescale.evaluate.protocols import PROTOCOLS
from largescale.optim.optimizers import OPTIMIZERS
from largescale.parallel import batchnorm, ddp, engine, fairscale, fsdp, strategies, zero
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

TINY = ROOT / "tests/tiny.yaml"


def lines_of(*overrides: str) -> list[str]:
    return without_effect(load_config(TINY, ["data.shards=x", *overrides]))


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (
            ["parallel.strategy=ddp", "parallel.cpu_offload=true"],
            "parallel.cpu_offload=True has no effect: it is only used with parallel.strategy=fsdp|zero1|zero2|zero3",
        ),
        (["parallel.strategy=fairscale", "parallel.cpu_offload=true"], "parallel.cpu_offload=True has no effect"),
        (["parallel.strategy=zero2", "parallel.reshard_after_forward=false"], "parallel.reshard_after_forward=False"),
        (["parallel.strategy=ddp", "parallel.shard=2"], "parallel.shard=2"),
        (
            ["parallel.sync_batchnorm=false", "parallel.batchnorm_group_size=2"],
            "parallel.batchnorm_group_size=2 has no effect without parallel.sync_batchnorm",
        ),
        (["optim.name=adamw", "optim.momentum=0.5"], "optim.momentum=0.5 has no effect"),
        (
            ["data.store_patience_s=7200"],
            "data.store_patience_s=7200 has no effect beyond run.hang_timeout_s=1800, when the run counts as hung; "
            "raise that too, or set it to 0",
        ),
        (["optim.name=sgd", "optim.betas=[0.9, 0.99]"], "optim.betas=[0.9, 0.99] has no effect"),
        (["optim.name=sgd", "optim.trust_coefficient=0.1"], "optim.trust_coefficient=0.1 has no effect"),
        (["method.queue=0"], "method.queue_start_step=1 has no effect without method.queue"),
        (["data.augment.jitter=0", "data.augment.hue=0.1"], "data.augment.hue=0.1 has no effect"),
        (["model.backbone=resnet18"], "model.depths=[1, 1] has no effect: it is only used with model.backbone=resnet"),
        (
            ["data.crops.0.augment={jitter: 0, hue: 0.1}"],
            "data.crops[0].augment.hue=0.1 has no effect without data.crops[0].augment.jitter",
        ),
        (["data.crops.1.augment.solarise_threshold=0.3"], "data.crops[1].augment.solarise_threshold=0.3 has no effect"),
        (["train.rollback_window=3"], "train.rollback_window=3 has no effect without train.max_rollbacks"),
    ],
)
def test_a_setting_that_nothing_uses_is_named(overrides, expected):
    assert any(expected in line for line in lines_of(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.strategy=fsdp", "parallel.cpu_offload=true"],
        ["parallel.strategy=zero3", "parallel.cpu_offload=true"],
        ["parallel.cpu_offload=false"],
        ["optim.name=adamw", "optim.momentum=0.9"],
        ["data.augment.solarise_threshold=0.3", "data.crops.1.augment.solarise=0.2"],
        ["data.crops.1.augment={solarise: 0.2, solarise_threshold: 0.3}"],
    ],
)
def test_settings_in_use_and_defaults_are_not(overrides):
    lines = lines_of(*overrides)
    # The small recipe itself sets one for the tests that choose fsdp.
    assert [line for line in lines if "unit_min_parameters" not in line] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_no_recipe_sets_what_it_does_not_use(path):
    assert without_effect(load_config(path, ["data.shards=x"])) == []


def used_by(key: str, names: list[str]) -> set[str]:
    """Names of a table with which a key is declared to have an effect."""
    config = load_config(TINY, ["data.shards=x"])
    used_if = next(declared(item).used_if for name, item, _ in settings_of(config) if name == key)
    return set(used_if.partition("=")[2].split("|")) if "=" in used_if else set(names)


def keys_of(group: str) -> list[str]:
    """The keys of a group of a run, those that owners declare included."""
    return list(vars(getattr(load_config(TINY, ["data.shards=x"]), group)))


@pytest.mark.parametrize("key", ["momentum", "betas", "trust_coefficient"])
def test_optimizers_read_what_is_declared(key):
    class Read:
        def __getattribute__(self, name: str) -> object:
            read.add(name)
            return getattr(everything, name)

    everything = load_config(TINY, ["data.shards=x"]).optim
    readers = set()
    for name, choice in OPTIMIZERS.items():
        read: set[str] = set()
        choice.options(Read())
        readers |= {name} if key in read else set()
    assert readers == used_by(f"optim.{key}", list(OPTIMIZERS))


@pytest.mark.parametrize("key", [key for key in keys_of("parallel") if key != "strategy"])
def test_strategies_read_what_is_declared(key):
    modules = {"ddp": ddp, "fsdp": fsdp, "zero1": zero, "zero2": zero, "zero3": zero, "fairscale": fairscale}
    # `offloads` is how strategies other than fsdp read it.
    reading = r"offloads\(config\)|ours\.cpu_offload\b" if key == "cpu_offload" else rf"\b(parallel|ours)\.{key}\b"
    reads = {
        name for name, module in modules.items() if re.search(reading, inspect.getsource(module).split('"""', 2)[2])
    }
    common = "".join(map(inspect.getsource, (engine, strategies, batchnorm)))
    if re.search(rf"config\.parallel\.{key}\b", common) and not reads:
        reads = set(modules)
    assert reads == used_by(f"parallel.{key}", list(modules))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_read_what_is_declared(protocol):
    ours = PROTOCOLS[protocol].own_keys()
    source = inspect.getsource(sys.modules[PROTOCOLS[protocol].measure.__module__])
    assert ours or not PROTOCOLS[protocol].trains
    assert all(f"config.{key}" in source for key in ours)
    assert all(key.startswith(f"{protocol.replace('-', '_')}_") for key in ours)
    assert set(ours) == {item.name for item in fields(PROTOCOLS[protocol].Settings)} - {
        item.name for item in fields(EvaluateConfig)
    }
    others = [key for key in keys_of("evaluate") if key not in ours and re.search(rf"config\.{key}\b", source)]
    assert others == []


@pytest.mark.parametrize(
    "override, expected",
    [
        ("parallel.replicate=2", "parallel.replicate=2: expected 1 with parallel.strategy=zero2; only fsdp has it"),
        ("parallel.sharded_init=true", "expected false with parallel.strategy=zero2; only fsdp has it"),
    ],
)
def test_what_would_be_missed_is_refused_under_other_strategies(override, expected):
    with pytest.raises(InputError, match=expected):
        lines_of("parallel.strategy=zero2", override)
    assert lines_of("parallel.strategy=fsdp", override) == []


def test_groups_of_several_owners_travel_between_processes():
    config = load_config(TINY, ["data.shards=x"])
    assert pickle.loads(pickle.dumps(config.optim)) == config.optim
    assert type(pickle.loads(pickle.dumps(config))) is type(config)
