from __future__ import annotations

import pytest
import torch

from largescale.clustering.fixed_point import NotFinite
from largescale.methods import clusters_found
from shards.ground.errors import InputError


def test_a_phase_is_described_by_means_over_sets_of_clusters():
    before = torch.tensor([[0, -1], [0, -1], [1, -1], [1, -1], [-1, -1]])
    after = torch.tensor([[3, 0], [3, 0], [0, 1], [3, 1], [1, 1]])
    sizes = [torch.tensor([1, 1, 0, 3]), torch.tensor([2, 3])]
    found = clusters_found.found(before, after, sizes)
    assert found["clusters_used"] == pytest.approx((3 / 4 + 1) / 2)
    assert found["cluster_size_10"] == pytest.approx((0 + 2 / 2.5) / 2)
    assert found["cluster_size_90"] == pytest.approx((1 / 1.25 + 2 / 2.5) / 2)
    assert found["reassigned"] == pytest.approx(1 / 4)  # of the first set alone: the second had none before
    assert 0 < found["cluster_nmi"] < 1
    assert "reassigned" not in clusters_found.found(before[:, 1:], after[:, 1:], sizes[1:])


def test_pairs_of_one_cluster_are_counted_without_images_themselves():
    assigned = torch.tensor([[0, 2], [0, 1], [3, 1]], dtype=torch.int32)
    together = (assigned[:, None] == assigned[None]).double().mean(2)
    expected = sum(together[i, j] for i in range(3) for j in range(3) if i != j) / 6
    found = float(clusters_found.same_cluster(assigned, [4, 3]))
    assert found == pytest.approx(float(expected)) == pytest.approx(1 / 3)
    assert float(clusters_found.same_cluster(assigned[:1], [4, 3])) == 0


def test_images_without_a_cluster_are_in_no_pair():
    assigned = torch.tensor([[0, -1], [0, -1], [1, -1], [-1, -1], [-1, 1]])
    assert float(clusters_found.same_cluster(assigned, [4, 3])) == pytest.approx((1 / 3 + 0) / 2)


def test_refusals_are_told_from_numbers_that_are_not_finite():
    refused = pytest.raises(InputError, match=r"method.clusters=\[9\], before step 3: 8 points")
    with refused, clusters_found.blaming([9], 3):
        raise ValueError("8 points for 9 clusters")
    with pytest.raises(NotFinite), clusters_found.blaming([9], 3):
        raise NotFinite("values are not finite")


def test_what_does_not_fit_is_said_in_a_line():
    assert clusters_found.misfit_of([3, 9], 9, 10**9, 1.0) == ""
    assert clusters_found.misfit_of([3, 9], 8, 0, 1.0) == "method.clusters=[3, 9]: 9 clusters for 8 images; lower it"
    assert clusters_found.misfit_of([3, 9], 1000, 2 * 10**9, 1.0) == (
        "method.max_phase_gb=1: clusters of 1,000 images take 2 GB on each of 1 rank; use more ranks or fewer "
        "clusters, or raise it"
    )


def test_one_cluster_for_most_images_is_a_symptom():
    symptom = clusters_found.one_for_most("Try less", [10, 10])
    assert symptom.shows({"same_cluster": 0.9}) and not symptom.shows({"same_cluster": 0.1}) and not symptom.shows({})
    two = clusters_found.one_for_most("Try less", [2])
    assert two.shows({"same_cluster": 0.9}) and not two.shows({"same_cluster": 0.51}), "half are of two equal clusters"
    assert symptom.words({"same_cluster": 0.9}) == (
        "two images are in one cluster with a probability of 90%: this looks like collapse. Try less"
    )
