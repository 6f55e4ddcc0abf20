from __future__ import annotations

from typing import Any

import pytest
import torch

from largescale.config import Config
from largescale.data.length import Length
from largescale.data.task_views import masks
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.artifacts import AUTOENCODER, REPAIR, Artifacts
from largescale.models.autoencoders import filled_from_neighbours
from largescale.observe.doctor import judge
from largescale.optim.roles import MAIN
from largescale.parallel.strategies import build_engine
from shards.ground.errors import InputError
from tests.helpers.doctor import said_of
from tests.helpers.one_view import BATCH, SIDE, built, log_sigmoid
from tests.helpers.one_view import random_views as views
from tests.helpers.ranks import run_ranks
from tests.methods.harness import LENGTH, mini, views_of_step, whole

CODE = 6
STRATEGIES = ("ddp", "fsdp", "fairscale", "zero1", "zero2", "zero3")


def build(*overrides: str) -> Artifacts:
    return built(Artifacts, "artifacts", *overrides, steps_per_epoch=2)


def test_losses_are_those_of_a_loop():
    """In evaluation mode, so that images can be taken one by one."""
    method, batch = build("method.dropped=0.4").eval(), views()
    ours, step = method.config, 3
    dropped = masks.entries(batch.ids, 0.4, CODE, seed=0, step=step)
    made, fooling, told = 0.0, 0.0, 0.0
    for number, image in enumerate(batch.images[0]):
        code = method.autoencoder.encode(image[None])
        intact = method.autoencoder.decode(code, SIDE)
        made += float((intact - image).square().sum().detach()) / image.numel() / BATCH
        own = dropped[number : number + 1]
        repaired = method.repaired(filled_from_neighbours(code, own), SIDE, own)
        features = method.backbone(torch.cat([intact, repaired]))
        real, fake = method.answer(features).flatten().tolist()
        changed = 0.0
        for y in range(SIDE):
            for x in range(SIDE):
                if not own[0, 0, y * CODE // SIDE, x * CODE // SIDE]:
                    changed += float((repaired - intact)[0, :, y, x].square().sum().detach())
        kept_pixels = 3 * int((~own).sum()) * (SIDE // CODE) ** 2
        fooling += (-log_sigmoid(fake) + ours.repair_weight * changed / kept_pixels) / BATCH
        told -= (log_sigmoid(real) + log_sigmoid(-fake)) / 2 / BATCH
        for scores, kept in zip(
            method.entries(features).tolist(), [[True] * CODE**2, (~own).flatten().tolist()], strict=True
        ):
            terms = [log_sigmoid(score if keep else -score) for score, keep in zip(scores, kept, strict=True)]
            told -= ours.entry_weight * sum(terms) / len(terms) / 2 / BATCH
    for objective, expected in ((AUTOENCODER, made), (REPAIR, fooling), (MAIN, told)):
        assert float(method(batch, step, objective).loss.detach()) == pytest.approx(expected, rel=1e-10), objective


def test_repair_is_judged_by_the_very_answers_that_the_backbone_is_trained_on():
    """In training mode, where BatchNorm looks at all images of a pass."""
    method, batch = build(), views()
    judged = method(batch, 3, REPAIR).evidence["answers"].flatten()
    torch.testing.assert_close(judged, method(batch, 3, MAIN).evidence["answers"][BATCH:])


def test_the_autoencoder_comes_first_and_stays_as_it_is_from_then_on():
    method = build("method.autoencoder_epochs=1.5")
    assert [method.objectives_of(step) for step in (0, 2, 3, 7)] == [(AUTOENCODER,)] * 2 + [(REPAIR, MAIN)] * 2
    method(views(), 3, REPAIR)
    method(views(), 3, MAIN)
    fed = {name.split(".")[0]: int(b) for name, b in method.named_buffers() if name.endswith("num_batches_tracked")}
    assert fed == {"autoencoder": 0, "repair": 1, "backbone": 1}


def bits(config: Config) -> list[dict[str, Any]]:
    """Networks of a run, after each step."""
    torch.manual_seed(0)
    engine, found = build_engine(build_method(config, LENGTH), config, torch.device("cpu")), []
    for step in range(4):
        batch = views_of_step(config, step)
        for objective in engine.method.objectives_of(step):
            check = engine.check(batch, engine.forward_backward(batch, step, objective).loss)
            engine.update(check, step=step, lr=0.01, clip=0)
        found.append({name: whole(value) for name, value in engine.state().items()})
    return found


def bits_of_all(configs: list[Config]) -> list[list[dict[str, Any]]]:
    return [bits(config) for config in configs]


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    """Networks after each step, by strategy."""
    overrides = ["method.autoencoder_epochs=1", "optim.name=adamw", "train.precision=fp32"]
    configs = [mini("artifacts", *overrides, f"parallel.strategy={name}") for name in STRATEGIES]
    return dict(zip(STRATEGIES, run_ranks(bits_of_all, 2, configs)[0], strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_frozen_is_the_same_to_the_bit_in_later_steps(trained, strategy):
    states = trained[strategy]

    def same(first: int, second: int, part: str) -> bool:
        names = [name for name in states[second] if f".{part}." in name and not name.endswith("num_batches_tracked")]
        assert names
        return all(name in states[first] and torch.equal(states[first][name], states[second][name]) for name in names)

    assert [same(0, 1, part) for part in ("autoencoder", "backbone", "repair")] == [False, True, True]
    assert [same(1, 3, part) for part in ("autoencoder", "backbone", "repair")] == [True, False, False]


def test_artifacts_are_found_at_chance_first_and_then_where_repair_does_nothing():
    """Of random networks: blurred places are seen; a repair network that is not trained does not hide them."""
    method, accuracies = build("train.precision=fp32").float(), []
    moved = [*method.backbone.parameters(), *method.answer.parameters(), *method.entries.parameters()]
    optimizer = torch.optim.Adam(moved, lr=0.003)
    for step in range(40):
        batch = Views([views(16, seed=step).images[0].float()], torch.arange(16) + 16 * step)
        output = method(batch, step, MAIN)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        accuracies.append(float(output.signs["task_accuracy"]))
    assert accuracies[0] == pytest.approx(0.5, abs=0.3)
    assert sum(accuracies[-10:]) / 10 > 0.95


def test_what_is_logged_is_what_a_step_reports():
    method, config = build(), mini("artifacts")
    first = method(views(), 0, AUTOENCODER)
    row = method.measures(float(first.loss.detach()), first.signs, BATCH)
    assert row["unexplained"] == pytest.approx(float(first.loss.detach()), rel=0.05) and "task_accuracy" not in row
    signs = {name: value for objective in (REPAIR, MAIN) for name, value in method(views(), 3, objective).signs.items()}
    later = method.measures(0.0, signs, BATCH)
    assert set(method.signs) == set(first.signs) | set(signs)
    unseen = [row | {"progress": 0.2}, *({**later, "task_accuracy": 0.5, "progress": p} for p in (0.3, 0.4, 0.5))]
    assert "repaired images look like others" in str(judge(config, unseen)), "it was so from the first line that tells"
    assert "repaired images look like others" in said_of(config, later | {"task_accuracy": 0.5})
    assert "the repair network is beaten" in said_of(config, later | {"task_accuracy": 1.0})
    assert said_of(config, later | {"task_accuracy": 0.7}) == "" and said_of(config, row) == ""
    assert {column for panel in method.panels(config) for column in panel.columns.values()} <= set(row) | set(later)
    assert method.brief(row).endswith("missing)") and method.brief(later).endswith("right)")


def test_a_run_that_ends_with_its_autoencoder_is_told():
    [line] = Artifacts.complaints(mini("artifacts", "method.autoencoder_epochs=4"), Length(8, 2, 40))
    assert line.startswith("method.autoencoder_epochs=4: the backbone is trained behind them") and line.endswith("as 1")
    assert Artifacts.complaints(mini("artifacts", "method.autoencoder_epochs=3"), Length(8, 2, 40)) == []


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.crops=[{num: 2, size: 24}]"], "data.crops=[2]: expected one group of one view"),
        (["method.autoencoder=[2,2,2,2,2,2]"], "expected fewer layers, so that 2 x 2 entries are left"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        mini("artifacts", *overrides)
    assert words in str(refusal.value)
