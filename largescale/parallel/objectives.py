"""A step's objectives as one: what is logged of a step that has several. And the steps at which they change."""

from __future__ import annotations

from dataclasses import replace

from largescale.methods.method import Method, Output
from largescale.parallel.engine import StepCheck


def as_one(results: dict[str, tuple[Output, StepCheck]]) -> tuple[Output, StepCheck]:
    """Output and check of a step: those of its last objective, with the signs of all.

    Args:
        results: of all objectives by name, in the order in which they were taken.

    Returns:
        The loss, the evidence and the norm of the last one; `StepCheck.norms` has the norms of those before it. The
        step counts as overflowed if any of them was.
    """
    *before, (output, check) = results.values()
    if not before:
        return output, check
    signs = {name: value for earlier, _ in results.values() for name, value in earlier.signs.items()}
    norms = {name: earlier.grad_norm for name, (_, earlier) in list(results.items())[:-1]}
    overflow = any(earlier.overflow for _, earlier in results.values())
    return output._replace(signs=signs), replace(check, norms=norms, overflow=overflow)


def stage_begins(method: Method, step: int) -> bool:
    """Whether a step has other objectives than the one before it."""
    return step > 0 and method.objectives_of(step) != method.objectives_of(step - 1)
