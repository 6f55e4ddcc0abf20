"""The protocols of `largescale evaluate`, by name: each has a file with its settings, and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from largescale.config import EvaluateConfig
from largescale.config.setting import a_name
from largescale.evaluate import knn, linear, spectrum
from largescale.evaluate.feature_set import FeatureSet
from shards.ground.errors import InputError

COMMON = frozenset(item.name for item in fields(EvaluateConfig))
"""Keys under `evaluate` that all protocols have."""


@dataclass(frozen=True)
class Protocol:
    """One entry of `PROTOCOLS`.

    Attributes:
        measure: what the features of training and test images are worth; needs its own `Settings`. What it returns
            has at least the `metric`.
        Settings: the keys under `evaluate` that it has beside those of all.
        chosen_on: on what it chooses settings, if any: never on the test images.
        metric: the value that is quoted, by its name in a result.
        title: of the metric, for people.
        is_share: whether it is one, to be shown in percent.
    """

    measure: Callable[[FeatureSet, FeatureSet, Any], dict[str, Any]]
    Settings: type[EvaluateConfig]
    chosen_on: str
    metric: str = "top1"
    title: str = "top-1"
    is_share: bool = True

    def own_keys(self) -> list[str]:
        """The keys under `evaluate` that it has beside those of all."""
        return [item.name for item in fields(self.Settings) if item.name not in COMMON]


PROTOCOLS = {
    "knn": Protocol(knn.measure, knn.Settings, knn.CHOSEN_ON),
    "linear": Protocol(linear.measure, linear.Settings, linear.CHOSEN_ON),
    "spectrum": Protocol(
        spectrum.measure,
        spectrum.Settings,
        spectrum.CHOSEN_ON,
        metric="effective_rank",
        title="effective rank",
        is_share=False,
    ),
}


def protocol_named(name: str) -> Protocol:
    """An entry of `PROTOCOLS`.

    Raises:
        InputError: there is none of this name.
    """
    if name not in PROTOCOLS:
        raise InputError(f"largescale evaluate {name}: expected {a_name(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def check_settings(name: str, overrides: list[str]) -> None:
    """Refuse settings of other protocols: whoever passes one expects it to change the figure.

    Raises:
        InputError: an override is of another protocol.
    """
    own = protocol_named(name).own_keys()
    for override in overrides:
        key = override.split("=", 1)[0].removeprefix("evaluate.")
        owners = [other for other, protocol in PROTOCOLS.items() if key in protocol.own_keys()]
        if override.startswith("evaluate.") and owners and key not in own:
            ours = ", ".join(f"evaluate.{one}" for one in own) or "none"
            raise InputError(
                f"{override}: used by `largescale evaluate {' and '.join(owners)}` alone; the settings of {name} "
                f"itself are {ours}"
            )
