"""What takes long to compute and several tests compare with, computed by one of pytest-xdist's workers for all."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from typing import TypeVar

import pytest

Value = TypeVar("Value")


def once(factory: pytest.TempPathFactory, name: str, compute: Callable[[], Value]) -> Value:
    """What `compute` returns to the worker that asks first; others wait for it, and get a copy.

    A worker whose computation fails fails with its error, and the next one that asks computes again.

    Args:
        factory: of the temporary folders of this run of the tests.
        name: of the value, used for no other.
        compute: must depend on nothing that differs from worker to worker.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    folder.mkdir(exist_ok=True)
    path = folder / name
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_bytes(pickle.dumps(compute()))
            unfinished.rename(path)
    # Written a moment ago by these very tests.
    return pickle.loads(path.read_bytes())
