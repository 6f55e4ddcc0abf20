"""Saving behind the training loop: stage, write, publish, each rank its own pieces.

The loop only waits for what a forward pass changes (statistics, queue), and, before its next update, for what is
left of the copy of weights and optimizer state, which runs during forward and backward. A thread then writes the copy
with collectives on its own process group, so that they never interleave with those of the training.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from largescale.checkpoint.folder import FileStamp, begin, publish, remove_old
from largescale.checkpoint.together import FailedOnARank, on_all, on_first
from largescale.checkpoint.writer import PieceWriter

_log = logging.getLogger(__name__)


class SaveFailed(Exception):
    """A checkpoint could not be written; earlier ones are untouched."""


class Saver:
    """Writes the checkpoints of a run.

    Args:
        folder: the run's `checkpoints` folder.
        keep: newest checkpoints to keep.
        keep_every: also keep those at multiples of this many steps; 0 keeps none of these.
        background: write while training continues.
        owner: number of the run folder's owner, see run/lease.py.
        verify: raises if the folder belongs to another training by now; called on rank 0 before anything is published.
        published: called with the step on every rank once its checkpoint is published; must not raise.
        device: of the tensors to save.
        timeout: of its collectives; None uses that of torch.

    Collectives: every rank must make one; it makes a gloo group.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int,
        background: bool,
        device: torch.device,
        owner: int = 0,
        verify: Callable[[], None] = lambda: None,
        published: Callable[[int], None] = lambda _: None,
        timeout: timedelta | None = None,
    ) -> None:
        self.folder, self.keep, self.keep_every, self.background = folder, keep, keep_every, background
        self._owner, self._verify, self._published = owner, verify, published
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))  # every rank is in it
        self._rank = dist.get_rank()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._staged: Future[None] = _done()
        self._written: Future[None] = _done()

    def save(self, state: dict[str, Tensor], progress: dict[str, Any], *, until_update: set[str]) -> None:
        """Begin to save a checkpoint; returns once what may change before `wait_staged` is copied.

        Args:
            state: tensors by canonical name; DTensors are written by the ranks that hold them, others once.
            progress: JSON values, with `step`: how many steps are done.
            until_update: names of the tensors that do not change before the caller has called `wait_staged`.

        Raises:
            SaveFailed: the previous save failed, or, without `background`, this one.

        Collectives: every rank must call it. In the training's groups none (but for HSDP's first save on CUDA).
        """
        # The buffers are reused: a save that is still being written would get values of this step.
        self.wait()
        staged = {name: self._buffer(name, value) for name, value in state.items()}
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        # What a forward pass changes is copied before this returns; otherwise the copy would mix two steps.
        later = {name: state[name] for name in state.keys() & until_update} if self.background else {}
        self._copy({name: state[name] for name in state.keys() - later.keys()})
        staging: Future[None] = Future()
        writing: Future[None] = Future()
        self._staged, self._written = staging, writing

        def stage() -> None:
            self._copy(later)
            later.clear()  # some are copies made for this save, which would stay on the device until it is written

        def work() -> None:
            _settle(staging, stage)
            _settle(writing, lambda: self._write(staged, progress, staging))

        if self.background:
            # A daemon, so that a failing process does not wait for the ranks it leaves behind.
            threading.Thread(target=work, name="checkpoint", daemon=True).start()
        else:
            work()
            self.wait()

    def wait_staged(self) -> None:
        """Wait until everything given to `save` has been copied; to be called before weights change."""
        self._staged.result()

    def wait(self) -> None:
        """Wait until the last save is published.

        Raises:
            SaveFailed: it failed; on all ranks alike, and only once per failure.
        """
        written, self._written = self._written, _done()
        written.result()

    def linger(self, limit_s: float) -> None:
        """Give the last save some time to be published, before a process ends that others may wait for. Raises
        nothing.
        """
        wait([self._written], limit_s)

    def _copy(self, state: dict[str, Tensor]) -> None:
        """Copy tensors to the buffers in host memory, on CUDA in a separate stream."""
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for name in sorted(state):
                self._buffers[name].copy_(_local(state[name]), non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()

    def _buffer(self, name: str, value: Tensor) -> Tensor:
        """The tensor to write: like `value`, on a buffer in host memory that is reused by every save."""
        local = _local(value)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=self._stream is not None)
            self._buffers[name] = buffer
        if not isinstance(value, DTensor):
            return buffer
        mesh = self._host_mesh(value.device_mesh)
        return DTensor.from_local(
            buffer, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )

    def _host_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh)
        return self._meshes[mesh]

    def _write(self, staged: dict[str, Tensor], progress: dict[str, Any], staging: Future[None]) -> None:
        """Write what is staged, publish, and remove old ones.

        Collectives: on the saver's own group; every rank's thread calls it.
        """
        started, group, step = time.perf_counter(), self._group, progress["step"]
        temporary = None
        try:
            on_all(group, staging.result)  # half a copy must not be published
            temporary = on_first(group, lambda: begin(self.folder, step, self._owner))
            writer = PieceWriter(temporary)

            def write() -> dict[str, FileStamp]:
                dcp.save(staged, storage_writer=writer, process_group=group)
                return writer.stamps

            files = {name: stamp for part in on_all(group, write) for name, stamp in part.items()}
            on_first(group, lambda: self._publish(temporary, progress, files))
        except FailedOnARank as error:
            if self._rank == 0 and temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            _log.warning(
                "%s: could not save step %d: %s. Earlier checkpoints are as they were", self.folder, step, error
            )
            raise SaveFailed(str(error)) from error
        if self._rank == 0:
            size = sum(stamp.size for stamp in files.values())
            _log.info("saved step %d: %.1f MB in %.1f s", step, size / 1e6, time.perf_counter() - started)
        self._published(step)

    def _publish(self, temporary: Path, progress: dict[str, Any], files: dict[str, FileStamp]) -> None:
        self._verify()
        publish(temporary, progress, files)
        try:
            remove_old(self.folder, published=progress["step"], keep=self.keep, keep_every=self.keep_every)
        except OSError as error:
            _log.warning("saved step %d, but could not remove an older checkpoint: %s", progress["step"], error)


def _local(value: Tensor) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach()


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def _settle(future: Future[None], action: Callable[[], None]) -> None:
    try:
        action()
        future.set_result(None)
    except BaseException as error:
        future.set_exception(error)
