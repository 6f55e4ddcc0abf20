from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from largescale.checkpoint.folder import Checkpoint
from largescale.config import flatten, load_config, to_yaml, values_saved_before
from largescale.config.loading import config_of_values
from largescale.data.views import Supports, Views
from largescale.evaluate.targets import config_of
from largescale.methods import build_method
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.soft_neighbours import cross_entropies, in_domain_neighbours, sharpened, smoothed_classes
from largescale.methods.paws import PAWS, Settings
from largescale.run.same_run import changed_setting
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.launcher import run_largescale
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import losses
from tests.helpers.streams import overwrite
from tests.methods.harness import train

MINI = ROOT / "tests/methods/mini/paws.yaml"
BATCH, CLASSES, IMAGES = 5, 3, 4
OVERRIDES = [f"train.global_batch={BATCH}", "data.streams=1", f"method.support.images={IMAGES}"]


def build(*overrides: str) -> PAWS:
    torch.manual_seed(0)
    return build_method(load_config(MINI, [*OVERRIDES, *overrides])).double().eval()


def views(step: int = 0) -> Views:
    """Two large views and a small one, and two views of supports."""
    generator = torch.Generator().manual_seed(step)

    def draw(num: int, side: int) -> Tensor:
        return torch.randn(num, 3, side, side, generator=generator, dtype=torch.float64)

    ids = torch.arange(CLASSES * IMAGES)
    supports = Supports(draw(2 * len(ids), 24), ids % CLASSES, ids)
    return Views.numbered([draw(2 * BATCH, 24), draw(BATCH, 16)], BATCH)._replace(supports=supports)


def naive_loss(method: PAWS, batch: Views) -> Tensor:
    """An image and a support at a time."""
    settings = method.config

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        z = method.projection(method.backbone(images))
        return unit(z.detach()), unit(method.predictor(z))

    def near(row: Tensor, rows: Tensor) -> Tensor:
        weights = [torch.exp(row @ other / settings.temperature) for other in rows]
        votes = []
        for k in range(CLASSES):
            own = [settings.smoothing / CLASSES + (1 - settings.smoothing) * float(label == k) for label in labels]
            votes.append(sum(w * share for w, share in zip(weights, own, strict=True)) / sum(weights))
        return torch.stack(votes)

    def sharp(p: Tensor) -> Tensor:
        return p ** (1 / settings.sharpening) / (p ** (1 / settings.sharpening)).sum()

    labels = [*batch.supports.labels.tolist()] * 2  # view after view
    known, predicted = both(batch.supports.images)
    seen = [both(images) for images in (*batch.images[0].split(BATCH), batch.images[1])]
    total, mean = torch.zeros((), dtype=torch.float64), torch.zeros(CLASSES, dtype=torch.float64)
    for i in range(BATCH):
        targets = [sharp(near(seen[a][0][i], known)) for a in range(2)]
        for v in range(3):
            q = near(seen[v][1][i], predicted)
            target = (targets[1], targets[0], (targets[0] + targets[1]) / 2)[v]
            total = total - (target * q.log()).sum() / (3 * BATCH)
            mean = mean + sharp(q) / (3 * BATCH)
    return total + settings.mean_entropy * (mean * mean.log()).sum()


@pytest.mark.parametrize(
    "overrides",
    [[], ["method.predictor_hidden=[]"], ["method.mean_entropy=0", "method.smoothing=0"], ["method.sharpening=1"]],
    ids=["published", "no-predictor", "no-entropy", "not-sharpened"],
)
def test_loss_and_gradient_equal_the_naive_loop(overrides):
    method = build(*overrides)
    for step in range(2):
        loss, expected = method(views(step), step).loss, naive_loss(method, views(step))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        parameters = [p for p in method.parameters() if p.requires_grad]
        for ours, theirs in zip(
            torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def seen_by_heads(method: PAWS, sizes: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Embeddings and predictions, where heads see the features of each of these lists of images at once."""
    z = [method.projection(torch.cat([method.backbone(images) for images in groups])) for groups in sizes]
    return torch.cat(z), torch.cat([method.predictor(part) for part in z])


@pytest.mark.parametrize("apart", [True, False])
def test_batchnorm_of_the_heads_sees_each_size_by_itself(apart):
    """Supports with the large views, in whatever groups these are; or all at once, a group after the other."""
    method, batch = build(f"method.head_per_size={str(apart).lower()}").train(), views()
    supports, (first, second), small = batch.supports.images, batch.images[0].split(BATCH), batch.images[1]
    large = [torch.cat([supports, first, second])] if apart else [torch.cat([supports, first]), second]
    found = method.embed(batch._replace(images=[first, second, small]))
    z, predicted = seen_by_heads(method, [large, [small]] if apart else [[*large, small]])
    torch.testing.assert_close(found["predictions"].flatten(0, 1), predicted[len(supports) :])
    torch.testing.assert_close(found["supports"].flatten(0, 1), predicted[: len(supports)])
    torch.testing.assert_close(found["embeddings"].flatten(0, 1), z[len(supports) :][: 2 * BATCH])


def test_the_predictor_is_the_published_one_unless_the_checkpoint_is_older():
    """BatchNorm, linear, BatchNorm, ReLU, linear; a checkpoint that does not name the key has no first BatchNorm."""
    first = [torch.nn.BatchNorm1d, torch.nn.Linear, torch.nn.BatchNorm1d, torch.nn.ReLU, torch.nn.Linear]
    assert [type(layer) for layer in build().predictor] == first
    assert [type(layer) for layer in build("method.predictor_batchnorm=false").predictor] == first[1:]
    new = ["method.head_per_size", "method.predictor_batchnorm"]
    config = load_config(MINI, OVERRIDES)
    older = {key: value for key, value in flatten(config).items() if key not in new}
    for key, words in zip([*new, ""], ([], [f"{new[0]}=false"], [f"{key}=false" for key in new]), strict=True):
        config = load_config(MINI, [*OVERRIDES, *words])
        assert changed_setting(values_saved_before(older, config), config) == key


def test_an_older_run_is_evaluated_as_it_was_trained(tmp_path):
    new = ("head_per_size", "predictor_batchnorm")
    config = load_config(MINI, OVERRIDES)
    lines = to_yaml(config).splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text("".join(line for line in lines if not line.strip().startswith(new)))
    values = {key: value for key, value in flatten(config).items() if not key.endswith(new)}
    found, said = config_of(cast(Checkpoint, SimpleNamespace(progress={"config": values})), tmp_path, [])
    for settings in (found.method, config_of_values(values, "the checkpoint").method):
        assert isinstance(settings, Settings) and not (settings.head_per_size or settings.predictor_batchnorm)
    assert [line.partition(" has method.")[2].partition("=")[0] for line in said] == ["predictor_batchnorm", new[0]]


def test_images_out_of_the_domain_count_less():
    """The loss is the mean of cross entropies that are weighted by the mean of both views' probabilities."""
    words = ["method.in_domain=true", "method.mean_entropy=0", "method.prior_temperature=0.5", "method.prior_power=2"]
    method, batch = build(*words), views()
    output = method(batch, 0)
    inputs = method.embed(batch)
    embeddings, known = unit(inputs["embeddings"]), unit(inputs["support_embeddings"]).transpose(0, 1).flatten(0, 1)
    labels = batch.supports.labels.repeat_interleave(2)
    classes = smoothed_classes(labels, CLASSES, 0.1, torch.float64)
    said = [in_domain_neighbours(one, known, classes, prior_temperature=0.5) for one in embeddings]
    weight = (said[0][1] + said[1][1]) / 2
    sharp = [sharpened(one, 0.25) for one, _ in said]
    targets = torch.stack([sharp[1], sharp[0], (sharp[0] + sharp[1]) / 2])
    torch.testing.assert_close(output.evidence["targets"], targets.detach())
    rows = cross_entropies(targets, output.evidence["probabilities"])
    torch.testing.assert_close(output.loss, (weight**2 * rows).mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(output.signs["in_domain"], weight.mean().detach())


def losses_in_domain() -> list[float]:
    return train(load_config(MINI, ["method.in_domain=true"]))["losses"]


@pytest.mark.distributed
def test_images_of_all_ranks_vote_for_each_other():
    [alone], [together, _] = run_ranks(losses_in_domain, 1), run_ranks(losses_in_domain, 2)
    assert together == pytest.approx(alone, rel=1e-9) and len(set(alone)) == len(alone)


def test_the_order_of_supports_does_not_matter():
    method, batch = build(), views()
    order = torch.randperm(CLASSES * IMAGES, generator=torch.Generator().manual_seed(1))
    images = batch.supports.images.unflatten(0, (2, -1))[:, order].flatten(0, 1)
    moved = Supports(images, batch.supports.labels[order], batch.supports.ids[order])
    output, other = method(batch, 0), method(batch._replace(supports=moved), 0)
    torch.testing.assert_close(output.loss, other.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.signs["support_accuracy"], other.signs["support_accuracy"])


def test_targets_take_no_gradient_and_supports_do():
    """Targets come from before the predictor; what it makes of supports learns too."""
    method = build()
    inputs = {name: value.detach().requires_grad_() for name, value in method.embed(views()).items()}
    method.loss(inputs | method.targets(views()), torch.arange(BATCH), 0).loss.backward()
    assert inputs["embeddings"].grad is None and inputs["support_embeddings"].grad is None
    assert inputs["supports"].grad.abs().sum() > 0 and inputs["predictions"].grad.abs().sum() > 0


@pytest.mark.parametrize("overrides, least", [([], -math.log(3)), (["method.mean_entropy=0"], 0.0)])
def test_equal_embeddings_cost_nothing_and_are_called_collapse(overrides, least):
    """Where all is alike, predictions are uniform: ln K - ln K. The least is -ln K, which the log counts from."""
    method, config = build(*overrides), load_config(MINI, [*OVERRIDES, *overrides])
    with torch.no_grad():
        method.projection[-1].weight.zero_()
        method.projection[-1].bias.fill_(1)
    output = method(views(), 0)
    loss = float(output.loss.detach())
    assert loss == pytest.approx(math.log(3) + least, abs=1e-9)
    references = PAWS.loss_references(config)
    assert references == pytest.approx({"uniform predictions": loss, "sure, all classes alike": least}, abs=1e-9)
    row = method.measures(loss, output.signs, BATCH)
    assert row["loss_above_least"] == pytest.approx(math.log(3)) and row["class_balance"] == pytest.approx(1)
    said = said_of(config, row)
    assert "looks like collapse" in said and ("method.mean_entropy=1" in said) == (least == 0)


def test_images_of_one_class_alone_are_said():
    """What the entropy of the mean prediction is against: all images near the supports of one class."""
    config, row = load_config(MINI, OVERRIDES), {"class_balance": 0.2, "support_accuracy": 0.5, "embedding_spread": 0.5}
    assert "most images are put into few classes (entropy 20% of ln K)" in said_of(config, row)
    assert PAWS.brief(row) == " (supports 50.0% right)"


def test_a_support_is_not_told_by_itself_nor_by_another_draw_of_its_image():
    """Three images are drawn twice; the nearest neighbour of each, but for itself, is of another class."""
    method = build()
    eye = torch.eye(8, dtype=torch.float64)[:3]
    own = torch.cat([eye, unit(eye + 0.1 * eye.roll(1, 0)), eye])
    ids, labels = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2]), torch.tensor([0, 1, 2, 1, 2, 0, 0, 1, 2])
    told = method._support_accuracy(own, labels, {"support_ids": ids[None]}, own, labels)
    by_themselves = method._support_accuracy(own, labels, {"support_ids": torch.arange(9)[None]}, own, labels)
    assert float(told) == 0 and float(by_themselves) == pytest.approx(6 / 9)


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.crops=[{num: 1, size: 24}]", "expected at least two large views"),
        ("method.sharpening=0", "method.sharpening=0.0: expected at least 0.001"),
        ("method.smoothing=1", "method.smoothing=1.0: expected below 1"),
        ("method.support.classes=1", "method.support.classes=1: expected at least 2"),
        ("method.support.images=[]", "method.support.images"),
        ("method.support.imagse=3", "method.support.imagse"),
    ],
)
def test_what_does_not_fit_is_refused(override, words):
    with pytest.raises(InputError, match=words):
        load_config(MINI, [override])


def audited(run: Path) -> dict[int, list[str]]:
    """The supports of all ranks, by step."""
    found: dict[int, list[str]] = {}
    for path in sorted(run.glob("audit/rank-*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            found.setdefault(row["step"], []).extend(row["support_keys"])
    return {step: sorted(keys) for step, keys in found.items()}


def ledgers(run: Path) -> dict[str, list[str]]:
    """Keys of the unreadable images that each rank has listed."""
    return {
        path.name: [json.loads(line)["key"] for line in path.read_text().splitlines()]
        for path in run.glob("skipped/*.jsonl")
    }


@pytest.mark.distributed
def test_a_run_with_an_unreadable_support_goes_on_with_other_ranks(shard_folder, tmp_path):
    """Every step draws it, and it counts once; other labels are named."""
    run, supports = tmp_path / "run", Path(shutil.copytree(shard_folder, tmp_path / "labelled"))
    bad = overwrite(supports, 1, 7)
    shared = [
        "pretrain",
        str(MINI),
        f"data.shards={shard_folder}",
        f"method.support.shards={supports}",
        "method.support.classes=10",
        "method.support.images=20",
        "data.audit=true",
        "data.max_skipped=1",
        "data.workers=0",
        f"run.dir={run}",
        "run.log_every=1",
        "train.steps=6",
        "checkpoint.every_steps=3",
        "checkpoint.keep=9",
    ]
    run_largescale(*shared, "parallel.strategy=fsdp", ranks=2)
    before, seen = losses(run), audited(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["skipped_samples"], row["skipped_rate"]) for row in rows] == [(1, 0)] * 6
    assert all(len(keys) == 200 and bad not in keys for keys in seen.values()) and sorted(seen) == [*range(6)]
    ledger = ledgers(run)
    assert ledger and all(keys == [bad] for keys in ledger.values())
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    other = run_largescale(*shared, "method.support.share=0.5", "method.support.seed=1", check=False)
    assert other.returncode == 2 and "cannot continue, method.support.seed was 0 and is now 1" in other.stderr
    listed = tmp_path / "listed.txt"
    listed.write_text("# numbers\n" + "\n".join(map(str, range(0, 200, 2))))
    other = run_largescale(*shared, f"method.support.subset={listed}", check=False)
    assert other.returncode == 2 and "other labelled images than method.support.shards and" in other.stderr
    run_largescale(*shared, "parallel.strategy=ddp")
    assert losses(run) == pytest.approx(before, rel=1e-8) and audited(run) == seen
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_samples"] for row in rows] == [1] * 6
    assert ledgers(run) == ledger
