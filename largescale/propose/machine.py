"""What a training would run on: GPUs and their memory, processor cores, memory of the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from largescale.distributed.control_groups import usable_cpus
from largescale.plan.hardware import gpu_named
from largescale.run.memory import footprint, host_bytes
from shards.ground.errors import InputError

GPUS_PER_NODE = 8
"""At most, as the planner's estimates assume."""


@dataclass(frozen=True)
class Machine:
    """Where a training would run.

    Attributes:
        gpus: number of them; 0 trains on the CPU.
        gpu: their kind: a name of `plan.hardware.GPUS`, or what the driver of one that is here says.
        gpu_gb: memory of each, 10^9 bytes.
        here: whether it is this machine, so that its speed can be measured.
        cores, host_gb: of this machine; of another one they are not known, and 0.
        hidden: whether it has GPUs that the training must not use, though they are there.
    """

    gpus: int
    gpu: str
    gpu_gb: float
    here: bool
    cores: int
    host_gb: float
    hidden: bool = False

    def __str__(self) -> str:
        what = f"{self.gpus} x {self.gpu} of {self.gpu_gb:.0f} GB" if self.gpus else "no GPU"
        if self.hidden:
            what = "no GPU of those here"
        return f"{what}, {self.cores} CPU cores, {self.host_gb:.0f} GB free" if self.here else what

    @property
    def nodes(self) -> int:
        """Of up to eight GPUs each, equally many; this machine is one."""
        if self.here:
            return 1
        least = -(-self.gpus // GPUS_PER_NODE)
        return next(nodes for nodes in range(least, self.gpus + 1) if self.gpus % nodes == 0)

    @property
    def environment(self) -> dict[str, str]:
        """Variables to start a training with."""
        return {"CUDA_VISIBLE_DEVICES": ""} if self.hidden else {}


def machine(kind: str | None, gpus: int | None) -> Machine:
    """This machine, or another one with GPUs of a kind.

    Args:
        kind: of the GPUs of another machine; None for this one.
        gpus: how many; None for all that are here, or one of another machine.

    Raises:
        InputError: an unknown kind, or more GPUs than there are here.
    """
    if gpus is not None and gpus < 0:
        raise InputError(f"--gpus {gpus}: expected 0 or more")
    if kind is not None:
        if gpus == 0:
            raise InputError(f"--gpus 0 --gpu {kind}: expected at least one GPU; leave --gpu out for a run without")
        return Machine(gpus or 1, kind, gpu_named(kind).memory_gb, False, 0, 0.0)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is not None and gpus > there:
        raise InputError(f"--gpus {gpus}: there are {there} here; for another machine pass --gpu KIND too")
    count = there if gpus is None else gpus
    cores = usable_cpus()
    host_gb = host_bytes(1, footprint()) / 1e9
    if not count:
        return Machine(0, "", 0.0, True, cores, host_gb, hidden=there > 0)
    memory = min(torch.cuda.get_device_properties(number).total_memory for number in range(count)) / 1e9
    return Machine(count, torch.cuda.get_device_name(0), memory, True, cores, host_gb)
