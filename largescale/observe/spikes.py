"""Gradient norms out of proportion: a spike often comes some steps before a loss that is not finite."""

from __future__ import annotations

from largescale.optim.roles import MAIN

_MEMORY = 0.99
FIRST_STEPS = 100
"""Steps that go into the average before anything is compared with it."""

SpikeState = dict[str, list[float]]
"""Average and number of steps, by the name of the objective."""


class SpikeWatch:
    """Compares each gradient norm with the running average of those before it, each objective by itself.

    Args:
        factor: a norm above factor x average is a spike; 0 never finds one.
        state: `state` of an earlier watch to continue from.
    """

    def __init__(self, factor: float, state: SpikeState | None = None) -> None:
        self.factor = factor
        self._state: SpikeState = {} if state is None else {name: list(of) for name, of in state.items()}

    @property
    def state(self) -> SpikeState:
        """Of now: a checkpoint is written while further steps are looked at."""
        return {name: list(of) for name, of in self._state.items()}

    def look(self, norm: float, objective: str = MAIN) -> str:
        """What is wrong with the norm of an objective's gradient; empty if nothing is, and then it joins the average.

        A norm of 0, that of an overflowed fp16 gradient, is skipped.
        """
        if norm == 0:
            return ""
        whose = "" if objective == MAIN else f"{objective}: "
        average, num_steps = self._state.get(objective, [0.0, 0.0])
        if self.factor > 0 and num_steps >= FIRST_STEPS and norm > self.factor * average:
            return f"{whose}gradient norm {norm:.3g} is {norm / average:.1f} times the running average"
        memory = min(_MEMORY, num_steps / (num_steps + 1))
        self._state[objective] = [memory * average + (1 - memory) * norm, num_steps + 1]
        return ""


def spike_state(saved: SpikeState | list[float]) -> SpikeState:
    """`SpikeWatch.state` of what a checkpoint has; older ones have the last objective's alone."""
    return {MAIN: saved} if isinstance(saved, list) else saved
