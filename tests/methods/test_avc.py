"""Pairs of images and sounds, their distances, and a task that is learnt by what sounds alone.

Covers: largescale/methods/sound_pairs.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from largescale.config import MethodConfig, SoundConfig, load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.avc import AVC
from largescale.methods.method import Output
from largescale.methods.sound_pairs import both_answers, strangers
from largescale.optim.roles import parameters_with
from shards.clips.clip import ClipSettings
from shards.conversion.convert import Options, convert
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.streams import make_stream
from tests.helpers.videos import write_video
from tests.methods.hearing import BATCH, hearing_method, sounding_views

MINI = ROOT / "tests/methods/mini/avc.yaml"
RATE, SECONDS, PLACES = 2000, 0.1, 8
"""Of sounds of the synthetic task, and places of its square."""


def build(*overrides: str) -> AVC:
    return hearing_method(AVC, MINI, *overrides)


def naive_loss(method: AVC, batch: Views, others: list[int]) -> Tensor:
    """The loop of the docstring."""
    slope, shift = method.match.weight[0, 0], method.match.bias[0]

    def match(z: Tensor, s: Tensor) -> Tensor:
        return slope * ((z - s) ** 2).sum().sqrt() + shift

    total, count = torch.zeros((), dtype=torch.float64), 0
    for group in batch.images:
        for i, j in enumerate(others):
            z = method.projection(method.backbone(group[i : i + 1]))[0]
            own, other = (method.sound_projection(method.hearing(batch.sounds[n : n + 1]))[0] for n in (i, j))
            z, own, other = (one / one.norm() for one in (z, own, other))
            total -= torch.log(torch.sigmoid(match(z, own))) / 2 + torch.log(torch.sigmoid(-match(z, other))) / 2
            count += 1
    return total / count


def test_loss_and_gradients_equal_the_naive_loop():
    method, batch = build().double().eval(), sounding_views()
    draws = method.task_views(batch, 2).facts["strangers"][0]
    others = strangers(batch.ids, torch.arange(BATCH), draws).tolist()
    assert (
        len(set(others)) > 2
        and others
        != strangers(batch.ids, torch.arange(BATCH), method.task_views(batch, 3).facts["strangers"][0]).tolist()
    )
    expected, found = naive_loss(method, batch, others), method(batch, 2)
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-12)
    trained = list(method.parameters())
    gradients = torch.autograd.grad(expected, trained)
    torch.testing.assert_close(torch.autograd.grad(found.loss, trained), gradients, rtol=1e-8, atol=1e-10)


def test_a_stranger_is_any_other_sample_and_never_the_same_one():
    ids = torch.tensor([5, 6, 5, 7, 8])
    for place, own in enumerate(ids.tolist()):
        drawn = torch.linspace(0, 1, 401, dtype=torch.float64)[:-1]
        found = strangers(ids, torch.full((400,), place), drawn)
        assert (ids[found] != own).all()
        counts = torch.bincount(found, minlength=5).tolist()
        if own != 5:
            assert counts == [0 if other == place else 100 for other in range(5)]
    assert strangers(ids, torch.arange(5), torch.full((5,), 0.3)).tolist() == [3, 3, 4, 0, 1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Whose sounds begin and end at other times of each clip, and say where they are: a sample is its place."""
    source = tmp_path_factory.mktemp("clips") / "in"
    for number in range(32):
        sound = np.arange(1200 + 80 * (number % 11), dtype=np.int16)
        frames = [np.full((32, 32, 3), 7 * number, np.uint8)] * 16
        start = 0.013 * (number % 7)
        write_video(source / f"{number:02d}.mkv", frames, rate=8, sound=sound, sound_rate=1000, sound_start=start)
    settings = ClipSettings(frame_rate=8.0, clip_seconds=4.0, sound_rate=1000)
    convert(source, source.parent / "shards", Options("clips", samples_per_shard=10, clips=settings))
    return source.parent / "shards"


@pytest.mark.parametrize("grid_s", [0.04, 0.0])
def test_sounds_of_others_start_where_own_ones_do(clips, grid_s, monkeypatch):
    """By their place on the grid of 0.04 s, and by how early in the clip they are."""
    wanted = SoundConfig(seconds=0.5, rate=1000, grid_s=grid_s, loudness=0.0)
    monkeypatch.setattr(MethodConfig, "sounds", lambda self: wanted)
    stream, method = make_stream(clips, "train.global_batch=32", "data.crops=[{num: 2, size: 16}]"), build()
    own, others = [], []
    for batch in stream(range(32)):
        begins = [stream.batches.reader.clip(number).sound_start for number in batch.ids.tolist()]
        starts = batch.sounds[:, 0].long() + (1000 * torch.tensor(begins)).round().long()
        draws = method.task_views(Views([], batch.ids), batch.step).facts["strangers"][0]
        own.append(starts)
        others.append(starts[strangers(batch.ids, torch.arange(32), draws)])
    assert len({*begins}) == 7
    own, others = torch.cat(own), torch.cat(others)
    on_grid = [torch.bincount(starts % 40, minlength=40) / len(starts) for starts in (own, others)]
    assert on_grid[0][0] == on_grid[1][0] == 1 if grid_s else max(one.max() for one in on_grid) < 0.1
    early = [torch.histc(starts.float(), 5, 0, 1501) / len(starts) for starts in (own, others)]
    assert min(one.min() for one in early) > 0.02
    torch.testing.assert_close(early[0], early[1], rtol=0, atol=0.06)


def test_embeddings_share_a_space_and_take_sound_in_either_form():
    method, batch = build().double().eval(), sounding_views()
    images, sounds = method.embed_images(batch.images[0]), method.embed_sounds(batch.sounds)
    assert images.shape == sounds.shape == (BATCH, 8)
    for found in (images, sounds):
        torch.testing.assert_close(found.norm(dim=1), torch.ones(BATCH, dtype=torch.float64))
    torch.testing.assert_close(method.embed_sounds(batch.sounds.double() / 2**15), sounds)


def test_near_belongs_together_from_the_start_and_what_is_unrelated_has_even_odds():
    chances = build().match(torch.tensor([0.0, math.sqrt(2), 2.0])).sigmoid().tolist()
    assert chances[0] > 0.9 and chances[1] == pytest.approx(0.5, abs=1e-6) and chances[2] < 0.3


@pytest.mark.parametrize("name", ["avc", "avol"])
def test_what_makes_logits_is_kept_in_float32_alone(name):
    method = build_method(load_config(MINI.with_name(f"{name}.yaml"), ["data.streams=1"]), Length(18, 3, 40))
    kept = parameters_with(method, method.roles(), "float32")
    assert len(kept) == 2 and all(one is own for one, own in zip(kept, method.match.parameters(), strict=True))


def squares(step: int, count: int, *, related: bool = True) -> Views:
    """A bright square in one of some places from left to right, and a tone whose pitch is the place."""
    generator = np.random.default_rng(step)
    ids = np.arange(count) + count * step
    images = 0.2 * generator.standard_normal((count, 3, 16, 24))
    for image, place in zip(images, ids % PLACES, strict=True):
        top, left = generator.integers(12), 3 * place
        image[:, top : top + 4, left : left + 3] += 3
    heard = ids % PLACES if related else generator.integers(PLACES, size=count)
    phase, times = generator.uniform(0, 2 * np.pi, (count, 1)), np.arange(round(SECONDS * RATE)) / RATE
    tones = 9000 * np.sin(2 * np.pi * (100 + 100 * heard[:, None]) * times + phase)
    tones += 300 * generator.standard_normal(tones.shape)
    sounds = torch.from_numpy(tones.astype(np.int16))
    return Views([torch.from_numpy(images).float()], torch.from_numpy(ids), sounds=sounds)


def small() -> tuple[AVC, torch.optim.Optimizer]:
    method = build("data.crops=[{num: 1, size: 24}]", "method.sound_widths=[8, 16]", "method.embedding=16")
    return method, torch.optim.AdamW(method.parameters(), lr=0.01)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def told_right(steps: int, *, related: bool) -> Tensor:
    """After some steps, the share told right of own sounds, and of those of others from another place."""
    method, optimizer = small()
    for step in range(steps):
        update(optimizer, method(squares(step, 64, related=related), step).loss)
    method.eval()
    batch = squares(10**6, 512, related=related)
    with torch.no_grad():
        right = method(batch, 0).evidence["logits"][0].argmax(-1) == torch.tensor([1, 0])
    others = strangers(batch.ids, torch.arange(512), method.task_views(batch, 0).facts["strangers"][0])
    return torch.stack(
        [right[:, 0].float().mean(), right[batch.ids[others] % PLACES != batch.ids % PLACES, 1].float().mean()]
    )


def test_the_pitch_of_a_square_s_place_is_found_in_seconds():
    assert told_right(200, related=True).min() > 0.95


def test_a_pitch_that_has_nothing_to_do_with_the_place_is_at_chance():
    assert float(told_right(60, related=False).mean()) == pytest.approx(0.5, abs=0.06)


def clicks(generator: np.random.Generator, grid: int, count: int = 64) -> Tensor:
    """Windows of noise with a trace of a codec, a click every 80 samples of the clip; windows start on a grid."""
    sounds = 100 * generator.standard_normal((count, 480))
    sounds[:, ::80] += 8000
    starts = grid * generator.integers(280 // grid, size=count)
    return torch.from_numpy(
        np.stack([sound[start : start + 200] for sound, start in zip(sounds, starts, strict=True)])
    ).to(torch.int16)


@pytest.mark.parametrize("grid, found", [(1, True), (80, False)])
def test_others_that_start_freely_are_told_by_their_start_alone_and_on_the_grid_they_are_not(grid, found):
    """Images are noise: there is nothing to be learnt."""
    method, optimizer = small()

    def told(step: int) -> Output:
        generator = np.random.default_rng(step)
        images = torch.from_numpy(generator.standard_normal((64, 3, 24, 24))).float()
        seen = method.embed_images(images)[None, :, None]
        heard = torch.stack([method.embed_sounds(clicks(generator, one)) for one in (80, grid)], dim=1)
        distances = (seen - heard).norm(dim=-1)
        wanted = torch.tensor([1, 0]).expand(1, 64, 2)
        inputs = {"logits": both_answers(method.match(distances)), "distances": distances, "wanted": wanted}
        return method.loss(inputs, torch.arange(64), step)

    for step in range(80):
        update(optimizer, told(step).loss)
    method.eval()
    accuracy = float(torch.stack([told(10**6 + step).signs["task_accuracy"] for step in range(4)]).mean())
    assert accuracy > 0.85 if found else accuracy == pytest.approx(0.5, abs=0.06)


def test_it_starts_near_chance():
    found = build()(squares(0, 64), 0)
    assert float(found.signs["task_accuracy"]) == pytest.approx(0.5, abs=0.1)
    assert set(found.signs) == set(build().signs)


def test_settings_that_cannot_work_are_refused():
    for override, line in (
        ("train.accumulate=6", "at least 2 per micro-batch"),
        ("method.sound_widths=[4,4,4,4,4]", "a spectrogram of 17 x 20, which so many make of at least 31 x 31"),
    ):
        with pytest.raises(InputError, match=line):
            load_config(MINI, ["train.global_batch=6", "data.streams=1", override])


def test_what_is_not_learnt_and_what_is_too_easy_are_said():
    config = load_config(MINI)
    row = {"loss": 0.69, "loss_over_ln_k": 0.995, "task_accuracy": 0.5}
    assert said_of(config, row).startswith("task is not learnt") and "what is heard" in said_of(config, row)
    assert said_of(config, {"loss": 0, "loss_over_ln_k": 0.0, "task_accuracy": 1.0}).startswith("task too easy")
    assert said_of(config, {"loss": 0.3, "loss_over_ln_k": 0.5, "task_accuracy": 0.85}) == ""
