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
from largescale.methods import build_method
from largescale.methods.deepclusterv2 import DeepClusterV2
from largescale.methods.phase import PlainEmbeddings, no_embeddings
from largescale.plan.trace import StepTrace
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.ranks import Counted, run_ranks
from tests.methods.begun import begun, coloured_images, random_views, sizes_of, take_state

pytestmark = pytest.mark.usefixtures("group_of_one")

MINI = ROOT / "tests/methods/mini/deepclusterv2.yaml"
BATCH, SAMPLES, PER_EPOCH = 6, 20, 3
LENGTH = Length(6 * PER_EPOCH, PER_EPOCH, SAMPLES, SAMPLES - BATCH * PER_EPOCH)


def build(*overrides: str, length: Length = LENGTH) -> DeepClusterV2:
    return begun(DeepClusterV2, MINI, BATCH, length, *overrides)


def views(step: int = 0) -> Views:
    return random_views(BATCH, step, SAMPLES, (2, 24), (1, 16))


def embeddings(method: DeepClusterV2, batch: Views) -> Tensor:
    """One view after the other, [3, B, D]."""
    each = [*batch.images[0].split(BATCH), batch.images[1]]
    return torch.stack([normalize(method.projection(method.backbone(view)), dim=1) for view in each])


def first_phase(method: DeepClusterV2, missing: int = 17) -> dict[str, float]:
    readable = torch.arange(SAMPLES) != missing
    vectors = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return method.phase(0, PlainEmbeddings(normalize(vectors, dim=1)[readable], readable), lambda what: None)


def later_phase(method: DeepClusterV2, step: int = PER_EPOCH) -> dict[str, float]:
    return method.phase(step, no_embeddings(), lambda what: None)


def naive_loss(method: DeepClusterV2, z: Tensor, ids: list[int]) -> Tensor:
    """The sum of the docstring."""
    total = torch.zeros((), dtype=torch.float64)
    for head, centroids in enumerate(method.centroids.split([5, 9, 4])):
        for place, sample in enumerate(ids):
            wanted = int(method.assignments.own[sample, head])
            for view in range(3):
                if wanted >= 0:
                    mine = torch.softmax(z[view, place] @ centroids.T / 0.1, 0)[wanted]
                    total = total - torch.log(mine) / 3 / BATCH / 3
    return total


def test_loss_and_gradient_equal_the_naive_loop():
    method = build().eval()
    first_phase(method)
    never_met = 0
    for step in range(4):
        batch = views(step)
        ids = batch.ids.tolist()
        never_met += ids.count(17)
        expected = naive_loss(method, embeddings(method, batch), ids)
        loss = method(batch, step).loss
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-14)
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        ours, theirs = torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert never_met, "no image without a cluster came"


def test_centroids_are_never_trained():
    method = build()
    assert not any("centroid" in name for name, _ in method.named_parameters())
    first_phase(method)
    before = method.centroids.clone()
    method(views(), 0).loss.backward()
    method.after_update(0)
    assert torch.equal(method.centroids, before)


def test_the_first_bank_is_of_centred_embeddings():
    method = build("method.clusters=[4]")
    vectors = normalize(torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64), dim=1)
    vectors = normalize(vectors + 20, dim=1)  # one large direction
    readable = torch.arange(SAMPLES) != 17
    method.phase(0, PlainEmbeddings(vectors[readable], readable), lambda what: None)
    expected = normalize(vectors[readable] - vectors[readable].mean(0), dim=1)
    for half in method.bank.own[readable].chunk(2, dim=1):
        torch.testing.assert_close(half, expected, rtol=1e-9, atol=1e-12)
    assert not method.bank.own[17].any()
    cosines = normalize(method.centroids, dim=1) @ normalize(method.centroids, dim=1).T
    assert float(cosines.sum() - 4) / 12 < 0.5
    method.phase(0, PlainEmbeddings(vectors[:1].repeat(SAMPLES, 1), readable | True), lambda what: None)
    torch.testing.assert_close(method.bank.own[:, :8], vectors[:1].repeat(SAMPLES, 1))  # all alike: left as they are


def test_a_phase_holds_no_more_than_it_promises():
    """Most bytes of all tensors of the first phase, with its embeddings, and k-means' blocks beside."""
    images, width = 60_000, 64
    overrides = [f"method.embedding={width}", "method.clusters=[50,300]", "method.kmeans_iterations=1"]
    config = load_config(MINI, ["train.precision=fp32", *overrides, "train.global_batch=8", "data.streams=1"])
    method = build_method(config, Length(6, 3, images))
    method.begin()
    vectors = normalize(torch.randn(images, width, generator=torch.Generator().manual_seed(0)), dim=1)
    with StepTrace() as trace:
        trace.watch(iter([vectors, method.bank.rows, method.assignments.rows, method.centroids]))
        method.phase(0, PlainEmbeddings(vectors, torch.ones(images, dtype=torch.bool)), lambda what: trace.held())
    held, promised, blocks = trace.lap(), DeepClusterV2.phase_bytes(config, images), 4096 * (300 * 4 + width * 4 * 8)
    assert 0.7 * promised < held <= promised + blocks, (held, promised, blocks)


def test_the_bank_holds_the_first_two_views_as_they_were_last_met():
    method = build().eval()
    first_phase(method, missing=-1)
    last: dict[int, Tensor] = {}
    for step in range(4):
        batch = views(step)
        z = embeddings(method, batch).detach()
        last |= {sample: torch.cat([z[0, place], z[1, place]]) for place, sample in enumerate(batch.ids.tolist())}
        method(batch, step)
    assert len(last) < SAMPLES
    for sample, row in last.items():
        torch.testing.assert_close(method.bank.own[sample], row)


def test_images_that_an_epoch_leaves_out_get_one_of_the_new_clusters():
    """Published code: a label of the last clustering or none."""
    method = build().eval()
    first_phase(method, missing=-1)
    method(views(), 0)
    later_phase(method)
    for head, centroids in enumerate(method.centroids.split([5, 9, 4])):
        points = method.bank.own.chunk(2, dim=1)[head % 2]
        assert torch.equal(method.assignments.own[:, head].long(), (points @ centroids.T).argmax(1))


def test_heads_take_turns_with_the_banks():
    method = build("method.clusters=[2,2]")
    axes = torch.eye(8, dtype=torch.float64)
    first = axes[torch.arange(SAMPLES) // (SAMPLES // 2)]  # two halves in one bank, odd and even in the other
    method.bank.own.copy_(torch.cat([first, axes[2 + torch.arange(SAMPLES) % 2]], dim=1))
    found = later_phase(method)
    halves, odd = torch.arange(SAMPLES) // (SAMPLES // 2), torch.arange(SAMPLES) % 2
    for head, known in enumerate((halves, odd)):
        assert agreement(method.assignments.own[:, head].long(), known, 2, 2) == pytest.approx((1, 1))
    assert found["clusters_used"] == 1


def test_coloured_squares_are_found_by_a_network_at_random():
    method = build("method.clusters=[4]")
    images, known = coloured_images(SAMPLES)
    with torch.no_grad():
        vectors, one = method.plain(images), method.plain(images[:1])
    torch.testing.assert_close(one, vectors[:1])  # BatchNorm does not mix images
    found = []
    for step in range(0, 4 * PER_EPOCH, PER_EPOCH):  # from several starts
        method.bank.own.copy_(vectors.repeat(1, 2))
        later_phase(method, step or 1)
        found.append(agreement(method.assignments.own[:, 0].long(), known, 4, 4).nmi)
    assert max(found) == pytest.approx(1)


def test_clusters_that_lose_their_images_do_not_stay_empty():
    """Published code leaves their centroids as they were."""
    used = []
    vectors = normalize(torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64), dim=1)
    vectors[13:] = vectors[13]  # of 12 starts several are copies, and the first of them takes all
    for iterations in (1, 100):
        method = build("method.clusters=[12]", f"method.kmeans_iterations={iterations}")
        method.bank.own.copy_(vectors.repeat(1, 2))
        used.append(later_phase(method)["clusters_used"])
    assert used[0] < used[1]


def test_a_phase_comes_before_each_epoch_and_only_the_first_embeds_images():
    method = build()
    due = [step for step in range(10) if method.phase_due(step)]
    assert due == [0, 3, 6, 9] and [step for step in due if method.phase_embeds(step)] == [0]


def test_what_a_checkpoint_holds_is_all_that_goes_on():
    method, other = build().eval(), build().eval()
    first_phase(method)
    method(views(0), 0)
    take_state(other, method)
    assert torch.equal(method(views(1), 1).loss, other(views(1), 1).loss)
    assert later_phase(method) == later_phase(other)
    assert torch.equal(method(views(2), 3).loss, other(views(2), 3).loss)


def test_too_many_clusters_or_too_little_memory_are_refused():
    with pytest.raises(InputError, match=r"method.clusters=\[5, 21\]: 21 clusters for 20 images; lower it"):
        build("method.clusters=[5,21]")
    with pytest.raises(InputError, match=r"method.max_phase_gb=1e-06: clusters of 20 images take"):
        build("method.max_phase_gb=0.000001")
    method = build("method.clusters=[20]")
    with pytest.raises(InputError, match=r"method.clusters=\[20\], before step 0: 19 points for 20 clusters"):
        first_phase(method)


def count_exchanges() -> list[tuple[str, int]]:
    method = build("data.crops=[{num: 2, size: 24}]").eval()
    own = slice(dist.get_rank() * BATCH // 2, (dist.get_rank() + 1) * BATCH // 2)
    whole = views()
    with Counted() as counted:
        method(Views([whole.images[0].view(2, BATCH, 3, 24, 24)[:, own].flatten(0, 1)], whole.ids[own]), 0)
    return counted.calls


@pytest.mark.distributed
def test_a_step_exchanges_ids_clusters_and_two_views_once():
    [calls, _] = run_ranks(count_exchanges, 2, timeout_s=600)
    assert sizes_of(calls) == [("all_gather", BATCH), ("all_gather", BATCH * 2 * 8), ("all_reduce", BATCH * 3)]
