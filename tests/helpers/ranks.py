"""Runs a function on several real processes joined by gloo, and brings back what each returns."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def forking() -> ForkServerContext:
    """Starts processes in a moment: they are forked from a server that has imported torch and the library once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preload"])
    return context


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: object, timeout_s: float = 600) -> list[Any]:
    """`function(*arguments)` on every rank; returns the results in rank order, or fails with a rank's traceback."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            forking().Process(target=_rank_main, args=(function, rank, world_size, folder, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
            if process.is_alive():
                process.kill()
        outcomes: dict[int, Any] = {}
        for file in Path(folder).glob("rank-*"):
            # Written a moment ago by this very test.
            rank, error, value = pickle.loads(file.read_bytes())
            assert not error, f"rank {rank}:\n{error}"
            outcomes[rank] = value
    assert len(outcomes) == world_size, f"only ranks {sorted(outcomes)} finished"
    return [outcomes[rank] for rank in range(world_size)]


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=world_size)
    try:
        value, error = function(*arguments), ""
        dist.barrier()
    except Exception:
        value, error = None, traceback.format_exc()
    (Path(folder) / f"rank-{rank}").write_bytes(pickle.dumps((rank, error, value)))
    dist.destroy_process_group()


class Counted:
    """Counts the collectives that a block issues through `torch.distributed`, with their sizes."""

    NAMES = (
        "all_reduce",
        "all_gather_into_tensor",
        "all_gather_single",
        "all_gather",
        "broadcast",
        "barrier",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
    )

    def __enter__(self) -> Counted:
        self.calls: list[tuple[str, int]] = []
        self._originals = {name: getattr(dist, name) for name in self.NAMES if hasattr(dist, name)}
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            sizes = [a.numel() for a in arguments if isinstance(a, torch.Tensor)]
            self.calls.append((name, max(sizes, default=0)))
            return original(*arguments, **options)

        return call
