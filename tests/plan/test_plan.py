"""The planner against real steps: the same collectives, bytes, operations and memory; and what it says of recipes.

Covers: largescale/plan/changes.py, largescale/plan/command.py, largescale/plan/estimate.py, largescale/plan/planner.py,
largescale/plan/simulate.py, largescale/plan/table.py, largescale/plan/trace.py
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torchvision

from largescale.cli import main
from largescale.config import Config, ModelConfig, load_config
from largescale.methods import build_method
from largescale.models.backbones import build_backbone
from largescale.parallel.strategies import build_engine
from largescale.plan.changes import changes, first_guess
from largescale.plan.estimate import collective_s, estimate
from largescale.plan.hardware import GPUS, Assumptions
from largescale.plan.planner import Request, plan
from largescale.plan.simulate import Simulation, local_bytes, simulate
from largescale.plan.trace import WEIGHTS, Collective, Operator, StepTrace
from tests.helpers.commands import ROOT
from tests.helpers.plans import configuration
from tests.helpers.ranks import run_ranks
from tests.methods.harness import views_of_step

CASES = [
    (2, ["parallel.strategy=fsdp"]),
    (2, ["parallel.strategy=fsdp", "model.backbone=regnet_y_400mf", "model.stem=3x3s2"]),
    (2, ["parallel.strategy=fsdp", "model.recompute_stages=[1]", "train.accumulate=2", "optim.name=adamw"]),
    (4, ["parallel.strategy=fsdp", "parallel.replicate=2"]),
    (4, ["parallel.strategy=fsdp", "parallel.sharded_init=true", "parallel.batchnorm_group_size=2"]),
    (2, ["parallel.strategy=ddp"]),
    (2, ["parallel.strategy=fsdp", "method.head_per_group=true"]),
    (2, ["parallel.strategy=fsdp", "train.accumulate=2", "train.loss_spans=global_batch"]),
    (2, ["parallel.strategy=ddp", "train.accumulate=2", "train.loss_spans=global_batch"]),
]


SINKHORN = "Sinkhorn's marginals"


def real_step(overrides: list[str]) -> dict[str, object]:
    """What a rank of a real step did."""
    config = configuration(overrides)
    torch.manual_seed(0)
    engine = build_engine(build_method(config, on_meta=config.parallel.sharded_init), config, torch.device("cpu"))
    views = views_of_step(config, 0)
    trace = StepTrace()
    trace.watch(iter([*engine.method.parameters(), *engine.method.buffers(), *views.images]))
    last = engine.method.length.num_steps - 1
    with trace:
        engine.forward_backward(views, last)
    gradients = local_bytes(p.grad for p in engine.method.parameters())
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.1
    with trace:
        engine.apply_gradients(last)
    optimizer = local_bytes(value for state in engine.optimizer.state.values() for value in state.values())
    return {
        "counts": trace.counts,
        "sent": trace.sent,
        "flops": sum(o.flops for o in trace.operators),
        "weights": local_bytes(engine.method.parameters()),
        "gradients": gradients,
        "optimizer": optimizer,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("ranks, overrides", CASES)
def test_a_plan_is_what_a_real_step_does(ranks, overrides):
    planned, real = simulate(configuration(overrides), ranks), run_ranks(real_step, ranks, overrides)[0]
    for name in ("weights", "gradients", "optimizer", "flops"):
        assert getattr(planned, name) == real[name], name
    counts, sent = planned.counts, planned.sent
    assert counts == real["counts"] and {what.of for what in planned.counts} >= {WEIGHTS, SINKHORN}
    assert sent == real["sent"]
    assert planned.peak > planned.kept > 0 and planned.peak >= planned.weights + planned.gradients + planned.optimizer


@pytest.mark.parametrize("name, gmacs", [("resnet50", 4.09), ("regnet_y_400mf", 0.40), ("regnet_y_16gf", 15.91)])
def test_operations_are_the_published_ones_with_grouped_convolutions(name, gmacs):
    """torchvision states multiply-adds of a forward pass at 224 px; each is two operations."""
    assert name in torchvision.models.list_models()
    with torch.device("meta"):
        backbone, _ = build_backbone(ModelConfig(backbone=name))
        images = torch.empty(1, 3, 224, 224)
        trace = StepTrace()
        with trace:
            features = backbone.eval()(images)
        forward = sum(operator.flops for operator in trace.operators)
        assert forward / 2e9 == pytest.approx(gmacs, rel=0.02)
        with trace:
            features.sum().backward()
    # The gradient of the images is not wanted, all others cost as much as the pass itself.
    whole = sum(operator.flops for operator in trace.operators)
    assert 2.9 < whole / forward < 3


def step_of(**changes: object) -> Simulation:
    one = Simulation(10, 10, 10, 0, 0, 0, 10**9, Counter(), Counter(), [Operator(10**12, 10**9)], 10, 10)
    return replace(one, **changes)


def test_an_operator_takes_what_takes_longest():
    gpu, assume = GPUS["h100"], Assumptions()
    computing = estimate(step_of(), gpu, 8, assume)
    assert computing.step_s == pytest.approx(1e12 / (989e12 * 0.5))
    moving = estimate(step_of(operators=[Operator(0, 10**10)]), gpu, 8, assume)
    assert moving.step_s == pytest.approx(1e10 / (3350e9 * 0.8))
    launching = estimate(step_of(operators=[Operator(0, 8)] * 1000), gpu, 8, assume)
    assert launching.step_s == pytest.approx(4e-3)


def test_collectives_of_weights_hide_and_others_do_not():
    gpu, assume = GPUS["h100"], Assumptions()
    hidden, waited = (Collective("all-reduce", 64, what) for what in (WEIGHTS, SINKHORN))
    one = collective_s(hidden, 10**8, gpu, 8, assume)
    assert one == pytest.approx((30 + 5 * 3) * 1e-6 + 2 * 1e8 * 63 / 64 / (50e9 * 0.8))
    behind = estimate(step_of(counts=Counter({hidden: 1}), sent=Counter({hidden: 10**8})), gpu, 8, assume)
    assert behind.step_s == pytest.approx(max(one, behind.compute_s))
    on_top = estimate(step_of(counts=Counter({waited: 1}), sent=Counter({waited: 10**8})), gpu, 8, assume)
    assert on_top.step_s == pytest.approx(one + on_top.compute_s) and on_top.waits_s == {SINKHORN: pytest.approx(one)}
    assert collective_s(Collective("all-gather", 8, WEIGHTS), 10**8, gpu, 8, assume) < one / 10
    assert collective_s(Collective("all-gather", 1, WEIGHTS), 10**8, gpu, 8, assume) == 0
    # Eight copies, one a node, meet over the network; sixteen neighbours fill two nodes.
    copies = Collective("all-reduce", 8, WEIGHTS, stride=8)
    assert collective_s(copies, 10**8, gpu, 8, assume) == pytest.approx(45e-6 + 2 * 1e8 * 7 / 8 / (50e9 * 0.8))
    neighbours = Collective("all-reduce", 16, WEIGHTS)
    assert collective_s(neighbours, 0, gpu, 8, assume) == pytest.approx((30 + 5) * 1e-6)


@pytest.mark.slow
def test_what_does_not_fit_is_named_with_the_change_that_helps():
    recipe = load_config(ROOT / "configs/swav/resnet50_800ep.yaml", ["train.global_batch=256"], default_shards="unset")
    found = plan(recipe, Request(1, "v100-16"))
    assert not found["fits"] and found["memory_gb"]["needed"] > 16
    overrides, needed = re.fullmatch(r"(\S+) needs ([\d.]+) GB and fits", found["advice"]).groups()
    changed = load_config(
        ROOT / "configs/swav/resnet50_800ep.yaml", ["train.global_batch=256", overrides], default_shards="unset"
    )
    again = plan(changed, Request(1, "v100-16"))
    assert again["fits"] and again["memory_gb"]["needed"] == pytest.approx(float(needed), abs=0.05)


def test_copies_are_given_up_where_they_do_not_fit():
    recipe = configuration(["parallel.strategy=fsdp", "parallel.replicate=2", "model.recompute_stages=[1,2]"])
    found = [" ".join(names) for names, _ in changes(recipe, 4)]
    assert found[0] == "parallel.replicate=1" and found[-1] == "parallel.replicate=1 train.global_batch=4"


def test_what_saves_memory_is_tried_one_by_one_before_it_is_combined():
    found = [" ".join(names) for names, _ in changes(configuration(["parallel.strategy=ddp"]), 2)]
    recompute, fsdp = "model.recompute_stages=[1,2]", "parallel.strategy=fsdp"
    assert found[:3] == [recompute, fsdp, f"{recompute} {fsdp}"]
    assert found[3] == "train.accumulate=2" and f"{recompute} {fsdp} train.accumulate=2" in found
    compiled = configuration(["model.compile_stages=[1]"])
    assert next(changes(compiled, 1))[0] == [recompute, "model.compile_stages=[]"]


def test_the_command_says_what_a_run_takes(capsys):
    recipe = [str(ROOT / "tests/tiny.yaml"), "data.shards=nowhere", "train.steps=100"]
    assert main(["plan", *recipe, "--gpus", "4", "--gpu", "a100-80", "--price", "2", "--images", "1e5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["steps"] == 100 and found["images"] == 100_000
    assert found["cost"] == pytest.approx(2 * 4 * found["hours"])
    assert main(["plan", *recipe, "--gpus", "16", "--compare"]) == 0
    rows = capsys.readouterr().out.splitlines()
    names = ["ddp", "fsdp", "fsdp, 2 copies", "zero1", "zero2", "zero3", "fairscale"]
    assert [row.split("  ")[0] for row in rows[1:]] == names
    assert all("train.precision=fp64" in row for row in rows if row.startswith("zero"))
    assert main(["plan", *recipe, "--gpus", "2"]) == 0
    text = capsys.readouterr().out
    assert "memory per GPU" in text and "fits" in text and "images/s" in text and "assumed: math 0.5" in text


def test_a_plan_has_the_steps_of_a_run():
    config = configuration(["train.steps=0", "train.epochs=0.7", "train.global_batch=16"])
    assert plan(config, Request(2, images=5 * 16))["steps"] == 4  # 3.5, to the nearest even number


@pytest.mark.parametrize(
    "chosen, gpu, planned, said",
    [
        ("bf16", "v100", "fp16", "train.precision=bf16: planned in fp16, the half precision of v100; set"),
        ("fp16", "h100", "bf16", "train.precision=fp16: planned in bf16, the half precision of h100; set"),
        ("auto", "v100", "fp16", ""),
        ("bf16", "h100", "bf16", ""),
        ("fp32", "v100", "fp32", ""),
    ],
)
def test_another_precision_than_the_chosen_one_is_said(chosen, gpu, planned, said, capsys):
    recipe = [str(ROOT / "tests/tiny.yaml"), "data.shards=nowhere", f"train.precision={chosen}"]
    assert main(["plan", *recipe, "--gpus", "1", "--gpu", gpu, "--images", "200", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["precision"] == planned
    assert output.err.startswith(said) and output.err.count("\n") == bool(said)


def test_another_strategy_is_planned_for_a_recipe_that_sets_what_fsdp_alone_has(capsys):
    of_fsdp = ["parallel.strategy=fsdp", "parallel.sharded_init=true", "parallel.replicate=2"]
    recipe = [str(ROOT / "tests/tiny.yaml"), "data.shards=nowhere", *of_fsdp, "--gpus", "4"]
    for strategy in ("ddp", "fsdp"):
        assert main(["plan", *recipe, "--strategy", strategy, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["strategy"] == ("ddp" if strategy == "ddp" else "fsdp, 2 copies")


def test_all_strategies_are_compared_and_their_libraries_are_not_needed(capsys, monkeypatch):
    for library in ("deepspeed", "fairscale"):
        monkeypatch.setitem(sys.modules, library, None)
    recipe = [str(ROOT / "tests/tiny.yaml"), "data.shards=nowhere", "train.precision=auto"]
    assert main(["plan", *recipe, "--gpus", "4", "--compare", "--json"]) == 0
    plans = {found["strategy"]: found for found in json.loads(capsys.readouterr().out)}
    assert list(plans) == ["ddp", "fsdp", "zero1", "zero2", "zero3", "fairscale"]
    optimizers = {name: found["memory_gb"]["optimizer"] for name, found in plans.items()}
    assert optimizers["ddp"] > 3.9 * optimizers["zero1"] and optimizers["zero1"] == optimizers["zero2"]
    assert main(["plan", *recipe, "--gpus", "4", "--gpu", "v100-16", "--compare"]) == 0
    said = capsys.readouterr()
    assert [row.split("  ")[0] for row in said.out.splitlines()[1:]] == list(plans) and "trains in" not in said.out
    assert said.err.endswith("v100-16 emulates it, so zero1, zero2, zero3 will take longer than planned\n")


@pytest.mark.parametrize(
    "chosen, says",
    [
        ("auto", ""),
        ("bf16", ""),
        (
            "fp16",
            "train.precision=fp16: planned in bf16, since parallel.strategy=zero2 does not train in fp16; set "
            "train.precision=bf16 to train as planned\n",
        ),
    ],
)
def test_a_strategy_that_does_not_train_in_the_half_precision_of_a_gpu_is_planned_as_it_trains(chosen, says, capsys):
    recipe = [str(ROOT / "tests/tiny.yaml"), "data.shards=nowhere", "parallel.strategy=zero2"]
    words = [*recipe, f"train.precision={chosen}", "--gpus", "2", "--gpu", "v100-32", "--images", "200", "--json"]
    assert main(["plan", *words]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["precision"] == "bf16"
    emulated = "train.precision=bf16: v100-32 emulates it, so zero2 will take longer than planned\n"
    assert output.err == says + emulated


@pytest.mark.parametrize(
    "options, says",
    [
        (["--gpus", "0"], "expected at least 1"),
        (["--gpus", "3"], "not divisible by 3 GPUs"),
        (["--gpus", "2", "--gpu", "abacus"], "--gpu abacus: expected one of v100-16"),
        (["--gpus", "2", "--strategy", "zero4"], "parallel.strategy=zero4: expected one of ddp, fsdp, zero1"),
        (["--gpus", "2", "--strategy", "zero3"], "train.precision=fp64: parallel.strategy=zero3 trains in fp32"),
        (["parallel.cpu_offload=true", "--gpus", "2", "--strategy", "fsdp"], "parallel.cpu_offload=true: host memory"),
        (["--gpus", "3", "--compare"], "not divisible by 3 GPUs"),
        (
            ["parallel.batchnorm_group_size=3", "--gpus", "4"],
            "parallel.batchnorm_group_size=3: does not divide 4 ranks; "
            "choose 1 (4 images), 2 (8 images) or 0 (16 images)",
        ),
        (["--gpus", "2", "--images", "-5"], "--images -5: expected at least 1"),
        (["--gpus", "2", "--price", "nan"], "--price nan: expected a price"),
        (["model.compile_stages=[9]", "--gpus", "2"], "model.compile_stages=[9]: expected stages from 1 to"),
    ],
)
def test_bad_requests_are_one_line(options, says, capsys):
    assert main(["plan", str(ROOT / "tests/tiny.yaml"), "data.shards=nowhere", *options]) == 2
    assert says in capsys.readouterr().err


SUPPORTS = ["method.support.classes=10", "method.support.images=8"]


@pytest.mark.parametrize(
    "recipe, options, says",
    [
        ("paws/resnet50_100ep", ["--gpus", "128"], "960 classes x 7 images = 6720 are not divisible by 128 ranks"),
        ("small/paws", [*SUPPORTS, "train.global_batch=64", "train.accumulate=4", "--gpus", "16"], "= 80 are not"),
    ],
)
def test_supports_that_gpus_cannot_share_are_one_line(recipe, options, says, capsys):
    assert main(["plan", recipe, "data.shards=nowhere", *options]) == 2
    assert says in capsys.readouterr().err


def test_guesses_leave_supports_as_many_and_go_with_other_settings():
    overrides = ["method.support={classes: 10, images: 7}", "train.global_batch=64", "data.streams=8"]
    config = load_config(ROOT / "configs/small/paws.yaml", overrides, default_shards="unset")
    none = dict.fromkeys(["weights", "gradients", "optimizer", "buffers", "views", "kept", "parameters", "trained"], 0)
    before = Simulation(**none, peak=10**6, counts=Counter(), sent=Counter(), operators=[])
    tried: list[tuple[int, float]] = []

    def needed(changed: Config, step: Simulation) -> float:
        tried.append((changed.train.global_batch, step.peak / 1e6))
        return step.peak

    guess = first_guess(config, 1, before, available=0.7e6, needed=needed)
    assert guess.overrides == ["train.global_batch=32"]  # 7 images of a class are in no two micro-batches
    images, supports = 64 * (2 * 28**2 + 24**2), 70 * 28**2
    assert tried[-1] == (32, pytest.approx((images / 2 + supports) / (images + supports), rel=1e-5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, gpus, gpu", [("seer/regnety_10b", 496, "a100-40"), ("swav/resnet50_800ep", 64, "v100-16")]
)
def test_published_settings_fit(recipe, gpus, gpu):
    config = load_config(ROOT / f"configs/{recipe}.yaml", default_shards="unset")
    found = plan(config, Request(gpus, gpu))
    assert found["fits"], found["memory_gb"]
    assert found["memory_gb"]["needed"] > 0.2 * GPUS[gpu].memory_gb
