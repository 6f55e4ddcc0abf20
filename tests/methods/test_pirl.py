from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from largescale.config import load_config
from largescale.data.device_random import uniform
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.pirl import PIRL
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.ranks import Counted, run_ranks
from tests.methods.begun import begun

MINI = ROOT / "tests/methods/mini/pirl.yaml"
BATCH, SAMPLES = 6, 9


def build(*overrides: str) -> PIRL:
    return begun(PIRL, MINI, BATCH, Length(8, 1, SAMPLES), *overrides)


def views(step: int = 0) -> Views:
    """Of samples some of which come twice."""
    generator = torch.Generator().manual_seed(step)
    images = [torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64) for side in (24, 26)]
    return Views(images, torch.randint(SAMPLES, (BATCH,), generator=generator))


def embed(method: PIRL, batch: Views, step: int) -> tuple[list[Tensor], list[Tensor]]:
    """Embeddings of patches and of images, an image at a time."""
    images, patches = method.task_views(batch, step).images
    of_patches, of_images = [], []
    for image, own in zip(images, patches.unflatten(0, (BATCH, -1)), strict=True):
        each = torch.cat([method.patch_projection(method.backbone(patch[None]))[0] for patch in own])
        of_patches.append(normalize(method.patches_together(each), dim=0))
        of_images.append(normalize(method.projection(method.backbone(image[None]))[0], dim=0))
    return of_patches, of_images


def test_loss_gradient_and_bank_equal_the_naive_loop_over_steps():
    """The bank as a dict from id to vector; Z is that of the first batch; of an id that comes twice the last stays."""
    method = build().eval()
    bank, z = dict(enumerate(method.bank.own.clone())), None
    settings = method.config
    n, momentum = settings.negatives, settings.bank_momentum
    for step in range(4):
        batch = views(step)
        of_patches, of_images = embed(method, batch, step)
        draws = uniform(0, step, 41, num=n, device=torch.device("cpu")).tolist()
        others, ids = [int(draw * SAMPLES) for draw in draws], batch.ids.tolist()

        def similarity(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(a @ b / settings.temperature)

        if z is None:
            pairs = [
                float(similarity(one, bank[row]).detach())
                for kind in (of_patches, of_images)
                for one, own in zip(kind, ids, strict=True)
                for row in (own, *others)
            ]
            z = SAMPLES * sum(pairs) / len(pairs)
        expected = torch.zeros((), dtype=torch.float64)
        for kind in (of_patches, of_images):
            for one, own in zip(kind, ids, strict=True):
                p = similarity(one, bank[own]) / z
                expected = expected - torch.log(p / (p + n / SAMPLES)) / 2
                for row in others:
                    p = similarity(one, bank[row]) / z
                    expected = expected - torch.log(1 - p / (p + n / SAMPLES)) / 2
        loss = method(batch, step).loss
        torch.testing.assert_close(loss, expected / BATCH, rtol=1e-11, atol=0)
        parameters = list(method.parameters())
        for ours, theirs in zip(
            torch.autograd.grad(loss, parameters), torch.autograd.grad(expected / BATCH, parameters), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        old = dict(bank)
        for one, own in zip(of_images, ids, strict=True):
            bank[own] = normalize(momentum * old[own] + (1 - momentum) * one.detach(), dim=0)
        torch.testing.assert_close(method.bank.own, torch.stack(list(bank.values())), rtol=0, atol=1e-14)
    assert min(len(set(views(step).ids.tolist())) for step in range(4)) < BATCH, "no sample came twice"


def count_exchanges() -> list[list[tuple[str, int]]]:
    """Of two steps in one micro-batch, and of one step in three."""
    calls = []
    for steps, parts in ((2, 1), (1, 3)):
        method, piece = build(f"train.accumulate={parts}").eval(), BATCH // 2 // parts
        with Counted() as counted:
            for step, part in itertools.product(range(steps), range(parts)):
                whole, first = views(step), (2 * part + dist.get_rank()) * piece
                method(Views([images[first:][:piece] for images in whole.images], whole.ids[first:][:piece]), step)
        calls.append(counted.calls)
    return calls


@pytest.mark.distributed
def test_a_step_exchanges_ids_embeddings_and_rows_once():
    """Besides Z, once in a run. Gathers are counted by their results."""
    [(calls, in_three_parts), _] = run_ranks(count_exchanges, 2, timeout_s=600)
    gathered = [size for name, size in calls if name.startswith("all_gather")]
    reduced = [size for name, size in calls if name == "all_reduce"]
    rows = (BATCH + 12) * 8
    assert gathered == [BATCH, BATCH * 8] * 2 and reduced == [rows, 1, rows] and len(calls) == 7
    reduced = [size for name, size in in_three_parts if name == "all_reduce"]
    assert reduced == [(2 + 12) * 8, 1, 2 * 8, 2 * 8], "the images at random, once"


def test_running_statistics_are_those_of_images():
    """They are what evaluation uses; patches have others."""
    method, batch = build().train(), views()
    alone = copy.deepcopy(method.backbone)
    alone(batch.images[0])
    method(batch, 0)
    for (name, ours), expected in zip(method.backbone.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, msg=name)


def test_a_bank_row_is_a_unit_vector_from_the_start_whatever_the_ranks():
    """A mean over ranks of random rows, as in published code, is shorter."""
    torch.testing.assert_close(build().bank.own.norm(dim=1), torch.ones(SAMPLES, dtype=torch.float64))


def test_a_bank_may_start_from_what_the_network_makes_of_images():
    """Minus their mean; what could not be read stays random. Only before the first step, and only if asked for."""
    method = build()
    vectors = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    vectors, readable = normalize(vectors + 20, dim=1), torch.arange(SAMPLES) != 7  # one large direction
    random = method.bank.own[7].clone()
    method.phase(0, PlainEmbeddings(vectors[readable], readable), lambda what: None)
    expected = normalize(vectors[readable] - vectors[readable].mean(0), dim=1)
    torch.testing.assert_close(method.bank.own[readable], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(method.bank.own[7], random)
    assert [step for step in range(20) if method.phase_due(step)] == [0]
    assert not any(build("method.bank_start=random").phase_due(step) for step in range(20))


def test_what_a_phase_knows_of_an_image_does_not_depend_on_others():
    method, images = build(), views().images[0]
    alone = torch.cat([method.plain(image[None]) for image in images])
    torch.testing.assert_close(method.plain(images), alone)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(BATCH, dtype=torch.float64))


def test_equal_embeddings_cost_a_guess_and_are_called_collapse():
    method = build().eval()
    row = torch.ones(8, dtype=torch.float64) / math.sqrt(8)
    with torch.no_grad():
        for layer in (method.projection[-1], method.patches_together):
            layer.weight.zero_()
            layer.bias.copy_(row)
        method.bank.own.copy_(row.expand_as(method.bank.own))
    output = method(views(), 0)
    loss = float(output.loss.detach())
    config = load_config(MINI)
    assert loss == pytest.approx(method.loss_references(config)["a guess"])
    found = method.measures(loss, output.signs, BATCH)
    assert "looks like collapse" in said_of(config, found)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.crops=[{num: 2, size: 24}]"], "data.crops=[2]: expected two groups of one view each"),
        (["method.patch=14"], "method.patch=14: expected at most 13, the side of a cell of data.crops.1"),
        (["model.backbone=vgg16_bn", "model.stem=imagenet"], "method.patch=12: expected at least 32 with"),
        (["method.max_bank_gb=1e-8"], "method.max_bank_gb=1e-08: rows of 8 numbers for 9 images take"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        build(*overrides)
    assert words in str(refusal.value)


def test_a_run_in_which_no_image_comes_back_is_said_and_images_that_meet_themselves():
    config = load_config(MINI, ["method.bank_start=random"])
    assert PIRL.complaints(config, Length(30, 10, 60)) == []
    [short] = PIRL.complaints(config, Length(10, 10, 60))
    assert short.startswith("the run has 1 epochs: rows of the bank are random") and "set train.epochs=3" in short
    network = load_config(MINI)
    assert PIRL.complaints(network, Length(10, 10, 60)) == []
    [many] = PIRL.complaints(config, Length(30, 2, 12))
    assert many.startswith("method.negatives=12: as many as there are images, 12") and many.endswith("negatives=6")


def test_a_bank_in_double_precision_is_twice_as_large():
    gb = SAMPLES * 8 * 4 / 1e9
    for precision, words in (("fp32", ""), ("fp64", "for 9 images take 5.76e-07 GB on each of 1 rank; use more")):
        overrides = [f"method.max_bank_gb={gb}", f"train.precision={precision}", "method.bank_start=random"]
        config = load_config(MINI, overrides)
        assert PIRL.phase_bytes(config, SAMPLES) == 0
        line = PIRL.misfit(config, Length(8, 1, SAMPLES))
        assert words in line and bool(line) == bool(words)


def test_embeddings_that_fill_the_bank_are_held_beside_it():
    gb = SAMPLES * 8 * 4 / 1e9
    config = load_config(MINI, [f"method.max_bank_gb={1.5 * gb}", "train.precision=fp32"])
    assert PIRL.phase_bytes(config, SAMPLES) / 1e9 == pytest.approx(2 * gb)
    assert PIRL.misfit(config, Length(8, 1, SAMPLES)).startswith(
        f"method.max_bank_gb={1.5 * gb:g}: the bank and the embeddings that fill it before the first step take "
        "5.76e-07 GB on each of 1 rank"
    )
    assert PIRL.misfit(load_config(MINI, [f"method.max_bank_gb={4.1 * gb}"]), Length(8, 1, SAMPLES)) == "", (
        "in double precision"
    )


def test_once_z_is_fixed_the_loss_is_a_mean_over_images():
    """So that it may not span the global batch, see `test_embedding_method.py`."""
    whole, cut = build().eval(), build("train.accumulate=2").eval()
    batch = views(1)
    half = BATCH // 2
    halves = [
        Views([images[part] for images in batch.images], batch.ids[part]) for part in (slice(half), slice(half, BATCH))
    ]
    for method in (whole, cut):
        method.log_z.fill_(math.log(5))
    parts = torch.stack([cut(one, 1).loss for one in halves])
    torch.testing.assert_close(parts.mean(), whole(batch, 1).loss, rtol=1e-12, atol=0)
    assert torch.equal(cut.bank.own, whole.bank.own)
