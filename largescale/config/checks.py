"""What a configuration must fulfil beyond its types: ranges, and keys that must fit each other."""

from __future__ import annotations

import math
from typing import Any

from largescale.config.schema import PRECISIONS, AugmentConfig, Config
from largescale.config.values import corpus_settings, flatten, prototype_counts, require


def validate(config: Config) -> None:
    """Check what types cannot: ranges, and keys that must fit each other.

    Raises:
        InputError: naming the key, what it got and what it expects.
    """
    _reject_non_finite(config)
    require(config.train.precision in PRECISIONS, "train.precision", config.train.precision,
            " or ".join([", ".join(PRECISIONS[:-1]), PRECISIONS[-1]]))
    require(config.model.stem in ("imagenet", "3x3s2", "3x3"), "model.stem", config.model.stem,
            "imagenet, 3x3s2 or 3x3")
    require(config.model.block in ("basic", "bottleneck"), "model.block", config.model.block,
            "basic or bottleneck")
    counts = prototype_counts(config)
    require(len(counts) > 0 and all(type(k) is int and k > 1 for k in counts), "model.prototypes",
            config.model.prototypes, "a number above 1, or a list of them")
    for key in ("train.global_batch", "train.rollback_window", "run.log_every", "data.streams", "data.shuffle_window",
                "data.prefetch", "data.fetches", "data.max_skipped_in_row", "method.sinkhorn_iterations",
                "checkpoint.keep", "model.width", "model.embedding", "evaluate.batch", "evaluate.size",
                "evaluate.resize"):
        require(_get(config, key) >= 1, key, _get(config, key), "at least 1")
    for key in ("method.temperature", "method.epsilon", "optim.lr", "data.store_stall_s", "run.lease_s"):
        require(_get(config, key) > 0, key, _get(config, key), "above 0")
    for key, most in (("run.hang_timeout_s", 1e6), ("run.lease_s", 3600), ("data.store_stall_s", 1e6),
                      ("data.cache_gb", 1e9)):
        # Beyond that, clocks and byte counts overflow.
        require(_get(config, key) <= most, key, _get(config, key), f"at most {most:g}")
    depths = config.model.depths
    require(len(depths) > 0 and min(depths) >= 1, "model.depths", depths, "blocks of each stage, at least 1")
    require(min(config.model.hidden, default=1) >= 1, "model.hidden", config.model.hidden, "widths of at least 1")
    parallel = config.parallel
    require(parallel.strategy == "fsdp" or parallel.replicate == 1, "parallel.replicate", parallel.replicate,
            f"1 with parallel.strategy={parallel.strategy}; only fsdp has copies of a model that is cut")
    require(config.data.workers >= -1, "data.workers", config.data.workers, "0 or more, or -1")
    corpus_settings(config.data)
    for key in ("train.steps", "data.threads", "data.cache_gb", "data.store_patience_s", "data.scaled_decode",
                "data.max_skipped", "data.max_skipped_rate", "checkpoint.every_steps", "checkpoint.keep_every",
                "method.queue", "method.queue_start_step", "method.freeze_prototypes_steps", "optim.warmup_epochs",
                "optim.weight_decay", "run.hang_timeout_s", "run.time_limit_s", "run.stop_before_s",
                "run.owner_wait_s", "train.spike_factor", "train.max_rollbacks"):
        require(_get(config, key) >= 0, key, _get(config, key), "0 or more")
    limit, margin = config.run.time_limit_s, config.run.stop_before_s
    require(limit == 0 or limit > margin, "run.time_limit_s", f"{limit:g}",
            f"more than run.stop_before_s={margin:g}, at which the run saves and stops, or 0 for no limit")
    require(config.train.steps > 0 or config.train.epochs > 0, "train.epochs", config.train.epochs,
            "above 0, or train.steps above 0")
    batch, accumulate = config.train.global_batch, config.train.accumulate
    require(accumulate >= 1 and batch % accumulate == 0, "train.accumulate", accumulate,
            f"a divisor of train.global_batch={batch}")
    require(batch % config.data.streams == 0, "data.streams", config.data.streams,
            f"a divisor of train.global_batch={batch}")
    require(config.method.queue % batch == 0, "method.queue", config.method.queue,
            f"a multiple of train.global_batch={batch}")
    both = sorted(set(config.model.compile_stages) & set(config.model.recompute_stages))
    require(not both, "model.compile_stages", config.model.compile_stages,
            f"none of model.recompute_stages={config.model.recompute_stages}")
    _check_views(config)
    _check_augment(config.data.augment)


def _reject_non_finite(config: Config) -> None:
    """No number may be infinite: where one switches something off, its comment says so, and it is 0."""

    def finite(value: Any) -> bool:
        if isinstance(value, list | dict):
            return all(map(finite, value.values() if isinstance(value, dict) else value))
        return not isinstance(value, float) or math.isfinite(value)

    for key, value in flatten(config).items():
        require(finite(value), key, value, "finite numbers")


def _check_views(config: Config) -> None:
    require(len(config.data.crops) > 0, "data.crops", [], "at least one group")
    require(sum(group.num for group in config.data.crops) > 1, "data.crops", "one view", "at least two views")
    for place, group in enumerate(config.data.crops):
        require(group.num >= 1 and group.size >= 1, f"data.crops[{place}]", f"num={group.num}, size={group.size}",
                 "num and size of at least 1")
        require(len(group.scale) == 2 and 0 < group.scale[0] <= group.scale[1] <= 1,
                 f"data.crops[{place}].scale", group.scale, "[smallest, largest] within (0, 1]")
        require(len(group.ratio) == 2 and 0 < group.ratio[0] <= group.ratio[1],
                 f"data.crops[{place}].ratio", group.ratio, "[smallest, largest], above 0")
    require(len(config.data.mean) == 3, "data.mean", config.data.mean, "three numbers, one a channel")
    require(len(config.data.std) == 3 and min(config.data.std) > 0, "data.std", config.data.std,
            "three numbers above 0, one a channel")


def _check_augment(augment: AugmentConfig) -> None:
    for name in ("flip", "jitter", "grayscale", "blur", "erase"):
        value = getattr(augment, name)
        require(0 <= value <= 1, f"data.augment.{name}", value, "a probability from 0 to 1")
    for name in ("rotate_degrees", "brightness", "contrast", "saturation", "hue", "gamma", "gain", "noise"):
        require(getattr(augment, name) >= 0, f"data.augment.{name}", getattr(augment, name), "0 or more")
    sigma, side = augment.blur_sigma, augment.erase_side
    require(len(sigma) == 2 and 0 < sigma[0] <= sigma[1], "data.augment.blur_sigma", sigma,
            "[smallest, largest], above 0")
    require(len(side) == 2 and 0 <= side[0] <= side[1] <= 1, "data.augment.erase_side", side,
            "[smallest, largest] within [0, 1]")


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
