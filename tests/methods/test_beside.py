"""Codes beside the network are those that the network would have waited for, whatever delays ranks have.

Covers: largescale/distributed/collectives.py
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from largescale.data.views import Views
from largescale.distributed.collectives import exchanged, exchanging
from largescale.methods import build_method
from largescale.methods.beside import Beside
from largescale.plan.trace import StepTrace
from tests.helpers.ranks import run_ranks
from tests.methods.harness import LENGTH, STEPS, mini, train

PATIENCE = timedelta(seconds=600)
PER_GROUP = ["method.head_per_group=true", "method.epsilon=0.04"]
CASES = [
    *([f"parallel.strategy={name}"] for name in ("ddp", "fsdp", "fairscale")),
    ["parallel.strategy=fsdp", "train.accumulate=2", "parallel.sync_batchnorm=false"],
    *([f"parallel.strategy=zero{stage}", "train.precision=fp32"] for stage in (1, 2, 3)),
    ["method.head_batchnorm=false", "model.recompute_stages=[1]", "method.prototypes=20", "method.queue=0"],
]
MARGINALS = "Sinkhorn's marginals"


@contextmanager
def delays() -> Iterator[Counter[str]]:
    """Hold modules and the exchanges of codes up at random, on every rank otherwise; counts these by their thread."""
    threads: Counter[str] = Counter()
    random_of = {name: random.Random(f"{name} {dist.get_rank()}") for name in ("modules", "codes")}
    all_reduce = dist.all_reduce

    def delayed(*arguments: Any, **options: Any) -> Any:
        if exchanged("") == MARGINALS:
            threads[threading.current_thread().name] += 1
            time.sleep(random_of["codes"].choice([0, 0.001, 0.01]))
        return all_reduce(*arguments, **options)

    hook = register_module_forward_pre_hook(
        lambda *_: time.sleep(random_of["modules"].choice([0, 0, 0, 0, 0, 0, 0, 0.001]))
    )
    dist.all_reduce = delayed
    try:
        yield threads
    finally:
        dist.all_reduce = all_reduce
        hook.remove()


def run_of(case: list[str], *overrides: str, **part: Any) -> tuple[dict[str, Any], dict[str, int]]:
    with delays() as threads:
        return train(mini("swav", *PER_GROUP, *case, *overrides), **part), dict(threads)


def both(folder: Path) -> list[Any]:
    """Each case with codes beside the network and without; and a run that goes on with the other of the two."""
    found: list[Any] = [(run_of(case), run_of(case, "method.overlap_codes=false")) for case in CASES]
    run_of(CASES[1], steps=STEPS // 2, checkpoints=folder)
    found.append(run_of(CASES[1], "method.overlap_codes=false", first=STEPS // 2, checkpoints=folder))
    return found


@pytest.mark.distributed
def test_codes_beside_the_network_change_no_bit(tmp_path):
    ranks = run_ranks(both, 2, tmp_path, timeout_s=600)
    for *cases, (resumed, _) in ranks:
        for case, ((beside, threads), (blocking, blocking_threads)) in zip(CASES, cases, strict=True):
            micro_batches = 2 if "train.accumulate=2" in case else 1
            sizes = 1 if "method.prototypes=20" in case else 2  # of heads
            exchanges = STEPS * micro_batches * sizes * 3
            assert threads == {"beside": exchanges} and blocking_threads == {"MainThread": exchanges}, case
            assert_same_bits(beside, blocking, case)
        assert resumed["losses"] == cases[1][0][0]["losses"][STEPS // 2 :]
    *cases, (resumed, _) = ranks[0]
    assert cases[1][0][0]["state"].keys() == resumed["state"].keys()
    for name, value in cases[1][0][0]["state"].items():
        assert torch.equal(value, resumed["state"][name]), name


def assert_same_bits(own: dict[str, Any], expected: dict[str, Any], where: object) -> None:
    assert own["losses"] == expected["losses"] and own["norms"] == expected["norms"], where
    assert own["state"].keys() == expected["state"].keys()
    for name, value in own["state"].items():
        assert torch.equal(value, expected["state"][name]), (where, name)


def in_float64() -> list[dict[str, Any]]:
    return [train(mini("swav", *PER_GROUP, *case)) for case in ([], ["parallel.strategy=fsdp"])]


@pytest.mark.distributed
def test_ranks_with_a_head_per_group_are_one_process():
    [alone, _], ranks = run_ranks(in_float64, 1)[0], run_ranks(in_float64, 2)[0]
    for run in ranks:
        assert run["losses"] == pytest.approx(alone["losses"], rel=1e-9)
        for name, value in run["state"].items():
            torch.testing.assert_close(value, alone["state"][name], rtol=1e-8, atol=1e-10)


def fails(inputs: list[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    raise ValueError(f"no codes of {len(inputs)}")


def thread_and_sum(inputs: list[Tensor], group: dist.ProcessGroup | None) -> tuple[str, Tensor]:
    total = inputs[0].clone()
    dist.all_reduce(total, group=group)
    return threading.current_thread().name, total


def kinds_of_start() -> dict[str, Any]:
    before = threading.active_count()
    beside, rows = Beside(PATIENCE), [torch.ones(3)]
    first, failing = beside.start(thread_and_sum, rows), beside.start(fails, rows)
    second = beside.start(thread_and_sum, rows)
    found: dict[str, Any] = {"first": first(), "second": second()}
    try:
        failing()
    except ValueError as error:
        found["failed"] = str(error)
    with StepTrace():
        found["watched"] = beside.start(thread_and_sum, rows)()
        found["planned group"] = Beside(PATIENCE).group
    [thread] = [one for one in threading.enumerate() if one.name == "beside"]
    del beside
    thread.join(600)
    found["left"] = threading.active_count() - before
    return found


@pytest.mark.distributed
def test_work_is_done_in_order_by_one_thread_that_ends_with_its_owner():
    for found in run_ranks(kinds_of_start, 2):
        assert [found[name][0] for name in ("first", "second", "watched")] == ["beside", "beside", "MainThread"]
        assert all(found[name][1].tolist() == [2, 2, 2] for name in ("first", "second", "watched"))
        assert found["failed"] == "no codes of 1" and found["planned group"] is None and found["left"] == 0


def dies(folder: Path) -> None:
    beside = Beside(PATIENCE)
    if dist.get_rank() == 1:
        # Nothing of what came before may still be on its way when this end of it is gone.
        while not (folder / "ready").exists():
            time.sleep(0.01)
        os._exit(0)
    (folder / "ready").touch()
    try:
        beside.start(thread_and_sum, [torch.ones(3)])()
    except RuntimeError as error:
        raise KeyError("heard of it") from error


@pytest.mark.distributed
def test_the_death_of_another_rank_is_heard_by_who_waits_for_codes(tmp_path):
    with pytest.raises(AssertionError, match="heard of it"):
        run_ranks(dies, 2, tmp_path)


def test_a_single_process_does_the_work_itself():
    name = Beside(PATIENCE).start(lambda inputs, group: threading.current_thread().name, [torch.ones(1)])()
    assert name == threading.current_thread().name


def test_threads_name_what_they_exchange_each_for_itself():
    names = []
    with exchanging("here"):
        thread = threading.Thread(target=lambda: names.append(exchanged("nothing")))
        thread.start()
        thread.join()
        with exchanging("within"):
            names.append(exchanged("nothing"))
        names.append(exchanged("nothing"))
    assert [*names, exchanged("nothing")] == ["nothing", "within", "here", "nothing"]


def test_codes_begin_before_small_crops_and_are_awaited_after_them(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        method = build_method(mini("swav", *PER_GROUP, "train.precision=fp32"), LENGTH)
        happened: list[str] = []

        class Watched(Beside):
            def start(self, work: Any, inputs: list[Tensor]) -> Any:
                happened.append("start")
                wait = super().start(work, inputs)
                return lambda: (happened.append("wait"), wait())[1]

        method._beside = Watched(PATIENCE)
        method.backbone.register_forward_pre_hook(lambda _, views: happened.append(str(views[0].shape[-1])))
        sizes = [group.size for group in method.groups]
        views = [torch.randn(group.num * 16, 3, group.size, group.size) for group in method.groups]
        method(Views.numbered(views, 16), 0)
        assert len(sizes) > 1 and happened == [str(sizes[0]), "start", *map(str, sizes[1:]), "wait"]
    finally:
        dist.destroy_process_group()
