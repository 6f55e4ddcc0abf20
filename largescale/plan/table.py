"""A plan in words."""

from __future__ import annotations

from typing import Any


def table(found: dict[str, Any]) -> str:
    """A plan as text for people, several lines: sizes, memory per GPU, collectives, time, cost.

    Args:
        found: what `planner.plan` returns.
    """
    memory, seconds = found["memory_gb"], found["seconds"]
    trained = f" ({found['trained'] / 1e6:,.1f} M take a gradient)" if found["trained"] < found["parameters"] else ""
    lines = [
        f"{found['recipe']}: {found['parameters'] / 1e6:,.1f} M parameters{trained}, {found['strategy']}, "
        f"{found['precision']}, "
        f"{found['gpus']} x {found['gpu']}, batch {found['global_batch']:,} ({found['batch_per_gpu']} per GPU"
        + (f" in {found['accumulate']} micro-batches)" if found["accumulate"] > 1 else ")"),
        "",
        "memory per GPU, GB",
        *(f"  {name:<28}{size:>10.3f}" for name, size in memory.items()),
        f"  {'fits' if found['fits'] else 'DOES NOT FIT'}",
        *([f"  {found['advice']}"] if "advice" in found else []),
        "",
        "collectives per step                     ranks   count         MB",
        *(
            f"  {row['kind']:<15}{row['of']:<23}{row['ranks']:>6}{row['count']:>8}{row['bytes'] / 1e6:>11,.1f}"
            for row in found["collectives"]
        ),
        "",
        "one step on one GPU",
        f"  {found['flops'] / 1e12:.2f} TFLOP, {found['bytes_moved'] / 1e9:,.0f} GB moved by {found['gpu']}'s kernels",
        *(f"  {name:<34}{1e3 * value:>9.1f} ms" for name, value in seconds.items()),
        f"  {'model FLOPs utilisation':<34}{found['utilisation']:>9.1%}",
        "",
        f"{found['images_per_s']:,.0f} images/s; the loaders of each node have to deliver "
        f"{found['images_per_s_per_node']:,.0f}",
        f"{found['images']:,} images: {found['epochs_per_day']:,.2f} epochs per day; the recipe's {found['steps']:,} "
        f"steps take {found['hours']:,.1f} hours, {found['gpu_hours']:,.0f} GPU-hours"
        + (f", cost {found['cost']:,.0f}" if found["cost"] else ""),
        *_phases(found["offline_phases"]),
        "",
        "assumed: " + ", ".join(f"{name} {value}" for name, value in found["assumptions"].items()),
        "Bytes and collectives are those of a real step; seconds are an estimate.",
    ]
    return "\n".join(lines)


def _phases(found: dict[str, float]) -> list[str]:
    if not found:
        return []
    hours = found["count"] * found["seconds"] / 3600
    return [
        f"of these {hours:,.1f} hours for {found['count']:,} offline phases, {found['seconds']:,.1f} s each to embed "
        "all images; what is made of them, such as clusters, is not counted"
    ]


def side_by_side(plans: list[dict[str, Any]]) -> str:
    """Several plans, one row each."""
    lines = [
        f"{'strategy':<18}{'GB needed':>10}{'fits':>6}{'step, ms':>10}{'images/s':>10}{'MB sent':>10}{'GPU-hours':>11}"
    ]
    lines += [
        f"{found['strategy']:<18}{found['left_out']}"
        if "left_out" in found
        else f"{found['strategy']:<18}{found['memory_gb']['needed']:>10.1f}{'yes' if found['fits'] else 'no':>6}"
        f"{1e3 * found['seconds']['step']:>10.1f}{found['images_per_s']:>10,.0f}"
        f"{sum(row['bytes'] for row in found['collectives']) / 1e6:>10,.0f}{found['gpu_hours']:>11,.0f}"
        for found in plans
    ]
    return "\n".join(lines)
