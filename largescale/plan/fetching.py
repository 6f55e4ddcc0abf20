"""When ZeRO stage 3 gathers and frees parameters: DeepSpeed's coordinator (0.19), replayed on sizes.

DeepSpeed gathers a parameter before the module that it belongs to runs, forward or backward, and frees it behind that.
It records the order of the modules in the first micro-batch, and again after a pass in another order. From then on it
gathers ahead, as many parameters at a time as `prefetch` elements hold, and keeps what is used again within `reuse`
elements; that of a module call is decided once. So a small network gathers everything once a micro-batch, and one of
many billion parameters once a use.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple


class Event(NamedTuple):
    """What happens to a module: "forward", "backward" (it is about to run), "done forward", "done backward"; or to all:
    "begin", "middle" (forward is over) and "end" of a micro-batch, "update".

    Attributes:
        before: most bytes held since the event before, parameters left out.
    """

    what: str
    module: int
    before: int


class Parameter(NamedTuple):
    """Elements of a parameter, and with its padding; whether it is small enough to stay gathered."""

    numel: int
    padded: int
    stays: bool


@dataclass(eq=False)
class Gather:
    """One all-gather; the parameters are copied out of what it gathered when the first is waited for."""

    parameters: set[int]
    numel: int
    waited_for: bool = False


@dataclass
class Coordinator:
    """Follows events; parameters and modules are numbers.

    Attributes:
        sizes: of all parameters.
        members: parameters of each module.
        prefetch, reuse, live: elements; DeepSpeed's options of these names.
        gathers: elements of each all-gather so far, padding included.
    """

    sizes: list[Parameter]
    members: list[list[int]]
    prefetch: int
    reuse: int
    live: int
    gathers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._state = ["freed"] * len(self.sizes)  # or "in flight", or "whole"
        self._users: list[set[int]] = [set() for _ in self.sizes]
        self._in_flight: dict[int, Gather] = {}
        self._mode = "unused"  # then "record", then "complete"
        self._order: list[int] = []
        self._uses: list[tuple[int, int]] = []
        self._keeps: dict[tuple[int, int], set[int]] = {}
        self._backward: dict[int, None] = {}
        self._reset()

    def elements(self) -> int:
        """Elements of gathered parameters, in flight or whole."""
        whole = sum(size.numel for size, state in zip(self.sizes, self._state, strict=True) if state == "whole")
        return whole + sum(gather.numel for gather in set(self._in_flight.values()))

    def follow(self, event: Event) -> None:
        """Gather and free what the event makes DeepSpeed gather and free."""
        match event.what:
            case "forward" | "backward":
                self._fetch(event.module, forward=event.what == "forward")
            case "done forward" | "done backward":
                self._release(event.module, forward=event.what == "done forward")
            case "begin":
                self._begin()
            case "end":
                self._end()
            case "update":
                self._update()

    def _forget(self) -> None:
        """The order is not the recorded one: DeepSpeed records it again from the next forward pass on."""
        self._mode, self._order, self._uses = "unused", [], []
        self._queue.clear()
        self._fetched_for.clear()
        self._drop_in_flight()

    def _drop_in_flight(self) -> None:
        for parameter, gather in list(self._in_flight.items()):
            self._wait(gather)
            self._free(parameter)
        self._in_flight.clear()

    def _begin(self) -> None:
        self._drop_in_flight()
        if self._mode == "record":
            self._uses = [
                (parameter, use) for use, module in enumerate(self._order) for parameter in sorted(self.members[module])
            ]
        self._mode = "record" if self._mode == "unused" else "complete"
        self._reset()

    def _reset(self) -> None:
        self._queue = deque(self._uses)
        self._fetched_for: dict[int, int] = defaultdict(lambda: -1)
        self._step, self._available = 0, 0

    def _fetch(self, module: int, forward: bool) -> None:
        if not forward:
            self._backward[module] = None
        if self._mode == "record":
            self._order.append(module)
        elif self._mode == "complete" and self._order[self._step : self._step + 1] != [module]:
            self._forget()
        wanted = self.members[module]
        self._gather(wanted)
        for parameter in wanted:
            self._users[parameter].add(module)
            if parameter in self._in_flight:
                self._wait(self._in_flight.pop(parameter))
        if self._mode == "complete":
            self._take_from_queue({p for p in wanted if self._fetched_for[p] < self._step})
            self._prefetch()
        self._step += 1

    def _take_from_queue(self, parameters: set[int]) -> None:
        taken: set[int] = set()
        while self._queue and len(taken) < len(parameters):
            parameter, use = self._queue.popleft()
            self._fetched_for[parameter] = use
            taken.add(parameter)

    def _prefetch(self) -> None:
        limit = min(self.live - self._available, self.prefetch)
        chosen: set[int] = set()
        numel = 0
        while self._queue and numel < limit:
            parameter, use = self._queue.popleft()
            self._fetched_for[parameter] = max(self._fetched_for[parameter], use)
            if self._state[parameter] == "freed" and parameter not in chosen:
                chosen.add(parameter)
                numel += self.sizes[parameter].numel
        self._gather(list(chosen))

    def _gather(self, parameters: list[int]) -> None:
        freed = {parameter for parameter in parameters if self._state[parameter] == "freed"}
        if not freed:
            return
        gather = Gather(freed, sum(self.sizes[parameter].padded for parameter in freed))
        self.gathers.append(gather.numel)
        self._available += sum(self.sizes[parameter].numel for parameter in freed)
        for parameter in freed:
            self._state[parameter], self._in_flight[parameter] = "in flight", gather

    def _wait(self, gather: Gather) -> None:
        if not gather.waited_for:
            for parameter in gather.parameters:
                self._state[parameter] = "whole"
        gather.waited_for = True

    def _release(self, module: int, forward: bool) -> None:
        if not forward:
            self._backward.pop(module, None)
        keeps = self._kept(module) if self._mode == "complete" else set()
        for parameter in self.members[module]:
            self._users[parameter].discard(module)
            if parameter not in keeps:
                self._free(parameter)

    def _kept(self, module: int) -> set[int]:
        """Parameters of a module that stay behind this call; decided once, in the micro-batch after the record."""
        call = (module, self._step)
        if call not in self._keeps:
            own = self.members[module]
            keeps = {p for p in own if self.sizes[p].stays or self._fetched_for[p] > self._step}
            self._keeps[call] = keeps | self._soon(set(own))
        return self._keeps[call]

    def _soon(self, parameters: set[int]) -> set[int]:
        """Those of some parameters that are used within the next `reuse` elements."""
        found: set[int] = set()
        passed = 0
        for module in self._order[self._step :]:
            if passed >= self.reuse:
                break
            found |= parameters.intersection(self.members[module])
            passed += sum(self.sizes[p].numel for p in self.members[module])
        return found

    def _free(self, parameter: int) -> None:
        if self._state[parameter] == "whole" and not self._users[parameter]:
            self._state[parameter] = "freed"
            self._available -= self.sizes[parameter].numel

    def _end(self) -> None:
        # Modules whose input wants no gradient never hear that their backward pass is over.
        while self._backward:
            module, _ = self._backward.popitem()
            for parameter in self.members[module]:
                self._users[parameter].discard(module)
                if not self.sizes[parameter].stays:
                    self._free(parameter)

    def _update(self) -> None:
        for gather in self._in_flight.values():
            self._wait(gather)
        self._in_flight.clear()
        for parameter, size in enumerate(self.sizes):
            self._users[parameter].clear()
            self._free(parameter)
            if size.stays:
                self.gathers.append(size.padded)
                self._state[parameter] = "whole"
