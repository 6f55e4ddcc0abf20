"""ODC against a loop over images, and its clusters against a count of the memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from largescale.clustering.agreement import agreement
from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.odc import ODC
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.ranks import Counted, run_ranks
from tests.methods.begun import begun, coloured_images, phase_over, plain_images, random_views, sizes_of, take_state

pytestmark = pytest.mark.usefixtures("group_of_one")

MINI = ROOT / "tests/methods/mini/odc.yaml"
BATCH, SAMPLES, COUNT, LEAST = 6, 40, 6, 5
LENGTH = Length(18, 3, SAMPLES)


def build(*overrides: str, length: Length = LENGTH) -> ODC:
    return begun(ODC, MINI, BATCH, length, *overrides)


def views(step: int = 0) -> Views:
    """One image comes twice."""
    drawn = random_views(BATCH, step, SAMPLES, (2, 24))
    generator = torch.Generator().manual_seed(step)
    ids = torch.randperm(SAMPLES, generator=generator)[:BATCH]
    ids[4] = ids[1]
    return Views(drawn.images, ids)


def fill(method: ODC) -> dict[str, float]:
    return phase_over(method, plain_images(SAMPLES), missing=17)


def counted(method: ODC) -> tuple[Tensor, Tensor]:
    """Means of rows at length 1, and sizes, by a pass over the memory."""
    own = method.assignments.own[:, 0].long()
    sums = torch.stack([method.memory.own[own == k].sum(0) for k in range(len(method.centroids))])
    return normalize(sums, dim=1), own[own >= 0].bincount(minlength=len(method.centroids))


def naive_loss(method: ODC, batch: Views, own: list[int], head: Tensor) -> Tensor:
    """The sum of the docstring."""
    sizes = [own.count(k) for k in range(COUNT)]
    mean = sum(sizes[k] * max(1, sizes[k]) ** -0.5 for k in range(COUNT)) / sum(sizes)
    total = torch.zeros((), dtype=torch.float64)
    for view in batch.images[0].split(BATCH):
        for z, sample in zip(method.projection(method.backbone(view)), batch.ids.tolist(), strict=True):
            if own[sample] >= 0:
                logs = torch.log_softmax(head[:, :-1] @ z + head[:, -1], 0)
                total = total - logs[own[sample]] * sizes[own[sample]] ** -0.5 / mean / BATCH / 2
    return total


def test_loss_gradients_and_memories_equal_the_naive_loop():
    method = build("method.head_lr=0.5", "method.head_weight_decay=0.1", "method.centroids_every=100").eval()
    fill(method)
    without, moved = 0, 0.0
    for step in range(8):
        batch = views(step)
        own, rows = method.assignments.own[:, 0].tolist(), method.memory.own.clone()
        without += sum(own[sample] < 0 for sample in batch.ids.tolist())
        head = method.head.rows.clone().requires_grad_()
        expected, output = naive_loss(method, batch, own, head), method(batch, step)
        torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=1e-14)
        trained = list(method.parameters())
        *theirs, of_head = torch.autograd.grad(expected, [*trained, head])
        torch.testing.assert_close(torch.autograd.grad(output.loss, trained), tuple(theirs), rtol=1e-9, atol=1e-12)
        method.after_update(step)
        torch.testing.assert_close(method.head.rows, head.detach() - 0.5 * (of_head + 0.1 * head.detach()))
        first, second = (
            normalize(method.projection(method.backbone(view)), dim=1) for view in batch.images[0].split(6)
        )
        for place in [0, 2, 3, 4, 5]:  # of the image that comes twice, its last place counts
            sample = int(batch.ids[place])
            rows[sample] = normalize(0.5 * rows[sample] + 0.25 * (first + second)[place].detach(), dim=0)
            own[sample] = int((method.centroids @ rows[sample]).argmax())
        torch.testing.assert_close(method.memory.own, rows)
        assert method.assignments.own[:, 0].tolist() == own
        assert torch.equal(method.sums.sizes, counted(method)[1])
        moved += float(output.signs["moved"])
    assert without and moved, "no image without a cluster came, or none left its own"


def test_centroids_are_the_means_of_the_memory_and_small_clusters_take_half_of_the_largest():
    method = build("method.centroids_every=1").eval()
    fill(method)
    dissolved = 0
    for step in range(1, 8):
        method(views(step), step)
        sizes = counted(method)[1]
        small = (sizes < LEAST).nonzero()[:, 0].tolist()
        dissolved += len(small)
        method._tend(step + 1)
        means, after = counted(method)
        torch.testing.assert_close(method.centroids, means, rtol=1e-7, atol=1e-7)
        assert torch.equal(method.sums.sizes, after) and int(after.sum()) == int(sizes.sum())
        assert int(after.min()) > 0
    assert dissolved, "no cluster was small"


def test_a_cluster_emptied_by_hand_is_filled_again():
    method = build("method.clusters=3", "method.least_images=2").eval()
    fill(method)
    largest, rows = int(method.sums.sizes.argmax()), method.assignments.own[:, 0]
    emptied = (largest + 1) % 3
    places = (rows == emptied).nonzero()[:, 0]
    method._move(places, torch.full_like(places, largest))
    before = int(method.sums.sizes[largest])
    method._tend(2)
    sizes = method.sums.sizes
    assert sizes[emptied] > 0 and int(sizes[emptied] + sizes[largest]) == before


def test_coloured_squares_are_found_by_a_network_at_random():
    method = build("method.clusters=4", "method.least_images=2", "method.hidden=[]")
    images, known = coloured_images(SAMPLES)
    phase_over(method, images)
    with torch.no_grad():
        for step in range(2, 10, 2):  # what two clusters share is found out when the second half of one is too small
            method._tend(step)
    assert agreement(method.assignments.own[:, 0].long(), known, 4, 4).nmi > 0.8


def test_micro_batches_share_the_centroids_of_their_step():
    method = build("train.accumulate=2", "method.centroids_every=1").eval()
    fill(method)
    half = views(3)
    method(Views([half.images[0][:6]], half.ids[:3]), 3)
    before = method.centroids.clone()
    method(Views([half.images[0][6:]], half.ids[3:]), 3)
    assert torch.equal(method.centroids, before)
    method.after_update(3)
    method(half, 4)
    assert not torch.equal(method.centroids, before)


def test_what_a_checkpoint_holds_is_all_that_goes_on():
    """Published memories are lost with a run that stops."""
    method, other = build().eval(), build().eval()
    fill(method)
    for step in range(2):
        method(views(step), step)
        method.after_update(step)
    take_state(other, method)
    for step in range(2, 5):
        assert torch.equal(method(views(step), step).loss, other(views(step), step).loss)
        method.after_update(step), other.after_update(step)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"method.clusters=41: 41 clusters for 40 images; lower it"):
        build("method.clusters=41")
    with pytest.raises(InputError, match=r"method.max_phase_gb=1e-06: clusters of 40 images take"):
        build("method.max_phase_gb=0.000001")
    with pytest.raises(InputError, match=r"method.least_images=7: 6 clusters have 6.7 images on average; lower it"):
        build("method.least_images=7")


def test_one_cluster_for_most_images_is_said():
    signs = {"cluster_picked": 0.9, "loss": 0.1, "loss_over_ln_k": 0.1}
    assert "one cluster for most images" in said_of(load_config(MINI), {**signs, "same_cluster": 0.9})
    assert said_of(load_config(MINI), {**signs, "same_cluster": 0.2}) == ""


def count_exchanges() -> list[tuple[str, int]]:
    method = build().eval()
    own = slice(dist.get_rank() * BATCH // 2, (dist.get_rank() + 1) * BATCH // 2)
    whole = views()
    images = whole.images[0].unflatten(0, (2, BATCH))[:, own].flatten(0, 1)
    with Counted() as counted:
        method(Views([images], whole.ids[own]), 0)
    return counted.calls


@pytest.mark.distributed
def test_a_step_exchanges_ids_clusters_rows_and_the_heads_gradient_once():
    [calls, _] = run_ranks(count_exchanges, 2, timeout_s=600)
    gathered = [("all_gather", BATCH), ("all_gather", BATCH), ("all_gather", 5 * BATCH)]
    assert sizes_of(calls) == [*gathered, ("all_reduce", BATCH), ("all_reduce", 5 * BATCH), ("all_reduce", 6 * (5 + 1))]
