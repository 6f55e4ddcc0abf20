"""The report's part about evaluations: what was measured, on what, and the images that were measured.

Images are looked up through the stamps of the features, never through the run's configuration: what the configuration
names may be other shards than those that were evaluated.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.manifold import TSNE

from largescale.config import Config
from largescale.data.corpora import open_corpus
from largescale.data.reader import ShardReader
from largescale.evaluate import exemplars
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.features import path_of
from largescale.evaluate.made_from import VERSION, shards_stamp
from largescale.evaluate.results import Record, Results, age
from largescale.methods import method_class
from largescale.observe import gallery, plots
from largescale.observe.html_parts import missing, section
from shards.ground.errors import InputError

NAMES = {"pretrained": "pretrained", "untrained": "untrained", "pixels": "raw pixels"}
PROTOCOLS = {"knn": "kNN", "linear": "linear"}
_DO = {"untrained": "the untrained network does", "pixels": "raw pixels do"}
_MAP_POINTS = 2000


def tiles(results: Results) -> str:
    """The newest accuracy of each protocol, with what it was measured on."""
    parts = "".join(_tile(protocol, record) for protocol, record in results.newest.items())
    return f'<div class="tiles">{parts}</div>' if parts else ""


def notes(run_dir: Path, results: Results) -> list[str]:
    """What a reader should know before believing a number."""
    lines = [_refused(results.refused)] if results.refused else []
    for protocol, record in results.newest.items():
        name = PROTOCOLS.get(protocol, protocol)
        accuracies = record["results"]
        better = [other for other in accuracies if accuracies[other]["top1"] > accuracies["pretrained"]["top1"]]
        lines += [f"{name}: {_DO[other]} better than the pretrained network." for other in better]
        lines += [f"{name}: {warning}." for warning in record["warnings"]]
        if old := age(record, run_dir):
            lines.append(f"{name}: {old}.")
    return lines


def _refused(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return (
        f"Not shown: {', '.join(names[:2])}{more}, changed or damaged since, or written by another version that "
        f"did not say what was measured. Run `largescale evaluate` again, or remove them."
    )


def accuracy(run_dir: Path, results: Results) -> str:
    """Bars of the newest results, and a table of all."""
    title = "What it learned"
    if not results.newest:
        return section(title, "", missing("Not measured yet; `largescale evaluate knn RUN` does it."))
    bars = plots.accuracy_bars(
        {
            PROTOCOLS.get(protocol, protocol): {
                NAMES[name]: result["top1"] for name, result in record["results"].items()
            }
            for protocol, record in results.newest.items()
        }
    )
    on = " ".join(
        f"{PROTOCOLS.get(protocol, protocol)}: {_measured_on(record)}." for protocol, record in results.newest.items()
    )
    text = f"Frozen features. {on} The probe's learning rate was chosen without the test images."
    table = "".join(
        _rows(run_dir, record, _settings_that_differ(results.all, record["protocol"])) for record in results.all
    )
    many = "s" * (len(results.all) != 1)
    details = (
        f"<details><summary>All numbers, of {len(results.all)} measurement{many}</summary><table><tr><th>protocol</th>"
        f'<th>features</th><th>test images</th><th>training images</th><th class="number">step</th>'
        f'<th class="number">top-1, %</th></tr>{table}</table></details>'
    )
    return section(title, text, f'<div class="grid"><div>{bars}</div><div>{details}</div></div>')


def images(run_dir: Path, config: Config) -> str:
    """Neighbours, the method's exemplars and map, of the features that are there."""
    shown = method_class(config).exemplars
    parts = (
        ("Nearest neighbours", _neighbours),
        *(((shown.title, _exemplars),) if shown else ()),
        ("Map of the features", _map),
    )
    return "".join(_section_of(title, part, run_dir, config) for title, part in parts)


def _section_of(title: str, part: Callable[[Path, Config], tuple[str, str]], run_dir: Path, config: Config) -> str:
    try:
        return section(title, *part(run_dir, config))
    except InputError as error:
        return section(title, "", missing(str(error)))


def _tile(protocol: str, record: Record) -> str:
    results = record["results"]
    own = results["pretrained"]["top1"]
    versus = "".join(
        f'<div class="versus"><b{"" if own >= other["top1"] else " class=worse"}>'
        f"{100 * (own - other['top1']):+.1f} points</b> against {NAMES[name]} ({100 * other['top1']:.1f} %)</div>"
        for name, other in results.items()
        if name != "pretrained"
    )
    return (
        f'<div class="tile"><div class="what">{html.escape(PROTOCOLS.get(protocol, protocol))} top-1, frozen features'
        f'</div><div class="value">{100 * own:.1f}<small> %</small></div>{versus}'
        f'<div class="on">{html.escape(_measured_on(record))}</div></div>'
    )


def _measured_on(record: Record) -> str:
    train, test = record["made_from"]["train_shards"], record["made_from"]["test_shards"]
    return (
        f"{record['num_test']:,} test images of {test['name']}, {record['num_train']:,} labelled training images "
        f"of {train['name']}, checkpoint of step {record['checkpoint_step']:,}"
    )


def _settings(record: Record) -> dict[str, Any]:
    """What may tell a measurement from another one of the same shards and checkpoint."""
    own = {
        key.removeprefix(f"{record['protocol']}_").replace("_", " "): value
        for key, value in record["settings"].items()
        if key.startswith(f"{record['protocol']}_")
    }
    images = {key: value for key, value in record["made_from"]["images"].items() if key != "precision"}
    # Those of the sweep are rows of their own.
    return {**images, **{key: value for key, value in own.items() if key not in ("neighbours", "rates")}}


def _settings_that_differ(records: list[Record], protocol: str) -> list[str]:
    of_protocol = [_settings(record) for record in records if record["protocol"] == protocol]
    return [key for key, value in of_protocol[0].items() if any(one.get(key) != value for one in of_protocol)]


def _rows(run_dir: Path, record: Record, differing: list[str]) -> str:
    settings = "".join(f", {key} {_settings(record).get(key, '?')}" for key in differing)
    train, test = record["made_from"]["train_shards"], record["made_from"]["test_shards"]
    rows = []
    for name, result in record["results"].items():
        if record["protocol"] == "knn":
            rows += [(f"kNN, k = {k}", name, share) for k, share in result["top1_by_k"].items()]
        else:
            rate = f", learning rate {result['learning_rate']:g}" if "learning_rate" in result else ""
            rows.append((f"{PROTOCOLS.get(record['protocol'], record['protocol'])}{rate}", name, result["top1"]))
    step = f"{record['checkpoint_step']}{' (old)' if age(record, run_dir) else ''}"
    return "".join(
        f"<tr><td>{html.escape(what + settings)}</td><td>{NAMES[name]}</td>"
        f'<td title="{html.escape(test["location"])}">{html.escape(test["name"])}</td>'
        f'<td title="{html.escape(train["location"])}">{html.escape(train["name"])}</td>'
        f'<td class="number">{step}</td><td class="number">{100 * share:.2f}</td></tr>'
        for what, name, share in rows
    )


def _features(run_dir: Path, part: str) -> FeatureSet:
    """The pretrained network's features.

    Raises:
        InputError: none are there, or none that say what they were made from.
    """
    path = path_of(run_dir, "pretrained", part)
    if not path.is_file():
        raise InputError("Needs `largescale evaluate knn RUN`.")
    features = FeatureSet.load(path)
    if features.made_from.get("version") != VERSION:
        raise InputError("The features were written by another version; run `largescale evaluate knn RUN` again.")
    return features


def _reader(stamp: dict[str, Any], config: Config) -> ShardReader:
    """The shards that a stamp names: where they were, or where the configuration now says, if they are the same.

    Raises:
        InputError: they are nowhere.
    """
    known = [stamp["location"], config.data.eval_shards, config.evaluate.train_shards, config.data.shards]
    why = ""
    for location in dict.fromkeys(place for place in known if isinstance(place, str) and place):
        try:
            corpus = open_corpus(location, config.data)
            if shards_stamp(corpus, location)["fingerprint"] == stamp["fingerprint"]:
                corpus.check_files()
                return ShardReader([corpus])
            why = why or "other shards are there now"
        except (InputError, OSError) as error:
            why = why or str(error)
    raise InputError(f"The images that were evaluated cannot be shown: those of {stamp['location']} ({why}).")


def _of(stamp: dict[str, Any]) -> str:
    return f"{stamp['shards']['name']}, network of step {stamp['weights']['step']:,}"


def _neighbours(run_dir: Path, config: Config) -> tuple[str, str]:
    train, test = _features(run_dir, "train"), _features(run_dir, "test")
    if train.made_from["weights"] != test.made_from["weights"] or train.made_from["images"] != test.made_from["images"]:
        raise InputError("Features of training and test images are of different networks; evaluate again.")
    bank, queries = (_reader(part.made_from["shards"], config) for part in (train, test))
    text = (
        f"Random test images of {_of(test.made_from)} (left), and the training images of "
        f"{train.made_from['shards']['name']} whose features are nearest. Green: same class."
    )
    return text, gallery.neighbours(train, test, bank, queries, config.run.seed)


def _exemplars(run_dir: Path, config: Config) -> tuple[str, str]:
    shown = method_class(config).exemplars
    assert shown is not None, "only called where the method has some"
    name = shown.name
    kept = exemplars.load(exemplars.path_of(run_dir, name))
    if kept is None:
        raise InputError("Needs `largescale evaluate knn RUN`.")
    bank = _reader(kept.made_from["shards"], config)
    used = len(torch.unique(kept.scores.argmax(1)))
    text = (
        f"The images of {_of(kept.made_from)} nearest to some {name}s, with their scores. {used} of "
        f"{kept.scores.shape[1]} {name}s are nearest to at least one of {len(kept.ids):,} images."
    )
    return text, gallery.exemplars(kept.scores, kept.ids, bank, config.run.seed)


def _map(run_dir: Path, config: Config) -> tuple[str, str]:
    test = _features(run_dir, "test")
    if len(test) < 50:
        raise InputError("Needs `largescale evaluate knn RUN` with at least 50 test images.")
    chosen = np.sort(np.random.default_rng(config.run.seed).permutation(len(test))[:_MAP_POINTS])
    features = torch.nn.functional.normalize(test.features[chosen], dim=1).numpy()
    points = TSNE(init="pca", random_state=0, perplexity=30, max_iter=500).fit_transform(features)
    picture = plots.feature_map(points, test.labels[chosen].numpy(), test.classes)
    text = (
        f"t-SNE of {len(chosen):,} test images of {_of(test.made_from)}, by cosine; classes were not known in training."
    )
    return text, f'<div class="wide">{picture}</div>'
