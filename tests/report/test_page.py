"""The report, as a real browser renders it.

Covers: largescale/evaluate/corpora_shown.py, largescale/evaluate/exemplars.py, largescale/report/evaluated.py,
largescale/report/gallery.py, largescale/report/html_parts.py, largescale/report/images.py,
largescale/run/environment.py
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import shards
from largescale.cli import main
from tests.helpers.commands import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")]

SCREENS = [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")]


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


def on_screens(page: Path, tmp_path: Path) -> list[dict]:
    """What a script measured in the page on each of SCREENS; nothing may appear on the console.

    Each screen is a frame of its own in one page: a browser's window cannot be as narrow as a phone.
    """
    measure = """<script>
      let errors = 0;
      addEventListener("error", () => { errors += 1; }, true);
      addEventListener("load", () => {
        const color = (element) => getComputedStyle(element).color, wide = document.documentElement.scrollWidth;
        const circle = document.querySelector(".map circle"), tip = document.querySelector(".tip");
        if (circle) circle.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
        parent.postMessage({ name: self.name, errors, overflow: wide - innerWidth, ink: color(document.body),
          broken: [...document.images].filter((i) => i.complete && !i.naturalWidth).length,
          images: document.images.length, plots: document.querySelectorAll("svg[role=img]").length,
          unnamed: [...document.images].filter((i) => !i.alt).length,
          tip: tip ? !tip.hidden && tip.querySelector("span").textContent : "" }, "*");
      });</script>"""
    inner, outer = tmp_path / "inner.html", tmp_path / "outer.html"
    inner.write_text(page.read_text().replace("<head>", "<head>" + measure).replace(' loading="lazy"', ""))
    frames = "".join(
        f'<iframe name="{number}" src="{inner.as_uri()}" '
        f'style="width:{width}px;height:900px;color-scheme:{scheme}"></iframe>'
        for number, (width, scheme) in enumerate(SCREENS)
    )
    collect = (
        "<script>const found = []; addEventListener('message', (event) => { found.push(event.data);"
        "document.title = JSON.stringify(found); });</script>"
    )
    outer.write_text(f"<!doctype html><title>none</title>{collect}{frames}")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        outer.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "CONSOLE" not in result.stderr, result.stderr
    title = re.search(r"<title>(.*)</title>", result.stdout)
    assert title is not None, result.stdout[:500]
    return sorted(json.loads(title.group(1)), key=lambda one: one["name"])


class Outline(HTMLParser):
    """Headings, ids and texts of a page, as a reader's software finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if re.fullmatch(r"h\d", tag):
            self.levels.append(int(tag[1]))
        self.ids += [value for name, value in attrs if name == "id" and value]


def check_structure(page: str) -> None:
    outline = Outline(page)
    assert outline.levels[0] == 1 and outline.levels.count(1) == 1
    assert all(later <= before + 1 for before, later in zip(outline.levels, outline.levels[1:], strict=False))
    assert len(set(outline.ids)) == len(outline.ids)
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\((?!data:|#|\$)|@import', page)


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
