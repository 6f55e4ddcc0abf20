"""What all tests share: real processes, and small shard folders of real images."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("no clock", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("no clock")

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "shards" / "sample" / "fashion-mnist.zip"
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where small files that are made by the thousand cost nothing to make; None, as `tempfile` has it, for any place."""


def run_python(*arguments: object, ranks: int = 1, cwd: Path | None = None, timeout_s: float = 300,
               check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, or torchrun with several ranks, as a user would."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )
    if check and result.returncode != 0:
        pytest.fail(f"{arguments} exited with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    return result


@pytest.fixture(scope="session")
def sample_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 training and 100 test images of the bundled sample, as ordinary class folders."""
    folder = tmp_path_factory.mktemp("sample")
    taken: dict[str, int] = {}
    with zipfile.ZipFile(SAMPLE) as archive:
        for name in sorted(archive.namelist()):
            part_and_class = name.rsplit("/", 1)[0]
            limit = 20 if "/train/" in name else 10
            if name.endswith(".png") and taken.get(part_and_class, 0) < limit:
                taken[part_and_class] = taken.get(part_and_class, 0) + 1
                archive.extract(name, folder)
    return folder / "fashion-mnist"


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory, sample_images: Path) -> Path:
    """The training images as 5 shards of 40, labelled, shuffled."""
    return _convert(sample_images / "train", tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="session")
def test_shard_folder(tmp_path_factory: pytest.TempPathFactory, sample_images: Path) -> Path:
    """The test images, labelled."""
    return _convert(sample_images / "test", tmp_path_factory.mktemp("shards") / "test")


def _convert(source: Path, out: Path) -> Path:
    run_python("-m", "shards", "convert", source, out, "--labels", "folder", "--shuffle", "0",
               "--samples-per-shard", "40", "--workers", "1")
    return out


@pytest.fixture
def tiny_overrides(shard_folder: Path, test_shard_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of configs/tests/tiny.yaml that point to the shards and to a fresh run folder."""

    def overrides(*extra: str, run: str = "run") -> list[str]:
        return [f"data.shards={shard_folder}", f"data.eval_shards={test_shard_folder}",
                f"run.dir={tmp_path / run}", *extra]

    return overrides
