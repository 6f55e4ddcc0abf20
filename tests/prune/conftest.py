"""A run of seconds, and what was pruned of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from largescale.cli import main
from tests.helpers.commands import TINY
from tests.helpers.prunings import HALF, RUN


@pytest.fixture(scope="session")
def run(shard_folder, held_out_shards, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prune") / "run"
    shards = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}"]
    assert main(["pretrain", str(TINY), *shards, f"run.dir={path}", *RUN]) == 0
    return path


@pytest.fixture(scope="session")
def pruned(run) -> Path:
    assert main(["prune", str(run), *HALF, "--rounds", "2", "--rewind", "2"]) == 0
    return run / "pruning"


@pytest.fixture
def say(capsys) -> Callable[..., tuple[int, str]]:
    """Runs the command; returns its exit code and what it said."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["prune", *map(str, words)])
        said = capsys.readouterr()
        return code, said.err + said.out

    return run
