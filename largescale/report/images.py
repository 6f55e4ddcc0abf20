"""The report's parts with images: neighbours, the method's own gallery, confident mistakes, and the map of features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from largescale.evaluate import exemplars
from largescale.evaluate.features import path_of
from largescale.methods import method_class
from largescale.report import gallery, plots
from largescale.report.evaluated import Part, Predictions, both_parts, described, predictions, reader_of
from largescale.report.feature_map import FeatureMap, as_html, feature_map
from largescale.report.html_parts import missing, section
from largescale.report.reported_run import ReportedRun
from shards.ground.errors import InputError

_FEWEST_ON_A_MAP = 50

_made: dict[tuple[object, ...], FeatureMap] = {}
"""The last map, by the files that it is of: it takes seconds, and with --watch the page is written again and again."""


def sections_of(run: ReportedRun) -> str:
    """All parts; one that cannot be shown says why."""
    shown = method_class(run.config).exemplars
    parts: tuple[tuple[str, Callable[[ReportedRun], tuple[str, str]]], ...] = (
        ("Nearest neighbours", _neighbours),
        *(((shown.title, _exemplars),) if shown else ()),
        ("Confident mistakes", _failures),
        ("Map of the features", _map),
    )
    return "".join(_section(title, part, run) for title, part in parts)


def map_figure(run: ReportedRun) -> Figure | None:
    """The map by class, for a file; None where there are no features."""
    try:
        found, test, _ = _map_of(run)
    except InputError:
        return None
    return plots.scatter(found.points, found.groups["class"][1], test.features.classes)


def _section(title: str, part: Callable[[ReportedRun], tuple[str, str]], run: ReportedRun) -> str:
    try:
        return section(title, *part(run))
    except InputError as error:
        return section(title, "", missing(str(error)))


def _neighbours(run: ReportedRun) -> tuple[str, str]:
    train, test = both_parts(run.path, run.config)
    text = (
        f"Random test images of {test.what} (left), and the training images of "
        f"{train.features.made_from['shards']['name']} whose features are nearest. Solid green frame: same class; "
        f"dashed red frame: another."
    )
    return text, gallery.neighbours(train, test, run.config.run.seed)


def _exemplars(run: ReportedRun) -> tuple[str, str]:
    shown = method_class(run.config).exemplars
    assert shown is not None, "only called where the method has some"
    name = shown.name
    kept = exemplars.load(exemplars.path_of(run.path, name))
    if kept is None:
        raise InputError("Needs `largescale evaluate knn RUN`.")
    bank = reader_of(kept.made_from["shards"], run.config)
    used = len(torch.unique(kept.scores.argmax(1)))
    text = (
        f"The images of {described(kept.made_from)} nearest to some {name}s, with their scores. {used} of "
        f"{kept.scores.shape[1]} {name}s are nearest to at least one of {len(kept.ids):,} images; the share of these "
        f"stands beside each."
    )
    return text, gallery.exemplars(kept.scores, kept.ids, bank, run.config.run.seed)


def _failures(run: ReportedRun) -> tuple[str, str]:
    train, test = both_parts(run.path, run.config)
    found = predictions(train.features, test.features, run.config.run.seed)
    num_wrong, body = gallery.failures(test, found)
    text = (
        f"kNN (k = 20, T = 0.07) is wrong about {num_wrong:,} of {len(found.rows):,} test images of {test.what}. "
        f"{'Those' if num_wrong else 'None'} that it is surest of, with its share of the votes:"
    )
    return text if num_wrong else text.split(". ")[0] + ".", body if num_wrong else ""


def _map(run: ReportedRun) -> tuple[str, str]:
    found, test, decided = _map_of(run)
    names = test.features.classes
    classes, clusters = found.groups["class"][1], found.groups["k-means cluster"][1]
    told = [
        f"{names[classes[place]]}; kNN says {names[decided.classes[place]]} ({decided.confidence[place]:.0%}); "
        f"cluster {clusters[place]}; {test.reader.key(int(test.features.ids[row]))}"
        for place, row in enumerate(found.rows.tolist())
    ]
    text = (
        f"{found.method} of {len(found.rows):,} test images of {test.what}, by cosine; classes were not known in "
        f"training. Point at a dot (or touch it) to see its image. Distances between far groups mean little."
    )
    return text, as_html(found, test, told)


def _map_of(run: ReportedRun) -> tuple[FeatureMap, Part, Predictions]:
    train, test = both_parts(run.path, run.config)
    if len(test.features) < _FEWEST_ON_A_MAP:
        raise InputError(f"Needs `largescale evaluate knn RUN` with at least {_FEWEST_ON_A_MAP} test images.")
    decided = predictions(train.features, test.features, run.config.run.seed)
    files = [path_of(run.path, "pretrained", part) for part in ("train", "test")]
    key = (run.config.run.seed, *((path, path.stat().st_mtime_ns) for path in files))
    if key not in _made:
        _made.clear()
        _made[key] = feature_map(test, decided)
    return _made[key], test, decided
