"""State by sample id against a dict, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import normalize

from largescale.methods.rows_by_id import RowsById
from shards.ground.errors import InputError
from tests.helpers.ranks import Counted, run_ranks

NUM, WIDTH, STEPS = 11, 3, 4
"""Rows that 2, 3 and 4 ranks hold in unequal parts, 8 ranks in parts of which some are empty."""


def ids_of_step(step: int) -> Tensor:
    """Some come twice."""
    return torch.randint(NUM, (8,), generator=torch.Generator().manual_seed(step))


def blended(old: Tensor, step: int) -> Tensor:
    new = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)
    return normalize(0.5 * old + 0.5 * normalize(new, dim=1), dim=1)


def make(seed: int = 0) -> RowsById:
    bank = RowsById(WIDTH).double()
    bank.make_room(NUM, key="method.max_bank_gb", max_gb=1)
    bank.draw_unit_rows(seed)
    return bank


def run_steps() -> dict[str, Any]:
    bank = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    start, read = bank.tensor(mesh).full_tensor().clone(), []
    with Counted() as counted:
        for step in range(STEPS):
            ids = ids_of_step(step)
            read.append(bank.read(ids))
            bank.write(ids, blended(read[-1], step))
    end = bank.tensor(mesh).full_tensor()
    return {"start": start, "read": torch.stack(read), "end": end, "own": bank.num_own, "calls": counted.calls}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_rows_are_those_of_a_dict_for_any_number_of_ranks(ranks):
    """Also that a step costs one all-reduce of the rows it reads, and of one rank none."""
    found = run_ranks(run_steps, ranks, timeout_s=600)
    rows = dict(enumerate(make().own.clone()))
    assert all(torch.equal(one["start"], torch.stack(list(rows.values()))) for one in found)
    for step in range(STEPS):
        ids = ids_of_step(step).tolist()
        old = torch.stack([rows[number] for number in ids])
        assert all(torch.equal(one["read"][step], old) for one in found)
        for number, row in zip(ids, blended(old, step), strict=True):
            rows[number] = row  # the last place wins
    assert all(torch.equal(one["end"], torch.stack(list(rows.values()))) for one in found)
    assert sum(one["own"] for one in found) == NUM
    assert all(one["calls"] == ([("all_reduce", 8 * WIDTH)] * STEPS if ranks > 1 else []) for one in found)


def test_the_first_rows_are_unit_vectors_of_the_seed_and_the_id():
    bank, other = make(), make(seed=1)
    torch.testing.assert_close(bank.own.norm(dim=1), torch.ones(NUM, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not torch.equal(bank.own, other.own)
    larger = RowsById(WIDTH).double()
    larger.make_room(5000, key="method.max_bank_gb", max_gb=1)
    larger.draw_unit_rows(0)
    assert torch.equal(larger.own[:NUM], bank.own)
    assert len(larger.own[4090:4110].unique(dim=0)) == 20


def test_what_does_not_fit_is_refused_in_a_line():
    with pytest.raises(InputError) as refusal:
        RowsById(128).make_room(10**9, key="method.max_bank_gb", max_gb=16)
    assert str(refusal.value) == (
        "method.max_bank_gb=16: rows of 128 numbers for 1,000,000,000 images take 512 GB on each of 1 rank; use more "
        "ranks or shorter rows, or raise it"
    )


def test_columns_of_whole_numbers_keep_their_type():
    labels = RowsById(2, torch.int32)
    labels.make_room(5, key="k", max_gb=1)
    labels.double().own.fill_(-1)
    labels.write(torch.tensor([3, 1, 3]), torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert labels.read(torch.tensor([3, 0, 1])).tolist() == [[5, 6], [-1, -1], [3, 4]]
    assert labels.rows.dtype == torch.int32
