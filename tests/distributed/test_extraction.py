"""Ranks that share the images of an evaluation find what one process finds, bit for bit.

Covers: largescale/evaluate/extract.py, largescale/evaluate/projection.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from largescale.config import load_config
from largescale.data.corpora import open_corpus
from largescale.distributed.collectives import rows_on_rank_0, tensor_from_rank_0
from largescale.evaluate.extract import extract, load_method, pixels
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.projection import Projection, of_folder
from largescale.evaluate.spectrum import lidar
from largescale.evaluate.views import features_of_views
from largescale.processes import rank
from shards.ground.errors import InputError
from tests.helpers.commands import TINY
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


def found(folder: str, batch: int) -> dict[str, FeatureSet]:
    """Features of two networks, on rank 0."""
    config = load_config(TINY, [f"data.shards={folder}", f"evaluate.batch={batch}"])
    networks = {"untrained": load_method(config, None).encode, "pixels": pixels}
    return extract(open_corpus(folder, config.data), config, networks, torch.device("cpu"))


def projected(folder: str, out: Path) -> Projection:
    """Of features of half of the images, which a batch size that fits no shard divides among the ranks."""
    config = load_config(TINY, [f"data.shards={folder}", "evaluate.batch=7"])
    corpus = open_corpus(folder, config.data)

    def features(ids: np.ndarray) -> torch.Tensor:
        sets = extract(corpus, config, {"pixels": pixels}, torch.device("cpu"), ids=ids[::2], labelled=False)
        return sets["pixels"].features if sets else torch.empty(0)

    return of_folder(out, 9, corpus, {"layer": "pixels"}, features)


def without_labels(folder: str) -> dict[str, Tensor]:
    """Features of three views of some images, on rank 0."""
    config = load_config(TINY, [f"data.shards={folder}", "evaluate.batch=12"])
    networks, ids = {"untrained": load_method(config, None).encode}, np.arange(0, 100, 7)
    return features_of_views(open_corpus(folder, config.data), config, networks, ids, 3, torch.device("cpu"))


def refused(folder: str) -> str:
    config = load_config(TINY, [f"data.shards={folder}"])
    networks = {"broken": lambda images: images.flatten(1) / 0 * 0}
    try:
        extract(open_corpus(folder, config.data), config, networks, torch.device("cpu"))
    except InputError as error:
        return str(error)
    return ""


def on_each_rank(folder: str, out: Path):
    uneven = rows_on_rank_0(torch.full((rank() * 2, 3), float(rank())))
    assert tensor_from_rank_0(torch.arange(6).view(2, 3) if rank() == 0 else None).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensor_from_rank_0(torch.empty(0, 4) if rank() == 0 else torch.ones(7)).shape == (0, 4)
    return (
        [found(folder, batch) for batch in (7, 150)],
        refused(folder),
        uneven,
        projected(folder, out),
        without_labels(folder),
    )


def test_ranks_share_the_images_and_change_nothing(held_out_shards: Path, tmp_path: Path):
    folder = str(held_out_shards)
    expected = [found(folder, batch) for batch in (7, 150)]
    for name, one in expected[0].items():  # whatever the size of a batch
        assert torch.equal(one.ids, torch.arange(100)) and torch.equal(one.ids, expected[1][name].ids)
        assert torch.allclose(one.features, expected[1][name].features, rtol=1e-5, atol=1e-6)
    first, second, third = run_ranks(on_each_rank, 3, folder, tmp_path)
    for mine, one in zip(first[0], expected, strict=True):  # a batch of 150 leaves two ranks without one
        for name in one:
            assert torch.equal(mine[name].features, one[name].features)
            assert torch.equal(mine[name].labels, one[name].labels) and torch.equal(mine[name].ids, one[name].ids)
    assert second[0] == third[0] == [{}, {}]
    for outcome in (first, second, third):  # not just on the rank that looked
        assert "features of the broken network are not finite on 100 of 100 images" in outcome[1]
    assert first[2].tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 4 and second[2] is None
    (tmp_path / "alone").mkdir()
    projection = projected(folder, tmp_path / "alone")
    assert projection.components.shape == (9, 3 * 28 * 28) and projection.about["fitted_on"]["num_images"] == 50
    for outcome in (first, second, third):  # bit for bit
        assert outcome[3].stamp() == projection.stamp() and outcome[3].about == projection.about
    expected_views = without_labels(folder)["untrained"]
    assert torch.equal(first[4]["untrained"], expected_views) and expected_views.shape[:2] == (3, 15)
    assert lidar(first[4]["untrained"]) == lidar(expected_views) and second[4] == third[4] == {}
