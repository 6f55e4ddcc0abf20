"""What a step does, operator by operator: collectives with their bytes, floating-point operations, bytes moved, memory.

Works on real tensors and on fake ones, so that a plan can be compared with a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from largescale.distributed.collectives import exchanged

_SWEEP_EVERY = 25
"""Operators between two looks at what is still held."""

WEIGHTS = "weights and gradients"
WAITED = "weights, waited for"
"""Exchanges of weights and gradients that the library does not overlap with anything.

Unnamed exchanges are WEIGHTS: only the strategies' libraries communicate outside `exchanging`.
"""

_KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "_allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter": "reduce-scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
}
"""By how the operator's name begins."""


class Collective(NamedTuple):
    """One kind of exchange: what, among how many ranks, of what, and how far apart these are numbered."""

    kind: str
    ranks: int
    of: str
    stride: int = 1


class Operator(NamedTuple):
    """One operator: floating-point operations, and bytes read and written."""

    flops: int
    moved: int


@dataclass
class StepTrace(TorchDispatchMode):
    """Records what is dispatched while it is active.

    Attributes:
        counts, sent: how often each collective was issued, and its bytes (of the whole gathered or reduced tensor).
        operators: all others that touch memory.
        peak: most bytes held at a time by tensors that were seen.
    """

    counts: Counter[Collective] = field(default_factory=Counter)
    sent: Counter[Collective] = field(default_factory=Counter)
    operators: list[Operator] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self._seen = 0

    def watch(self, tensors: Iterator[Tensor]) -> None:
        """Count these tensors as held, for as long as they are."""
        for tensor in tensors:
            self._hold(tensor.to_local() if isinstance(tensor, DTensor) else tensor)

    def add(self, what: Collective, count: int, size: int) -> None:
        """Count collectives, `size` bytes in total."""
        if count:
            self.counts[what] += count
            self.sent[what] += size

    def forget(self) -> None:
        """Leave out what was sent and computed so far; what is held goes on."""
        self.counts.clear()
        self.sent.clear()
        self.operators.clear()

    def held(self) -> int:
        """Bytes that are held now."""
        total = 0
        for key, reference in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._storages[key]
            else:
                # FSDP2 frees a gathered weight by shrinking its storage, so its size is looked up every time.
                total += storage.nbytes()
        self.peak = max(self.peak, total)
        return total

    def lap(self) -> int:
        """Most bytes held at a time since the last lap; resets `peak`."""
        self.held()
        most, self.peak = self.peak, 0
        return most

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it dispatches its local tensor once more
        result = function(*arguments, **(options or {}))
        if function.namespace == "c10d":
            self._collective(function, arguments)
        elif not function.is_view and function.namespace == "aten":
            self._operator(function, arguments, options or {}, result)
        for tensor in _tensors(result):
            self._hold(tensor)
        self._seen += 1
        if self._seen % _SWEEP_EVERY == 0 or function.namespace in ("c10d", "fsdp"):
            self.held()
        return result

    def _hold(self, tensor: Tensor) -> None:
        if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
            return  # oneDNN's copy of a block, whose storage cannot be seen
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = StorageWeakRef(storage)

    def _collective(self, function: Any, arguments: tuple[Any, ...]) -> None:
        name = function._schema.name.removeprefix("c10d::")
        kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), name)
        groups = [a for a in arguments if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(groups[0]))
        # Ranks of a group that are far apart in number are on different nodes, and the slower network counts.
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        # Outputs come first; of a reduce-scatter the input is the larger one, and its size is what rings send.
        whole = arguments[1] if kind == "reduce-scatter" else arguments[0]
        what = Collective(kind, len(ranks), exchanged(WEIGHTS), stride)
        self.add(what, 1, sum(tensor.nbytes for tensor in _tensors(whole)))

    def _operator(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        name = function._schema.name
        if name.startswith("aten::empty") or name == "aten::new_empty":
            return  # allocates and touches nothing, so it takes no time
        inputs = [tensor for value in (arguments, options) for tensor in _tensors(value)]
        moved = sum(tensor.nbytes for tensor in [*inputs, *_tensors(result)])
        self.operators.append(Operator(_flops(name, arguments, result), moved))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _flops(name: str, arguments: tuple[Any, ...], result: Any) -> int:
    """Multiplications and additions of matrix products and convolutions (grouped ones too); 0 for what only moves."""
    match name.removeprefix("aten::"):
        case "convolution":
            return 2 * result.numel() * arguments[1][0].numel()
        case "convolution_backward":
            grad, _, weight = arguments[:3]
            return 2 * grad.numel() * weight[0].numel() * sum(arguments[-1][:2])
        case "mm" | "bmm":
            return 2 * arguments[0].numel() * arguments[1].shape[-1]
        case "addmm":
            return 2 * arguments[1].numel() * arguments[2].shape[-1]
        case "mv":
            return 2 * arguments[0].numel()
    return 0
