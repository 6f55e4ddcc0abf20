"""A step that cannot be used: what it takes to look into it is written, and the run goes on without that data.

Covers: largescale/__main__.py, largescale/run/logs.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from largescale.__main__ import main
from largescale.data.loaded import Batch
from largescale.data.stream import Stream
from largescale.observe import spikes
from largescale.run.rollback import DataSteps
from tests.helpers.commands import TINY
from tests.helpers.launcher import pretrain, run_largescale
from tests.helpers.runs import final_state, metrics
from tests.methods.harness import RECIPES

pytestmark = pytest.mark.distributed


def poisoned() -> int:
    """largescale, with a NaN in rank 1's views of data step 8 (a sample that breaks the augmentation, say)."""
    clean = Stream._images

    def loaded(self: Stream, data_steps: DataSteps) -> Iterator[Batch]:
        for batch in clean(self, data_steps):
            if batch.step == 8 and dist.get_rank() == 1:
                batch.views[0][0, 0, 0, 0] = float("nan")
            yield batch

    Stream._images = loaded
    return main()


def spiking() -> int:
    """largescale, with views of step 5 that are a thousand times too bright; spikes are looked for from step 3 on."""
    clean = Stream._images
    spikes.FIRST_STEPS = 3

    def loaded(self: Stream, data_steps: DataSteps) -> Iterator[Batch]:
        for batch in clean(self, data_steps):
            if batch.step == 5:
                batch.views[0].mul_(1000)
            yield batch

    Stream._images = loaded
    return main()


def keys_of(run: Path) -> dict[int, list[str]]:
    rows = [json.loads(line) for line in (run / "audit" / "rank-00001.jsonl").read_text().splitlines()]
    return {row["step"]: row["keys"] for row in rows}


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_the_run_goes_back_and_leaves_the_data_out(tiny_overrides, tmp_path, strategy):
    run = tmp_path / "run"
    shared = ["train.rollback_window=2", "checkpoint.keep=9", f"parallel.strategy={strategy}"]
    clean = tmp_path / "clean"
    pretrain(tiny_overrides(*shared, run="clean"), 2)
    mirrored = tiny_overrides("train.max_rollbacks=1", *shared, f"checkpoint.mirror=file://{tmp_path}/mirror")
    result = run_largescale("pretrain", TINY, *mirrored, ranks=2, entry=poisoned)
    assert "step 8: input views not finite on rank 1" in result.stderr
    assert "going back to step 5, 1 of at most 1 times" in result.stderr
    [row] = [json.loads(line) for line in (run / "rollbacks.jsonl").read_text().splitlines()]
    assert (row["step"], row["to"], row["without"]) == (8, 5, [7, 9])
    assert [row["step"] for row in metrics(run)] == list(range(14))
    # Steps 0 to 6 as in the clean run, then its data of two steps later.
    expected = keys_of(clean)
    assert keys_of(run) == {step: expected[step + 2 * (step >= 7)] for step in range(12)} | {
        step: keys_of(run)[step] for step in (12, 13)
    }
    assert all(bool(value.isfinite().all()) for value in final_state(run).values())
    if strategy == "fsdp":
        goes_on_from_the_mirror(tmp_path, tiny_overrides(*shared), expected=run)


def test_a_spike_is_found_in_a_stage_of_its_own_objective(tiny_overrides, tmp_path):
    """Of a method whose first steps, these ones, have another objective than the last ones."""
    recipe, shards = RECIPES / "artifacts.yaml", tiny_overrides("train.steps=14", "method.autoencoder_epochs=1.5")
    options = ["train.spike_factor=10", "train.max_rollbacks=1", "checkpoint.every_steps=2"]
    result = run_largescale("pretrain", recipe, *shards, *options, entry=spiking)
    assert "step 5: autoencoder: gradient norm" in result.stderr and "times the running average" in result.stderr
    assert [row["step"] for row in json.loads(f"[{(tmp_path / 'run/rollbacks.jsonl').read_text()}]")] == [5]


def goes_on_from_the_mirror(folder: Path, overrides: list[str], expected: Path) -> None:
    """The folder is lost, and later copies with it; what is left out is known from the copy that it went back to."""
    run, mirror = expected.rename(folder / "first"), folder / "mirror"
    for step in (10, 14):
        shutil.rmtree(mirror / f"step-{step:08d}")
    # Nothing is wrong this time, and yet the same data are left out.
    pretrain([*overrides, f"checkpoint.mirror=file://{mirror}"], 2)
    assert (folder / "run" / "rollbacks.jsonl").read_bytes() == (run / "rollbacks.jsonl").read_bytes()
    assert metrics(folder / "run") == metrics(run)[5:]
    again, before = final_state(folder / "run"), final_state(run)
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)
    assert {path.name for path in mirror.iterdir()} == {f"step-{step:08d}" for step in (5, 10, 14)}


def test_what_it_takes_to_look_into_it_is_written_and_the_run_stops(tiny_overrides, tmp_path):
    result = run_largescale("pretrain", TINY, *tiny_overrides(), ranks=2, check=False, entry=poisoned)
    assert result.returncode != 0
    assert "error: step 8: input views not finite on rank 1" in result.stderr
    folder = tmp_path / "run" / "trouble" / "step-00000008"
    row = json.loads((folder / "rank-00001.json").read_text())
    assert row["data_step"] == 8 and len(row["keys"]) == 8
    with safe_open(folder / "rank-00001.safetensors", "pt") as scores:
        assert scores.get_slice("scores.0").get_shape() == [4, 8, 12]
    # Nothing of that step is in the checkpoint.
    assert not (tmp_path / "run" / "rollbacks.jsonl").exists()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000005\n"
