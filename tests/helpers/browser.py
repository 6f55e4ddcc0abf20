"""Pages as a real browser renders them, and as a reader's software finds their parts."""

from __future__ import annotations

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

SCREENS = [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")]


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
