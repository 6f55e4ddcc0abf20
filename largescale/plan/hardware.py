"""GPUs and networks, as their makers state them, and what a plan assumes beyond that."""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config.setting import a_name
from shards.ground.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory_gb: its memory.
        tflops: dense half-precision matrix products (bfloat16; float16 if it has none), 10^12 per second.
        memory_gb_s: bandwidth of its memory.
        link_gb_s: to the other GPUs of its node, one direction.
        network_gb_s: to other nodes, its share of the node's adapters, one direction.
        half: its half precision.
    """

    memory_gb: float
    tflops: float
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float
    half: str = "bf16"


GPUS = {
    "v100-16": Gpu(16, 125, 900, 150, 3.1, "fp16"),
    "v100-32": Gpu(32, 125, 900, 150, 3.1, "fp16"),
    "a100-40": Gpu(40, 312, 1555, 300, 12.5),
    "a100-80": Gpu(80, 312, 2039, 300, 25),
    "h100": Gpu(80, 989, 3350, 450, 50),
    "h200": Gpu(141, 989, 4800, 450, 50),
    "b200": Gpu(180, 2250, 8000, 900, 50),
}
"""Data sheets of the SXM models. Networks: of V100 nodes 2 x 100 Gb/s for 8 GPUs, of A100-40 nodes 8 x 100 Gb/s, of
A100-80 nodes 8 x 200 Gb/s, of later ones 8 x 400 Gb/s."""


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says.

    Attributes:
        math: share of `tflops` that convolutions and matrix products reach.
        bandwidth: share of `memory_gb_s` that other kernels reach.
        launch_us: time between two kernels at least.
        wire: share of link and network bandwidth that collectives reach.
        link_us, network_us: latency of a collective inside a node, and between nodes; log2 of the nodes times `hop_us`
            is added.
        reserve_gb: taken by the CUDA context, libraries and the collectives' buffers.
        slack: share of a GPU's memory that the allocator loses to fragments.
    """

    math: float = 0.5
    bandwidth: float = 0.8
    launch_us: float = 4.0
    wire: float = 0.8
    link_us: float = 15.0
    network_us: float = 30.0
    hop_us: float = 5.0
    reserve_gb: float = 1.5
    slack: float = 0.05


_SMALLEST = {"v100": "v100-16", "a100": "a100-40"}
"""What a name without the memory stands for."""


def gpu_named(name: str) -> Gpu:
    """The GPU of a name; one that comes with more and less memory is the one with less.

    Raises:
        InputError: one that is not known; lists the others.
    """
    name = _SMALLEST.get(name, name)
    if name not in GPUS:
        raise InputError(f"--gpu {name}: expected {a_name(name, GPUS)}")
    return GPUS[name]


def gpu_like(device: str, memory_gb: float) -> str:
    """The name in `GPUS` of a device as its driver calls it; empty for one that is not there.

    Args:
        device: such as "NVIDIA A100-SXM4-80GB".
        memory_gb: which tells kinds apart that come with more and less.
    """
    alike = [name for name in GPUS if name.split("-")[0] in device.lower()]
    return min(alike, key=lambda name: abs(GPUS[name].memory_gb - memory_gb), default="")
