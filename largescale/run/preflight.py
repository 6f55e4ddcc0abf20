"""Checks before a long run, on every rank: names the node that would spoil it.

Shards are opened and the network is built as in the run. Each rank reports what it sees (GPUs, clock, free disk,
shards) and exchanges data with its neighbours; rank 0 compares. All ranks must share the run's folder.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from largescale.checkpoint.folder import newest_first
from largescale.config import Config, without_effect
from largescale.data.corpora import Corpus
from largescale.data.stream import Stream
from largescale.methods import build_method, require_fit
from largescale.models.backbones import count_parameters
from largescale.parallel.strategies import build_engine, drawn_in_pieces
from largescale.processes import barrier, process_group, rank, together, world_size
from largescale.run.resume import settle_precision
from largescale.run.schedule_check import complaints as schedule_complaints
from largescale.run.shared import unshared
from shards.format.manifest import Manifest
from shards.ground.errors import InputError

MAX_CLOCK_SKEW_S = 2.0
"""Tolerated difference between a rank's clock and the median one."""
MIN_SHARE_OF_BANDWIDTH = 0.5
"""Fraction of the median rank's bandwidth below which a rank is called slow."""

_ROUNDS = 5
_PROBED_SHARDS = 4


@dataclass(frozen=True)
class Findings:
    """What one rank found.

    Attributes:
        problems: what it noticed on its own.
        clock_s: its clock right after a barrier.
        bandwidth: bytes per second to its better neighbour.
        all_reduce_s: time of one all-reduce of `message_bytes` over all ranks.
    """

    host: str
    gpus: int
    problems: list[str]
    clock_s: float
    bandwidth: float
    all_reduce_s: float
    message_bytes: int


def preflight(config: Config) -> None:
    """Check what a run of this configuration needs; on rank 0, print a table and what does not fit its length.

    Raises:
        InputError: something is wrong; names host and rank of each problem.

    Collectives: every rank must call it.
    """
    with process_group(config.run.hang_timeout_s, config.run.join_timeout_s) as device:
        stream = Stream(config, rank=rank(), world_size=world_size(), device=device, dtype=torch.float32)
        together(stream.check_files)
        together(lambda: require_fit(config, stream.length))
        method = build_method(config, stream.length, on_meta=drawn_in_pieces(config))
        parameters = count_parameters(method)  # here, since a strategy may cut them
        build_engine(method, settle_precision(config, device), device)
        problems = [*_disk_problems(config, parameters), *_shard_problems(stream.folders)]
        bandwidth, all_reduce_s, message_bytes = _measure_network(device)
        barrier()
        own = Findings(
            socket.gethostname(),
            torch.cuda.device_count(),
            problems,
            time.time(),
            bandwidth,
            all_reduce_s,
            message_bytes,
        )
        findings: list[Findings | None] = [None] * world_size()
        dist.all_gather_object(findings, own)
        complaints = judge([found for found in findings if found is not None])
        complaints += filter(None, [unshared(Path(config.run.dir))])
        if rank() == 0:
            of_schedule = [*without_effect(config), *schedule_complaints(config, stream.length)]
            sys.stderr.write("".join(f"warning: {complaint}\n" for complaint in of_schedule))
            sys.stdout.write(_table(findings))
            sys.stdout.flush()
    if complaints:
        raise InputError("; ".join(complaints))


def judge(findings: list[Findings]) -> list[str]:
    """What is wrong: one line per problem, with rank and host; findings are in rank order."""
    complaints = []
    clock = statistics.median(found.clock_s for found in findings)
    bandwidth = statistics.median(found.bandwidth for found in findings)
    gpus = statistics.mode(found.gpus for found in findings)
    for number, found in enumerate(findings):
        where = f"rank {number} on {found.host}"
        complaints += [f"{where}: {problem}" for problem in found.problems]
        if found.gpus != gpus:
            complaints.append(f"{where}: sees {found.gpus} GPUs, the others {gpus}")
        if abs(found.clock_s - clock) > MAX_CLOCK_SKEW_S:
            complaints.append(f"{where}: its clock is {found.clock_s - clock:+.1f} s off; set it (chrony, ntp)")
        if found.bandwidth < MIN_SHARE_OF_BANDWIDTH * bandwidth:
            complaints.append(
                f"{where}: {found.bandwidth / 1e9:.2f} GB/s to its neighbours, the median is {bandwidth / 1e9:.2f}"
            )
    return complaints


def _disk_problems(config: Config, parameters: int) -> list[str]:
    """Check for room for the checkpoints that are still to come and one being written, in a writable folder."""
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        return [f"{folder}: cannot be written to ({error.strerror})"]
    # Weights, and at most two optimizer moments, in fp32.
    to_come = max(1, config.checkpoint.keep + 1 - len(newest_first(folder / "checkpoints")))
    needed = parameters * 4 * 3 * to_come
    free = shutil.disk_usage(folder).free
    if free < needed:
        return [f"{folder}: {free / 1e9:.1f} GB free, {to_come} checkpoints need {needed / 1e9:.1f}"]
    return []


def _shard_problems(corpora: list[Corpus]) -> list[str]:
    """A few shards of each corpus, others on each rank, can be read (those of a store were asked for its manifest)."""
    return [problem for corpus in corpora if corpus.cache is None for problem in _local_shard_problems(corpus.manifest)]


def _local_shard_problems(manifest: Manifest) -> list[str]:
    problems = []
    count = len(manifest.shards)
    for number in range(min(_PROBED_SHARDS, count)):
        shard = (rank() + number * max(1, count // _PROBED_SHARDS)) % count
        path = manifest.tar_path(shard)
        try:
            with path.open("rb") as file:
                file.seek(-512, os.SEEK_END)
                file.read(512)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems


def _measure_network(device: torch.device) -> tuple[float, float, int]:
    """Bytes per second to the better of both neighbours, seconds of an all-reduce, its bytes."""
    message = torch.ones(2**24 if device.type == "cuda" else 2**21, device=device)
    num_bytes = message.numel() * message.element_size()
    # Pairs (0,1) (2,3) ..., then (1,2) (3,4) ...: a slow rank is slow in both, its neighbours in one.
    times = [_exchange_s(message, (rank() + shift) // 2 * 2 - shift, device) for shift in (0, 1)]
    met = [seconds for seconds in times if seconds > 0]
    bandwidth = 2 * num_bytes / min(met) if met else float("inf")
    return bandwidth, _timed(lambda: dist.all_reduce(message), device), num_bytes


def _exchange_s(message: torch.Tensor, first: int, device: torch.device) -> float:
    """Seconds to swap a message within the pair (first, first + 1) that this rank belongs to; 0 without a partner."""
    partner = first + 1 if rank() == first else first
    if first < 0 or first + 1 >= world_size():
        for _ in range(_ROUNDS + 1):
            barrier()
        return 0.0
    received = torch.empty_like(message)

    def swap() -> None:
        operations = [dist.P2POp(dist.isend, message, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return _timed(swap, device)


def _timed(action: Callable[[], object], device: torch.device) -> float:
    """Median seconds over some rounds that all ranks begin together, after one to warm up."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        barrier()
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _gigabytes(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.2f}" if math.isfinite(bandwidth) else "-"


def _table(findings: list[Findings | None]) -> str:
    lines = [f"{'rank':>5}  {'host':<24} {'GPUs':>4}  {'neighbours':>12}\n"]
    lines += [
        f"{number:>5}  {found.host:<24} {found.gpus:>4}  {_gigabytes(found.bandwidth):>7} GB/s\n"
        for number, found in enumerate(findings)
        if found is not None
    ]
    slowest = max(found.all_reduce_s for found in findings if found is not None)
    size = findings[0].message_bytes if findings[0] is not None else 0
    lines.append(f"all-reduce of {size / 1e6:.0f} MB over {len(findings)} ranks: {slowest * 1e3:.1f} ms\n")
    return "".join(lines)
