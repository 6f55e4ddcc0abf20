"""The report's parts with images: neighbours, the method's own gallery, confident mistakes, and the map of features."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from matplotlib.figure import Figure

from largescale.evaluate import corpora_shown, exemplars, task_pictures
from largescale.evaluate.features import path_of
from largescale.methods import method_class
from largescale.report import gallery, plots
from largescale.report.evaluated import Part, Predictions, both_parts, corpora_of, described, predictions, reader_of
from largescale.report.feature_map import CLASS, CLUSTER, CORPUS, FeatureMap, as_html, feature_map
from largescale.report.html_parts import missing, section
from largescale.report.reported_run import ReportedRun
from largescale.report.unmeasured import needed
from shards.ground.errors import InputError

_FEWEST_ON_A_MAP = 50

_made: dict[tuple[object, ...], FeatureMap] = {}
"""The last map, by the files that it is of: it takes seconds, and with --watch the page is written again and again."""


def sections_of(run: ReportedRun) -> str:
    """All parts; one that cannot be shown says why."""
    shown, drawn = method_class(run.config).exemplars, method_class(run.config).pictures
    parts: tuple[tuple[str, Callable[[ReportedRun], tuple[str, str]]], ...] = (
        ("Nearest neighbours", _neighbours),
        *(((shown.title, _exemplars),) if shown else ()),
        *(((drawn.title, _task),) if drawn else ()),
        ("Confident mistakes", _failures),
        ("Map of the features", _map),
    )
    return "".join(_section(title, part, run) for title, part in parts)


def map_figures(run: ReportedRun) -> Iterator[tuple[str, Figure]]:
    """The map by class, and by corpus where there are several, with their names; none where there are no features."""
    try:
        found, _, _ = _map_of(run)
    except InputError:
        return
    for name, by in (("map", CLASS), ("map-by-corpus", CORPUS)):
        if by in found.groups:
            names, groups = found.groups[by]
            yield name, plots.scatter(found.points, groups, names)


def _section(title: str, part: Callable[[ReportedRun], tuple[str, str]], run: ReportedRun) -> str:
    try:
        return section(title, *part(run))
    except InputError as error:
        return section(title, "", missing(str(error)))


def _neighbours(run: ReportedRun) -> tuple[str, str]:
    train, test = both_parts(run.path, run.config, same_classes=False)
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
        raise InputError(needed(run.config))
    bank = reader_of(kept.made_from["shards"], run.config)
    used = len(torch.unique(kept.scores.argmax(1)))
    text = (
        f"The images of {described(kept.made_from)} nearest to some {name}s, with their scores. {used} of "
        f"{kept.scores.shape[1]} {name}s are nearest to at least one of {len(kept.ids):,} images; the share of these "
        f"stands beside each."
    )
    return text, gallery.exemplars(kept.scores, kept.ids, bank, run.config.run.seed)


def _task(run: ReportedRun) -> tuple[str, str]:
    shown = method_class(run.config).pictures
    assert shown is not None, "only called where the method draws"
    drawn = task_pictures.load(task_pictures.path_of(run.path))
    if drawn is None:
        raise InputError(needed(run.config))
    text = f"{shown.about} Random images of {described(drawn.made_from)}."
    return text, gallery.rows_of_pictures(drawn.columns, drawn.made_from["columns"])


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
    found, parts, decided = _map_of(run)
    test, clusters = parts[0], found.groups[CLUSTER][1]

    def told(place: int, part: int, row: int) -> str:
        images = parts[part]
        says = f"{images.name}" if part else ""
        if images.features.labels[row] >= 0:
            says += f"{'; ' * bool(says)}{images.class_of(row)}"
        if not part:
            says += f"; kNN says {test.features.classes[decided.classes[place]]} ({decided.confidence[place]:.0%})"
        return f"{says}; cluster {clusters[place]}; {images.reader.key(int(images.features.ids[row]))}"

    others = sum(len(part.features) for part in parts[1:])
    also = f" and {others:,} images of the {len(parts) - 1} corpora it was trained on," if others else ""
    text = (
        f"{found.method} of {len(found.points) - others:,} test images of {test.what},{also} by cosine; "
        f"classes were not known in training. Point at a dot (or touch it) to see its image. Distances between far "
        f"groups mean little."
    )
    return text, as_html(found, parts, [told(place, *image) for place, image in enumerate(found.images.tolist())])


def _map_of(run: ReportedRun) -> tuple[FeatureMap, list[Part], Predictions]:
    train, test = both_parts(run.path, run.config)
    if len(test.features) < _FEWEST_ON_A_MAP:
        raise InputError(f"Needs `largescale evaluate knn RUN` with at least {_FEWEST_ON_A_MAP} test images.")
    decided = predictions(train.features, test.features, run.config.run.seed)
    corpora = corpora_of(run.path, run.config, test.features)
    files = [path_of(run.path, "pretrained", part) for part in ("train", "test")]
    files += [corpora_shown.path_of(run.path, number) for number in range(len(corpora))]
    key = (run.config.run.seed, *((path, path.stat().st_mtime_ns) for path in files if path.exists()))
    if key not in _made:
        _made.clear()
        _made[key] = feature_map(test, decided, corpora)
    return _made[key], [test, *corpora], decided
