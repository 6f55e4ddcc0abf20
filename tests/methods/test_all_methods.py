"""Every method against itself in one process: strategies, numbers of ranks, ways of accumulation.

Covers: largescale/distributed/collectives.py, largescale/models/running_statistics.py
"""

from __future__ import annotations

import math
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from largescale.methods import METHODS, build_method
from tests.helpers.commands import ROOT
from tests.helpers.once import once
from tests.helpers.ranks import run_ranks
from tests.methods.harness import GLOBAL_BATCH, STEPS, mini, recipes, spans_global_batch, train_all

pytestmark = pytest.mark.distributed

OVER_BATCH = ["train.accumulate=2", GLOBAL_BATCH]
WAYS = [["train.accumulate=1"], ["train.accumulate=2", "optim.name=adamw", "optim.lr=0.001"], OVER_BATCH]
"""Micro-batches, what the loss spans, and optimizer: each method under all."""

STILL = 1e-10

CANDIDATES_OF_THE_BATCH = {"swav", "simclr", "mocov3", "nnclr", "barlow", "vicreg", "cpc", "paws"}
"""Methods whose loss of an image depends on which others are in its batch, so that it matters where a batch is cut."""

OF_MICRO_BATCHES = {"pirl", "avc", "avol"}
"""Methods in which a constant of the run is of the first micro-batch: Z; or an image meets another sample of its
micro-batch.
"""

IN_STAGES = {"artifacts"}
"""Methods whose networks are not all trained in every step."""

AVERAGED_STATISTICS = {"artifacts", "densecl", "mocov1", "mocov2", "pcl", "deepcluster", "deepercluster", "odc", "sela"}
"""Methods with a teacher in evaluation mode, or with phases that see images so: running statistics that ranks have of
their own images count there."""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return once(tmp_path_factory, "all-methods", lambda: run_ranks(train_all, 1, recipes(WAYS), timeout_s=600)[0])


OF_PAIRS = {"pair_square", "agreement_of_others"}
"""Signs that are estimated from the pairs within a rank's micro-batch."""
_ABOUT_ITS_MEAN = {"mean_embedding", "mean_square", "agreement"}
OF_SHARES = {"barlow": _ABOUT_ITS_MEAN, "vicreg": _ABOUT_ITS_MEAN, "pirl": {"picked"}, "pcl": {"cluster_picked"}}
"""Signs that each rank's share decides: moments about its own mean, a fraction of those of its images that have a
cluster, and a tie of an image with itself among others."""


def assert_equal_signs(own: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]], name: str) -> None:
    """What the doctor sees does not depend on who holds the images."""
    left_out = OF_PAIRS | OF_SHARES.get(name, set())
    for step, (mine, theirs) in enumerate(zip(own, expected, strict=True)):
        assert mine.keys() == theirs.keys(), name
        for sign in theirs.keys() - left_out:
            torch.testing.assert_close(mine[sign], theirs[sign], rtol=1e-8, atol=1e-8, msg=f"{name}, {step}, {sign}")


def assert_equal_states(own: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: Any) -> None:
    assert own.keys() == expected.keys(), where
    for key, value in own.items():
        difference = (value - expected[key]).double().norm()
        assert difference <= 1e-8 * expected[key].double().norm() + STILL, (where, key)


def test_every_method_has_a_mini_recipe():
    assert {path.stem for path in (ROOT / "tests/methods/mini").glob("*.yaml")} == set(METHODS)


@pytest.mark.parametrize(
    "strategy, ranks, overrides",
    [("ddp", 2, []), ("fsdp", 2, []), ("fairscale", 2, []), ("ddp", 4, []), ("fsdp", 4, ["parallel.replicate=2"])],
    ids=["ddp-2", "fsdp-2", "fairscale-2", "ddp-4", "hsdp-2x2"],
)
def test_float64_runs_equal_one_process(one_process, strategy, ranks, overrides):
    ways = [[*way, f"parallel.strategy={strategy}", *overrides] for way in WAYS]
    found = run_ranks(train_all, ranks, recipes(ways), timeout_s=600)[0]
    for way, (mine, theirs) in enumerate(zip(found, one_process, strict=True)):
        for name in METHODS:
            own, expected = mine[name], theirs[name]
            assert own["losses"] == pytest.approx(expected["losses"], rel=1e-9), (name, way)
            assert own["norms"] == pytest.approx(expected["norms"], rel=1e-8), (name, way)
            assert_equal_signs(own["signs"], expected["signs"], name)
            missing = expected["state"].keys() - own["state"].keys()
            # OSS keeps the optimizer's state of a parameter on its owner alone.
            assert all(strategy == "fairscale" and key.startswith("optimizer.") for key in missing), (name, missing)
            held = {key: value for key, value in expected["state"].items() if key not in missing}
            assert_equal_states(own["state"], held, (name, way))


@pytest.mark.parametrize("ranks, strategy, then, other", [(2, "fsdp", 1, "ddp"), (1, "ddp", 4, "fsdp")])
def test_a_run_that_stops_goes_on_with_other_ranks(one_process, tmp_path, ranks, strategy, then, other):
    stops, goes_on = (recipes([[*way, f"parallel.strategy={name}"] for way in WAYS]) for name in (strategy, other))
    run_ranks(partial(train_all, folder=tmp_path, steps=STEPS // 2), ranks, stops, timeout_s=600)
    found = run_ranks(partial(train_all, folder=tmp_path, first=STEPS // 2), then, goes_on, timeout_s=600)[0]
    for way, (mine, theirs) in enumerate(zip(found, one_process, strict=True)):
        for name in METHODS:
            assert mine[name]["losses"] == pytest.approx(theirs[name]["losses"][STEPS // 2 :], rel=1e-9), (name, way)
            assert_equal_states(mine[name]["state"], theirs[name]["state"], (name, way))


def newest_last(run: dict[str, Any], micro_batches: int) -> torch.Tensor | None:
    """What the run's queue holds, if it has one, whether steps went into it whole or a micro-batch at a time."""
    queue = run["state"].get("extra.queue")
    if queue is None or queue.dim() == 2:
        return queue
    return queue.unflatten(1, (-1, micro_batches)).flip(2).flatten(2, 3)


def test_a_loss_over_the_global_batch_is_that_of_an_uncut_step():
    """BatchNorm, which sees micro-batches, stands still; a loss that may not span a batch needs no batch whole."""
    ways = [["train.accumulate=1"], [*OVER_BATCH, "train.accumulate=4"], ["train.accumulate=4"]]
    uncut, over_batch, cut = run_ranks(partial(train_all, still=True), 1, recipes(ways), timeout_s=600)[0]
    changed = {name for name in METHODS if cut[name]["losses"] != pytest.approx(uncut[name]["losses"])}
    assert changed == CANDIDATES_OF_THE_BATCH | OF_MICRO_BATCHES
    assert {name for name in METHODS if spans_global_batch(name)} == CANDIDATES_OF_THE_BATCH
    for name in set(METHODS) - OF_MICRO_BATCHES:
        own, expected = over_batch[name], uncut[name]
        assert own["losses"] == pytest.approx(expected["losses"], rel=1e-9), name
        assert own["norms"] == pytest.approx(expected["norms"], rel=1e-9), name
        for key in expected["state"].keys() - {"extra.queue"}:
            torch.testing.assert_close(own["state"][key], expected["state"][key], rtol=1e-9, atol=1e-12)
        if (queue := newest_last(expected, 1)) is not None:
            torch.testing.assert_close(newest_last(own, 4), queue, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(own["state"]["extra.queue"].shape, cut[name]["state"]["extra.queue"].shape)


def test_every_method_trains_on_features_of_a_grid():
    """Those that work on maps take the maps' channels, the others features four times as wide."""
    [[runs]] = run_ranks(train_all, 1, recipes([["model.pool=2"]]), timeout_s=600)
    assert runs.keys() == METHODS.keys()
    for name, run in runs.items():
        assert len(set(run["losses"])) > 1 and all(map(math.isfinite, run["losses"])), name


def test_batchnorm_sees_micro_batches_whatever_the_loss_spans():
    """Two ranks with a BatchNorm each are two micro-batches; running statistics are fed once by each."""
    [over_batch, cut] = run_ranks(train_all, 1, recipes([OVER_BATCH, ["train.accumulate=2"]]), timeout_s=600)[0]
    [ranks] = run_ranks(train_all, 2, recipes([["parallel.batchnorm_group_size=1"]]), timeout_s=600)[0]
    for name in set(METHODS) - AVERAGED_STATISTICS - OF_MICRO_BATCHES:
        assert over_batch[name]["losses"] == pytest.approx(ranks[name]["losses"], rel=1e-9), name
        assert over_batch[name]["norms"] == pytest.approx(ranks[name]["norms"], rel=1e-9), name
    for name in METHODS:
        counts = [
            {key: int(value) for key, value in way[name]["state"].items() if key.endswith("num_batches_tracked")}
            for way in (over_batch, cut)
        ]
        views = sum(group.num for group in mini(name).data.crops)  # that some methods pass one by one
        assert counts[0] == counts[1], name
        in_all_steps = {0, STEPS * 2, STEPS * 4, STEPS * 2 * views}
        assert set(counts[0].values()) <= in_all_steps or name in IN_STAGES, name


@cache
def biases_before_batchnorm(name: str) -> list[str]:
    """Names of biases that BatchNorm takes away again: their gradient is rounding alone, of which Adam makes steps."""
    return [
        f".{place}.{number}.bias"
        for place, head in build_method(mini(name)).named_modules()
        if isinstance(head, nn.Sequential)
        for number, (layer, after) in enumerate(pairwise(head))
        if isinstance(layer, nn.Linear) and layer.bias is not None and isinstance(after, nn.BatchNorm1d)
    ]


@pytest.fixture(scope="module")
def ddp_in_float32(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return once(tmp_path_factory, "all-methods-in-float32", lambda: in_float32("ddp"))


def in_float32(strategy: str) -> list[dict[str, dict[str, Any]]]:
    ways = [[*way, f"parallel.strategy={strategy}", "train.precision=fp32"] for way in WAYS]
    return run_ranks(train_all, 2, recipes(ways), timeout_s=600)[0]


SIZE_OF_TERMS = {"paws": math.log(3)}
"""Of losses that are a difference of entropies: their rounding is that of the terms."""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_equals_ddp_in_float32(ddp_in_float32, stage):
    """DeepSpeed keeps fp32 weights, so it is compared with DDP on the same ranks."""
    for way, (mine, theirs) in enumerate(zip(in_float32(f"zero{stage}"), ddp_in_float32, strict=True)):
        for name in METHODS:
            own, expected = mine[name], theirs[name]
            # Some losses pass through 0, as a mean of cosines does; float32 has seven digits of the cosines.
            nearly = max(5e-7, 1e-5 * SIZE_OF_TERMS.get(name, 0))
            assert own["losses"][:2] == pytest.approx(expected["losses"][:2], rel=1e-5, abs=nearly), (name, way)
            assert own["losses"][-1] == pytest.approx(expected["losses"][-1], rel=1e-2), (name, way)
            assert own["state"].keys() == expected["state"].keys()
            assert len(own["losses"]) == STEPS
            keys = [key for key in sorted(expected["state"]) if key.startswith("model.") and "running" not in key]
            keys = [key for key in keys if not key.endswith(tuple(biases_before_batchnorm(name)))]
            weights = [torch.cat([run["state"][key].double().flatten() for key in keys]) for run in (own, expected)]
            assert (weights[0] - weights[1]).norm() <= 1e-4 * weights[1].norm(), (name, way)
