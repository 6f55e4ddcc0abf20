"""The report, as a real browser renders it.

Covers: largescale/evaluate/corpora_shown.py, largescale/evaluate/exemplars.py, largescale/report/evaluated.py,
largescale/report/gallery.py, largescale/report/html_parts.py, largescale/report/images.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import shards
from largescale.cli import main
from largescale.config import load_config
from largescale.methods import METHODS
from largescale.report.page import _header
from tests.helpers.browser import SCREENS, check_structure, on_screens
from tests.helpers.commands import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shard_folder, held_out_shards, sample_images) -> Path:
    """On two corpora, one of them without labels."""
    folder = tmp_path_factory.mktemp("reported") / "<run> & more"
    bags = folder.with_name("<b>ags")
    shards.convert(sample_images / "train" / "bag", bags, workers=1)
    overrides = [
        f"data.shards=[{{path: {shard_folder}}},{{path: '{bags}'}}]",
        f"evaluate.train_shards={shard_folder}",
        f"data.eval_shards={held_out_shards}",
        f"run.dir={folder}",
        "train.precision=fp32",
        "name=a <b>bold</b> name",
    ]
    assert main(["pretrain", str(ROOT / "tests/tiny.yaml"), *overrides]) == 0
    return folder


@pytest.mark.parametrize("method, labels", [("swav", "without"), ("paws", "with")])
def test_the_header_says_whether_labels_were_used(method, labels):
    config = load_config(ROOT / "tests/tiny.yaml", ["data.shards=unused"])
    config = replace(config, method=METHODS[method].Settings(name=method))
    assert f", {labels} labels. Made " in _header([SimpleNamespace(config=config)])


def test_a_run_that_was_not_evaluated_says_so(run):
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Not measured yet" in page and "largescale evaluate knn" in page
    assert "a &lt;b&gt;bold&lt;/b&gt; name" in page and "<b>bold" not in page  # names are text, not markup
    check_structure(page)


def test_the_whole_report_stands_alone_and_nothing_in_it_is_broken(run, tmp_path, capsys):
    assert main(["evaluate", "knn", str(run)]) == 0
    assert main(["evaluate", "linear", str(run)]) == 0
    capsys.readouterr()
    assert main(["report", str(run), "--figures", str(tmp_path / "figures")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert written[0] == run / "report.html" and {path.suffix for path in written[1:]} == {".svg", ".png"}
    assert {"loss", "loss-log", "accuracy-knn", "map", "map-by-corpus"} <= {path.stem for path in written[1:]}
    assert all(path.stat().st_size > 1000 for path in written)
    page = written[0].read_text()
    check_structure(page)
    assert len(page) < 10_000_000
    screens = on_screens(written[0], tmp_path)
    assert len(screens) == len(SCREENS)
    for screen in screens:
        assert screen["errors"] == screen["broken"] == screen["unnamed"] == 0 and screen["overflow"] <= 0, screen
        assert screen["images"] >= 10 and screen["plots"] >= 10 and "kNN says" in screen["tip"], screen
    light, dark, *_ = (screen["ink"] for screen in screens)
    assert light != dark
    for heading in ("Verdict", "Training", "What it learned", "Where time went", "Nearest neighbours", "Prototypes"):
        assert heading.lower() in page.lower(), heading
    assert "by cosine" in page and "images of the 2 corpora it was trained on" in page
    assert page.count("</i>&lt;b&gt;ags</li>") == page.count("</i>test (test)</li>") == 1  # colours of corpora
    for heading in ("Confident mistakes", "Map", "To repeat it"):
        assert heading.lower() in page.lower(), heading
    numbers = json.loads(page.split('id="numbers">')[1].split("</script>")[0])
    assert len(numbers[0]["metrics"]) == 14 and len(numbers[0]["results"]) == 2
