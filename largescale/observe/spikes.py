"""Gradient norms out of proportion: a spike often comes some steps before a loss that is not finite."""

from __future__ import annotations

_MEMORY = 0.99
FIRST_STEPS = 100
"""Steps that go into the average before anything is compared with it."""


class SpikeWatch:
    """Compares each gradient norm with the running average of those before it.

    Args:
        factor: a norm above factor x average is a spike; 0 never finds one.
        state: `state` of an earlier watch to continue from.
    """

    def __init__(self, factor: float, state: list[float] | None = None) -> None:
        self.factor = factor
        self.average, self.num_steps = state or [0.0, 0.0]

    @property
    def state(self) -> list[float]:
        """Average and number of steps, for a checkpoint."""
        return [self.average, self.num_steps]

    def look(self, norm: float) -> str:
        """What is wrong with a step's gradient norm; empty if nothing is, and then it joins the average.

        A norm of 0, that of an overflowed fp16 gradient, is skipped.
        """
        if norm == 0:
            return ""
        if self.factor > 0 and self.num_steps >= FIRST_STEPS and norm > self.factor * self.average:
            return f"gradient norm {norm:.3g} is {norm / self.average:.1f} times the running average"
        memory = min(_MEMORY, self.num_steps / (self.num_steps + 1))
        self.average = memory * self.average + (1 - memory) * norm
        self.num_steps += 1
        return ""
