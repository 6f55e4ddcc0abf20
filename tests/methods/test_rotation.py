from __future__ import annotations

import pytest
import torch
from torch import Tensor

from largescale.config import load_config
from largescale.data.crops import crop
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.rotation import Rotation
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of

MINI = ROOT / "tests/methods/mini/rotation.yaml"
BATCH = 6
LENGTH = Length(18, 3, 40)


def build(*overrides: str) -> Rotation:
    config = load_config(MINI, [f"train.global_batch={BATCH}", "data.streams=1", *overrides])
    torch.manual_seed(0)
    return build_method(config, LENGTH)


def views(step: int = 0) -> Views:
    generator = torch.Generator().manual_seed(step)
    images = [torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64) for side in (24, 16)]
    return Views(images, torch.randint(40, (BATCH,), generator=generator))


def naive_loss(method: Rotation, batch: Views, turns: list[list[list[int]]]) -> Tensor:
    """The loop of the docstring; `turns` of each view of each image."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for group, of_images in zip(batch.images, turns, strict=True):
        for image, own in zip(group, of_images, strict=True):
            for turn in own:
                x = method.backbone(torch.rot90(image, turn, (1, 2))[None])[0]
                for place, layer in enumerate(m for m in method.head if isinstance(m, torch.nn.Linear)):
                    x = layer.weight @ (torch.relu(x) if place else x) + layer.bias
                total, count = total - torch.log_softmax(x, 0)[turn], count + 1
    return total / count


@pytest.mark.parametrize("hidden", [[], [10]])
@pytest.mark.parametrize("turns", ["all", "one"])
def test_loss_and_gradients_equal_the_naive_loop(turns, hidden):
    method, batch = build(f"method.turns={turns}", f"method.hidden={hidden}").double().eval(), views()
    seen = method.task_views(batch, step=2).facts["turns"]
    if turns == "all":
        assert seen.shape == (8, BATCH)
        theirs = [[[0, 1, 2, 3]] * BATCH] * 2
    else:
        assert seen.shape == (2, BATCH) and len(seen.unique()) > 2 and not torch.equal(seen[0], seen[1])
        theirs = [[[turn] for turn in view] for view in seen.tolist()]
    expected, found = naive_loss(method, batch, theirs), method(batch, 2)
    torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=1e-14)
    trained = list(method.parameters())
    gradients = torch.autograd.grad(expected, trained)
    torch.testing.assert_close(torch.autograd.grad(found.loss, trained), gradients, rtol=1e-9, atol=1e-12)


def corners(step: int, count: int) -> Views:
    """Noise that is bright at the upper left."""
    generator = torch.Generator().manual_seed(step)
    images = 0.3 * torch.randn(count, 3, 16, 16, generator=generator)
    images[:, :, :6, :6] += 2
    return Views([images], torch.arange(count) + count * step)


@pytest.mark.parametrize("turns", ["all", "one"])
def test_a_bright_corner_says_what_is_up_within_50_steps(turns):
    method = build(f"method.turns={turns}", "data.crops=[{num: 1, size: 16}]")
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.01)
    start = method(corners(0, 64), 0)
    assert float(start.signs["task_accuracy"]) < 0.45
    for step in range(50):
        loss = method(corners(step, 16), step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    method.eval()
    assert float(method(corners(1000, 64), 0).signs["task_accuracy"]) > 0.98


def test_it_starts_at_chance():
    """Noise has no upper side."""
    method = build("method.turns=all", "method.hidden=[]")
    found = method(Views([torch.randn(200, 3, side, side) for side in (24, 16)], torch.arange(200)), 0)
    assert float(found.signs["task_accuracy"]) == pytest.approx(1 / 4, abs=0.03)
    assert method.measures(float(found.loss.detach()), {}, 0)["loss_over_ln_k"] == pytest.approx(1, abs=0.2)


def squeezed_noise(generator: torch.Generator, width: int) -> Views:
    """Crops of noise that has no upper side, of 16 x `width` px, made square as those of a run are."""
    images = torch.randint(256, (32, 3, 16, width), dtype=torch.uint8, generator=generator)
    views = torch.empty(32, 3, 16, 16, dtype=torch.uint8)
    for image, out in zip(images, views, strict=True):
        crop(image, [0, 0, 16, width], 16, out[None])
    normal = (views.float() - 127.5) / views.float().std()
    return Views([normal], torch.randint(2**40, (32,), generator=generator))


@pytest.mark.parametrize("width, least, most", [(32, 0.44, 0.56), (16, 0.18, 0.32)])
def test_squeezed_crops_tell_a_quarter_from_a_half_and_square_ones_tell_nothing(width, least, most):
    """Squeezed noise is finer along one side; half of the answers are right where a quarter is chance."""
    method, generator = build("method.turns=one", "data.crops=[{num: 1, size: 16}]"), torch.Generator().manual_seed(0)
    optimizer, shares = torch.optim.Adam(method.parameters(), lr=0.01), []
    for step in range(60):
        output = method(squeezed_noise(generator, width), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        shares.append(float(output.signs["task_accuracy"]))
    assert least < sum(shares[-20:]) / 20 < most


def test_views_rotated_by_augmentation_are_complained_of():
    config = load_config(MINI, ["data.augment.rotate_degrees=45"])
    [line] = [one for one in Rotation.complaints(config, LENGTH) if "rotate_degrees" in one]
    assert line.startswith("data.augment.rotate_degrees=45: views that are rotated so far do not show")
    assert not Rotation.complaints(load_config(MINI, ["data.augment.rotate_degrees=10"]), LENGTH)


def test_turns_that_are_not_found_and_those_that_something_gives_away_are_said():
    config = load_config(MINI)
    assert said_of(config, {"loss": 1.38, "loss_over_ln_k": 0.995, "task_accuracy": 0.26}).startswith(
        "task is not learnt"
    )
    assert said_of(config, {"loss": 0, "loss_over_ln_k": 0.0, "task_accuracy": 1.0}).startswith("task too easy")
    assert said_of(config, {"loss": 0.3, "loss_over_ln_k": 0.2, "task_accuracy": 0.9}) == ""
