"""Exchanges between ranks that run beside the rest of a step.

On CPUs one thread does what it is given, in that order. On CUDA the calling thread launches it at once, on another
stream. Collectives have a process group of their own: there they come in the same order on every rank, however they
fall between those of BatchNorm, weights and gradients.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from largescale.distributed import threads
from largescale.processes import together, world_size

Value = TypeVar("Value")
Task = tuple["Future[Any]", Callable[[], Any]]


class Beside:
    """Starts functions of tensors and a group, and hands over what they return when it is needed.

    Where a thread would gain nothing, the caller does the work itself: a single process on a CPU, which waits for
    nobody, and a plan, which looks at what its own thread does. What is computed, and which collectives there are, is
    the same in every case.

    Attributes:
        group: of all ranks, for these functions alone; None is the default one.

    Collectives: every rank must make one, where there are several; an all-gather of objects, and those of making the
    group.

    Raises:
        InputError: the system does not allow its threads, on any rank.
    """

    def __init__(self, timeout: timedelta) -> None:
        """Collectives of the group give up after `timeout`."""
        self.group: dist.ProcessGroup | None = None
        self._tasks: SimpleQueue[Task | None] | None = None
        self._stream: torch.cuda.Stream | None = None
        if world_size() > 1 and not _planned():
            together(lambda: threads.require(threads.GROUPS // 2 + 1 + threads.of_math()))
            self.group = cast(dist.ProcessGroup, dist.new_group(timeout=timeout))  # every rank is in it

    def start(self, work: Callable[..., Value], inputs: list[Tensor]) -> Callable[[], Value]:
        """Begin `work(inputs, group)`; returns what waits for its value, to be called once.

        Args:
            work: a function of tensors and the group alone that computes without gradients, and whose collectives all
                are in the group. It runs no module: hooks of a strategy belong to the caller's thread.
            inputs: nobody changes them until the value is there.

        Collectives: those of `work`; every rank must start the same work in the same order.
        """
        if not _planned() and inputs[0].is_cuda:
            return self._on_stream(work, inputs)
        if not _planned() and self.group is not None:
            future: Future[Value] = Future()
            self._queue().put((future, partial(work, inputs, self.group)))
            return future.result
        value = work(inputs, self.group)
        return lambda: value

    def _on_stream(self, work: Callable[..., Value], inputs: list[Tensor]) -> Callable[[], Value]:
        """Each stream waits for the other before it uses the other's memory, and so before any of it is used again."""
        stream = self._stream = self._stream or torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            value = work(inputs, self.group)

        held = [*inputs]

        def wait() -> Value:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
            held.clear()  # not before: freed memory is handed out again at once
            return value

        return wait

    def _queue(self) -> SimpleQueue[Task | None]:
        if self._tasks is None:
            self._tasks = SimpleQueue()
            # A daemon, so that a failing process does not wait for the ranks it leaves behind.
            threading.Thread(target=_serve, args=(self._tasks,), name="beside", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None)
        return self._tasks


def _serve(tasks: SimpleQueue[Task | None]) -> None:
    while task := tasks.get():
        future, work = task
        try:
            future.set_result(work())
        except BaseException as error:  # the thread that waits for the value raises it
            future.set_exception(error)
        del task, future, work  # and the tensors in them, until the next step


def _planned() -> bool:
    """Whether the operators of this thread are watched, or are on tensors without numbers."""
    return bool(_get_current_dispatch_mode_stack())
