"""The report's curves: what every run logs, what its method adds, and whatever else is in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from matplotlib.figure import Figure

from largescale.methods import method_class
from largescale.report import plots
from largescale.report.html_parts import details, missing, section
from largescale.report.reported_run import ReportedRun

_NOT_CURVES = (
    "step",
    "interval_steps",
    "progress",
    "epoch",
    "images_seen",
    "skipped_samples",
    "augment_s",
    "updates_skipped",
    "save_s",
    "online_s",
)


@dataclass(frozen=True)
class Panel:
    """Columns of metrics.jsonl by label, drawn together.

    Attributes:
        name: of the file with `--figures`.
        log: whether it is also worth drawing with logarithmic axes, if any value is above 0.
    """

    name: str
    title: str
    columns: dict[str, str]
    limits: tuple[float, float] | None = None
    references: dict[str, float] = field(default_factory=dict)
    log: bool = False


def section_of(runs: Sequence[ReportedRun], smooth: int | None) -> str:
    """The part of the page with all curves.

    Args:
        runs: one, or several to compare.
        smooth: logged lines that a running average spans; None for a fortieth of them.
    """
    drawn = [run for run in runs if run.metrics]
    if not drawn:
        return section("Training", "", missing("Nothing is logged yet; `largescale pretrain` writes it."))
    panels = list(panels_of(drawn))
    shown = "".join(_figure(panel, drawn, smooth, log=False) for panel in panels)
    logs = "".join(_figure(panel, drawn, smooth, log=True) for panel in panels if panel.log)
    body = f'{plots.legend([(run.label, run.number) for run in runs])}<div class="grid">{shown}</div>'
    body += details("Loss, gradient and rates above 0, on logarithmic axes", f'<div class="grid">{logs}</div>')
    return section("Training", _says(drawn, smooth), body)


def figures(runs: Sequence[ReportedRun], smooth: int | None) -> Iterator[tuple[str, Figure]]:
    """All curves for files, with their names."""
    drawn = [run for run in runs if run.metrics]
    for panel in panels_of(drawn) if drawn else ():
        yield panel.name, draw(panel, drawn, smooth, legend=True)
        if panel.log:
            yield f"{panel.name}-log", draw(panel, drawn, smooth, log=True, legend=True)


def span_of(runs: Sequence[ReportedRun], smooth: int | None) -> int:
    """How many logged lines a running average spans."""
    return max(len(run.metrics) for run in runs) // 40 if smooth is None else smooth


def draw(
    panel: Panel, runs: Sequence[ReportedRun], smooth: int | None, *, log: bool = False, legend: bool = False
) -> Figure:
    """A panel of one run's columns, or of one column of several runs."""
    several = len(runs) > 1
    lines = [
        plots.Line(run.label if several else label, run.steps, _values(run, key), run.number if several else place)
        for run in runs
        for place, (label, key) in enumerate(panel.columns.items())
    ]
    return plots.curves(
        panel.title,
        lines,
        references=panel.references,
        limits=panel.limits,
        smooth=span_of(runs, smooth),
        log=log,
        legend=legend or not several,
    )


def _values(run: ReportedRun, key: str) -> list[float]:
    """A column in the unit of its panel."""
    return [value / 1e9 for value in run.column(key)] if key.endswith("_bytes") else run.column(key)


def panels_of(runs: Sequence[ReportedRun]) -> Iterator[Panel]:
    """The panels that some run has values for; with several runs each column is a panel of its own."""
    taken: set[str] = set()
    for panel in [*_common(runs), *_of_methods(runs), *_online(), *_costs()]:
        columns = {label: key for label, key in panel.columns.items() if _has(runs, key)}
        new = {label: key for label, key in columns.items() if key not in taken}
        taken |= set(columns.values())
        log = panel.log and any(value > 0 for run in runs for key in new.values() for value in run.column(key))
        yield from _apart(replace(panel, log=log), new, several=len(runs) > 1)
    keys = dict.fromkeys(key for run in runs for row in run.metrics for key in row)
    for key in keys:
        if key not in taken and key not in _NOT_CURVES and _has(runs, key):
            title = key.replace("_", " ")
            yield Panel(key, title[:1].upper() + title[1:], {key: key})


def _apart(panel: Panel, columns: dict[str, str], *, several: bool) -> Iterator[Panel]:
    if not columns:
        return
    if not several or len(columns) == 1:
        yield Panel(panel.name, panel.title, columns, panel.limits, panel.references, panel.log)
        return
    for label, key in columns.items():
        yield Panel(key, f"{panel.title}: {label}", {label: key}, panel.limits, panel.references, panel.log)


def _has(runs: Sequence[ReportedRun], key: str) -> bool:
    """Whether a column has anything to show: what is 0 throughout does not happen in these runs."""
    return any(value == value and value != 0 for run in runs for value in run.column(key))


def _common(runs: Sequence[ReportedRun]) -> list[Panel]:
    references = [method_class(run.config).loss_references(run.config) for run in runs]
    same = references[0] if all(one == references[0] for one in references) else {}
    return [
        Panel("loss", "Loss", {"loss": "loss"}, references=same, log=True),
        Panel("learning-rate", "Learning rate", {"learning rate": "lr"}, log=True),
    ]


def _of_methods(runs: Sequence[ReportedRun]) -> list[Panel]:
    found: dict[str, Panel] = {}
    for run in runs:
        for panel in method_class(run.config).panels(run.config):
            name = "-".join(panel.columns.values()).replace("_", "-")
            found.setdefault(panel.title, Panel(name, panel.title, panel.columns, panel.limits))
    return list(found.values())


def _online() -> list[Panel]:
    return [
        Panel("online-knn", "kNN top-1 among training images", {"kNN": "online_knn_top1"}),
        Panel(
            "online-rank",
            "Effective rank",
            {"as it is": "online_effective_rank", "less the mean": "online_effective_rank_centred"},
        ),
        Panel("online-mean-share", "Share of the mean vector", {"share": "online_mean_share"}),
        Panel("online-alpha", "Alpha of the spectrum", {"alpha": "online_alpha"}),
        Panel("online-uniformity", "Uniformity", {"uniformity": "online_uniformity"}),
    ]


def _costs() -> list[Panel]:
    return [
        Panel("gradient-norm", "Gradient norm", {"gradient norm": "grad_norm"}, log=True),
        Panel("images-per-second", "Images per second, all ranks", {"images/s": "images_per_s"}),
        Panel("seconds-per-step", "Seconds per step", {"whole step": "step_s", "waiting for data": "data_wait_s"}),
        Panel(
            "loader",
            "Making an image's views, ms of one loader thread",
            {"read and verify": "read_ms", "decode": "decode_ms", "crop": "crop_ms"},
        ),
        Panel("memory", "Peak memory of rank 0, GB", {"GB": "peak_memory_bytes"}),
        Panel("queue", "Batches ready besides the one taken", {"batches": "queue_depth"}),
        Panel("fetched", "Fetched from a store per interval, GB", {"GB": "fetched_bytes"}),
        Panel("cache", "Share of shards found in the cache", {"share": "cache_hit_rate"}, (0, 1)),
    ]


def _figure(panel: Panel, runs: Sequence[ReportedRun], smooth: int | None, *, log: bool) -> str:
    name = f"{panel.name}{'-log' * log}"
    return f"<div>{plots.in_page(draw(panel, runs, smooth, log=log), name, _alt(panel, runs))}</div>"


def _alt(panel: Panel, runs: Sequence[ReportedRun]) -> str:
    """The last values in words."""
    last = [
        f"{run.label + ' ' if len(runs) > 1 else ''}{label} {values[-1]:.4g} at the end, {values[0]:.4g} at the start"
        for run in runs
        for label, key in panel.columns.items()
        if (values := [value for value in _values(run, key) if value == value])
    ]
    return f"{panel.title} over steps: {'; '.join(last)}"


def _says(runs: Sequence[ReportedRun], smooth: int | None) -> str:
    span = span_of(runs, smooth)
    faint = (
        f" Bold lines are running averages over {span} logged lines, faint ones what was logged." if span > 1 else ""
    )
    at = "; ".join(f"{run.label + ': ' if len(runs) > 1 else ''}step {run.steps[-1] + 1:,}" for run in runs)
    return f"Logged up to {at}.{faint}"
