"""The stages of a run, in which a step has other objectives than before."""

from __future__ import annotations

from largescale.methods.method import Method

_LOOKS = 1000


def steps_of_stages(method: Method) -> list[int]:
    """A step of each stage, in their order; the last one is the run's. A stage of less than a thousandth of the run
    may be passed over.
    """
    last = method.length.num_steps - 1
    found = {method.objectives_of(step): step for step in (last * look // _LOOKS for look in range(_LOOKS + 1))}
    return sorted(found.values())
