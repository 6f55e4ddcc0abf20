"""`import largescale`: what it gives, what it costs, and that no order of imports changes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import largescale
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

NAMES = {"METHODS", "__version__", "evaluate", "export", "load", "load_backbone", "load_config", "pretrain"}


def test_it_offers_what_it_says():
    assert set(largescale.__all__) == NAMES <= set(dir(largescale))
    for name in NAMES:
        assert getattr(largescale, name) is not None
    assert set(largescale.METHODS) >= {"swav", "simclr", "mocov2"}
    assert largescale.load_config("small/simclr").method.name == "simclr"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = largescale.nothing


def test_evaluate_is_a_function_and_the_package_of_its_modules():
    import largescale.evaluate.knn as module

    assert largescale.evaluate.knn is module
    with pytest.raises(InputError, match=r"evaluate knm: expected one of knn, linear.*did you mean knn"):
        largescale.evaluate("knm", "runs/a")
    with pytest.raises(InputError, match="evaluate knn: no run"):
        largescale.evaluate("knn")


def test_the_version_is_that_of_the_distribution():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "largescale.__version__"}
    assert largescale.__version__.count(".") == 2


def test_both_packages_are_typed():
    assert all((ROOT / package / "py.typed").is_file() for package in ("largescale", "shards"))


CHEAP = """
import sys
import largescale
largescale.__version__, largescale.__all__
heavy = {"torch", "numpy", "omegaconf", "torchvision"} & set(sys.modules)
assert not heavy, heavy
largescale.load_config
assert "torch" not in sys.modules
"""

ORDERS = """
import os, sys
import largescale.cli, largescale.pretrain  # all that they need is imported once; each order then begins without them
ORDERS = [
    "import largescale; f = largescale.pretrain",
    "from largescale import pretrain as f",
    "import largescale.pretrain; from largescale import pretrain as f",
    "from largescale.pretrain import describe; import largescale; f = largescale.pretrain",
    "from largescale import pretrain; import largescale.pretrain; f = largescale.pretrain",
    "from largescale.pretrain import pretrain as f",
    "import importlib; f = importlib.import_module('largescale.pretrain').pretrain",
    "from largescale import *; f = pretrain",
    "import largescale.cli; import largescale; largescale.METHODS; f = largescale.pretrain",
]
failed = 0
for order in ORDERS:
    child = os.fork()
    if not child:
        for name in ("largescale", "largescale.pretrain", "largescale.cli"):
            del sys.modules[name]
        names = {}
        exec(order, names)
        import types
        from largescale import pretrain
        module = sys.modules["largescale.pretrain"]
        right = type(names["f"]) is types.FunctionType and names["f"] is pretrain is module.pretrain
        os._exit(0 if right and type(module) is types.ModuleType else 1)
    if os.waitpid(child, 0)[1]:
        failed += 1
        print("wrong:", order)
sys.exit(failed)
"""


@pytest.mark.parametrize("script", [CHEAP, ORDERS], ids=["importing it is cheap", "pretrain is the function"])
def test_in_a_fresh_interpreter(script):
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_the_docstring_shows_is_there():
    assert all(f"largescale.{name}(" in largescale.__doc__ for name in ("load_config", "pretrain", "load"))
    assert Path(largescale.__file__).parent == ROOT / "largescale"
