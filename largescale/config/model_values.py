"""The architecture that values of a configuration describe, as files of weights carry them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from largescale.config.model_settings import ModelConfig
from largescale.config.setting import declared


def model_of(values: Any) -> ModelConfig | None:
    """The architecture in a configuration's values by key; keys that this version does not know are passed over.

    Returns:
        None for what is not the values of a configuration, or has one that its setting does not allow.
    """
    if not isinstance(values, Mapping) or "model.backbone" not in values:
        return None
    model = ModelConfig()
    for item in fields(ModelConfig):
        value = values.get(f"model.{item.name}", default := getattr(model, item.name))
        alike = type(value) is type(default) and (not isinstance(value, list) or all(type(one) is int for one in value))
        if not alike or declared(item).misfit(value):
            return None
        setattr(model, item.name, value)
    return model
