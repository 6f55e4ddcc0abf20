"""The wheel: both packages with what they need at run time, and every recipe of configs/."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest

from tests.helpers.commands import ROOT

IN_THE_WHEEL = """
import largescale, shards
from largescale.config.recipes import find_recipe, packaged
assert largescale.__file__.startswith({folder!r}) and shards.__file__.startswith({folder!r})
assert all(str(find_recipe(name)).startswith({folder!r}) for name in packaged()) and len(packaged()) == {num_recipes}
"""


@pytest.mark.slow
@pytest.mark.skipif(int(version("setuptools").split(".")[0]) < 77, reason="pyproject.toml asks for setuptools 77")
def test_the_wheel_has_all_that_is_used(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    for name in ("largescale", "shards", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            source,
            "--no-deps",
            "--no-build-isolation",
            "-w",
            wheels,
            "--disable-pip-version-check",
            "--quiet",
        ],
        check=True,
        timeout=300,
        cwd=tmp_path,
    )
    [wheel] = wheels.glob("largescale-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    recipes = [path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")]
    assert {f"largescale/recipes/{name}" for name in recipes} <= names
    data = [
        path.relative_to(ROOT).as_posix()
        for package in ("largescale", "shards")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".css", ".typed", ".zip")
    ]
    assert {name for name in data if not name.endswith("make_sample.py")} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "configs/")) for name in names)
    script = IN_THE_WHEEL.format(folder=str(tmp_path / "installed"), num_recipes=len(recipes))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600, cwd=tmp_path / "installed")
