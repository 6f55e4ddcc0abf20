"""Steps of several objectives: each moves its own parameters alone, under every strategy.

Covers: largescale/models/constant_weights.py
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from largescale.config import Config
from largescale.data.length import Length
from largescale.methods import build_method, context_encoder
from largescale.methods.method import Output
from largescale.models.constant_weights import constant_weights
from largescale.optim.roles import MAIN
from largescale.parallel.engine import Engine, StepCheck
from largescale.parallel.objectives import as_one, stage_begins
from largescale.parallel.strategies import build_engine
from tests.helpers.commands import ROOT
from tests.helpers.launcher import run_largescale
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import losses
from tests.methods.harness import LENGTH, mini, views_of_step, whole

ADVERSARY = "discriminator"
ADAM = ["optim.name=adamw", "optim.lr=0.001"]
STRATEGIES = [
    *(f"parallel.strategy={name}" for name in ("ddp", "fsdp", "fairscale", "zero1", "zero2", "zero3")),
    "parallel.strategy=fsdp train.precision=bf16",
    "parallel.strategy=ddp optim.name=lars optim.lr=0.1",
]


def engine_of(config: Config) -> Engine:
    torch.manual_seed(0)
    return build_engine(build_method(config, LENGTH), config, torch.device("cpu"))


def adversarial(*overrides: str) -> Config:
    return mini("context_encoder", "train.precision=fp32", *ADAM, *overrides)


def hashes(engine: Engine) -> dict[str, str]:
    """Of parameters, momentum and step counts, by name; running statistics are left out."""
    held = {name for name, _ in engine.method.named_parameters()}
    state = {name: whole(value) for name, value in engine.state().items()}
    return {
        name: hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in state.items()
        if name.removeprefix("model.") in held or name.startswith("optimizer.")
    }


def moved_by_objective(config: Config, steps: int = 3) -> list[tuple[str, set[str], set[str]]]:
    """For each update: its objective, and names of what changed and of all there is."""
    engine, found = engine_of(config), []
    for step in range(steps):
        views = views_of_step(config, step)
        for objective in engine.method.objectives:
            before = hashes(engine)
            check = engine.check(views, engine.forward_backward(views, step, objective).loss)
            engine.update(check, step=step, lr=config.optim.lr, clip=config.optim.clip_grad_norm)
            after = hashes(engine)
            changed = {name for name, value in after.items() if before.get(name) != value}
            found.append((objective, changed, set(after)))
    return found


def moved_by_all(configs: list[Config], careless: bool) -> list[list[tuple[str, set[str], set[str]]]]:
    if careless:  # gradients of the adversary's weights, which the engine has to drop
        context_encoder.constant_weights = nullcontext
    return [moved_by_objective(config) for config in configs]


@pytest.mark.distributed
@pytest.mark.parametrize("careless", [False, True])
def test_an_objective_moves_its_own_parameters_and_leaves_all_else_to_the_bit(careless):
    ways = STRATEGIES[:-2] if careless else STRATEGIES
    configs = [adversarial("train.accumulate=2", *overrides.split()) for overrides in ways]
    for overrides, updates in zip(ways, run_ranks(moved_by_all, 2, configs, careless, timeout_s=600)[0], strict=True):
        assert [objective for objective, _, _ in updates] == 3 * [ADVERSARY, MAIN]
        for objective, changed, all_names in updates:
            own = {name for name in all_names if (".discriminator." in f".{name}") == (objective == ADVERSARY)}
            assert changed <= own, (overrides, objective, changed - own)
            weights = {name for name in own if name.startswith("model.")}
            assert weights & changed == weights, (overrides, objective, weights - changed)


def loop(config: Config, steps: int) -> dict[str, Tensor]:
    """Weights after steps of two optimizers, one objective after the other, without an engine."""
    torch.manual_seed(0)
    method = build_method(config, LENGTH).to(torch.float64)
    adversary = [p for name, p in method.named_parameters() if name.startswith("discriminator.")]
    rest = [p for name, p in method.named_parameters() if not name.startswith("discriminator.")]
    factor = config.method.discriminator_lr_factor
    optimizers = {
        objective: torch.optim.SGD(of, lr=lr, momentum=config.optim.momentum)
        for objective, of, lr in ((ADVERSARY, adversary, factor * config.optim.lr), (MAIN, rest, config.optim.lr))
    }
    for step in range(steps):
        for objective in (ADVERSARY, MAIN):
            moved = {ADVERSARY: adversary, MAIN: rest}[objective]
            gradients = torch.autograd.grad(method(views_of_step(config, step), step, objective).loss, moved)
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            for parameter, gradient in zip(moved, gradients, strict=True):
                parameter.grad = gradient * min(1.0, config.optim.clip_grad_norm / float(norm))
            optimizers[objective].step()
    return {f"model.{name}": parameter.detach() for name, parameter in method.named_parameters()}


def loop_and_engine(config: Config, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = engine_of(config)
    for step in range(steps):
        views = views_of_step(config, step)
        for objective in engine.method.objectives:
            check = engine.check(views, engine.forward_backward(views, step, objective).loss)
            engine.update(check, step=step, lr=config.optim.lr, clip=config.optim.clip_grad_norm)
    return loop(config, steps), {name: whole(value) for name, value in engine.state().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("clip", [1000, 0.05])
def test_steps_are_those_of_an_optimizer_for_each_objective(clip):
    """Each gradient is clipped by itself, at 0.05 both of them; the second objective sees what the first has moved."""
    config = mini("context_encoder", "optim.name=sgd", "optim.lr=0.1", f"optim.clip_grad_norm={clip}")
    config.optim.weight_decay = 0
    [(expected, found)] = run_ranks(loop_and_engine, 1, config, 3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def troubled(config: Config) -> dict[str, Any]:
    """What is said of a loss that is not finite, in either objective, on rank 1."""
    said: dict[str, Any] = {}
    for bad in (ADVERSARY, MAIN):
        engine = engine_of(config)
        forward = engine.method.forward

        def failing(views: Any, step: int, objective: str, forward: Any = forward, bad: str = bad) -> Output:
            output = forward(views, step, objective)
            return output._replace(loss=output.loss * float("nan")) if objective == bad and dist.get_rank() else output

        engine.method.forward = failing  # type: ignore[method-assign]
        views = views_of_step(config, 0)
        for objective in engine.method.objectives:
            check = engine.check(views, engine.forward_backward(views, 0, objective).loss)
            if check.trouble:
                said[bad] = objective, check.trouble
                break
            engine.update(check, step=0, lr=0.001, clip=0)
    return said


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_is_told_before_its_update_with_the_name_of_the_objective():
    for said in run_ranks(troubled, 2, adversarial()):
        assert said[ADVERSARY] == (
            ADVERSARY,
            f"{ADVERSARY}: loss not finite on rank 1; gradient not finite on ranks 0, 1",
        )
        assert said[MAIN] == (MAIN, "loss not finite on rank 1; gradient not finite on ranks 0, 1")


def overflowing(config: Config) -> tuple[list[bool], list[float], set[str]]:
    """Of a step whose adversary's fp16 gradient overflows: what overflowed, loss scales, and which weights moved."""
    engine, views = engine_of(config), views_of_step(config, 0)
    before = {name: parameter.detach().clone() for name, parameter in engine.method.named_parameters()}
    overflowed, scales = [], []
    for objective in engine.method.objectives:
        loss = engine.forward_backward(views, 0, objective).loss
        if objective == ADVERSARY:
            engine.gradients()[0].view(-1)[0] = float("inf")
        check = engine.check(views, loss)
        assert not check.trouble
        engine.update(check, step=0, lr=0.001, clip=0)
        overflowed.append(check.overflow)
        scales.append(float(engine.loss_scale.factor))
    moved = {n.split(".")[0] for n, p in engine.method.named_parameters() if not torch.equal(p, before[n])}
    return overflowed, scales, moved


@pytest.mark.distributed
def test_an_overflow_of_one_objective_skips_its_update_alone():
    [(overflowed, scales, moved)] = run_ranks(overflowing, 1, adversarial("train.precision=fp16"))
    assert overflowed == [True, False] and scales == [2.0**15, 2.0**15]
    assert moved == {"backbone", "bottleneck", "decoder"}


def test_what_is_logged_is_the_last_objectives_with_the_signs_of_all():
    outputs = [
        Output(torch.tensor(float(n)), {f"sign{n}": torch.tensor(n)}, {f"kept{n}": torch.tensor(n)}) for n in (1, 2)
    ]
    checks = [StepCheck(1.0, 10.0, "", overflow=True), StepCheck(2.0, 20.0, "", stop=True)]
    output, check = as_one({ADVERSARY: (outputs[0], checks[0]), MAIN: (outputs[1], checks[1])})
    assert float(output.loss) == 2 and set(output.signs) == {"sign1", "sign2"} and set(output.evidence) == {"kept2"}
    assert check == StepCheck(2.0, 20.0, "", stop=True, overflow=True, norms={ADVERSARY: 10.0})
    assert as_one({MAIN: (outputs[1], checks[1])}) == (outputs[1], checks[1])


def test_constant_weights_take_no_gradient_and_pass_it_on():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1).requires_grad_(False))
    x = torch.randn(2, 3, requires_grad=True)
    with constant_weights(network):
        held = network(x).sum()
    held.backward()
    assert x.grad is not None and all(parameter.grad is None for parameter in network.parameters())
    assert [p.requires_grad for p in network.parameters()] == [True, True, False, False]
    network(x).sum().backward()
    assert network[0].weight.grad is not None


def test_a_stage_begins_where_objectives_change():
    method = build_method(mini("denoising", "method.layers=one_by_one"), Length(6, 2, 40))
    assert [step for step in range(6) if stage_begins(method, step)] == [2, 4]
    assert not any(stage_begins(build_method(mini("denoising"), LENGTH), step) for step in range(6))


@pytest.mark.distributed
def test_saving_often_changes_nothing_where_ranks_have_batchnorm_of_their_own_and_layers_that_stay(
    shard_folder, tmp_path
):
    """Layers that have learnt are used by their running statistics, which saving makes equal on all ranks."""
    found = []
    for every in (0, 1):
        run = tmp_path / f"every-{every}"
        run_largescale(
            "pretrain",
            str(ROOT / "tests/methods/mini/denoising.yaml"),
            f"data.shards={shard_folder}",
            f"run.dir={run}",
            "method.layers=one_by_one",
            "parallel.sync_batchnorm=false",
            "train.steps=9",
            "run.log_every=1",
            f"checkpoint.every_steps={every}",
            ranks=2,
        )
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], rel=1e-9)
