"""Signs of embeddings against their definitions, and the doctor's words.

Covers: largescale/methods/contrastive.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from largescale.config import load_config
from largescale.methods.joint_embedding import JointEmbedding, unit
from largescale.methods.simclr import SimCLR
from largescale.observe.doctor import judge
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of

MINI = ROOT / "tests/methods/mini/simclr.yaml"
DIMENSION = 8


def measures(first: Tensor, second: Tensor) -> dict[str, float]:
    signs = JointEmbedding.watch_embeddings(first, second)
    assert {name: value.shape for name, value in signs.items()} == {
        name: sign.shape for name, sign in JointEmbedding.embedding_signs(DIMENSION).items()
    }
    return JointEmbedding.measures(JointEmbedding.__new__(JointEmbedding), 0.0, signs, len(first))


def drawn(num: int, scale: Tensor | None = None) -> Tensor:
    z = torch.randn(num, DIMENSION, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return unit(z if scale is None else z * scale)


def test_embeddings_all_over_the_sphere():
    found = measures(drawn(4000), drawn(4000))
    assert found["embedding_std"] == pytest.approx(1, abs=0.01) and found["agreement"] == pytest.approx(1)
    assert found["effective_rank"] == pytest.approx(DIMENSION, rel=0.02)
    assert said_of(load_config(MINI), found) == ""


def test_the_rank_is_the_participation_ratio_of_the_second_moment_in_large_and_small_batches():
    z = drawn(4000, torch.linspace(1, 4, DIMENSION, dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(z.T @ z / len(z))
    expected = float(eigenvalues.sum().square() / eigenvalues.square().sum())
    assert measures(z, z)["effective_rank"] == pytest.approx(expected, rel=0.01)
    squares = [JointEmbedding.watch_embeddings(part, part)["pair_square"] for part in z.split(4)]
    assert float(1 / torch.stack(squares).mean()) == pytest.approx(expected, rel=0.05)


def test_views_of_other_images_are_compared_too():
    first, second = drawn(6), drawn(6, torch.linspace(1, 4, DIMENSION, dtype=torch.float64))
    pairs = [float(first[i] @ second[j]) for i in range(6) for j in range(6) if i != j]
    found = measures(first, second)
    assert found["agreement_of_others"] == pytest.approx(sum(pairs) / len(pairs))
    assert found["agreement"] == pytest.approx(sum(float(first[i] @ second[i]) for i in range(6)) / 6)


def test_one_point_and_one_line_are_called_collapse():
    config = load_config(MINI)
    line = unit(torch.ones(1, DIMENSION, dtype=torch.float64)) * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    on_a_line, equal = measures(line, line), measures(line.abs(), line.abs())
    assert on_a_line["effective_rank"] == pytest.approx(1) and on_a_line["embedding_spread"] == pytest.approx(1)
    assert "lie on a line (effective rank 1.00): this looks like collapse" in said_of(config, on_a_line)
    assert "nearly equal (spread 0.00%): this looks like collapse" in said_of(config, equal)
    assert equal["embedding_std"] == pytest.approx(0, abs=1e-7)
    healthy = measures(drawn(100), drawn(100))
    once = [{**row, "progress": 0.5} for row in (healthy, healthy, equal)]
    assert judge(config, once) is None  # one line may be chance
    assert said_of(config, {}) == ""


def test_single_images_have_no_pairs_and_are_not_called_collapse():
    each = [JointEmbedding.watch_embeddings(row, row) for row in drawn(50).split(1)]
    signs = {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
    row = JointEmbedding.measures(JointEmbedding.__new__(JointEmbedding), 0.0, signs, 50)
    assert "effective_rank" not in row and said_of(load_config(MINI), row) == ""
    assert JointEmbedding.brief(row).startswith(" (std ")


def test_embeddings_close_together_are_no_collapse_where_the_loss_tells_them_apart():
    """As with MoCo v1's linear head, whose embeddings share a large mean."""
    config = load_config(MINI)
    z = unit(drawn(100) + 10)
    row = measures(z, z)
    guess = SimCLR.loss_references(config)["all views alike"]
    assert row["effective_rank"] < 2 and row["embedding_spread"] < 0.05
    assert said_of(config, row | {"loss": 0.9 * guess}) == ""
    assert "looks like collapse" in said_of(config, row | {"loss": guess})
