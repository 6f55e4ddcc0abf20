"""Covers: largescale/methods/swav/observe.py"""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from largescale.config import Config, load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.swav.observe import reachable_usage
from largescale.observe.doctor import Doctor, judge
from largescale.observe.meter import Meter
from tests.helpers.commands import ROOT

HEALTHY = {
    "progress": 0.5,
    "loss_over_ln_k": 0.7,
    "assignment_entropy": 0.5,
    "prototype_usage": 0.9,
    "prototype_usage_reachable": 1.0,
}


CONFIG = load_config(ROOT / "tests/tiny.yaml", ["data.shards=unused"])


def advice(*rows: dict, config: Config = CONFIG) -> str:
    doctor = Doctor(config)
    found = [doctor.look({**HEALTHY, "progress": 0.5 + number / 100, **row}) for number, row in enumerate(rows)]
    return str(found[-1] or "")


def test_a_healthy_run_gets_no_warning():
    assert advice({}) == advice({}, {}) == advice({}, {}, {}) == ""


@pytest.mark.parametrize(
    "sign, value, words",
    [
        ("loss_over_ln_k", 0.995, "as if predictions were uniform"),
        ("loss_over_ln_k", 1.004, "as if predictions were uniform"),
        ("assignment_entropy", 0.99, "samples are not told apart"),
        ("prototype_usage", 0.02, "embeddings gather in few places"),
    ],
)
def test_each_sign_of_collapse_is_said_in_words_but_not_while_a_run_begins(sign, value, words):
    signs = {sign: value}
    assert words in advice(signs, signs, signs) and "Try" in advice(signs, signs, signs)
    assert advice(*3 * [{**signs, "progress": 0.05}]) == ""


@pytest.mark.parametrize(
    "sign, overrides, expected",
    [
        ("loss_over_ln_k", [], ["method.epsilon=0.03", "optim.lr=0.25"]),
        ("loss_over_ln_k", ["method.epsilon=0.03"], ["method.epsilon=0.018", "optim.lr=0.25"]),
        ("assignment_entropy", ["method.prototypes=300"], ["method.epsilon=0.03", "method.prototypes=150"]),
        (
            "assignment_entropy",
            ["method.prototypes=[300,300,12]"],
            ["method.epsilon=0.03", "method.prototypes=[150,150,12]"],
        ),
        ("assignment_entropy", ["method.epsilon=0.005"], ["optim.lr=0.25"]),  # nothing sharper, no fewer than 12
        ("prototype_usage", [], []),
        (
            "prototype_usage",
            ["method.queue=0", "method.prototypes=[64,300]"],
            ["method.prototypes=[32,150]", "method.queue=240"],
        ),
    ],
)
def test_advice_starts_from_the_settings_of_the_run_and_is_accepted(sign, overrides, expected):
    signs = {"loss_over_ln_k": 1.0, "assignment_entropy": 0.99, "prototype_usage": 0.01}
    config = load_config(ROOT / "tests/tiny.yaml", ["data.shards=unused", *overrides])
    line = advice(*3 * [{sign: signs[sign]}], config=config)
    found = re.findall(r"\b[a-z]+\.[a-z]+=(?:\[[\d,]+\]|[\d.]+)", line)
    assert found == expected and "Try, in another run.dir, " in line
    load_config(ROOT / "tests/tiny.yaml", ["data.shards=unused", *overrides, *found])


def test_a_queue_is_advised_where_init_would_propose_one():
    """100,000 images or more, a batch below the number of prototypes, and once features have settled."""
    row = {"prototype_usage": 0.01, "step": 4999, "progress": 0.5}
    for prototypes, epoch, expected in ((300, 0.5, True), (300, 2.0, False), (12, 0.5, False)):
        words = ["data.shards=unused", "method.queue=0", f"method.prototypes={prototypes}"]
        config = load_config(ROOT / "tests/tiny.yaml", words)
        line = advice(*3 * [{**row, "epoch": epoch}], config=config)  # 80,000 images seen
        assert ("method.queue=240 with method.queue_start_step=400" in line) == expected and "Try, " in line


def test_a_queue_that_harms_is_not_put_off_to_where_it_hardly_takes_part():
    words = ["data.shards=unused", "method.queue=320", "method.queue_start_step=50"]  # 20 batches
    config = load_config(ROOT / "tests/tiny.yaml", words)
    for num_steps, later in ((279, False), (280, True)):
        row = {"code_balance": 0.1, "step": num_steps // 2 - 1, "progress": (num_steps // 2) / num_steps}
        line = advice(*3 * [row], config=config)
        assert "method.queue=80" in line and ("method.queue_start_step=120" in line) == later


def test_a_loss_above_ln_k_is_not_uniform_and_one_that_falls_past_it_is_no_alarm():
    assert advice({"loss_over_ln_k": 1.5}, {"loss_over_ln_k": 1.4}) == ""
    assert advice({"loss_over_ln_k": 1.1}, {"loss_over_ln_k": 1.0}, {"loss_over_ln_k": 0.9}) == ""
    assert advice({"loss_over_ln_k": 1.1}, {"loss_over_ln_k": 1.0}) == ""


@pytest.mark.parametrize("counts, num_images", [([2000], 32), ([100], 64), ([12, 12], 16), ([3000], 10**6), ([2], 1)])
def test_reachable_usage_is_what_random_draws_reach(counts, num_images):
    random = np.random.default_rng(0)
    drawn = [
        sum(len(set(random.integers(0, count, min(num_images, 50 * count)).tolist())) for count in counts)
        for _ in range(40)
    ]
    assert reachable_usage(counts, num_images) == pytest.approx(np.mean(drawn) / sum(counts), rel=0.05)


def test_usage_is_judged_by_what_the_samples_of_the_interval_could_reach():
    few = {"prototype_usage": 0.012, "prototype_usage_reachable": reachable_usage([2000], 32)}
    assert few["prototype_usage_reachable"] < 0.05 and advice(few, few, few) == ""  # 24 of 2000, by 32 images
    assert "gather in few places" in advice(*3 * [{**few, "prototype_usage": 1 / 2000}])  # one place for all 32


def test_a_line_of_another_version_is_passed_over():
    assert Doctor(CONFIG).look({"step": 3, "loss_over_ln_k": 1.0, "assignment_entropy": 1.0}) is None


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "planted, words", [("", ""), ("constant", "embeddings are nearly equal"), ("one place", "few places")]
)
def test_a_planted_collapse_is_found_in_what_a_real_method_puts_out(alone, planted, words):
    config = load_config(
        ROOT / "tests/tiny.yaml",
        [
            "data.shards=unused",
            "method.prototypes=500",
            "train.precision=fp32",
            "method.queue=0",
            "method.embedding=32",
            "method.epsilon=0.01",
        ],
    )
    torch.manual_seed(0)
    method = build_method(config)
    last = method.projection[-1]
    with torch.no_grad():
        if planted == "constant":
            last.weight.zero_()
        elif planted == "one place":  # embeddings differ, but one prototype is nearest to them all
            last.bias.copy_(2 * method.prototypes.heads[0].weight[7])
    meter = Meter(method, 16, 200, torch.device("cpu"))
    for step in range(4):
        views = [
            torch.randn(16, 3, group.size, group.size).repeat(group.num, 1, 1, 1)
            + 0.3 * torch.randn(group.num * 16, 3, group.size, group.size)
            for group in config.data.crops
        ]
        output = method(Views.numbered(views, 16), step)
        batch = SimpleNamespace(substituted=[], unread_supports=[], ids=range(16), costs={})
        meter.add(output, SimpleNamespace(loss=float(output.loss.detach()), overflow=False), 0.0, batch)
    row = {"progress": 0.5, **meter.summary()}
    assert row["prototype_usage_reachable"] == pytest.approx(1 - (1 - 1 / 500) ** 64)
    assert row["loss_over_ln_k"] == pytest.approx(row["loss"] / math.log(500))
    # The loss of a network that has just started is above ln K.
    start = {} if planted == "constant" else {"loss_over_ln_k": 0.9}
    found = str(judge(config, 3 * [{**row, **start}]) or "")
    assert words in found if words else not found, (found, row)
