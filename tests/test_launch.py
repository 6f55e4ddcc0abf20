from __future__ import annotations

import pytest

from largescale.launch import slurm_ranks

STEP = {"SLURM_JOB_ID": "123", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu7,gpu9"}


def test_a_task_of_srun_knows_its_rank_and_where_to_meet():
    ranks = slurm_ranks(STEP)
    assert (ranks["RANK"], ranks["WORLD_SIZE"], ranks["LOCAL_RANK"], ranks["MASTER_ADDR"]) == ("9", "16", "1", "gpu7")
    assert 20000 <= int(ranks["MASTER_PORT"]) < 60000


@pytest.mark.parametrize("tasks, size", [("8(x2)", "8"), ("2,1", "2"), ("", None)])
def test_a_task_of_srun_knows_how_many_share_its_node(tasks, size):
    assert slurm_ranks({**STEP, "SLURM_STEP_TASKS_PER_NODE": tasks}).get("LOCAL_WORLD_SIZE") == size


def test_steps_and_jobs_do_not_meet_each_other():
    ports = {slurm_ranks({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
             for job in (100, 101, 102) for step in range(3)}
    assert len(ports) == 9


@pytest.mark.parametrize("environment", [
    {}, {**STEP, "RANK": "0"}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "4"},
])
def test_torchrun_one_task_and_the_batch_script_are_left_alone(environment):
    assert slurm_ranks(environment) == {}


def test_a_chosen_meeting_point_stays():
    ranks = slurm_ranks({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (ranks["MASTER_ADDR"], ranks["MASTER_PORT"]) == ("10.0.0.1", "29500")
