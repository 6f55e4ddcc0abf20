"""What a method may know of its views besides their pixels, tested against the pixels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms.v2.functional as reference

from largescale.config import MethodConfig, load_config
from largescale.data.decode import EncodedImage, Scratch
from largescale.data.stream import Stream
from largescale.data.views import FACTS, Views
from largescale.methods import METHODS
from largescale.parallel.engine import Engine
from tests.helpers.commands import ROOT

PLAIN = [
    "data.mean=[0,0,0]",
    "data.std=[1,1,1]",
    "data.scaled_decode=0",
    "data.augment={rotate_degrees: 0, jitter: 0, gamma: 0, gain: 0, grayscale: 0, blur: 0, noise: 0, erase: 0}",
    "data.crops.1.augment.flip=1",
    "data.crops.2.augment.flip=0",
]


def make_stream(folder: Path, *overrides: str, rank: int = 0, ranks: int = 1) -> Stream:
    config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={folder}", *PLAIN, *overrides])
    return Stream(config, rank=rank, world_size=ranks, device=torch.device("cpu"), dtype=torch.float64)


@pytest.fixture
def asking(monkeypatch):
    monkeypatch.setattr(MethodConfig, "facts", FACTS)


@pytest.mark.usefixtures("asking")
def test_a_view_is_what_its_box_and_its_flip_say(shard_folder):
    stream = make_stream(shard_folder)
    batch = next(iter(stream(range(2, 3))))
    views = batch.inputs()
    boxes, flips = views.facts["boxes"], views.facts["flips"]
    assert boxes.shape == (4, 16, 4) and flips.shape == (4, 16) and 0 < flips[:2].sum() < 32
    assert flips[2].all() and not flips[3].any()
    per_view = [view for group, num in zip(views.images, (2, 1, 1), strict=True) for view in group.chunk(num)]
    for row, sample in enumerate(views.ids.tolist()):
        image = EncodedImage(stream.batches.reader.read(sample), max_pixels=10**9).decode(1, Scratch())
        for number, view in enumerate(per_view):
            box, size = boxes[number, row].tolist(), list(view.shape[-2:])
            expected = reference.resized_crop(image, *box, size, antialias=True)
            expected = expected.flip(-1) if flips[number, row] else expected
            assert (view[row] * 255 - expected).abs().max() <= 1 + 1e-9


@pytest.mark.usefixtures("asking")
def test_facts_and_views_do_not_depend_on_ranks_processes_or_on_whether_they_are_asked_for(shard_folder, monkeypatch):
    whole = next(iter(make_stream(shard_folder)(range(1)))).inputs()
    parts = [
        next(iter(make_stream(shard_folder, "data.workers=1", rank=rank, ranks=2)(range(1)))).inputs()
        for rank in range(2)
    ]
    for name in FACTS:
        assert torch.equal(torch.cat([part.facts[name] for part in parts], dim=1), whole.facts[name])
    monkeypatch.setattr(MethodConfig, "facts", ())
    unasked = next(iter(make_stream(shard_folder)(range(1)))).inputs()
    assert not unasked.facts
    assert all(torch.equal(own, other) for own, other in zip(unasked.images, whole.images, strict=True))


def test_methods_ask_for_what_there_is():
    assert all(set(method.Settings.facts) <= set(FACTS) for method in METHODS.values())
    views = Views.numbered([torch.zeros(8, 3, 4, 4), torch.zeros(4, 3, 2, 2)], 4, FACTS)
    assert views.facts["boxes"].shape == (3, 4, 4) and views.facts["flips"].shape == (3, 4)


def test_micro_batches_take_their_facts_along():
    boxes = torch.arange(3 * 4 * 4).view(3, 4, 4)
    views = Views([torch.zeros(8, 3, 4, 4), torch.zeros(4, 3, 2, 2)], torch.arange(4), {"boxes": boxes})
    parts = Engine.micro_batches(SimpleNamespace(accumulate=2, _views_per_group=[2, 1]), views)
    assert [part.ids.tolist() for part in parts] == [[0, 1], [2, 3]]
    assert torch.equal(torch.cat([part.facts["boxes"] for part in parts], dim=1), boxes)
