from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize

from largescale.clustering.kmeans import Clusters
from largescale.config import load_config
from largescale.data.device_random import uniform
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.pcl import PCL
from largescale.methods.phase import PlainEmbeddings, with_plain_images
from largescale.plan.trace import StepTrace
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.ranks import Counted, run_ranks
from tests.methods.begun import begun, random_views, sizes_of

pytestmark = pytest.mark.usefixtures("group_of_one")

MINI = ROOT / "tests/methods/mini/pcl.yaml"
BATCH, SAMPLES, PER_EPOCH = 6, 20, 3
LENGTH = Length(6 * PER_EPOCH, PER_EPOCH, SAMPLES)


def build(*overrides: str, length: Length = LENGTH) -> PCL:
    return begun(PCL, MINI, BATCH, length, "method.queue=18", *overrides)


def views(step: int = 0) -> Views:
    return random_views(BATCH, step, SAMPLES, (2, 24))


def corpus(missing: int = 17) -> PlainEmbeddings:
    readable = torch.arange(SAMPLES) != missing
    return PlainEmbeddings(all_vectors()[readable], readable)


def all_vectors() -> Tensor:
    vectors = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return normalize(vectors, dim=1)


def cluster(method: PCL, step: int = 0, **options: int) -> dict[str, float]:
    return method.phase(step, corpus(**options), lambda what: None)


def chosen(number: int, count: int, step: int, wanted: int) -> list[int]:
    """Clusters at random, as the numbers of (seed, step) sort them."""
    draws = uniform(0, step, number, 42, num=count, device=torch.device("cpu")).tolist()
    return sorted(range(count), key=draws.__getitem__)[:wanted]


def naive_clusters(method: PCL, queries: Tensor, ids: list[int], step: int) -> Tensor:
    """The sum of the docstring, a query at a time."""
    total = torch.zeros((), dtype=torch.float64)
    sets = zip((5, 9), method.centroids.split([5, 9]), method.spreads.split([5, 9]), strict=True)
    for number, (count, centroids, phi) in enumerate(sets):
        others = chosen(number, count, step, 6)
        for query, sample in zip(queries, ids, strict=True):
            own = int(method.assignments.own[sample, number])
            if own < 0:
                continue
            mine = torch.exp(query @ centroids[own] / phi[own])
            wrong = [torch.exp(query @ centroids[other] / phi[other]) for other in others if other != own]
            total = total - torch.log(mine / (mine + sum(wrong))) / len(queries) / 2
    return total


def test_loss_and_gradient_equal_the_naive_loop():
    method, plain = build().eval(), build("method.warmup_epochs=9").eval()
    cluster(method)
    unassigned = 0
    for step in range(4):
        batch = views(step)
        ids = batch.ids.tolist()
        unassigned += sum(sample == 17 for sample in ids)
        queries = normalize(method.projection(method.backbone(batch.images[0][:BATCH])), dim=1)
        moco = plain(batch, step).loss
        loss = method(batch, step).loss
        expected = naive_clusters(method, queries, ids, step)
        torch.testing.assert_close(loss - moco, expected, rtol=1e-11, atol=1e-14)
        students = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
        ours = torch.autograd.grad(loss, [p for _, p in students])
        theirs = torch.autograd.grad(expected, [p for _, p in students])
        without = torch.autograd.grad(moco, [plain.get_parameter(name) for name, _ in students])
        for one, clusters, rest in zip(ours, theirs, without, strict=True):
            torch.testing.assert_close(one, clusters + rest, rtol=1e-9, atol=1e-12)
    assert unassigned, "no image without a cluster came"


def test_a_phase_assigns_every_image_that_could_be_read_to_its_nearest_centroid():
    method, readable, vectors = build(), corpus().readable, all_vectors()
    found = cluster(method)
    assert found["clusters_used_5"] == 1.0 and 0 < found["clusters_used_9"] <= 1
    assigned = method.assignments.own
    assert assigned[17].tolist() == [-1, -1] and int(assigned[readable].min()) == 0
    for number, count in enumerate((5, 9)):
        centroids = method.centroids.split([5, 9])[number]
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(count, dtype=torch.float64))
        means = torch.stack([vectors[assigned[:, number] == one].mean(0) for one in range(count)])
        used = ~means.isnan().any(1)
        torch.testing.assert_close(centroids[used], normalize(means[used], dim=1))
    theirs = KMeans(5, n_init=1, init="random", random_state=0).fit(vectors[readable].numpy()).inertia_
    ours = sum(
        float((vectors[assigned[:, 0] == one] - vectors[assigned[:, 0] == one].mean(0)).square().sum())
        for one in range(5)
    )
    assert ours <= 1.2 * theirs


def spread(distances: list[list[float]], *, smoothing: float = 10, temperature: float = 0.2) -> Tensor:
    """The published estimate, a cluster at a time."""
    phi = [np.mean(own) / np.log(len(own) + smoothing) if len(own) > 1 else np.nan for own in distances]
    filled = np.where(np.isnan(phi), np.nanmax(phi), phi)
    clipped = np.clip(filled, np.percentile(filled, 10), np.percentile(filled, 90))
    return torch.from_numpy(temperature * clipped / clipped.mean())


def clusters_of(distances: list[list[float]]) -> Clusters:
    numbers = torch.tensor([place for place, own in enumerate(distances) for _ in own])
    flat = torch.tensor([one for own in distances for one in own], dtype=torch.float64)
    sizes = torch.tensor(list(map(len, distances)))
    return Clusters(torch.zeros(len(distances), 8), numbers, flat, sizes, 0.0, 1)


def test_spreads_equal_the_published_estimate():
    distances = [[0.1, 0.2, 0.4], [0.9], [0.5, 0.5], [], [0.05] * 7, [0.3, 1.0]]
    torch.testing.assert_close(build()._spread(clusters_of(distances)), spread(distances), rtol=1e-12, atol=0)


def test_clusters_of_copies_are_not_divided_by_nothing():
    phi = build()._spread(clusters_of([[0.0, 0.0]] * 9 + [[0.5, 0.7]]))
    assert phi.isfinite().all() and float(phi.min()) > 0
    alone = build()._spread(clusters_of([[0.0]] * 4))
    assert alone.tolist() == [0.2] * 4


def test_with_a_cluster_per_image_it_is_infonce_against_all_images():
    method = build("method.clusters=[20]", "method.wrong_clusters=99").eval()
    plain = build("method.warmup_epochs=9").eval()
    cluster(method, missing=-1)
    batch = views(3)
    queries = normalize(method.projection(method.backbone(batch.images[0][:BATCH])), dim=1)
    loss = (method(batch, 3).loss - plain(batch, 3).loss).detach()
    logits = queries @ all_vectors().T / method.config.temperature
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, batch.ids).detach())


def test_images_of_one_cluster_do_not_get_it_as_wrong():
    """In published code the clusters of a batch are candidates for all its images, also for the mates of one."""
    method, plain = build("method.clusters=[3]").eval(), build("method.warmup_epochs=9").eval()
    cluster(method)
    method.assignments.own.fill_(1)
    with torch.no_grad():
        method.centroids.copy_(torch.eye(8, dtype=torch.float64)[:3])
        for layer in (method.projection[-1], plain.projection[-1]):
            layer.weight.zero_()
            layer.bias.copy_(torch.eye(8, dtype=torch.float64)[1])
        method.spreads.fill_(0.01)
    loss = float(method(views(), 0).loss.detach() - plain(views(), 0).loss.detach())
    assert loss == pytest.approx(0, abs=1e-12)  # ln 2 if a mate's cluster were wrong


def test_as_many_wrong_clusters_as_there_are_may_be_asked_for():
    method = build("method.wrong_clusters=1000").eval()
    cluster(method)
    assert method(views(), 0).loss.isfinite()


def test_clusters_at_random_follow_from_seed_and_step_not_from_a_process():
    assert chosen(0, 9, 5, 6) != chosen(0, 9, 6, 6) != chosen(1, 9, 6, 6)
    first, second = build().eval(), build().eval()
    for method in (first, second):
        cluster(method)
    assert torch.equal(first(views(), 5).loss, second(views(), 5).loss)


def test_phases_come_before_epochs_after_the_warm_up():
    method = build("method.warmup_epochs=2", "method.recluster_epochs=2")
    assert [step for step in range(20) if method.phase_due(step)] == [6, 12, 18]
    plain = build("method.warmup_epochs=9")
    for step in (0, 5):
        assert torch.equal(method(views(step), step).loss, plain(views(step), step).loss)


def test_a_warm_up_that_outlasts_the_run_is_said():
    config = load_config(MINI, ["method.warmup_epochs=20"])
    [line] = [one for one in PCL.complaints(config, Length(30, 3, 200)) if "warmup" in one]
    assert line == (
        "method.warmup_epochs=20: clusters take part only after it, and the run has 10 epochs; set "
        "method.warmup_epochs=1, or train longer"
    )
    assert not PCL.complaints(load_config(MINI, ["method.warmup_epochs=5"]), Length(30, 3, 200))


def test_collapse_is_said_before_there_are_clusters_and_after():
    config = load_config(MINI, ["method.warmup_epochs=2"])
    without, with_clusters = PCL.loss_references(config).values()
    signs = {"embedding_std": 0.0, "spread": 0.0, "effective_rank": 1.0, "agreement": 1.0, "picked": 0.0}
    for epoch, loss in ((1.5, without), (3.0, with_clusters)):
        collapsed = {**signs, "epoch": epoch, "loss": loss}
        assert "looks like collapse" in said_of(config, collapsed)
        apart = {**collapsed, "loss": 0.5 * loss}
        assert said_of(config, apart) == ""


def test_more_images_than_a_phase_can_hold_are_refused():
    config = load_config(MINI, ["method.clusters=[5,7]", "train.precision=fp32"])
    size, in_double = (PCL.phase_bytes(one, SAMPLES) for one in (config, load_config(MINI, ["method.clusters=[5,7]"])))
    assert in_double - size == 4 * 8 * SAMPLES + 4 * 12 * 9 + 4 * 4 * 7 * 8 + 4 * 4096 * (7 + 64)
    build("method.clusters=[5,7]", f"method.max_phase_gb={in_double / 1e9}")
    with pytest.raises(InputError) as refusal:
        build("method.clusters=[5,7]", f"method.max_phase_gb={size / 1e9}")
    assert str(refusal.value).startswith(
        f"method.max_phase_gb={size / 1e9:g}: clusters of 20 images take {in_double / 1e9:.3g} GB on each of 1 rank; "
        "use more ranks"
    )


def test_a_phase_holds_no_more_than_it_promises():
    """Most bytes of all tensors of a phase, beside what a run holds anyway and k-means' blocks."""
    images, width = 60_000, 64
    overrides = [
        "train.precision=fp32",
        f"method.embedding={width}",
        "method.clusters=[50,300]",
        "method.kmeans_restarts=2",
    ]
    config = load_config(MINI, [*overrides, "method.kmeans_iterations=2", "train.global_batch=8", "data.streams=1"])
    method = build_method(config, Length(6, 3, images))
    method.begin()
    vectors = normalize(torch.randn(images, width, generator=torch.Generator().manual_seed(0)), dim=1)
    with StepTrace() as trace:
        trace.watch(iter([vectors, method.assignments.rows, method.centroids]))
        method.phase(0, PlainEmbeddings(vectors, torch.ones(images, dtype=torch.bool)), lambda what: trace.held())
    held, promised, blocks = trace.lap(), PCL.phase_bytes(config, images), 4096 * (300 * 4 + width * 4 * 8)
    assert 0.5 * promised < held <= promised + blocks, (held, promised, blocks)


def test_the_best_of_several_starts_counts():
    few, many = (build("method.clusters=[5,9]", f"method.kmeans_restarts={times}") for times in (1, 20))
    inertia = []
    for method in (few, many):
        cluster(method)
        own = method.assignments.own[corpus().readable, 1].long()
        means = torch.stack([corpus().vectors[own == one].mean(0) for one in range(9)])
        inertia.append(float((corpus().vectors - means[own]).square().sum()))
    assert inertia[1] < inertia[0]


def test_more_clusters_than_images_are_refused():
    with pytest.raises(InputError) as refusal:
        build("method.clusters=[5,21]")
    assert str(refusal.value) == "method.clusters=[5, 21]: 21 clusters for 20 images; lower it"
    method = build("method.clusters=[20]")
    with pytest.raises(InputError, match=r"method.clusters=\[20\], before step 0: 19 points for 20 clusters"):
        cluster(method)


@pytest.mark.parametrize(
    "crops, size, resize",
    [
        ("[{num: 2, size: 224, scale: [0.2, 1.0]}]", 224, 256),  # as published
        ("[{num: 2, size: 224, scale: [0.14, 1.0]}, {num: 6, size: 96, scale: [0.05, 0.14]}]", 224, 256),
        ("[{num: 2, size: 28, scale: [0.81, 1.0]}]", 28, 31),
        ("[{num: 2, size: 90, scale: [0.1, 0.25]}]", 90, 180),
    ],
)
def test_a_phase_sees_images_of_the_size_and_cut_of_large_views(crops, size, resize):
    """Whatever evaluation sees: that may change within a run."""
    config = load_config(MINI, [f"data.crops={crops}", "evaluate.size=16", "evaluate.resize=20"])
    shown = with_plain_images(config)
    assert (shown.evaluate.size, shown.evaluate.resize) == (size, resize)
    assert (config.evaluate.size, config.evaluate.resize) == (16, 20)


def count_exchanges() -> list[tuple[str, int]]:
    method = build().eval()
    method.assignments.own.fill_(1)
    own = slice(dist.get_rank() * BATCH // 2, (dist.get_rank() + 1) * BATCH // 2)
    whole = views()
    with Counted() as counted:
        method(Views([whole.images[0].view(2, BATCH, 3, 24, 24)[:, own].flatten(0, 1)], whole.ids[own]), 0)
    return counted.calls


@pytest.mark.distributed
def test_a_step_exchanges_keys_ids_and_clusters_once():
    [calls, _] = run_ranks(count_exchanges, 2, timeout_s=600)
    assert sizes_of(calls) == [("all_gather", BATCH), ("all_gather", BATCH * 8), ("all_reduce", BATCH * 2)]
