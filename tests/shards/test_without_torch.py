"""`shards` where torch is not installed: an interpreter that sees the standard library and the packages linked here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

NEEDED = ("numpy", "pillow", "simplejpeg", "xxhash", "safetensors", "fsspec", "pyarrow", "tqdm")
"""What of the dependencies in pyproject.toml is shards' own (and matplotlib, for the page of `info --html`)."""

COMMANDS = """
import importlib.util, sys
from pathlib import Path
images, home = map(Path, sys.argv[1:])
for name in ("torch", "torchvision", "largescale"):
    assert importlib.util.find_spec(name) is None, f"{name} is here: this shows nothing"

from shards.cli import main
out, tars = home / "photos", home / "tars"
assert main(["convert", str(images), str(out), "--labels", "folder", "--shuffle", "0", "--samples-per-shard", "40",
             "--workers", "2", "--duplicates", "near", "--max-side", "20", "--min-side", "8"]) == 0
tars.mkdir()
for tar in out.glob("*.tar"):
    tar.rename(tars / tar.name)
assert main(["index", str(tars), "--workers", "2"]) == 0
assert main(["verify", str(tars), "--workers", "2"]) == 0
assert main(["info", str(tars)]) == 0

import shards
assert len(list(shards.open(tars))) == len(shards.open(tars)) > 0
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with links to what `shards` needs and to itself."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "shards").symlink_to(ROOT / "shards")
    for name in NEEDED:
        found = distribution(name)
        for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return folder


def test_every_command_works(packages, sample_images, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(  # -S: not the packages of this interpreter
        [sys.executable, "-S", "-c", COMMANDS, sample_images / "test", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "PYTHONPATH": str(packages)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "samples in 3 shards are intact" in result.stdout
