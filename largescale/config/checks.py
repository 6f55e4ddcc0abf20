"""Checks beyond types: declared ranges, and keys that must fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from functools import reduce
from typing import Any

from largescale.config.data_settings import AugmentConfig, DataConfig
from largescale.config.group_augment import augment_of_group
from largescale.config.schema import Config
from largescale.config.setting import declared
from largescale.config.values import corpus_settings, enumerated, require, with_present_names, written


def validate(config: Config) -> None:
    """Check what types cannot: declared ranges, and keys that must fit each other.

    Raises:
        InputError: naming the key, what it got and what it expects.
    """
    for key, item, value in settings_of(config):
        expected = declared(item).misfit(value)
        require(not expected, key, value, expected)
    _check_groups(config)
    _check_batch(config)
    _check_clipping(config)
    _check_loss_spans(config)
    _check_supports(config)
    _check_frames(config)
    _check_model(config)
    _check_unused(config)
    corpus_settings(config.data)
    config.method.check(config)
    require(
        config.train.steps > 0 or config.train.epochs > 0,
        "train.epochs",
        config.train.epochs,
        "above 0, or train.steps above 0",
    )
    limit, margin = config.run.time_limit_s, config.run.stop_before_s
    require(
        limit == 0 or limit > margin,
        "run.time_limit_s",
        f"{limit:g}",
        f"more than run.stop_before_s={margin:g}, within which it saves and stops, or 0 for no limit",
    )
    require(
        config.evaluate.size <= config.evaluate.resize,
        "evaluate.size",
        config.evaluate.size,
        f"at most evaluate.resize={config.evaluate.resize}, the shorter side it is cut from",
    )


def without_effect(config: Config) -> list[str]:
    """A line for each setting that was changed although nothing in this configuration uses it."""
    return [
        *(
            f"{key}={value} has no effect: it is only used with {used_if}"
            if "=" in used_if
            else f"{key}={value} has no effect without {used_if}"
            for key, item, value in settings_of(config)
            if (used_if := declared(item).used_if) and value != default_of(item) and not holds(config, used_if)
        ),
        *(line for place in range(len(config.data.crops)) for line in _without_effect_in_group(config, place)),
        *_patience_in_vain(config),
    ]


def _patience_in_vain(config: Config) -> Iterator[str]:
    """Waiting for data is no progress, so a run waits no longer than until it counts as hung."""
    patience, hang = config.data.store_patience_s, config.run.hang_timeout_s
    if 0 < hang <= patience != DataConfig().store_patience_s:
        yield (
            f"data.store_patience_s={patience:g} has no effect beyond run.hang_timeout_s={hang:g}, when the run counts "
            f"as hung; raise that too, or set it to 0"
        )


def _without_effect_in_group(config: Config, place: int) -> Iterator[str]:
    """What a crop group changes of its augmentation although these views do not use it."""
    group, augment = f"data.crops[{place}].augment", augment_of_group(config.data, place)
    for name in config.data.crops[place].augment:
        needed = declared(AugmentConfig.__dataclass_fields__[name]).used_if.rpartition(".")[2]
        if needed and not getattr(augment, needed):
            yield f"{group}.{name}={getattr(augment, name)} has no effect without {group}.{needed}"


def settings_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Every setting: its dotted key, its field and its value; those of groups in lists too."""
    for item in fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{key}.")
            continue
        yield key, item, value
        for place, element in enumerate(value if isinstance(value, list) else []):
            if is_dataclass(element):
                yield from settings_of(element, f"{key}[{place}].")


def free_keys(config: Config) -> frozenset[str]:
    """Keys in which the configurations of one run may differ: they do not change what it computes."""
    return frozenset(key for key, item, _ in settings_of(config) if declared(item).free)


def values_saved_before(flat: dict[str, Any], config: Config) -> dict[str, Any]:
    """Values by dotted key that an earlier version saved, by all keys of this one.

    A key that came since has its default, whose effect that version did not have either, or else its `before`.
    """
    absent = {
        key: default_of(item) if declared(item).before is None else declared(item).before
        for key, item, _ in settings_of(config)
    }
    return {**absent, **with_present_names(flat, config)}


def holds(config: Config, condition: str) -> bool:
    """Whether a key is set, or has one of the values that `key=VALUE|VALUE` names; of `data.augment` for any views."""
    key, _, values = condition.partition("=")
    if key.startswith("data.augment."):
        name = key.removeprefix("data.augment.")
        return any(getattr(augment_of_group(config.data, place), name) for place in range(len(config.data.crops)))
    value = value_at(config, key)
    return str(value) in values.split("|") if values else bool(value)


def value_at(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def default_of(item: Field[Any]) -> Any:
    """The default of a field."""
    return item.default_factory() if callable(item.default_factory) else item.default


def _check_groups(config: Config) -> None:
    for place, group in enumerate(config.data.crops):
        for key, item, value in settings_of(augment_of_group(config.data, place), f"data.crops[{place}].augment."):
            expected = declared(item).misfit(value) if item.name in group.augment else ""
            require(not expected, key, value, expected)


def _check_unused(config: Config) -> None:
    for key, item, value in settings_of(config):
        setting, default = declared(item), default_of(item)
        if setting.refused_elsewhere and value != default and not holds(config, setting.used_if):
            choice, owners = setting.used_if.partition("=")[0], enumerated(setting.owners, "or")
            require(
                False, key, value, f"{written(default)} with {choice}={value_at(config, choice)}; only {owners} has it"
            )


def _check_batch(config: Config) -> None:
    batch = config.train.global_batch
    for key, value in (("train.accumulate", config.train.accumulate), ("data.streams", config.data.streams)):
        require(batch % value == 0, key, value, f"a divisor of train.global_batch={batch}")


def _check_clipping(config: Config) -> None:
    require(
        not (config.optim.clip_grad_norm and config.optim.clip_tensor_norm),
        "optim.clip_tensor_norm",
        config.optim.clip_tensor_norm,
        f"0 with optim.clip_grad_norm={config.optim.clip_grad_norm:g}; leave one of them out",
    )


def _check_loss_spans(config: Config) -> None:
    spans, possible = config.train.loss_spans, config.method.loss_spans
    require(
        spans in possible,
        "train.loss_spans",
        spans,
        f"{' or '.join(possible)} with method.name={config.method.name}, whose loss compares no images "
        "beyond a micro-batch: global_batch would cost a forward pass and change nothing",
    )


def _check_supports(config: Config) -> None:
    if (support := config.method.supports()) is None:
        return
    require(
        bool(support.shards) or len(corpus_settings(config.data)) == 1,
        "method.support.shards",
        "''",
        "a folder, since data.shards is a list of several",
    )
    require(
        support.images % config.train.accumulate == 0,
        "method.support.images",
        support.images,
        f"a multiple of train.accumulate={config.train.accumulate}: every micro-batch has images of every class",
    )


def _check_frames(config: Config) -> None:
    if (wanted := config.method.frame_tuples()) is None:
        return
    least, most = wanted.config.least_gap_s, wanted.config.most_gap_s
    require(least <= most, "method.frames.most_gap_s", most, f"at least method.frames.least_gap_s={least:g}")
    numbers = [group.num for group in config.data.crops]
    require(
        numbers == [wanted.shown],
        "data.crops",
        numbers,
        f"one group of {wanted.shown} views, the frames of a sample, such as "
        f"[{{num: {wanted.shown}, size: 112, scale: [0.4, 1.0]}}]",
    )


def _check_model(config: Config) -> None:
    model = config.model
    require(
        not (model.weights and config.init_from),
        "model.weights",
        model.weights,
        f"none with init_from={config.init_from}, which takes the backbone of that run too; leave one of them out",
    )
    both = sorted(set(model.compile_stages) & set(model.recompute_stages))
    require(
        not both,
        "model.compile_stages",
        model.compile_stages,
        f"none of model.recompute_stages={model.recompute_stages}",
    )
