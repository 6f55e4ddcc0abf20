from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from largescale.clustering.agreement import agreement
from largescale.clustering.fixed_point import NotFinite
from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.sela import SeLa
from largescale.plan.trace import StepTrace
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.ranks import run_ranks
from tests.methods.begun import begun, coloured_images, phase_over, plain_images, random_views, take_state

pytestmark = pytest.mark.usefixtures("group_of_one")

MINI = ROOT / "tests/methods/mini/sela.yaml"
BATCH, SAMPLES, PER_EPOCH = 6, 40, 3
LENGTH = Length(6 * PER_EPOCH, PER_EPOCH, SAMPLES)


def build(*overrides: str, length: Length = LENGTH) -> SeLa:
    return begun(SeLa, MINI, BATCH, length, *overrides)


def views(step: int = 0) -> Views:
    return random_views(BATCH, step, SAMPLES, (2, 24), (1, 16))


def solve(method: SeLa, images: Tensor, missing: int = 17, step: int = 2) -> dict[str, float]:
    return phase_over(method, images, missing=missing, step=step)


def test_loss_and_gradient_equal_the_naive_loop():
    method = build().eval()
    for step in range(2):
        batch = views(step)
        each = [*batch.images[0].split(BATCH), batch.images[1]]
        expected = torch.zeros((), dtype=torch.float64)
        for number, head in enumerate(method.heads):
            for view in each:
                for place, sample in enumerate(batch.ids.tolist()):
                    probabilities = torch.softmax(head(method.backbone(view))[place], 0)
                    expected = expected - probabilities[method.labels.own[sample, number]].log() / 2 / BATCH / 3
        loss = method(batch, step).loss
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-14)
        trained = list(method.parameters())
        ours, theirs = torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_first_labels_are_balanced_and_other_ones_in_each_head():
    method = build("method.clusters=[4,4]")
    for head in range(2):
        assert method.labels.own[:, head].bincount().tolist() == [10] * 4
    assert not torch.equal(method.labels.own[:, 0], method.labels.own[:, 1])
    assert not torch.equal(method.labels.own[:, 0], torch.arange(SAMPLES) % 4)
    other = build("method.clusters=[4,4]", "run.seed=1")
    assert not torch.equal(method.labels.own, other.labels.own)


def first_labels() -> Tensor:
    return build().labels.own


@pytest.mark.distributed
def test_the_first_labels_do_not_depend_on_the_ranks():
    assert torch.equal(torch.cat(run_ranks(first_labels, 3)), build().labels.own)


def test_solves_are_often_at_first_and_seldom_in_the_end():
    method = build("method.solves=4", length=Length(1000, 10, SAMPLES))
    assert [step for step in range(1000) if method.phase_due(step)] == [40, 160, 360, 640]


def test_solves_that_a_run_has_no_room_for_are_said_and_none_comes_before_the_first_step():
    method = build("method.solves=100", length=Length(1000, 100, 10 * SAMPLES))
    due = [step for step in range(1000) if method.phase_due(step)]
    assert 0 not in due and len(due) < 100
    config = load_config(MINI, ["method.solves=100"])
    [line] = SeLa.complaints(config, Length(1000, 100, 1000))
    assert f"method.solves=100: only {len(due)} come before steps of their own" in line
    assert "set method.solves=30 or fewer" in line
    assert SeLa.complaints(load_config(MINI, ["method.solves=30"]), Length(1000, 100, 1000)) == []
    [line] = SeLa.complaints(config, Length(20_000, 1000, 1000))
    assert "each embeds every image, in a run of 20,000 steps or 20 epochs; set method.solves=80" in line
    assert SeLa.complaints(config, Length(280_000, 1000, 1000)) == []
    assert SeLa.suited(config, Length(20_000, 1000, 1000))["solves"][0] == 80


@pytest.mark.parametrize("precision, within", [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)])
def test_heads_are_read_in_full_under_autocast_and_beside_large_biases(precision, within):
    method = build().to(precision)
    for head in method.heads:
        torch.nn.init.constant_(head.bias, 48.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        method.plain(plain_images(SAMPLES).to(precision)[:2])
    for head, (weights, biases) in zip(method.heads, method._layers, strict=True):
        largest = float(head.weight.detach().abs().max())
        torch.testing.assert_close(weights, head.weight.float(), rtol=within, atol=within * largest)
        torch.testing.assert_close(biases.float(), head.bias.float())


def test_labels_that_are_not_found_in_time_are_said(caplog):
    method = build("method.solve_iterations=2", "method.tolerance=0.000001").eval()
    with caplog.at_level("WARNING"):
        solve(method, plain_images(SAMPLES))
    assert "labels of head 0, before step 2: error" in caplog.text
    assert "above method.tolerance=1e-06; raise method.solve_iterations" in caplog.text


def test_a_phase_holds_no_more_than_it_promises():
    """Most bytes of all tensors of a phase, with features."""
    images = 20_000
    overrides = ["method.clusters=[50,60]", "method.solve_iterations=12", "method.tolerance=0.000001"]
    config = load_config(MINI, ["train.precision=fp32", *overrides, f"train.global_batch={BATCH}", "data.streams=1"])
    method = build_method(config, Length(100, 50, images))
    method.begin()
    features = torch.randn(images, method.num_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        method.plain(plain_images(SAMPLES)[:2].float())
        with StepTrace() as trace:
            trace.watch(iter([features, method.labels.rows]))
            everything = torch.ones(images, dtype=torch.bool)
            method.phase(2, PlainEmbeddings(features, everything), lambda what: trace.held())
    held, promised = trace.lap(), SeLa.phase_bytes(config, images)
    assert 0.6 * promised < held <= promised, (held, promised)


def test_a_network_that_has_diverged_is_no_fault_of_the_clusters():
    method = build().eval()
    with torch.no_grad():
        method.heads[0].bias.fill_(torch.nan)
    with pytest.raises(NotFinite):
        solve(method, plain_images(SAMPLES))


def test_labels_are_those_of_the_published_loop_by_the_heads_as_they_are():
    method = build().eval()
    method._layers = [(torch.zeros(5, 1), torch.zeros(5))]
    method.after_update(0)  # what heads were is forgotten
    images, before = plain_images(SAMPLES), method.labels.own.clone()
    found = solve(method, images)
    features = method.backbone(images)
    readable = torch.arange(SAMPLES) != 17
    for number, head in enumerate(method.heads):
        kernel = torch.softmax(head(features[readable]), 1).detach() ** 5
        beta, last = torch.ones(kernel.shape[1], dtype=torch.float64), torch.tensor(0.0)
        for iteration in range(1, 1000):
            alpha = 1 / len(kernel) / (kernel @ beta)
            if iteration % 10 == 1 and (last / alpha - 1).abs().sum() < 0.1:
                break
            last, beta = alpha, 1 / kernel.shape[1] / (alpha @ kernel)
        assert torch.equal(method.labels.own[readable, number].long(), (kernel * beta).argmax(1))
    assert torch.equal(method.labels.own[17], before[17]), "an image that cannot be read keeps its labels"
    assert found["solve_error"] < 0.1 and 0 < found["clusters_used"] <= 1


def test_a_solve_sees_each_image_by_itself():
    method, images = build(), plain_images(SAMPLES)  # in training mode
    with torch.no_grad():
        torch.testing.assert_close(method.plain(images[:1]), method.plain(images)[:1])


def test_coloured_squares_are_told_apart():
    """A head learns what it is given; labels follow the squares after a few rounds of both."""
    method = build("method.clusters=[4]", "method.power=25", "method.tolerance=0.01")
    images, known = coloured_images(SAMPLES)
    head = method.heads[0]
    with torch.no_grad():
        features = method.plain(images)
        features = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for step in range(30):
        for _ in range(5):
            optimizer.zero_grad()
            cross_entropy(head(features), method.labels.own[:, 0].long()).backward()
            optimizer.step()
        method._layers = [(head.weight.detach(), head.bias.detach())]
        method.phase(step, PlainEmbeddings(features, torch.ones(SAMPLES, dtype=torch.bool)), lambda what: None)
    found = agreement(method.labels.own[:, 0].long(), known, 4, 4)
    assert found.nmi == pytest.approx(1)


def test_what_a_checkpoint_holds_is_all_that_goes_on():
    method, other = build().eval(), build("run.seed=1").eval()
    other.load_state_dict(method.state_dict())
    solve(method, plain_images(SAMPLES))
    take_state(other, method)
    assert torch.equal(method(views(1), 3).loss, other(views(1), 3).loss)
    assert solve(method, plain_images(SAMPLES), step=8) == solve(other, plain_images(SAMPLES), step=8)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"method.clusters=\[5, 41\]: 41 clusters for 40 images; lower it"):
        build("method.clusters=[5,41]")
    with pytest.raises(InputError, match=r"method.max_phase_gb=1e-06: clusters of 40 images take"):
        build("method.max_phase_gb=0.000001")
    with pytest.raises(InputError, match=r"method.clusters=\[40\], before step 2: 39 points for 40 clusters"):
        solve(build("method.clusters=[40]"), plain_images(SAMPLES))


def test_labels_that_are_not_learnt_are_said():
    config = load_config(MINI)
    signs = {"cluster_picked": 0.1, "same_cluster": 0.2, "loss": 1.5}
    assert "clusters are not learnt" in said_of(config, {**signs, "loss_over_ln_k": 1.0})
    assert said_of(config, {**signs, "loss_over_ln_k": 0.6}) == ""
