"""Ranks that do, and do not, see one folder as `run.dir`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from largescale.run import shared
from largescale.run.shared import unshared
from shards.ground.files import remove_partial_files
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


def complaints(folder: str) -> list[str]:
    """What is wrong with three folders, in which another run starts just then."""
    number = dist.get_rank()
    node = Path(folder) / f"node{number // 2}"
    node.mkdir(exist_ok=True)
    dist.barrier()
    os.chdir(node)
    look = shared._unseen
    shared._unseen = lambda probes, patience_s: remove_partial_files(probes[0].parent) or look(probes, patience_s)
    relative, absolute = unshared(Path("run"), patience_s=0.5), unshared(Path(folder) / "run", patience_s=0.5)
    (node / "a file").touch()
    return [relative, absolute, unshared(Path("a file") / "run")]


def test_nodes_that_do_not_share_it_are_named(tmp_path):
    results = run_ranks(complaints, 3, str(tmp_path))
    for relative, absolute, unwritable in results:
        assert "rank 0 on " in relative and f"has {tmp_path}/node0/run; rank 2 on " in relative
        assert f"has {tmp_path}/node1/run)" in relative and "rank 1" not in relative and "share, and pass" in relative
        assert absolute == ""
        assert f"cannot write to {tmp_path}/node0/a file/run (Not a directory)" in unwritable
    assert {path.name for path in tmp_path.rglob("*")} == {"node0", "node1", "a file"}
