"""Tasks on frames of clips: what they share, and that they tell order of what moves and not of what does not."""

from __future__ import annotations

import pytest
import torch

from largescale.config import Config
from largescale.data.views import Views
from largescale.methods import METHODS, build_method
from largescale.methods.frame_task import FrameTask
from tests.methods.harness import mini

TASKS = [name for name, method in METHODS.items() if issubclass(method, FrameTask)]
BATCH, SIDE = 48, 16


def tiny(name: str, *overrides: str) -> Config:
    num = mini(name).data.crops[0].num
    own = {"opn": ["method.jitter=0", "method.pair=32"], "shuffle_learn": ["method.hidden=[32]"]}
    crops = f"data.crops=[{{num: {num}, size: {SIDE}}}]"
    return mini(name, "train.precision=fp32", crops, "method.embedding=[32]", "model.width=16", *own[name], *overrides)


def growing_squares(config: Config, generator: torch.Generator, moves: bool) -> Views:
    """Noise with a square whose side tells the time of a frame, of as many clips; if `moves` is false, nothing does."""
    wanted, count = config.method.frame_tuples(), config.data.crops[0].num
    places = torch.arange(wanted.drawn) + 0.4 * torch.rand(BATCH, wanted.drawn, generator=generator)
    places = 2 + places * (SIDE - 4) / wanted.drawn
    number = torch.multinomial(torch.tensor(wanted.chances), BATCH, replacement=True, generator=generator)
    shown = torch.gather(places, 1, torch.tensor(wanted.orders)[number])
    sides = shown if moves else torch.rand(BATCH, count, generator=generator) * (SIDE - 4) + 2
    along = torch.arange(SIDE)
    inside = (along < sides[..., None]).float()
    images = 2 * inside[..., None] * inside[..., None, :] - 1  # [B, F, S, S]
    images = images.transpose(0, 1).flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    ids = torch.randint(10**6, (BATCH,), generator=generator)
    return Views([images], ids, {"times_us": (1e6 * shown.T).long()})


def learn(config: Config, moves: bool, steps: int) -> list[float]:
    torch.manual_seed(0)
    method = build_method(config)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.003)
    generator, found = torch.Generator().manual_seed(1), []
    for step in range(steps):
        output = method(growing_squares(config, generator, moves), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        found.append(float(output.signs["task_accuracy"]))
    return found


def chance(name: str) -> float:
    return max(METHODS[name].class_shares(tiny(name)))


@pytest.mark.parametrize("name", TASKS)
def test_what_changes_with_time_is_put_in_order_and_nothing_else(name):
    found = learn(tiny(name), True, 120)
    assert abs(sum(found[:3]) / 3 - chance(name)) < 0.3 and sum(found[-20:]) / 20 > 0.95
    still = learn(tiny(name), False, 60)
    assert sum(still[-20:]) / 20 < chance(name) + 0.05
