"""Nothing outside of `largescale/methods/` knows a method, and the guide's example is one.

Covers: largescale/methods/method.py, largescale/methods/table.py
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from largescale.config.recipes import packaged
from largescale.methods import METHODS, build_method, table
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks
from tests.methods.harness import LENGTH, STEPS, mini, train

PACKAGE = ROOT / "largescale"
WORDS = re.compile(r"swav|prototype|sinkhorn|simclr", re.IGNORECASE)
NAMES = re.compile(rf"{WORDS.pattern}|\b({'|'.join(METHODS)})\b", re.IGNORECASE)
PROVENANCE = {
    "config/model_settings.py": "resnet50w2, w4, w5 (SwAV's)",  # whose networks these are
    "config/schema.py": 'name: str = setting("swav"',  # the default of the slot
    "checkpoint/foreign_layouts.py": "",  # all of it is about files of others, their names and those of their tensors
}
"""Lines of code, docstrings and comments aside, that may say where something comes from."""


def without_recipes(text: str) -> str:
    """A text without the names of recipes: examples of commands and of Python begin with one."""
    for name in packaged():
        text = text.replace(name, "")
    return text


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "methods"]


def docstrings(tree: ast.Module) -> list[ast.Expr]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def code_with_a_method_in_it(path: Path) -> list[str]:
    text = without_recipes(path.read_text())
    prose = {line for node in docstrings(ast.parse(text)) for line in range(node.lineno, node.end_lineno + 1)}
    allowed = [what for name, what in PROVENANCE.items() if name.strip() == str(path.relative_to(PACKAGE))]
    return [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if number not in prose and NAMES.search(line.partition("#")[0]) and not any(what in line for what in allowed)
    ]


def test_nothing_outside_of_methods_knows_a_method():
    assert [line for path in modules() for line in code_with_a_method_in_it(path)] == []


def test_docstrings_outside_of_methods_name_one_as_a_source_alone():
    """Where somebody is named there, a paper or published code is what the sentence is about."""
    for path in modules():
        for node in docstrings(ast.parse(path.read_text())):
            text = without_recipes(node.value.value)
            assert not WORDS.search(text) or re.search(r"arXiv|published|SwAV's", text), f"{path.name}:{node.lineno}"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The method that docs/extending.md shows, as a module."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)
    path = tmp_path_factory.mktemp("example") / "example_method.py"
    path.write_text(code)
    return path


def train_example(path: Path, strategies: list[tuple[str, str]]) -> list[list[float]]:
    """Losses of the example under some strategies and precisions."""
    from largescale.config import load_config

    specification = importlib.util.spec_from_file_location("example_method", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["example_method"] = module
    specification.loader.exec_module(module)
    table.METHODS["example"] = module.Example
    losses = []
    for strategy, precision in strategies:
        config = load_config(
            ROOT / "tests" / "mini.yaml",
            ["method.name=example", f"parallel.strategy={strategy}", f"train.precision={precision}"],
        )
        losses.append(train(config)["losses"])
    return losses


@pytest.mark.distributed
def test_the_guides_method_trains_under_every_strategy(example):
    code = [line for line in example.read_text().splitlines() if line.strip()]
    assert len(code) <= 40, "the guide promises a method of a page"
    double = [(strategy, "fp64") for strategy in ("ddp", "fsdp", "fairscale")]
    single = [(strategy, "fp32") for strategy in ("ddp", "zero1", "zero2", "zero3")]
    [alone] = run_ranks(train_example, 1, example, [("ddp", "fp64")], timeout_s=300)
    together = run_ranks(train_example, 2, example, [*double, *single], timeout_s=300)[0]
    assert len(set(alone[0])) == STEPS  # images differ from step to step, and so do weights
    for losses in together[:3]:
        assert losses == pytest.approx(alone[0], rel=1e-9)
    for losses in together[3:]:
        assert losses == pytest.approx(alone[0], rel=1e-3)


def test_every_method_says_whether_phases_come_after_the_first_step(one_process):
    length = replace(LENGTH, num_steps=100)
    for name in METHODS:
        method = build_method(mini(name), length, on_meta=True)
        assert method.later_phases == any(map(method.phase_due, range(1, length.num_steps))), name


def test_every_method_says_what_it_is():
    for name, method in METHODS.items():
        assert method.title and method.Settings.__doc__ and method.__doc__, name
        assert issubclass(method.Settings, torch.nn.Module) is False


def test_the_page_of_methods_has_a_row_to_choose_each_by():
    page = (ROOT / "docs" / "methods.md").read_text()
    rows = [line for line in page.partition("\n## ")[0].splitlines() if line.startswith("| [`")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row.split("]")[0])) == sorted(METHODS)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)", page, re.M)}
    assert {re.search(r"\(#([\w-]+)\)", row).group(1) for row in rows} <= anchors
