from __future__ import annotations

import math

import pytest
import torch

from largescale.data.task_views.lab import lab_of, srgb_of
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.colour_tracking import ColourTracking
from largescale.methods.phase import PlainEmbeddings
from largescale.models.backbones import feature_map
from largescale.models.initialise import initialise_pieces
from shards.ground.errors import InputError
from tests.helpers.doctor import said_of
from tests.methods.harness import mini

BATCH, SIDE, FRAMES = 3, 24, 3
HUES = torch.tensor([[40.0, 0.0], [0.0, 40.0], [-40.0, 0.0], [0.0, -40.0]], dtype=torch.float64)


def build(*overrides: str) -> ColourTracking:
    torch.manual_seed(0)
    method = build_method(mini("colour_tracking", *overrides)).double()
    assert isinstance(method, ColourTracking)
    method.begin()
    method.centres.copy_(HUES)
    return method


def views(srgb: torch.Tensor) -> Views:
    """Frames [F, B, 3, S, S] in [0, 1]."""
    data = mini("colour_tracking").data
    mean, std = (torch.tensor(values, dtype=srgb.dtype)[:, None, None] for values in (data.mean, data.std))
    return Views([((srgb - mean) / std).flatten(0, 1)], torch.arange(srgb.shape[1]), {})


def random_srgb() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(FRAMES, BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


def naive_loss(method: ColourTracking, srgb: torch.Tensor) -> torch.Tensor:
    """The loop of the docstring, in evaluation mode."""
    total = torch.zeros((), dtype=torch.float64)
    for clip in range(BATCH):
        seen = method.task_views(views(srgb[:, clip : clip + 1]), 0).images[0]
        z = method.projection(feature_map(method.backbone, seen))  # [F, D, h, w]
        side = z.shape[-1]
        bins = {}
        for frame in range(FRAMES):
            lab = lab_of(srgb[frame, clip])
            for row in range(side):
                for column in range(side):
                    y, x = ((2 * place + 1) * SIDE // (2 * side) for place in (row, column))
                    colour = lab[1:, y, x]
                    bins[frame, row, column] = min(range(4), key=lambda k, c=colour: float((c - HUES[k]).norm()))
        earlier = [place for place in bins if place[0] < FRAMES - 1]
        for frame, row, column in bins:
            if frame < FRAMES - 1:
                continue
            scores = [z[f, :, r, c] @ z[frame, :, row, column] for f, r, c in earlier]
            alike = torch.stack(scores).softmax(0)
            copied = sum(
                share for share, place in zip(alike, earlier, strict=True) if bins[place] == bins[frame, row, column]
            )
            # The logarithms' sums are 1 but for what is added to the four shares.
            total = total - torch.log(copied + 1e-6) + math.log(1 + 4e-6)
    return total / (BATCH * side * side)


def test_loss_and_gradients_equal_the_naive_loop():
    method, srgb = build().eval(), random_srgb()
    expected, found = naive_loss(method, srgb), method(views(srgb), 0)
    torch.testing.assert_close(found.loss, expected, rtol=1e-9, atol=1e-12)
    trained = list(method.parameters())
    gradients = torch.autograd.grad(expected, trained, allow_unused=True)
    for one, other in zip(torch.autograd.grad(found.loss, trained, allow_unused=True), gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_the_network_sees_no_colours():
    """Frames of one lightness and other hues are the same to it."""
    method = build().eval()
    lightness = 40 + 20 * torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    frames = []
    for hue in HUES / 4:  # within sRGB
        lab = torch.cat([lightness[None], hue[:, None, None].expand(2, SIDE, SIDE)])
        frames.append(srgb_of(lab).expand(FRAMES, 1, -1, -1, -1))
    seen = [method.task_views(views(one), 0).images[0] for one in frames]
    for one in seen[1:]:
        torch.testing.assert_close(one, seen[0], rtol=0, atol=1e-5)


def test_places_that_are_found_again_are_coloured_rightly():
    """Features that name each place: copied is what was there, wherever it went."""
    method = build()
    generator = torch.Generator().manual_seed(3)
    places = 9
    order = torch.stack([torch.randperm(places, generator=generator) for _ in range(FRAMES)])
    bins = torch.randint(4, (places,), generator=generator)[order][:, None]  # [F, 1, P]
    named = 50 * torch.eye(places, dtype=torch.float64)[order].transpose(1, 2)[..., None]  # [F, P, P, 1]
    method.projection = torch.nn.Identity()
    method.backbone = torch.nn.Identity()
    logits = log_shares(method, named, bins)
    assert torch.equal(logits.argmax(-1)[0], bins[-1]) and float(logits.exp().max(-1).values.min()) > 0.99
    lost = log_shares(method, torch.zeros_like(named), bins)  # all places alike: the shares of colours before
    shares = torch.stack([(bins[:-1] == k).double().mean() for k in range(4)])
    torch.testing.assert_close(lost[0, 0].exp(), (shares + 1e-6).expand(places, 4))


def log_shares(method: ColourTracking, maps: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    import largescale.methods.colour_tracking as module

    before, module.feature_map = module.feature_map, lambda backbone, images: images
    try:
        return method.embed(Views([maps], torch.arange(1), {"bins": bins}))["logits"]
    finally:
        module.feature_map = before


def test_the_phase_finds_the_colours_and_their_shares(one_process):
    method = build()
    method.centres.zero_()
    images = torch.cat([srgb_of(torch.tensor([60.0, *hue]).double()[:, None, None].expand(3, SIDE, SIDE))[None]
                        for hue in (HUES / 2)[[0, 0, 1, 2, 3]]])  # fmt: skip
    rows = method.plain(views(images[None]).images[0])
    found = method.phase(0, PlainEmbeddings(rows.double(), torch.ones(5, dtype=torch.bool)), lambda what: None)
    distance = torch.cdist(method.centres, HUES / 2)
    assert distance.min(0).values.max() < 1 and found["commonest_colour"] == pytest.approx(2 / 5)
    signs = {name: torch.tensor(0.5) for name in method.signs}
    assert method.measures(0.1, signs, 1)["task_chance"] == pytest.approx(2 / 5)


def test_colours_of_a_corpus_of_any_size_are_clustered_by_their_counts(one_process):
    """A billion of them as their share of a few, on a grid that all colours are on."""
    corners = torch.stack(torch.meshgrid(*3 * [torch.tensor([0.0, 1.0]).double()], indexing="ij"), -1).view(-1, 3, 1, 1)
    method = build()
    rows = method.plain(views(corners.expand(-1, -1, SIDE, SIDE)[None]).images[0])
    assert (rows.sum(1) == 64).all() and (rows.max(1).values == 64).all()
    few = method.phase(0, PlainEmbeddings(rows.double(), torch.ones(8, dtype=torch.bool)), lambda what: None)
    centres, shares = method.centres.clone(), method.shares.clone()
    many = method.phase(0, PlainEmbeddings(1e9 * rows.double(), torch.ones(8, dtype=torch.bool)), lambda what: None)
    assert few.keys() == many.keys()
    order, again = centres[:, 0].argsort(), method.centres[:, 0].argsort()
    torch.testing.assert_close(method.centres[again], centres[order], rtol=0, atol=1e-3)
    torch.testing.assert_close(method.shares[again], shares[order], rtol=0, atol=1e-4)


def test_clips_without_colours_and_too_few_of_them_are_refused_in_a_line(one_process):
    method = build()
    grey = method.plain(views(torch.full((1, 2, 3, SIDE, SIDE), 0.5, dtype=torch.float64)).images[0])
    with pytest.raises(InputError, match=r"clips show no colours, which method.name=colour_tracking is to copy"):
        method.phase(0, PlainEmbeddings(grey.double(), torch.ones(2, dtype=torch.bool)), lambda what: None)
    with pytest.raises(InputError, match=r"method.colours=4: 0 points for 4 clusters; lower it, or add clips"):
        method.phase(0, PlainEmbeddings(grey[:0].double(), torch.zeros(2, dtype=torch.bool)), lambda what: None)


def test_what_would_be_right_if_nothing_moved():
    method = build().eval()
    still = random_srgb()[:1].expand(FRAMES, -1, -1, -1, -1)
    assert float(method(views(still), 0).signs["same_place"]) == 1.0
    assert float(method(views(random_srgb()), 0).signs["same_place"]) < 0.6


def test_a_copy_of_all_places_alike_is_called_unlearnt():
    """Though few colours in a clip make it far better than uniform shares of all."""
    method, srgb = build().eval(), random_srgb()
    with torch.no_grad():
        method.projection.weight.zero_()
        output = method(views(srgb), 0)
    row = method.measures(float(output.loss), output.signs, BATCH)
    assert row["loss_over_ln_k"] == pytest.approx(1, rel=1e-5)
    assert "predictions are no better than a copy of all places alike" in said_of(mini("colour_tracking"), row)
    assert said_of(mini("colour_tracking"), row | {"loss_over_ln_k": 0.9}) == ""


def test_a_projection_that_is_drawn_in_pieces_is_distributed_like_the_constructors():
    usual, drawn = build("method.embedding=64"), build("method.embedding=64")
    initialise_pieces(drawn, 1)
    for name, parameter in usual.projection.state_dict().items():
        own = drawn.projection.state_dict()[name]
        assert float(own.std()) == pytest.approx(float(parameter.std()), rel=0.2), name
        assert float(own.abs().max()) == pytest.approx(float(parameter.abs().max()), rel=0.1), name
