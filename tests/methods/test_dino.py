from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.dino import DINO
from largescale.methods.losses import swapped_prediction
from largescale.optim.roles import role_of
from largescale.plan.simulate import simulate
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.methods.harness import mini

MINI = ROOT / "tests/methods/mini/dino.yaml"
BATCH, LARGE, SMALL, OUTPUTS = 6, 2, 1, 24
LENGTH = Length(num_steps=8, steps_per_epoch=4, num_samples=24)


def build(*overrides: str) -> DINO:
    torch.manual_seed(0)
    config = load_config(MINI, [f"train.global_batch={BATCH}", "data.streams=1", *overrides])
    return build_method(config, LENGTH).double()


def views(step: int = 0) -> Views:
    generator = torch.Generator().manual_seed(step)
    images = [
        torch.randn(num * BATCH, 3, size, size, generator=generator, dtype=torch.float64)
        for num, size in ((LARGE, 24), (SMALL, 16))
    ]
    return Views.numbered(images, BATCH)


def outputs(parts: dict[str, torch.nn.Module], groups: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs [B, K] of every view."""
    rows = normalize(parts["last_layer"].weight, dim=1)
    found = []
    for images in groups:
        z = normalize(parts["projection"](parts["backbone"](images)), dim=1)
        found += (z @ rows.T).chunk(len(images) // BATCH)
    return found


def parts_of(method: DINO) -> dict[str, torch.nn.Module]:
    return {name: method.get_submodule(name) for name in ("backbone", "projection", "last_layer")}


def naive_loss(
    student: list[torch.Tensor], teacher: list[torch.Tensor], centre: torch.Tensor, temperature: float, cool: float
) -> torch.Tensor:
    """An image of a pair of views at a time."""
    terms = []
    for a, t in enumerate(teacher):
        for v, s in enumerate(student):
            if v == a:
                continue
            for mine, theirs in zip(s, t, strict=True):
                q = torch.exp((theirs - centre) / cool)
                q = q / q.sum()
                log_p = mine / temperature - torch.log(torch.exp(mine / temperature).sum())
                terms.append(-(q * log_p).sum())
    assert len(terms) == LARGE * (LARGE + SMALL - 1) * BATCH
    return torch.stack(terms).mean()


def test_loss_gradient_and_centre_equal_the_naive_loop_over_steps():
    method = build()
    means = []
    for step in range(4):
        batch = views(step)
        centre = sum((0.1 * 0.9 ** (len(means) - 1 - past) * mean for past, mean in enumerate(means)), torch.zeros(()))
        torch.testing.assert_close(method.centre, centre.expand(OUTPUTS).double(), rtol=1e-12, atol=1e-15)
        with torch.no_grad():
            teacher = outputs(dict(method.teacher.items()), batch.images[:1])
        cool = 0.02 + 0.02 * step / 4  # in the first of four steps of the warm-up it is 0.02
        assert method.teacher_temperature(step) == pytest.approx(cool)
        loss = method(batch, step).loss
        expected = naive_loss(outputs(parts_of(method), batch.images), teacher, centre, 0.1, cool)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        students = [p for p in method.parameters() if p.requires_grad]
        for ours, theirs in zip(
            torch.autograd.grad(loss, students), torch.autograd.grad(expected, students), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        means.append(torch.cat(teacher).mean(0))
    assert method.teacher_temperature(4) == method.teacher_temperature(7) == 0.04


def test_a_constant_added_to_all_outputs_and_the_centre_leaves_the_loss():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(n, BATCH, OUTPUTS, generator=generator, dtype=torch.float64) for n in (2, 4))
    shift = torch.randn(OUTPUTS, generator=generator, dtype=torch.float64)

    def loss(t: torch.Tensor, s: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return swapped_prediction(s, ((t - c) / 0.04).softmax(-1), 0.1)

    torch.testing.assert_close(
        loss(teacher + shift, student + 3.0, shift), loss(teacher, student, torch.zeros(OUTPUTS)), rtol=1e-12, atol=0
    )


def test_the_teacher_begins_equal_trains_no_weights_and_has_statistics_of_its_own():
    method = build()
    for name, part in parts_of(method).items():
        for student, teacher in zip(part.parameters(), method.teacher[name].parameters(), strict=True):
            assert torch.equal(student, teacher) and student.data_ptr() != teacher.data_ptr()
    method(views(), 0).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for name, p in method.named_parameters() if not name.startswith("teacher."))
    student, teacher = (dict(net.named_buffers()) for net in (method.backbone, method.teacher["backbone"]))
    counts = [key for key in teacher if key.endswith("num_batches_tracked")]
    assert counts and all(int(teacher[key]) == 1 and int(student[key]) == 2 for key in counts)  # sizes of views
    images = views().images[0]
    assert torch.equal(method.eval().encode(images), method.teacher["backbone"](images))


def test_two_large_groups_are_one_for_batchnorm():
    """Views of one size that are augmented in two ways share a pass through the backbone."""
    together, apart = build(), build("data.crops=[{num: 1, size: 24}, {num: 1, size: 24}, {num: 1, size: 16}]")
    batch = views()
    cut = batch._replace(images=[*batch.images[0].split(BATCH), batch.images[1]])
    torch.testing.assert_close(apart(cut, 0).loss, together(batch, 0).loss, rtol=1e-12, atol=0)
    assert apart.num_large == together.num_large == 2


def test_the_last_layer_begins_to_train_after_its_epochs():
    roles = build("method.freeze_last_layer_epochs=1.5").roles()
    assert role_of("last_layer.weight", roles).frozen_until == 6 and role_of("projection.0.weight", roles) is None


def test_momentum_rises_to_one():
    method = build()
    assert method.average_momentum(0) == pytest.approx(0.9)
    assert method.average_momentum(4) == pytest.approx(0.95) and method.average_momentum(8) == pytest.approx(1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_exchanges_the_mean_of_outputs_once(accumulate):
    step = simulate(mini("dino", f"train.accumulate={accumulate}", "train.precision=fp32"), 2)
    own = {what: count for what, count in step.counts.items() if what.of == "centre of the outputs"}
    [what] = own
    assert what.kind == "all-reduce" and own[what] == 1 and step.sent[what] == 4 * OUTPUTS


def logged(method: DINO, batch: Views) -> tuple[float, dict[str, float]]:
    output = method(batch, 7)
    loss = float(output.loss.detach())
    return loss, method.measures(loss, output.signs, BATCH)


def test_uniform_outputs_cost_ln_k_and_are_called_collapse():
    method = build()
    with torch.no_grad():
        for parts in (parts_of(method), method.teacher):
            parts["last_layer"].weight.fill_(1.0)
    loss, row = logged(method, views())
    assert loss == pytest.approx(math.log(OUTPUTS))
    assert row["teacher_entropy"] == pytest.approx(1) and row["divergence"] == pytest.approx(0, abs=1e-9)
    assert "collapse for want of sharpening" in said_of(load_config(MINI), row)


def test_one_output_for_all_costs_nothing_and_is_called_collapse():
    method = build("method.temperature=0.01", "method.teacher_temperature=0.01", "method.centring=false")
    with torch.no_grad():
        for parts in (parts_of(method), method.teacher):
            parts["projection"][-1].weight.zero_()
            parts["projection"][-1].bias.fill_(1.0)
            parts["last_layer"].weight.fill_(-1.0)[0] = 1.0
    loss, row = logged(method, views())
    assert loss == pytest.approx(0, abs=1e-9) and row["same_output"] == 1
    assert row["teacher_entropy"] == pytest.approx(0, abs=1e-9) and row["divergence"] == pytest.approx(0, abs=1e-9)
    words = said_of(load_config(MINI, ["method.centring=false"]), row)
    assert "collapse for want of centring. Try, in another run.dir, method.centring=true" in words


def test_a_network_at_its_start_gets_no_warning():
    method = build()
    _, row = logged(method, views())
    assert said_of(load_config(MINI), row) == ""


@pytest.mark.parametrize("crops", ["[{num: 1, size: 24}, {num: 4, size: 16}]", "[{num: 1}]"])
def test_one_large_view_is_refused(crops):
    with pytest.raises(InputError, match=r"data.crops=1 views in the leading groups.*at least two large views"):
        load_config(MINI, [f"data.crops={crops}"])


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method.freeze_last_layer_epochs=9"], "the last layer trains only after that, and the run has 10 epochs"),
        (["method.warmup_teacher_epochs=6"], "set method.warmup_teacher_epochs=0.5"),
        (["method.teacher_temperature=0.1"], "set it below method.temperature=0.1"),
    ],
)
def test_what_comes_too_late_or_does_not_sharpen_is_said_before_the_run(overrides, words):
    length = Length(num_steps=100, steps_per_epoch=10, num_samples=160)
    [line] = DINO.complaints(load_config(MINI, overrides), length)
    assert words in line
    assert DINO.complaints(load_config(MINI), length) == []


def test_between_micro_batches_only_the_sum_of_outputs_is_kept():
    """At 65,536 outputs and 1,024 images, rows of all would be 268 MB."""
    method = build("train.accumulate=2")
    whole = views()
    half = BATCH // 2
    for part in (slice(half), slice(half, BATCH)):
        images = [group.unflatten(0, (-1, BATCH))[:, part].flatten(0, 1) for group in whole.images]
        centre = method.centre.clone()
        assert torch.equal(method(Views(images, whole.ids[part]), 0).evidence["centre"], centre)
        held = method._total
        assert held is None if part.stop == BATCH else held is not None and held.shape == (OUTPUTS,)
    assert not torch.equal(method.centre, centre)
