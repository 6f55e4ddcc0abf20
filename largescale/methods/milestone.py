"""What a method starts to do at a certain step, so that a run's length can be checked against it."""

from __future__ import annotations

from dataclasses import dataclass

LATEST = 0.5
"""Fraction of a run by which warm-up should be over and everything in the method active."""


@dataclass(frozen=True)
class Milestone:
    """A change in what a method does.

    Attributes:
        key: the setting that decides when, in steps.
        step: the first step trained in the new way, `delay` steps after the value of `key`.
        what: the new way, as a clause: "prototypes train".
        delay: further steps it takes.
        without: override that disables it, if a run is too short for the delay alone.
    """

    key: str
    step: int
    what: str
    delay: int = 0
    without: str = ""
