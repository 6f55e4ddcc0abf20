"""Covers: largescale/methods/feature_clusters.py, largescale/methods/own_head.py"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from largescale.clustering.agreement import agreement
from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.deepcluster import DeepCluster
from largescale.methods.phase import PlainEmbeddings
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.ranks import Counted, run_ranks
from tests.methods.begun import begun, coloured_images, phase_over, plain_images, random_views, sizes_of, take_state

pytestmark = pytest.mark.usefixtures("group_of_one")

MINI = ROOT / "tests/methods/mini/deepcluster.yaml"
BATCH, SAMPLES, PER_EPOCH = 6, 40, 3
LENGTH = Length(6 * PER_EPOCH, PER_EPOCH, SAMPLES)


def build(*overrides: str, length: Length = LENGTH) -> DeepCluster:
    return begun(DeepCluster, MINI, BATCH, length, *overrides)


def views(step: int = 0) -> Views:
    return random_views(BATCH, step, SAMPLES, (1, 24), (1, 16))


def cluster(method: DeepCluster, step: int = 0) -> dict[str, float]:
    return phase_over(method, plain_images(SAMPLES), missing=17, step=step)


def naive_loss(method: DeepCluster, batch: Views, head: Tensor) -> Tensor:
    """The sum of the docstring."""
    own = method.assignments.own[:, 0].tolist()
    sizes = [own.count(number) for number in range(6)]
    used, total = sum(size > 0 for size in sizes), torch.zeros((), dtype=torch.float64)
    for view in batch.images:
        features = method.backbone(view)
        if method.shared.hidden:
            features = torch.relu(method.projection[2](torch.relu(method.projection[0](features))))
        for x, sample in zip(features, batch.ids.tolist(), strict=True):
            if own[sample] >= 0:
                mine = torch.softmax(head[:, :-1] @ x + head[:, -1], 0)[own[sample]]
                total = total - mine.log() * sum(sizes) / used / sizes[own[sample]] / BATCH / 2
    return total


@pytest.mark.parametrize("hidden", [[], [12, 7]])
def test_loss_and_gradients_equal_the_naive_loop(hidden):
    method = build(f"method.hidden={hidden}", "method.head_lr=0.5", "method.head_weight_decay=0.1").eval()
    cluster(method)
    without = 0
    for step in range(6):
        batch = views(step)
        without += batch.ids.tolist().count(17)
        head = method.head.rows.clone().requires_grad_()
        expected, loss = naive_loss(method, batch, head), method(batch, step).loss
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-14)
        trained = list(method.parameters())
        *theirs, of_head = torch.autograd.grad(expected, [*trained, head])
        torch.testing.assert_close(torch.autograd.grad(loss, trained), tuple(theirs), rtol=1e-9, atol=1e-12)
        method.after_update(step)
        torch.testing.assert_close(method.head.rows, head.detach() - 0.5 * (of_head + 0.1 * head.detach()))
    assert without, "no image without a cluster came"


def test_a_step_that_is_passed_over_leaves_the_head_and_its_gradient_alone():
    method, other = build().eval(), build().eval()
    for one in (method, other):
        cluster(one)
    method(views(5), 0)  # fp16 overflows: no update
    for one in (method, other):
        one(views(1), 1)
        one.after_update(1)
    assert torch.equal(method.head.rows, other.head.rows)


def test_weights_stand_for_sampling_clusters_equally_often():
    """Six images, all draws of two with clusters at random, then images at random within them, against all images."""
    losses = torch.tensor([1.0, 2, 4, 8, 16, 32], dtype=torch.float64)
    method = build("method.clusters=4", length=Length(18, 3, 6))
    noise = torch.randn(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 2, 2, 3]].repeat(1, 4) + 0.001 * noise
    method.phase(0, PlainEmbeddings(vectors, torch.ones(6, dtype=torch.bool)), lambda what: None)
    own = method.assignments.own[:, 0].long()
    members = {number: (own == number).nonzero().flatten().tolist() for number in own.unique().tolist()}
    assert len({len(ones) for ones in members.values()}) > 1, "clusters of different sizes"
    mean = torch.zeros((), dtype=torch.float64)
    for first, second in itertools.product(members, repeat=2):
        for i, j in itertools.product(members[first], members[second]):
            mean += (losses[i] + losses[j]) / 2 / len(members) ** 2 / len(members[first]) / len(members[second])
    assert float((method.weights[own] * losses).mean()) == pytest.approx(float(mean))


def test_weights_follow_the_sizes_of_clusters_and_are_1_on_average():
    method = build()
    cluster(method)
    own = method.assignments.own[:, 0].long()
    assert int(own[17]) == -1
    sizes = own[own >= 0].bincount(minlength=6)
    used = sizes > 0
    torch.testing.assert_close(method.weights[used], 39 / used.sum() / sizes[used].double())
    assert float(method.weights[own[own >= 0]].mean()) == pytest.approx(1)


def test_a_head_is_drawn_again_from_seed_and_step_with_every_clustering():
    method, other, seeded = (
        build("method.clusters=30"),
        build("method.clusters=30"),
        build("run.seed=1", "method.clusters=30"),
    )
    heads = []
    for one, step in ((method, 0), (other, 0), (seeded, 0), (method, 3)):
        cluster(one, step=step)
        heads.append(one.head.rows.clone())
    assert (
        torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[3])
    )
    assert float(heads[0][:, :-1].std()) == pytest.approx(0.01, rel=0.1) and not heads[0][:, -1].any()


def test_no_optimizer_holds_anything_of_the_head():
    """Published code makes another optimizer for every head; momentum of a former one would turn it around."""
    method = build()
    assert not any("head" in name for name, _ in method.named_parameters())


def test_coloured_squares_are_found_by_a_network_at_random():
    method = build("method.clusters=4", "method.components=3")
    images, known = coloured_images(SAMPLES)
    found = []
    for step in range(0, 5 * PER_EPOCH, PER_EPOCH):  # from several starts
        phase_over(method, images, step=step)
        found.append(agreement(method.assignments.own[:, 0].long(), known, 4, 4).nmi)
    assert max(found) == pytest.approx(1)


def test_what_is_clustered_is_the_last_hidden_layer_before_its_relu():
    method = build("method.hidden=[12,7]").eval()
    with torch.no_grad():
        found = method.plain(plain_images(SAMPLES))
        assert found.shape == (SAMPLES, 7) and float(found.min()) < 0
        seen = method.embed(views())["features"]
        assert seen.shape == (2, BATCH, 7) and float(seen.min()) == 0


def test_phases_come_before_epochs():
    method = build("method.recluster_epochs=2")
    assert [step for step in range(13) if method.phase_due(step)] == [0, 6, 12]


def test_what_a_checkpoint_holds_is_all_that_goes_on():
    """In published code clusters are lost with a run that stops."""
    method, other = build().eval(), build().eval()
    cluster(method)
    method(views(0), 0)
    method.after_update(0)
    take_state(other, method)
    assert torch.equal(method(views(1), 1).loss, other(views(1), 1).loss)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"method.clusters=41: 41 clusters for 40 images; lower it"):
        build("method.clusters=41")
    with pytest.raises(InputError, match=r"method.max_phase_gb=1e-06: clusters of 40 images take"):
        build("method.max_phase_gb=0.000001")
    with pytest.raises(InputError, match=r"method.clusters=40, before step 0: 39 points for 40 clusters"):
        cluster(build("method.clusters=40"))


def test_one_cluster_for_most_images_is_said():
    signs = {"cluster_picked": 0.9, "loss": 0.1, "loss_over_ln_k": 0.1}
    assert "one cluster for most images" in said_of(load_config(MINI), {**signs, "same_cluster": 0.9})
    assert said_of(load_config(MINI), {**signs, "same_cluster": 0.2}) == ""


def count_exchanges() -> list[tuple[str, int]]:
    method = build().eval()
    own = slice(dist.get_rank() * BATCH // 2, (dist.get_rank() + 1) * BATCH // 2)
    whole = views()
    with Counted() as counted:
        method(Views([images[own] for images in whole.images], whole.ids[own]), 0)
    return counted.calls


@pytest.mark.distributed
def test_a_step_exchanges_ids_clusters_and_the_heads_gradient_once():
    [calls, _] = run_ranks(count_exchanges, 2, timeout_s=600)
    assert sizes_of(calls) == [("all_gather", BATCH), ("all_reduce", BATCH), ("all_reduce", 6 * (10 + 1))]
