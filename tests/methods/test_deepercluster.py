from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from largescale.clustering.agreement import agreement
from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.task_views.rotation import turned
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.deepercluster import DeeperCluster
from largescale.methods.phase import PlainEmbeddings
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.ranks import run_ranks
from tests.methods.begun import begun, phase_over, plain_images, random_views, take_state

pytestmark = pytest.mark.usefixtures("group_of_one")

MINI = ROOT / "tests/methods/mini/deepercluster.yaml"
BATCH, SAMPLES, PER_EPOCH = 6, 40, 3
LENGTH = Length(6 * PER_EPOCH, PER_EPOCH, SAMPLES)


def build(*overrides: str, length: Length = LENGTH) -> DeeperCluster:
    return begun(DeeperCluster, MINI, BATCH, length, *overrides)


def views(step: int = 0) -> Views:
    return random_views(BATCH, step, SAMPLES, (2, 24))


def cluster(method: DeeperCluster, step: int = 0) -> dict[str, float]:
    return phase_over(method, plain_images(SAMPLES), missing=17, step=step)


def rows_of(method: DeeperCluster) -> Tensor:
    return method.heads.tensor(init_device_mesh("cpu", (1,))).full_tensor().clone()


def naive_loss(method: DeeperCluster, batch: Views, turns: Tensor, rows: Tensor) -> Tensor:
    """The sum of the docstring, for two super-clusters of three clusters."""
    own = method.assignments.own[:, 0].tolist()
    size = {cluster: own.count(cluster) for cluster in set(own) - {-1}}
    used = [len({cluster for cluster in size if cluster // 3 == coarse}) for coarse in range(2)]
    V, W = rows[-8:], rows[:-8].view(8, 3, -1)
    total = torch.zeros((), dtype=torch.float64)
    for number, (view, of_view) in enumerate(zip(batch.images[0], turns.flatten().tolist(), strict=True)):
        x = torch.relu(method.projection[0](method.backbone(torch.rot90(view, of_view, (1, 2))[None])[0]))
        mine = own[batch.ids[number % BATCH]]
        if mine < 0:
            continue
        s, k = of_view * 2 + mine // 3, mine % 3
        weight = sum(size.values()) / sum(map(bool, used)) / used[mine // 3] / size[mine] / len(turns.flatten())
        total = total - torch.log_softmax(V[:, :-1] @ x + V[:, -1], 0)[s] * weight
        total = total - torch.log_softmax(W[s, :, :-1] @ x + W[s, :, -1], 0)[k] * weight
    return total


@pytest.mark.parametrize("turns", ["one", "all"])
def test_loss_and_gradients_equal_the_naive_loop(turns):
    method = build(f"method.turns={turns}", "method.head_lr=0.5", "method.head_weight_decay=0.1").eval()
    cluster(method)
    without = 0
    for step in range(5):
        batch = views(step)
        without += batch.ids.tolist().count(17)
        seen = method.task_views(batch, step).facts["turns"]
        rows = rows_of(method).requires_grad_()
        each = batch if turns == "one" else batch._replace(images=[batch.images[0].repeat(4, 1, 1, 1)])
        expected, found = naive_loss(method, each, seen, rows), method(batch, step)
        torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(found.signs["super_loss"] + found.signs["sub_loss"], expected.detach())
        trained = list(method.parameters())
        *theirs, of_rows = torch.autograd.grad(expected, [*trained, rows])
        torch.testing.assert_close(torch.autograd.grad(found.loss, trained), tuple(theirs), rtol=1e-9, atol=1e-12)
        method.after_update(step)
        torch.testing.assert_close(rows_of(method), rows.detach() - 0.5 * (of_rows + 0.1 * rows.detach()))
    assert without, "no image without a cluster came"


def test_clusters_of_a_super_cluster_are_within_it_and_weights_are_1_on_average():
    method = build()
    found = cluster(method)
    own = method.assignments.own[:, 0].long()
    assert int(own[17]) == -1 and set(own.tolist()) <= {-1, 0, 1, 2, 3, 4, 5}
    assert float(method.weights[own[own >= 0]].mean()) == pytest.approx(1)
    sizes = own[own >= 0].bincount(minlength=6).double()
    shares = (sizes * method.weights).view(2, 3)
    torch.testing.assert_close(shares, torch.full_like(shares, 39 / 6))  # all clusters have images, and count alike
    assert found["super_clusters_used"] == found["clusters_used"] == 1 and "cluster_nmi" not in found
    again = cluster(method, step=3)
    assert 0 <= again["cluster_nmi"] <= 1 and 0 <= again["super_cluster_nmi"] <= 1


def test_a_super_cluster_with_few_images_has_as_few_clusters():
    method = build()
    points = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[:2] += 50
    found, sizes = method._clusters(points, 0, lambda what: None)
    far = int(found[0]) // 3
    assert (found[:2] // 3).tolist() == [far, far] and set((found[2:] // 3).tolist()) == {1 - far}
    assert sorted(sizes[far].tolist()) == [0, 1, 1] and torch.equal(sizes.flatten(), found.bincount(minlength=6))
    assert float(method._weights(sizes)[found].mean()) == pytest.approx(1)


def test_a_super_cluster_of_one_image_weighs_no_more_than_a_cluster_of_one():
    method = build()
    sizes = torch.tensor([[1, 0, 0], [1, 19, 19]])
    weights = method._weights(sizes)
    assert float((weights * sizes.flatten()).sum() / 40) == pytest.approx(1)
    assert float(weights[0]) == pytest.approx(float(weights[3])), "40 / 2 of it before, and 40 / 6"
    assert float(weights[4]) == pytest.approx(float(weights[5])) and float(weights[0]) < 2 * 40 / 6
    sizes = torch.tensor([[1, 1, 1], [1, 18, 18]])  # as small as without: unchanged
    expected = 40 / 6 / sizes.flatten().double()
    torch.testing.assert_close(method._weights(sizes), expected, rtol=1e-14, atol=0)


def test_heads_are_drawn_again_with_every_clustering_and_held_by_no_optimizer():
    method, other = build(), build()
    cluster(method)
    first = rows_of(method)
    cluster(method, step=3)
    cluster(other)
    assert first.shape == (4 * 6 + 8, 11) and float(first[:, :-1].std()) == pytest.approx(0.01, rel=0.2)
    assert torch.equal(first, rows_of(other)) and not torch.equal(first, rows_of(method))
    assert not any("head" in name for name, _ in method.named_parameters())


def test_what_a_checkpoint_holds_is_all_that_goes_on():
    method, other = build().eval(), build().eval()
    cluster(method)
    method(views(0), 0)
    method.after_update(0)
    take_state(other, method)
    assert torch.equal(method(views(1), 1).loss, other(views(1), 1).loss)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"method.clusters=42: 42 clusters for 40 images; lower it"):
        build("method.clusters=42")
    with pytest.raises(InputError, match=r"method.max_phase_gb=1e-06: clusters of 40 images take"):
        build("method.max_phase_gb=0.000001")
    with pytest.raises(InputError, match=r"method.clusters=7: expected a multiple of method.super_clusters=2"):
        build("method.clusters=7")
    with pytest.raises(InputError, match=r"data.crops=groups of 24, 16 px: expected one group with"):
        build("data.crops=[{num: 2, size: 24}, {num: 1, size: 16}]")


def test_one_cluster_or_super_cluster_for_most_images_is_said():
    config = load_config(MINI)
    healthy = {"loss": 1.0, "super_loss": 0.5, "sub_loss": 0.5, "same_cluster": 0.2, "same_super_cluster": 0.5}
    assert said_of(config, healthy) == ""
    assert "one super-cluster for most images" in said_of(config, {**healthy, "same_super_cluster": 0.95})
    assert "one cluster for most images" in said_of(config, {**healthy, "same_cluster": 0.8})


def test_a_level_that_is_not_learnt_is_said_whatever_the_other_does():
    config = load_config(MINI)
    signs = {"same_cluster": 0.2, "same_super_cluster": 0.5, "loss_over_ln_k": 0.6}
    chance, solved = {"super_loss": math.log(8), "sub_loss": math.log(3)}, {"super_loss": 0.1, "sub_loss": 0.1}
    assert said_of(config, {**signs, **solved}) == ""
    sub = said_of(config, {**signs, **solved, "sub_loss": chance["sub_loss"]})
    assert "clusters are not learnt" in sub and "(loss 100% of ln K/m)" in sub and "method.head_lr=10" in sub
    coarse = said_of(config, {**signs, **solved, "super_loss": chance["super_loss"]})
    assert "super-classes are not learnt" in coarse and "fewer method.super_clusters" in coarse
    assert DeeperCluster.brief({"loss_over_ln_k": 0.6}) == " (60% of ln 4K)"


FINE, COLOURS = 2, 4


def planted(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images of four colours, bright above, with a small or a large square; also their colours and sizes."""
    generator = torch.Generator().manual_seed(int(ids[0]))
    colours, sizes = ids % COLOURS, ids // COLOURS % FINE
    palette = torch.tensor([[1.5, 0, 0], [0, 1.5, 0], [0, 0, 1.5], [-1, -1, -1]])
    images = palette[colours][:, :, None, None] + 0.02 * torch.randn(len(ids), 3, 16, 16, generator=generator)
    images[:, :, :4] += 1
    images[:, :, 7:9, 5:7] += 1
    images[:, :, 6:11, 3:8] += sizes[:, None, None, None]
    return images, colours, sizes


def test_both_levels_are_found_and_learnt_where_images_have_them():
    """Super-clusters are colours, clusters small and large squares; colour and turn are told of images not seen."""
    count = 200
    length = Length(120, 120, count)
    method = build(
        "data.crops=[{num: 1, size: 16}]",
        "method.hidden=[]",
        f"method.clusters={FINE * COLOURS}",
        f"method.super_clusters={COLOURS}",
        "method.components=3",
        "method.head_lr=1",
        length=length,
    ).float()
    images, colours, sizes = planted(torch.arange(count))
    found = phase_over(method, images)
    own = method.assignments.own[:, 0].long()
    assert agreement(own // FINE, colours, COLOURS, COLOURS).nmi == pytest.approx(1), "colours are super-clusters"
    for colour in range(COLOURS):
        mine = colours == colour
        assert agreement(own[mine] % FINE, sizes[mine], FINE, FINE).nmi > 0.8, "sizes are clusters"
    assert found["clusters_used"] == 1
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.01)
    first = None
    for step in range(120):
        ids = torch.arange(step * 48, step * 48 + 48) * 7 % count
        output = method(Views([images[ids]], ids), step)
        first = first or {name: float(value) for name, value in output.signs.items()}
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_update(step)
    assert first["super_class_picked"] < 0.3 and first["super_loss"] == pytest.approx(math.log(16), abs=0.2)
    unseen, colours, sizes = planted(torch.arange(count, 2 * count))
    turns = torch.arange(count) % 4
    method.eval()
    with torch.no_grad():
        features = method.project(method.backbone(turned(unseen, turns)))
    rows = rows_of(method)
    own = own[: FINE * COLOURS].view(FINE, COLOURS)  # the first images are one of each kind
    super_class = turns * COLOURS + own[0, colours] // FINE
    of_super, within = rows[-4 * COLOURS :], rows[: -4 * COLOURS].view(4 * COLOURS, FINE, -1)[super_class]
    said = (features @ of_super[:, :-1].T + of_super[:, -1]).argmax(1)
    assert float((said == super_class).double().mean()) > 0.9, "chance is 1 in 16"
    said = ((features[:, None] * within[:, :, :-1]).sum(2) + within[:, :, -1]).argmax(1)
    assert float((said == own[sizes, colours] % FINE).double().mean()) > 0.8, "chance is 1 in 2"


def phases_of(ranks_seed: int) -> Tensor:
    """Clusters that all ranks find, of vectors that they have in pieces."""
    config = load_config(MINI, ["data.streams=1"])
    method = build_method(config, LENGTH).double()
    method.begin()
    generator = torch.Generator().manual_seed(ranks_seed)
    own = slice(method.assignments.first, method.assignments.first + method.assignments.num_own)
    vectors = torch.randn(SAMPLES, 10, generator=generator, dtype=torch.float64)[own]
    method.phase(0, PlainEmbeddings(vectors, torch.ones(len(vectors), dtype=torch.bool)), lambda what: None)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return torch.cat([value.full_tensor().flatten().double() for value in method.state(mesh).values()])


@pytest.mark.distributed
def test_any_number_of_ranks_finds_the_same():
    [alone] = run_ranks(phases_of, 1, 5, timeout_s=600)
    for found in run_ranks(phases_of, 3, 5, timeout_s=600):
        assert torch.equal(found, alone)
