"""`largescale config`: every key is explained, and what is none is answered with the nearest.

Covers: largescale/config/command.py
"""

from __future__ import annotations

import pytest

from largescale.cli import main
from largescale.config.explain import explain
from largescale.config.reference import every_key, groups
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.methods import those_with

DEMO = str(ROOT / "configs/demo.yaml")
SMALL = str(ROOT / "configs/small/swav.yaml")


@pytest.fixture
def said(capsys):
    """What a command writes, with its exit code."""

    def run(*words: str) -> tuple[int, str]:
        code = main(["config", *words])
        written = capsys.readouterr()
        return code, written.out + written.err

    return run


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["optim.momentum"],
            [
                "Fraction of the previous update",
                "default  0.9",
                "values   at least 0 and below 1",
                "used     only with optim.name=lars or sgd",
                "fixed: a run continues with the value",
            ],
        ),
        (["data.augment.hue"], ["only if data.augment.jitter is set", "a number, from 0 to 0.5"]),
        (
            ["parallel.cpu_offload"],
            [
                "only with parallel.strategy=fsdp, zero1, zero2 or zero3",
                "values   true or false",
                "resume   may change: a run can continue with another value",
            ],
        ),
        (["model.stem"], ["values   one of imagenet, 3x3s2, 3x3"]),
        (["optim.name"], ["values   one of lars, adamw, sgd"]),
        (["data.shards"], ["default  none: it must be set"]),
        (["data.crops.1.size"], ["data.crops[0].size", "a whole number, from 2 to 16384"]),
        (
            ["method.queue"],
            [
                "method.queue, with method.name=swav\n",
                "default  0\n",
                "method.queue, with method.name=mocov2\n",
                "default  65536\n",
            ],
        ),
        (["model.prototypes"], ["model.prototypes is now called method.prototypes.", "default  3000"]),
        (["optim.lr", DEMO, "optim.lr=0.25"], ["value    0.25\n", "default  4.8"]),
        (["optim.momentum", DEMO], ["value    0.9, without effect here"]),
        (["data.crops.0.size", SMALL], ["value    28, 24\n"]),
        (
            ["data.crops.1.augment.blur"],
            ["data.crops[0].augment.blur overrides data.augment.blur for the views of one crop group:", "default  0.5"],
        ),
        (["data.shards", str(ROOT / "configs/swav/resnet50_800ep.yaml")], ["value    (not set)"]),
        (["optim"], ["optim: The optimizer", "  optim.lr = 4.8\n      Peak learning rate"]),
        (["optim", DEMO], ["  optim.lr = 0.002  (default 4.8)\n"]),
        ([DEMO], ["  optim.lr = 0.002  (default 4.8)\n", "  data.crops = [{num: 2, size: 28"]),
        ([], ["\n  data.augment    Photometric", "19 of swav, 3 of simclr"]),
    ],
)
def test_what_is_asked_for_is_explained(said, words, expected):
    code, text = said(*words)
    assert code == 0
    for part in expected:
        assert part in text, part


@pytest.mark.parametrize(
    "words, expected",
    [
        (["lr"], "unknown key lr; did you mean optim.lr?"),
        (["optim.lrr"], "unknown key optim.lrr; did you mean optim.lr?"),
        (["optimizer"], "unknown key optimizer; did you mean optim?"),
        (["data.crops.0.sized"], "unknown key data.crops[0].sized; did you mean data.crops[0].size?"),
        (["zzzzzzz"], "unknown key zzzzzzz; `largescale config` lists the groups"),
        (
            ["method.epsilon", str(ROOT / "configs/small/simclr.yaml")],
            "method.epsilon is unknown for method simclr; swav has it",
        ),
        (["optim", "data"], "optim data: expected one key or group at a time"),
        (["optim.lr=1"], "optim.lr=1: overrides need a recipe; pass the recipe too"),
        (["optim.lr", "nothing.yaml"], "nothing.yaml: no such configuration file"),
    ],
)
def test_what_is_not_there_is_a_line(said, words, expected):
    code, text = said(*words)
    assert code == 2 and text.startswith("error: ") and expected in text and text.count("\n") == 1


def test_every_key_and_every_group_can_be_asked_for():
    for key in every_key():
        text = explain(key.name)
        assert key.setting.help.split()[0] in text and "default" in text and "resume" in text
    for group in groups():
        listed = explain(group)
        for key in every_key():
            assert key.group != group or f"  {key.name} = " in listed


def test_a_recipe_of_another_method_has_only_its_own_keys():
    from largescale.config import load_config

    text = explain("method", load_config(ROOT / "configs/small/simclr.yaml"))
    assert "method.temperature" in text and "method.queue" not in text
    with pytest.raises(InputError, match=f"method.queue is unknown for method simclr; {those_with('queue')} have it"):
        explain("method.queue", load_config(ROOT / "configs/small/simclr.yaml"))
