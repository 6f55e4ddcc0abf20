"""Teachers follow their students exactly: under every strategy, once per update, and not where fp16 passes one over."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from largescale.methods import build_method
from largescale.methods.teachers import cosine_momentum
from largescale.parallel.batchnorm import average_statistics
from largescale.parallel.strategies import build_engine
from tests.helpers.ranks import run_ranks
from tests.methods.harness import LENGTH, STEPS, mini, views_of_step, whole

pytestmark = pytest.mark.distributed

MOMENTUM = 0.9
DOUBLE = [("mocov2", strategy, "fp64") for strategy in ("ddp", "fsdp", "fairscale")] + [("byol", "ddp", "fp64")]
SINGLE = [("mocov2", f"zero{stage}", "fp32") for stage in (1, 2, 3)]


def follow(name: str, strategy: str, precision: str, accumulate: int) -> float:
    """Largest error, relative to the weights, of the teacher after some steps against the sum over its students."""
    config = mini(
        name,
        f"parallel.strategy={strategy}",
        f"train.precision={precision}",
        f"train.accumulate={accumulate}",
        f"method.momentum={MOMENTUM}",
        "optim.lr=0.5",
    )
    torch.manual_seed(0)
    engine = build_engine(build_method(config, LENGTH), config, torch.device("cpu"))
    averaged = engine.method.averages()[0].buffers

    def weights(of: str) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix(of): whole(value).double()
            for name, value in engine.state().items()
            if name.startswith(of) and value.is_floating_point() and (averaged or "running" not in name)
        }

    expected = weights("model.backbone.")
    assert all(torch.equal(value, expected[name]) for name, value in weights("model.teacher.backbone.").items())
    for step in range(3):
        views = views_of_step(config, step)
        output = engine.forward_backward(views, step)
        engine.update(engine.check(views, output.loss), step=step, lr=config.optim.lr, clip=0.0)
        kept = MOMENTUM if name == "mocov2" else cosine_momentum(MOMENTUM, step, STEPS)
        for key, student in weights("model.backbone.").items():
            expected[key] = kept * expected[key] + (1 - kept) * student
    teacher = weights("model.teacher.backbone.")
    assert teacher.keys() == expected.keys()
    return max(float((teacher[key] - value).norm() / value.norm().clamp_min(1e-6)) for key, value in expected.items())


def follow_all(cases: list[tuple[str, str, str]]) -> list[float]:
    return [follow(*case, accumulate) for case in cases for accumulate in (1, 4)]


def test_a_teacher_is_the_running_average_of_its_student_under_every_strategy():
    errors = run_ranks(follow_all, 2, [*DOUBLE, *SINGLE], timeout_s=600)[0]
    assert max(errors[: 2 * len(DOUBLE)]) < 1e-14
    assert max(errors[2 * len(DOUBLE) :]) < 1e-6


def passed_over(_: str) -> bool:
    """Whether a teacher stayed as it was in a step that fp16 passed over, and moved in the next."""
    config = mini("mocov2", "train.precision=fp16", "optim.lr=0.5")
    torch.manual_seed(0)
    engine = build_engine(build_method(config), config, torch.device("cpu"))
    teacher = engine.method.teacher["backbone"]

    def step(poison: bool) -> bool:
        before = [p.detach().clone() for p in teacher.parameters()]
        views = views_of_step(config, 0)
        views = views._replace(images=[images.half() for images in views.images])
        loss = engine.forward_backward(views, 0).loss
        if poison and dist.get_rank() == 1:
            engine.gradients()[0].fill_(float("inf"))
        check = engine.check(views, loss)
        assert check.overflow == poison
        engine.update(check, step=0, lr=0.5, clip=0.0)
        return all(torch.equal(old, new) for old, new in zip(before, teacher.parameters(), strict=True))

    engine.loss_scale.numbers[0] = 2.0**4
    return step(poison=True) and not step(poison=False)


def test_a_teacher_waits_where_fp16_passes_a_step_over():
    assert run_ranks(passed_over, 2, "") == [True, True]


def saves_in_between(name: str, saves: bool) -> dict[str, torch.Tensor]:
    """The state after some steps on ranks whose BatchNorm is their own; as a save does, statistics are averaged."""
    config = mini(name, "parallel.sync_batchnorm=false", "optim.lr=0.5", "train.precision=fp32")
    torch.manual_seed(0)
    engine = build_engine(build_method(config, LENGTH), config, torch.device("cpu"))
    for step in range(4):
        views = views_of_step(config, step)
        output = engine.forward_backward(views, step)
        engine.update(engine.check(views, output.loss), step=step, lr=config.optim.lr, clip=0.0)
        if saves and step == 1:
            average_statistics(engine.method)
    average_statistics(engine.method)
    return {name: whole(value).clone() for name, value in engine.state().items()}


@pytest.mark.parametrize("name", ["mocov2", "densecl"])
def test_keys_of_own_statistics_do_not_depend_on_when_a_run_is_saved(name):
    with_saves, without = (run_ranks(saves_in_between, 2, name, saves) for saves in (True, False))
    for found, expected in zip(with_saves, without, strict=True):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    teachers = [key for key in without[0] if "teacher" in key and "running" in key]
    assert teachers and all(torch.equal(without[0][key], without[1][key]) for key in teachers)
