"""Covers: largescale/distributed/rendezvous.py, largescale/processes.py"""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from largescale.distributed import rendezvous, stopping
from largescale.distributed.launch import Launch, launch_of, slurm_ranks, start_id
from largescale.distributed.rendezvous import join
from largescale.processes import join_time_s, name_of_gpu, on_rank_0, rank
from shards.ground.errors import InputError
from tests.helpers.ranks import run_ranks

STEP = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu7,gpu9",
}


def test_a_task_of_srun_knows_its_rank_and_where_to_meet():
    ranks = slurm_ranks(STEP)
    assert (ranks["RANK"], ranks["WORLD_SIZE"], ranks["LOCAL_RANK"], ranks["MASTER_ADDR"]) == ("9", "16", "1", "gpu7")
    assert 20000 <= int(ranks["MASTER_PORT"]) < 60000


@pytest.mark.parametrize("kept, same", [("True", False), ("False", True)])
def test_restarts_that_each_node_counts_for_itself_part_no_ranks_in_a_new_store(monkeypatch, kept, same):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", kept)
    ids = []
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        ids.append(start_id())
    assert (ids[0] == ids[1]) == same


@pytest.mark.parametrize("tasks, size", [("8(x2)", "8"), ("2,1", "2"), ("", None)])
def test_a_task_of_srun_knows_how_many_share_its_node(tasks, size):
    assert slurm_ranks({**STEP, "SLURM_STEP_TASKS_PER_NODE": tasks}).get("LOCAL_WORLD_SIZE") == size


def test_steps_and_jobs_do_not_meet_each_other():
    ports = {
        slurm_ranks({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in (100, 101, 102)
        for step in range(3)
    }
    assert len(ports) == 9


@pytest.mark.parametrize(
    "environment",
    [{}, {**STEP, "RANK": "0"}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "4"}],
)
def test_torchrun_one_task_and_the_batch_script_are_left_alone(environment):
    assert slurm_ranks(environment) == {}


def test_a_chosen_meeting_point_stays():
    ranks = slurm_ranks({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (ranks["MASTER_ADDR"], ranks["MASTER_PORT"]) == ("10.0.0.1", "29500")


RANKS = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_what_torchrun_sets():
    assert launch_of({**RANKS, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == Launch(1, 2, 1, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    "environment",
    [{}, {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}],
)
def test_an_address_alone_makes_no_ranks(environment):
    assert launch_of(environment) is None


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"WORLD_SIZE": None}, "RANK=1 is set in the environment but WORLD_SIZE is not"),
        ({"RANK": None}, "WORLD_SIZE=2 is set in the environment but RANK is not"),
        ({"RANK": "one"}, "RANK='one' in the environment: expected a whole number, at least 0"),
        ({"RANK": "2"}, "RANK=2: expected less than WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=''"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(change, expected):
    environment = {name: value for name, value in {**RANKS, **change}.items() if value is not None}
    with pytest.raises(InputError, match=re.escape(expected)):
        launch_of(environment)


def at(port: int, rank: int, size: int = 2, address: str = "127.0.0.1") -> Launch:
    return Launch(rank, size, rank, size, address, port)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outcomes(launches: list[Launch], uses: str = "", timeout_s: float = 20) -> list[str]:
    """What each rank says when it joins, a thread a rank; empty where all met."""

    def one(launch: Launch) -> str:
        try:
            join(launch, timeout_s=timeout_s, uses=uses)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(launches)) as pool:
        return list(pool.map(one, launches))


def test_ranks_that_all_come_meet(port):
    assert outcomes([at(port, 1), at(port, 0)]) == ["", ""]


def test_missing_ranks_are_named_on_all_others(port):
    for said in outcomes([at(port, 0, 4), at(port, 2, 4)], timeout_s=1.5):
        assert said.startswith("ranks 1, 3 of 4 did not join within run.join_timeout_s=1.5")


def test_two_ranks_on_one_gpu_are_refused(port):
    for said in outcomes([at(port, 0), at(port, 1)], uses="GPU-42"):
        assert "ranks 0 and 1" in said and "would share a GPU (GPU-42)" in said


def test_slices_of_a_gpu_are_told_apart():
    assert name_of_gpu("u", 0, "MIG-a") == "MIG-a" and name_of_gpu("u", 1, "MIG-a, MIG-b") == "MIG-b"
    assert name_of_gpu("u", 0, "") == name_of_gpu("u", 1, "GPU-x,GPU-y") == name_of_gpu("u", 3, "MIG-a") == "u"


@pytest.mark.parametrize("on_node, seconds", [(16, 50), (0, 50), (8, 300)])
def test_ranks_of_several_nodes_have_longer_to_come(on_node, seconds):
    assert join_time_s(Launch(0, 16, 0, on_node, "h", 1)) == seconds


def test_a_rank_0_that_cannot_be_reached(port):
    assert "rank 0 cannot be reached there (Connection refused)" in outcomes([at(port, 1)], timeout_s=0.5)[0]
    nowhere = at(port, 1, address="no.such.host.invalid")
    assert "MASTER_ADDR=no.such.host.invalid: " in outcomes([nowhere], timeout_s=0.5)[0]


def test_names_that_are_not_answered_for_at_once_are_asked_for_again(port, monkeypatch):
    answers, asked = socket.getaddrinfo, []

    def busy(*arguments: object, **more: object) -> object:
        asked.append(arguments)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return answers(*arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", busy)
    assert outcomes([at(port, 1, address="localhost"), at(port, 0)]) == ["", ""]
    assert len(asked) >= 3


def test_a_port_that_is_taken():
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert f"MASTER_PORT={taken}: cannot be opened on" in outcomes([at(taken, 0)])[0]


def stopped(_: str) -> str:
    assert on_rank_0(lambda: ["found by", rank()]) == ["found by", 0]

    def wait() -> None:
        raise stopping.StoppedWaiting(f"rank {rank()} was asked to stop")

    with pytest.raises(stopping.StoppedWaiting) as caught:
        on_rank_0(wait)
    return str(caught.value)


@pytest.mark.distributed
def test_where_rank_0_stops_while_the_others_wait_for_it_all_stop():
    assert run_ranks(stopped, 2, "") == ["rank 0 was asked to stop"] * 2


def test_waiting_ends_at_a_signal(port, monkeypatch):
    monkeypatch.setattr(stopping, "_received", ["SIGTERM"])
    monkeypatch.setattr(stopping, "_since", [0.0])
    with pytest.raises(stopping.StoppedWaiting, match="stopped by SIGTERM while waiting for rank 0"):
        join(at(port, 1), timeout_s=600)


def test_a_rank_that_is_asked_to_stop_with_rank_0_follows_it(port, monkeypatch):
    def leaves(*_: object) -> str:
        monkeypatch.setattr(stopping, "_received", ["SIGTERM"])
        monkeypatch.setattr(stopping, "_since", [0.0])
        raise dist.DistNetworkError("failed to recv, got 0 bytes")

    monkeypatch.setattr(rendezvous, "_verdict", leaves)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with pytest.raises(stopping.StoppedWaiting, match="stopped by SIGTERM while waiting for other ranks"):
        join(at(port, 1), timeout_s=20)
    del store
