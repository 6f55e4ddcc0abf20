from __future__ import annotations

import json
import math
import shutil
from itertools import product

import pytest
import torch

from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.task_views.colour_bins import rebalancing
from largescale.data.task_views.lab import lab_of, srgb_of
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.colorization import Colorization
from largescale.methods.phase import PlainEmbeddings
from shards.ground.errors import InputError
from tests.helpers.coloured import coloured_shards
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.launcher import run_largescale
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import losses
from tests.methods.harness import mini

BATCH, SIDE, CELL = 4, 24, 4


def build(*overrides: str) -> Colorization:
    torch.manual_seed(0)
    method = build_method(mini("colorization", *overrides), Length(8, 1, 40))
    assert isinstance(method, Colorization)
    method.begin()
    return method.double()


def normalised(srgb: torch.Tensor) -> torch.Tensor:
    data = mini("colorization").data
    mean, std = (torch.tensor(values, dtype=srgb.dtype)[:, None, None] for values in (data.mean, data.std))
    return (srgb - mean) / std


def random_srgb(batch: int = BATCH, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def views(srgb: torch.Tensor) -> Views:
    return Views([normalised(srgb)], torch.arange(len(srgb)))


def with_prior(method: Colorization) -> Colorization:
    """A prior that is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(len(method.bins), generator=generator, dtype=torch.float64) ** 4
    method.prior.copy_(shares / shares.sum())
    method.weights.copy_(rebalancing(method.prior, method.bins, 5.0, 0.5))
    return method


def test_the_loss_is_that_of_a_loop():
    method, srgb = with_prior(build()).eval(), random_srgb()
    srgb[2] = srgb[2, :1]  # without colours
    batch = views(srgb)
    logits = method.embed(method.task_views(batch, 3))["logits"][0]
    lab, bins, total, weighed, right = lab_of(srgb), method.bins.tolist(), 0.0, 0.0, 0.0
    for image, row, column in product(range(BATCH), range(SIDE // CELL), range(SIDE // CELL)):
        colour = lab[image, 1:, CELL * row + 2, CELL * column + 2].tolist()
        order = sorted(range(len(bins)), key=lambda q: math.dist(colour, bins[q]))[:5]
        shares = [math.exp(-(math.dist(colour, bins[q]) ** 2) / 50) for q in order]
        own = logits[image, row, column].tolist()
        log_sum = math.log(sum(map(math.exp, own)))
        cost = sum(share / sum(shares) * (log_sum - own[q]) for share, q in zip(shares, order, strict=True))
        weight = float(method.weights[order[0]]) if image != 2 else 0.0
        total, weighed = total + weight * cost, weighed + weight
        right += weight * (max(range(len(own)), key=own.__getitem__) == order[0])
    cells = BATCH * (SIDE // CELL) ** 2
    output = method(batch, 3)
    loss = float(output.loss.detach())
    assert loss == pytest.approx(total / cells, rel=1e-9)
    row = method.measures(loss, output.signs, BATCH)
    assert row["task_accuracy"] == pytest.approx(right / weighed)
    assert row["loss_over_ln_k"] == pytest.approx(total / weighed / loss_of_one_answer(method), rel=1e-9)
    assert row["coloured"] == pytest.approx(3 / 4)


def best_answer(method: Colorization) -> torch.Tensor:
    """Of those that are always the same, for colours in the middle of their bins: shares [Q]."""
    found, bins = torch.zeros_like(method.prior), method.bins.tolist()
    for q, (share, weight) in enumerate(zip(method.prior.tolist(), method.weights.tolist(), strict=True)):
        near = sorted(range(len(bins)), key=lambda other, q=q: math.dist(bins[q], bins[other]))[:5]
        parts = [math.exp(-(math.dist(bins[q], bins[other]) ** 2) / 50) for other in near]
        for other, part in zip(near, parts, strict=True):
            found[other] += share * weight * part / sum(parts)
    return found


def loss_of_one_answer(method: Colorization) -> float:
    return sum(-share * math.log(share) for share in best_answer(method).tolist() if share > 0)


def test_uniform_answers_cost_ln_k_and_the_best_one_for_all_is_called_unlearnt():
    """Though rare colours, of which there are many, make it far better than uniform."""
    method, config = build(), mini("colorization")
    counts = torch.zeros(len(method.bins), dtype=torch.int64)
    counts[torch.tensor([3, 20, 40, 60])] = torch.tensor([1, 2, 3, 30])  # 36 cells
    method.prior.copy_(counts / counts.sum())
    method.weights.copy_(rebalancing(method.prior, method.bins, 5.0, 0.5))
    colours = method.bins.repeat_interleave(counts, 0).view(1, 1, 6, 6, 2)
    for logits, cost in (
        (torch.zeros_like(method.prior), math.log(len(method.bins))),
        (best_answer(method).log(), None),
    ):
        given = {"logits": logits.clamp_min(-700).expand(1, 1, 6, 6, -1), "colours": colours}
        output = method.loss(given, torch.arange(1), 0)
        row = method.measures(float(output.loss), output.signs, 1)
        assert float(output.loss) == pytest.approx(cost or loss_of_one_answer(method), rel=1e-6)
        assert row["loss_over_ln_k"] == pytest.approx((cost or loss_of_one_answer(method)) / loss_of_one_answer(method))
        assert "predictions are no better than one answer for all" in said_of(config, row)
    assert row["loss_over_ln_k"] == pytest.approx(1) and float(output.loss) < 0.6 * math.log(len(method.bins))
    row = method.measures(float(output.loss), output.signs, BATCH)
    assert said_of(config, row | {"loss_over_ln_k": 0.8}) == ""
    assert "20% of the images show colours" in said_of(config, row | {"loss_over_ln_k": 0.8, "coloured": 0.2})
    for panel in method.panels(config):
        assert set(panel.columns.values()) <= set(row)


def test_chance_is_the_best_answer_that_is_always_the_same():
    """Over the colours that the prior is of."""
    method = with_prior(build())
    signs = {name: torch.tensor(1.0) for name in method.signs}
    weighed = (method.prior * method.weights).tolist()
    assert method.measures(0.0, signs, 1)["task_chance"] == pytest.approx(max(weighed))
    assert sum(weighed) == pytest.approx(1)


def test_right_answers_have_no_error_and_grey_ones_that_of_grey():
    method, batch = build("method.temperature=0.01"), views(random_srgb())
    facts = method.task_views(batch, 0)
    colours = method.bins[torch.randint(len(method.bins), (BATCH, 6, 6), generator=torch.Generator().manual_seed(0))]
    nearest = (colours[..., None, :] == method.bins).all(-1).double()
    output = method.loss({"logits": 100 * nearest[None], "colours": colours[None]}, facts.ids, 0)
    row = method.measures(0.0, output.signs, BATCH)
    assert row["task_accuracy"] == 1 and row["colour_error"] == pytest.approx(0, abs=1e-6)
    grey = (method.bins == 0).all(1).double().expand_as(nearest)
    output = method.loss({"logits": 100 * grey[None], "colours": colours[None]}, facts.ids, 0)
    row = method.measures(0.0, output.signs, BATCH)
    assert row["colour_error"] == pytest.approx(row["grey_error"])
    assert row["grey_error"] == pytest.approx(float(colours.square().sum(-1).mean().sqrt()))


def test_images_without_colours_teach_nothing():
    """Else they would teach that everything is grey."""
    method, srgb = build().eval(), random_srgb(2)
    grey = srgb[1:].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    gradients = []
    for images in (srgb[:1], torch.cat([srgb[:1], grey])):
        method.zero_grad()
        (method(views(images), 0).loss * len(images)).backward()
        gradients.append([parameter.grad.clone() for parameter in method.parameters() if parameter.grad is not None])
    for alone, beside in zip(*gradients, strict=True):
        torch.testing.assert_close(beside, alone, rtol=1e-9, atol=1e-12)


def test_the_network_sees_lightness_alone():
    """Images of one lightness in other colours are one image to it; so colours can be told by what is shown only."""
    lightness = 40 + 20 * random_srgb(1)[:, :1]
    red, blue = (
        srgb_of(torch.cat([lightness, torch.full_like(lightness, a), torch.full_like(lightness, b)], dim=1))
        for a, b in ((25.0, 10.0), (-5.0, -25.0))
    )
    method = build()
    shown = [method.task_views(views(images), 0) for images in (red, blue)]
    torch.testing.assert_close(shown[0].images[0], shown[1].images[0], rtol=0, atol=1e-4)
    assert float((shown[0].facts["colours"] - shown[1].facts["colours"]).norm(dim=-1).min()) > 40
    back = shown[0].images[0] - normalised(torch.zeros(3, 1, 1, dtype=torch.float64))
    grey = back * torch.tensor(mini("colorization").data.std, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(grey, grey[:, :1].expand_as(grey))
    torch.testing.assert_close(lab_of(grey)[:, :1], lightness, rtol=0, atol=1e-3)


def test_augmentation_that_leaves_the_range_of_colours_is_cut():
    method = build()
    beyond = method.task_views(views(1.4 * random_srgb() - 0.2), 0)
    cut = method.task_views(views((1.4 * random_srgb() - 0.2).clamp(0, 1)), 0)
    assert torch.equal(beyond.images[0], cut.images[0]) and torch.equal(beyond.facts["colours"], cut.facts["colours"])


def corpus() -> torch.Tensor:
    """Nine images, one of them grey."""
    srgb = random_srgb(9) ** torch.linspace(0.3, 3, 9)[:, None, None, None]
    srgb[4] = srgb[4, 0]
    return srgb


def prior_of(ranks_part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Prior and weights of a corpus of which each rank has a part."""
    method = build()
    own = ranks_part.tensor_split(torch.distributed.get_world_size())[torch.distributed.get_rank()]
    rows = method.plain(normalised(own))
    found = method.phase(0, PlainEmbeddings(rows.sum(0, keepdim=True), torch.ones(len(own), dtype=torch.bool)), print)
    return method.prior, method.weights, found


@pytest.mark.distributed
def test_the_prior_is_that_of_a_loop_for_any_number_of_ranks(group_of_one):
    alone = prior_of(corpus())
    for ranks in run_ranks(prior_of, 2, corpus(), timeout_s=600):
        assert torch.equal(ranks[0], alone[0]) and torch.equal(ranks[1], alone[1]) and ranks[2] == alone[2]
    lab, bins = lab_of(corpus()), build().bins.tolist()
    counts = [0] * len(bins)
    for image, row, column in product([*range(4), *range(5, 9)], range(2, SIDE, CELL), range(2, SIDE, CELL)):
        colour = lab[image, 1:, row, column].tolist()
        counts[min(range(len(bins)), key=lambda q: math.dist(colour, bins[q]))] += 1
    assert alone[0].tolist() == pytest.approx([count / sum(counts) for count in counts], rel=1e-6)
    assert float((alone[0] * alone[1]).sum()) == pytest.approx(1, rel=1e-6)
    assert alone[2]["coloured_images"] == pytest.approx(8 / 9)
    assert alone[2]["bins_used"] == pytest.approx(sum(count > 0 for count in counts) / len(bins))


def test_a_corpus_without_colours_is_refused(group_of_one):
    grey = random_srgb(3)[:, :1].expand(-1, 3, -1, -1)
    with pytest.raises(InputError, match=r"none of 3 images shows colours, which method.name=colorization is to tell"):
        prior_of(grey.contiguous())


@pytest.mark.distributed
def test_a_run_counts_colours_once_and_goes_on_with_other_ranks(tmp_path):
    run = tmp_path / "run"
    shared = [
        "pretrain",
        str(ROOT / "tests/methods/mini/colorization.yaml"),
        f"data.shards={coloured_shards(tmp_path, 60, seed=0)}",
        f"run.dir={run}",
        "data.augment.jitter=0",
        "data.augment.grayscale=0",
        "run.log_every=1",
        "train.steps=6",
        "checkpoint.every_steps=3",
        "checkpoint.keep=9",
        "evaluate.batch=7",
    ]
    run_largescale(*shared, "parallel.strategy=fsdp", ranks=2)
    before = losses(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "coloured_images" in row] == [0]
    assert rows[0]["coloured_images"] == 1 and 0 < rows[0]["bins_used"] < 0.3
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    run_largescale(*shared, "parallel.strategy=ddp")
    assert losses(run) == pytest.approx(before, rel=1e-8)


def shapes(batch: int, step: int, *, colour_of_shape: bool = True) -> torch.Tensor:
    """A disc is red and a square blue, or either is one of both; on grey, somewhere and of some lightness."""
    generator = torch.Generator().manual_seed(step)
    x, y = 7 + 10 * torch.rand(2, batch, 1, 1, generator=generator)
    lightness = 45 + 20 * torch.rand(batch, 1, 1, generator=generator)
    place, disc = torch.arange(SIDE) + 0.5, torch.arange(batch)[:, None, None] % 2 == 0
    across, down = (place - x).abs(), (place[:, None] - y).abs()
    inside = torch.where(disc, across**2 + down**2 < 36, torch.maximum(across, down) < 5.3)
    is_red = disc if colour_of_shape else torch.rand(batch, 1, 1, generator=generator) < 0.5
    a, b = (torch.where(is_red, red, blue) * inside for red, blue in ((60.0, 10.0), (40.0, -50.0)))
    return srgb_of(torch.stack([torch.where(inside, lightness, 80.0), a, b], dim=1))


def learnt(method: Colorization, steps: int, *, colour_of_shape: bool = True) -> list[dict[str, float]]:
    """What is logged of each step of a training."""

    def images(batch: int, step: int) -> torch.Tensor:
        return normalised(shapes(batch, step, colour_of_shape=colour_of_shape)).float()

    counts = method.plain(images(200, 10**6)).sum(0)[:-1]
    method.prior.copy_(counts / counts.sum())
    method.weights.copy_(rebalancing(method.prior, method.bins, 5.0, 0.5))
    optimizer = torch.optim.Adam(method.parameters(), lr=0.005)
    rows = []
    for step in range(steps):
        output = method(Views([images(32, step)], torch.arange(32)), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        rows.append(method.measures(float(output.loss.detach()), output.signs, 32))
    return rows


def mean_of_last(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows[-10:]) / 10


SMALL = ["train.precision=fp32", "method.decoder=[32, 32]", "model.width=16"]


def test_it_learns_that_shape_decides_colour():
    """From chance to nearly all cells, each colour weighed alike."""
    rows = learnt(build(*SMALL).float(), 70)
    assert rows[0]["loss_over_ln_k"] > 0.9 and rows[0]["task_accuracy"] < rows[0]["task_chance"] < 0.4
    assert mean_of_last(rows, "task_accuracy") > 0.98
    assert mean_of_last(rows, "colour_error") < mean_of_last(rows, "grey_error") / 3


def test_colours_that_shapes_do_not_decide_are_told_only_by_what_is_hidden():
    """A network that sees colours is a shortcut; one that sees lightness cannot tell the two colours apart."""
    blind, seeing = build(*SMALL).float(), build(*SMALL).float()
    grey = seeing.task_views
    seeing.task_views = lambda views, step: grey(views, step)._replace(images=views.images)
    found = [mean_of_last(learnt(one, 50, colour_of_shape=False), "task_accuracy") for one in (blind, seeing)]
    assert found[0] < 0.8 and found[1] > 0.95


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.crops=[{num: 2, size: 24}]"], "data.crops=[2]: expected one group of one view"),
        (["method.cell=25"], "method.cell=25: expected at most 24, the size of views"),
        (["method.bin_step=50", "method.neighbours=27"], "method.neighbours=27: expected at most 26, the bins with"),
        (["method.uniform_share=0"], "method.uniform_share=0"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        mini("colorization", *overrides)
    assert words in str(refusal.value)


def test_a_view_whose_colours_are_changed_is_warned_of():
    small = load_config(ROOT / "configs/small/colorization.yaml")
    assert Colorization.complaints(small, Length(8, 1, 40)) == []
    changed = load_config(ROOT / "configs/small/colorization.yaml", ["data.augment.jitter=0.8"])
    [line] = Colorization.complaints(changed, Length(8, 1, 40))
    assert line == "data.augment.jitter=0.8: colours that are changed at random cannot be told; set it to 0"
