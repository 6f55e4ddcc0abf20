"""Distillation: a float64 loop, what holds at the ends, and a teacher that stays what it was.

Covers: largescale/methods/losses/soft_targets.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from largescale.config import Config, SupportConfig, load_config
from largescale.data.length import Length
from largescale.data.views import Supports, Views
from largescale.methods import build_method, require_fit
from largescale.methods.distillation import Distillation
from largescale.methods.losses.soft_targets import soft_targets
from largescale.methods.taught import taught_by
from largescale.models.image_classifier import read_classifier
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.teachers import CLASSES, teacher, write_teacher

MINI = ROOT / "tests/methods/mini/distillation.yaml"
BATCH = 6
LENGTH = Length(18, 3, 40)
NORMALISED_ALIKE = ["data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]"]


def config_of(*overrides: str, path: Path | None = None) -> Config:
    sizes = [f"train.global_batch={BATCH}", "data.streams=1", "method.label_weight=0"]
    return load_config(MINI, [*sizes, *taught_by(path or teacher()), *overrides])


def build(*overrides: str, path: Path | None = None) -> Distillation:
    torch.manual_seed(0)
    method = build_method(config_of(*overrides, path=path), LENGTH).double()
    method.begin()
    return method


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64) for side in (24, 16)]
    return Views(images, torch.arange(BATCH))


def naive_loss(method: Distillation, batch: Views, temperature: float) -> Tensor:
    """The loop of the docstring; the teacher sees images normalised by its own numbers."""
    taught, total = read_classifier(teacher()).load(dtype=torch.float64), 0.0
    shown = method._normalisation
    for group in batch.images:
        for image in group:
            pixels = torch.stack([image[c] * shown[1][c] + shown[0][c] for c in range(3)])
            t = taught(((pixels - 0.5) / 0.25)[None])[0] / temperature
            p = t.exp() / t.exp().sum()
            s = method.head(method.backbone(image[None]))[0] / temperature
            q = s.exp() / s.exp().sum()
            for y in range(len(CLASSES)):
                total = total - temperature**2 * p[y] * q[y].log()
    return total / (len(batch.images) * BATCH)


@pytest.mark.parametrize("normalisation", [[], NORMALISED_ALIKE], ids=["other numbers", "the same numbers"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_loss_and_gradients_equal_the_naive_loop(temperature, normalisation):
    method, batch = build(f"method.temperature={temperature}", *normalisation).eval(), views()
    expected, found = naive_loss(method, batch, temperature), method(batch, 2)
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-12)
    trained = list(method.parameters())
    gradients = torch.autograd.grad(expected, trained)
    torch.testing.assert_close(torch.autograd.grad(found.loss, trained), gradients, rtol=1e-8, atol=1e-11)


def test_labelled_images_have_their_part_in_loss_and_gradients():
    """Equation 3: both sums, weighted, with BatchNorm over all that goes through the network at once."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(2 * 8, 3, 24, 24, generator=generator, dtype=torch.float64)
    labelled = Supports(images, torch.arange(8) % 4, torch.arange(8))
    method = build("method.label_weight=0.3", "method.support={classes: 4, images: 2, views: 2}").eval()
    found = method(views()._replace(supports=labelled), 0)
    expected = 0.7 * naive_loss(method, views(), 2.0)
    for number, image in enumerate(images):
        s = method.head(method.backbone(image[None]))[0]
        expected = expected - 0.3 * (s[number % 8 % 4] - s.exp().sum().log()) / len(images)
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-12)
    trained = list(method.parameters())
    gradients = torch.autograd.grad(expected, trained)
    torch.testing.assert_close(torch.autograd.grad(found.loss, trained), gradients, rtol=1e-8, atol=1e-11)
    right = [int(method.classify(image[None]).argmax()) == n % 4 for n, image in enumerate(images)]
    assert float(found.signs["label_accuracy"]) == sum(right) / len(images)


def test_labels_must_be_of_the_teachers_classes(shard_folder):
    with pytest.raises(InputError, match=r"method.support.classes=3: expected 4, all of method.classes"):
        config_of("method.label_weight=0.5", "method.support.classes=3")
    config = config_of("method.label_weight=0.5", "method.support.classes=4", f"data.shards={shard_folder}")
    with pytest.raises(InputError, match=r"method.label_weight=0.5: the classes of .* are not method.classes"):
        require_fit(config, LENGTH)


def test_labels_without_a_weight_are_spoken_of():
    said = "method.support has no effect without method.label_weight"
    assert any(said in line for line in Distillation.complaints(config_of(), LENGTH))
    unused = SupportConfig()
    as_it_is = [f"method.support.{key}={getattr(unused, key)}" for key in ("classes", "images", "views")]
    for fits in (as_it_is, ["method.label_weight=0.5"]):
        assert not any(said in line for line in Distillation.complaints(config_of(*fits), LENGTH))


def test_a_student_that_is_the_teacher_has_the_entropy_as_its_loss_and_no_gradient():
    method = build("model.width=6", "method.hidden=[12]", "method.temperature=2", *NORMALISED_ALIKE).eval()
    method.load_state_dict(read_classifier(teacher()).load(dtype=torch.float64).state_dict())
    found = method(views(), 0)
    torch.testing.assert_close(found.loss, 4 * found.signs["teacher_entropy"], rtol=1e-12, atol=0)
    assert float(found.signs["same_choice"]) == 1 and abs(float(found.signs["divergence"])) < 1e-12
    for gradient in torch.autograd.grad(found.loss, list(method.parameters())):
        assert gradient.abs().max() < 1e-12


def test_a_small_temperature_is_the_cross_entropy_with_the_first_choice():
    generator = torch.Generator().manual_seed(1)
    student, wanted = (torch.randn(32, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    cold = soft_targets(student, 1e4 * wanted, 1.0)
    torch.testing.assert_close(cold.loss, nn.functional.cross_entropy(student, wanted.argmax(1)), rtol=1e-9, atol=0)
    assert float(cold.entropy) < 1e-9


def test_gradients_keep_their_size_at_any_temperature():
    generator = torch.Generator().manual_seed(2)
    wanted = torch.randn(64, 7, generator=generator, dtype=torch.float64)
    sizes = []
    for temperature in (10.0, 100.0, 1000.0):
        student = torch.randn(64, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
        [gradient] = torch.autograd.grad(soft_targets(student, wanted, temperature).loss, student)
        sizes.append(float(gradient.norm()))
    assert sizes == pytest.approx([sizes[0]] * 3, rel=0.1)


def test_the_teacher_is_frozen_and_in_no_checkpoint():
    method = build()
    [held] = method.held
    before = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    method.train()
    for step in range(3):
        loss = method(views(), step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not any(module.training for module in held.modules())
    assert not any(parameter.requires_grad for parameter in held.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.state_dict().items())
    own = {id(parameter) for parameter in method.parameters()}
    assert not own & {id(parameter) for parameter in held.parameters()}
    assert {name.partition(".")[0] for name in method.state_dict()} == {"backbone", "head"}


def test_an_image_is_judged_by_the_teacher_alone():
    """Training-mode BatchNorm would let the others of its batch change what it says of an image."""
    method, batch = build(), views()
    both = method.targets(batch)["wanted"]
    first = method.targets(Views([group[:1] for group in batch.images], batch.ids[:1]))["wanted"]
    torch.testing.assert_close(both[:, :1], first, rtol=1e-10, atol=1e-12)


@pytest.fixture
def other_teacher(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "other.safetensors"
    write_teacher(path, seed=1)
    yield path


def test_another_teacher_is_refused(other_teacher):
    config = config_of()
    require_fit(config, LENGTH)
    moved = config_of(path=other_teacher)
    moved.method.teacher_sha256 = config.method.teacher_sha256
    with pytest.raises(InputError, match=r"another file than the one that method.teacher_sha256 names"):
        require_fit(moved, LENGTH)
    with pytest.raises(InputError, match=r"method.classes: not those of teacher.safetensors, which are 4"):
        require_fit(config_of("method.classes=[a, b, c, d]"), LENGTH)
    with pytest.raises(
        InputError, match=r"method.teacher_sha256 is not set; that of teacher.safetensors is [0-9a-f]{64}"
    ):
        require_fit(config_of('method.teacher_sha256=""'), LENGTH)
    with pytest.raises(InputError, match=r"nowhere: no such file"):
        require_fit(config_of("method.teacher=nowhere"), LENGTH)


def test_without_a_teacher_the_command_is_named():
    with pytest.raises(InputError, match=r"method.classes=\[\]: .*largescale distill TEACHER CONFIG"):
        build_method(load_config(MINI, ["method.classes=[]"]), LENGTH)
    with pytest.raises(InputError, match=r"method.teacher is not set: .*largescale distill TEACHER CONFIG"):
        build_method(load_config(MINI), LENGTH).begin()


def test_what_a_student_is_evaluated_by_needs_no_teacher():
    method = build_method(load_config(MINI), LENGTH).eval()
    images = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(method.classify(images), method.head(method.encode(images)))
    assert method.class_names == CLASSES


@pytest.mark.parametrize("name", ["T-shirt/top", "it's", 'a "b"', "a, b", "007", "no", "k: v", "[x]", "#1", " x"])
def test_names_of_classes_go_through_the_configuration_as_they_are(tmp_path, name):
    overrides = [f"method.classes={json.dumps(['x', name])}", "method.label_weight=0"]
    assert load_config(MINI, overrides).method.classes == ["x", name]


def test_the_small_student_learns_from_the_teacher():
    method = build("data.crops=[{num: 1, size: 24}]", "method.temperature=1")
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.01)
    measured = []
    for step in range(60):
        images = torch.randn(16, 3, 24, 24, generator=torch.Generator().manual_seed(step % 4), dtype=torch.float64)
        found = method(Views([images], torch.arange(16)), step)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        signs = {name: value.float() for name, value in found.signs.items()}
        measured.append(method.measures(float(found.loss.detach()), signs, 16))
    assert measured[-1]["divergence"] < 0.2 * measured[0]["divergence"]
    assert measured[-1]["same_choice"] > 0.8 > measured[0]["same_choice"]


def test_the_doctor_tells_a_teacher_that_says_nothing_and_a_student_that_does_not_follow():
    config, most = config_of(), math.log(len(CLASSES))
    undecided = {"teacher_entropy_over_ln_k": 0.995, "teacher_entropy": 0.995 * most, "divergence": 0.0}
    deaf = {"teacher_entropy_over_ln_k": 0.5, "divergence_over_uniform": 1.01, "divergence": 0.8}
    well = {"teacher_entropy_over_ln_k": 0.5, "divergence_over_uniform": 0.4, "divergence": 0.3}
    assert "teacher is undecided" in said_of(config, undecided)
    assert "nearer to the teacher's than uniform" in said_of(config, deaf)
    assert said_of(config, well) == ""
