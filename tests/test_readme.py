"""What the README and the guides tell a reader to type or open exists."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import largescale.cli
import shards.cli
from largescale.config import load_config
from largescale.methods import METHODS
from tests.helpers.commands import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"largescale": largescale.cli._parser, "shards": shards.cli._parser}


def commands(page: Path) -> list[str]:
    """The lines of the page's code blocks, continued lines joined, comments dropped."""
    text = page.read_text().replace("\\\n", " ")
    return [line.split(" # ")[0].strip() for line in text.splitlines() if line.startswith("    ") and line.strip()]


def arguments_of(command: str) -> tuple[str, list[str]] | None:
    words = shlex.split(command.partition(" > ")[0])
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] == "launch/local.sh":
        words = ["largescale", "pretrain", *words[1:]]
    return (words[0], words[1:]) if words[0] in PARSERS else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse_and_their_recipes_exist(page):
    made = {command.partition(" > ")[2] for command in commands(page)} - {""}
    for program, arguments in filter(None, map(arguments_of, commands(page))):
        parsed = PARSERS[program]().parse_args(arguments)
        if getattr(parsed, "config", None) and parsed.config not in made:
            assert (ROOT / parsed.config).is_file(), parsed.config


def test_the_readme_has_commands_to_check():
    found = [arguments_of(command) for command in commands(ROOT / "README.md")]
    assert len([one for one in found if one]) >= 3


def test_the_readmes_recipe_for_own_images_can_be_used_as_it_is():
    [(_, arguments)] = [
        one for command in commands(ROOT / "README.md") if (one := arguments_of(command)) and one[1][0] == "pretrain"
    ]
    config = load_config(ROOT / arguments[1], arguments[2:])
    assert config.data.shards == "data/photos" and config.method.queue == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_exist(page):
    text = page.read_text()
    quoted = re.findall(r"`((?:largescale|shards|tests|configs|docs|benchmarks|launch)/[\w./-]*)`", text)
    linked = [str((page.parent / link).relative_to(ROOT)) for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    missing = [path for path in quoted + linked if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


def test_what_spans_micro_batches_is_told_of_every_method_that_offers_it():
    section = (ROOT / "docs/scaling-out.md").read_text().partition("## Micro-batches")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`\w.*) \| .* \| (.*) \|$", section, re.MULTILINE)
    told = {name for names, spans in rows if not spans.startswith("refused") for name in re.findall(r"`(\w+)`", names)}
    assert told == {name for name, method in METHODS.items() if "global_batch" in method.Settings.loss_spans}


def test_methods_that_no_gpu_has_run_are_named():
    pages = (ROOT / "benchmarks/results").glob("gpu_check_nvidia-*.json")
    run = {row["what"] for page in pages for row in json.loads(page.read_text())["rows"]}
    told = (ROOT / "docs/gpu-check.md").read_text().rpartition("Not run on a GPU yet:")[2]
    assert set(re.findall(r"`(\w+)`", told)) == set(METHODS) - run


def test_make_targets_exist():
    helped = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"make ([a-z-]+)", helped))
    told = {target for page in PAGES for target in re.findall(r"make ([a-z-]+)", " ".join(commands(page)))}
    assert {"pretrain", "test", "bench", "lint"} <= targets
    assert told <= targets
