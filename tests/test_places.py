"""Tests and what they share are where one looks for them.

A module's tests are in the file at the mirrored path: largescale/run/lease.py in tests/run/test_lease.py,
shards/format/writer.py in tests/shards/format/test_writer.py. Where those of another file exercise it, the docstring of
that file ends with a paragraph `Covers: PATH, PATH`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.helpers.commands import ROOT

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
MODULES = [
    path.relative_to(ROOT)
    for package in ("largescale", "shards")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
]
USED_ONCE = {Path("shards/sample/make_sample.py")}
"""What made the files that are in this repository, from others that are not."""


def imported(path: Path) -> set[str]:
    """Modules that a file imports, or takes names of, that may be modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def covered(path: Path) -> list[Path]:
    """What a test file says that it covers besides the module at its own place."""
    said = re.search(r"^Covers: ([^:]+)\Z", ast.get_docstring(ast.parse(path.read_text())) or "", re.MULTILINE)
    return [Path(name) for name in re.split(r",\s+", said.group(1))] if said else []


def own_test(module: Path) -> Path:
    below = module.relative_to("largescale") if module.parts[0] == "largescale" else module
    return ROOT / "tests" / below.parent / f"test_{below.name}"


def test_nothing_is_taken_from_a_test_module():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in TESTS}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        taken = imported(path) & modules
        assert not taken, f"{path.relative_to(ROOT)} imports {', '.join(taken)}: what tests share is in tests/helpers"


def test_every_module_has_its_tests_or_a_line_that_says_where():
    elsewhere = {module for path in TESTS for module in covered(path)} | USED_ONCE
    missing = [module for module in MODULES if not own_test(module).exists() and module not in elsewhere]
    assert not missing, (
        f"write {own_test(missing[0]).relative_to(ROOT)}, or name {missing[0]} in the paragraph `Covers:` of the file "
        f"whose tests cover it; the same for {missing[1:]}"
    )


def test_what_is_said_to_be_covered_is_there_and_has_no_file_of_its_own():
    for path in TESTS:
        for module in covered(path):
            assert module in MODULES, f"{path.relative_to(ROOT)} covers {module}, which is not there"
            assert not own_test(module).exists(), f"{module} has {own_test(module).relative_to(ROOT)}"
