"""Tests and what they share are where one looks for them."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers.commands import ROOT

TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))


def imported(path: Path) -> set[str]:
    """Modules that a file imports, or takes names of, that may be modules."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_nothing_is_taken_from_a_test_module():
    modules = {str(path.with_suffix("")).replace("/", ".") for path in TESTS}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        taken = imported(path.relative_to(ROOT)) & modules
        assert not taken, f"{path.relative_to(ROOT)} imports {', '.join(taken)}: what tests share is in tests/helpers"
