"""One step of the real method and strategy on fake tensors, over a process group of any size that sends nothing.

Fake tensors have shapes and no numbers: RegNetY-256gf on 512 ranks takes a laptop half a minute. The network is built
and cut on the meta device and becomes fake tensors after that; cutting fake ones would take minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from largescale.config import Config
from largescale.config.setting import a_name
from largescale.data.length import NOMINAL, Length
from largescale.data.supports import require_shared_evenly
from largescale.data.views import Supports, Views
from largescale.methods import build_method, require_fit
from largescale.methods.method import Method
from largescale.models.backbones import chosen_blocks
from largescale.models.initialise import materialise
from largescale.parallel import fsdp
from largescale.parallel.engine import Engine
from largescale.parallel.offload import offloads
from largescale.parallel.precision import views_dtype
from largescale.parallel.strategies import STRATEGIES, prepare
from largescale.plan import like_ddp, like_fairscale, like_zero
from largescale.plan.phase import Phase, phase_of
from largescale.plan.stages import steps_of_stages
from largescale.plan.stand_in import Peaks, StandIn
from largescale.plan.trace import Collective, Operator, StepTrace
from shards.ground.errors import InputError

_STAND_INS: dict[str, Callable[[Method, Config, torch.device, FakeTensorMode], Engine]] = {
    "ddp": like_ddp.build,
    "zero1": partial(like_zero.build, stage=1),
    "zero2": partial(like_zero.build, stage=2),
    "zero3": partial(like_zero.build, stage=3),
    "fairscale": like_fairscale.build,
}
"""Strategies whose own engine takes no fake tensors."""


@dataclass(frozen=True)
class Simulation:
    """A step of one rank; bytes unless said otherwise. Of a method in stages, bytes are those of the stage that holds
    most, and what is sent and computed is that of the last one.

    Attributes:
        weights, gradients, optimizer, buffers, views: what the rank holds of each.
        kept: activations (and gathered weights) that are held at the end of the forward pass for the backward pass.
        peak: the most that is held at a time, all of the above included.
        counts, sent: collectives of the step.
        operators: what is computed.
        parameters, trained: numbers of the whole network, and those that take a gradient, not a teacher's.
        phase: an offline phase of the run, if it has any.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    views: int
    kept: int
    peak: int
    counts: Counter[Collective]
    sent: Counter[Collective]
    operators: list[Operator]
    parameters: int
    trained: int
    phase: Phase | None = None

    @property
    def most_held(self) -> int:
        """Bytes that are held at most, in a step or in an offline phase."""
        return max(self.peak, self.held_in_a_phase)

    @property
    def held_in_a_phase(self) -> int:
        """Bytes that are held at most in an offline phase; 0 if there is none."""
        between_steps = self.weights + self.gradients + self.optimizer + self.buffers
        return between_steps + self.phase.held if self.phase else 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the step on one rank."""
        return sum(operator.flops for operator in self.operators)


def simulate(config: Config, ranks: int, images: int = NOMINAL) -> Simulation:
    """Simulate a step of rank 0 out of `ranks`, and an offline phase if there are any.

    Args:
        config: of the run.
        ranks: number of them.
        images: of the corpus; what is held of each is simulated too.

    Raises:
        InputError: a strategy that cannot be planned, or sizes that do not fit the ranks.
    """
    _check(config)
    if config.train.global_batch % (ranks * config.train.accumulate):
        raise InputError(
            f"train.global_batch={config.train.global_batch}: not divisible by {ranks} GPUs"
            + (f" x {config.train.accumulate} micro-batches" if config.train.accumulate > 1 else "")
        )
    require_shared_evenly(config, ranks)
    length = Length.nominal(config, images)
    with _group(ranks):
        require_fit(config, length)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        engine = _build(config, length, fake)
        with fake:
            engine.method.begin()
            step = _step(engine, config, ranks)
            return replace(step, phase=phase_of(engine, config))


def _check(config: Config) -> None:
    strategy = config.parallel.strategy
    if strategy not in STRATEGIES:
        raise InputError(f"parallel.strategy={strategy}: expected {a_name(strategy, STRATEGIES)}")
    if offloads(config) and strategy not in ("ddp", "fairscale"):
        raise InputError("parallel.cpu_offload=true: host memory cannot be planned; plan without it")


@contextmanager
def _group(ranks: int) -> Iterator[None]:
    if dist.is_initialized():
        raise InputError("a plan is made by one process; start it without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _build(config: Config, length: Length, fake: FakeTensorMode) -> Engine:
    device = torch.device("cpu")
    method = build_method(config, length, on_meta=True)
    # Compiled blocks would be traced, and not run; uncompiled ones do the same, in more kernels.
    chosen_blocks(method.backbone, config.model.compile_stages, key="model.compile_stages")
    config = replace(config, model=replace(config.model, compile_stages=[]))
    prepare(method, config, device)

    def faked(network: nn.Module, device: torch.device, seed: int) -> None:
        with fake:
            materialise(network, device, seed)

    if config.parallel.strategy == "fsdp":
        return fsdp.build(method, config, device, make_real=faked)
    faked(method, device, config.run.seed)
    return _STAND_INS[config.parallel.strategy](method, config, device, fake)


def _step(engine: Engine, config: Config, ranks: int) -> Simulation:
    batch = config.train.global_batch // ranks
    images = [
        torch.empty(group.num * batch, 3, group.size, group.size, dtype=views_dtype(config))
        for group in config.data.crops
    ]
    views = Views.numbered(images, batch, config.method.facts, config.method.sounds())
    if (support := config.method.supports()) is not None:
        size, shown = config.data.crops[0].size, support.views * (support.size // ranks)
        pixels = torch.empty(shown, 3, size, size, dtype=views_dtype(config))
        views = views._replace(supports=Supports.numbered(support, pixels, ranks))
        images = views.pixels()
    parameters, buffers = list(engine.method.parameters()), list(engine.method.buffers())
    for network in engine.method.held:
        buffers += [*network.parameters(), *network.buffers()]
    wrapped = engine.wrapped if isinstance(engine.wrapped, StandIn) else StandIn(engine.method)
    weights = local_bytes(wrapped.weights())
    trace = StepTrace()
    trace.watch(iter([*parameters, *buffers, *images, *wrapped.always_held()]))
    wrapped.observe(trace)
    most, gradients = Peaks(0, 0, 0), 0
    for step in steps_of_stages(engine.method):  # by the last one everything takes part, such as a queue
        trace.forget()
        for objective in engine.method.objectives_of(step):
            kept, passes, held = _passes(engine, views, step, trace, objective)
            with trace:
                engine.apply_gradients(step)
            most = Peaks(max(most.kept, kept), max(most.passes, passes), max(most.update, trace.lap()))
            gradients = max(gradients, held)
    peaks = wrapped.settle(trace, most)
    optimizer = local_bytes(value for state in engine.optimizer.state.values() for value in state.values())
    return Simulation(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=local_bytes(buffers),
        views=local_bytes(images),
        kept=peaks.kept,
        # The optimizer's state is there from the second step on, in the backward pass too.
        peak=max(peaks.passes + optimizer, peaks.update),
        counts=trace.counts,
        sent=trace.sent,
        operators=trace.operators,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
    )


def _passes(engine: Engine, views: Views, step: int, trace: StepTrace, objective: str) -> tuple[int, int, int]:
    """Forward and backward; bytes that are kept in between, that are held at most, and of gradients."""
    before = trace.held()
    kept = [0]
    backward = _noting(engine.backward, lambda: kept.append(trace.held() - before))
    engine.backward = backward  # type: ignore[method-assign]  # of this engine alone, which is thrown away
    with trace:
        engine.forward_backward(views, step, objective)
    return max(kept), trace.lap(), local_bytes(engine.gradients())


def _noting(function: Callable[..., Any], note: Callable[[], object]) -> Callable[..., Any]:
    def noting(*arguments: Any) -> Any:
        note()
        return function(*arguments)

    return noting


def local_bytes(tensors: Any) -> int:
    """Bytes of tensors, of sharded ones those of this rank's piece."""
    return sum(
        tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes
        for tensor in tensors
        if isinstance(tensor, Tensor)
    )
