"""The report, as a real browser renders it.

Covers: largescale/evaluate/exemplars.py, largescale/observe/gallery.py, largescale/observe/html_parts.py,
largescale/observe/plots.py, largescale/run/environment.py
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from largescale.cli import main
from tests.helpers.commands import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shard_folder, test_shard_folder) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "<run> & more"
    overrides = [
        f"data.shards={shard_folder}",
        f"data.eval_shards={test_shard_folder}",
        f"run.dir={folder}",
        "train.precision=fp32",
        "name=a <b>bold</b> name",
    ]
    assert main(["pretrain", str(ROOT / "tests/tiny.yaml"), *overrides]) == 0
    return folder


def in_browser(page: Path, tmp_path: Path, width: int = 1200) -> str:
    """The page's text and structure after the browser has loaded it, with what a script measured in its title."""
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load', () => { const broken = [...document.images].filter(i => !i.naturalWidth);"
        "const wide = document.documentElement.scrollWidth > innerWidth;"
        "document.title = `images ${document.images.length} broken ${broken.length} svg "
        "${document.querySelectorAll('svg').length} too wide ${wide}`; })</script>"
    )
    probe.write_text(page.read_text().replace("</body>", script + "</body>"))
    result = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},2000",
            "--virtual-time-budget=5000",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return result.stdout


def test_a_run_that_was_not_evaluated_says_so(run, tmp_path):
    assert main(["report", str(run)]) == 0
    dom = in_browser(run / "report.html", tmp_path)
    assert "Not measured yet" in dom and "largescale evaluate knn" in dom
    assert "a &lt;b&gt;bold&lt;/b&gt; name" in dom  # names are text, not markup


@pytest.mark.parametrize("width", [1200, 500])
def test_the_whole_report_stands_alone_and_nothing_in_it_is_broken(run, tmp_path, width, capsys):
    assert main(["evaluate", "knn", str(run)]) == 0
    assert main(["evaluate", "linear", str(run)]) == 0
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\((?!data:|#)|@import', page)
    dom = in_browser(run / "report.html", tmp_path, width)
    title = re.search(r"<title>images (\d+) broken (\d+) svg (\d+) too wide (\w+)</title>", dom)
    assert title is not None, dom[:500]
    images, broken, _, too_wide = title.groups()
    assert int(images) >= 10 and broken == "0" and too_wide == "false"
    for heading in ("Training", "What it learned", "Nearest neighbours", "Prototypes", "Map", "Settings"):
        assert heading.lower() in dom.lower(), heading
