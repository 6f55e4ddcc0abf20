"""What all tests share: real processes, and small shard folders of real images."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes compute at once; before torch is imported
with suppress(AttributeError, OSError):  # another system than Linux, or one that forbids it
    # A thread that is woken does not take the core from the one that woke it. Else that one is stopped while it holds a
    # lock, and gloo's loop spins until it goes on, which takes much of the CPU. What tests start inherits it.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

from tests.helpers.commands import IN_MEMORY, ROOT, SAMPLE, run_python

__all__ = ["IN_MEMORY", "ROOT", "SAMPLE", "run_python"]

hypothesis.settings.register_profile("no clock", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("no clock")


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of gloo with this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder whose parents anybody may enter, as those of `tmp_path` are not; for `as_nobody`."""
    with tempfile.TemporaryDirectory(prefix="largescale-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


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
def held_out_shards(tmp_path_factory: pytest.TempPathFactory, sample_images: Path) -> Path:
    """The test images, labelled."""
    return _convert(sample_images / "test", tmp_path_factory.mktemp("shards") / "test")


def _convert(source: Path, out: Path) -> Path:
    run_python(
        "-m",
        "shards",
        "convert",
        source,
        out,
        "--labels",
        "folder",
        "--shuffle",
        "0",
        "--samples-per-shard",
        "40",
        "--workers",
        "1",
    )
    return out


@pytest.fixture
def tiny_overrides(shard_folder: Path, held_out_shards: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of configs/tests/tiny.yaml that point to the shards and to a fresh run folder."""

    def overrides(*extra: str, run: str = "run") -> list[str]:
        return [
            f"data.shards={shard_folder}",
            f"data.eval_shards={held_out_shards}",
            f"run.dir={tmp_path / run}",
            *extra,
        ]

    return overrides


@pytest.fixture(scope="session")
def scene_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and test scenes of several garments, with lists of labels, masks and boxes."""
    from tests.helpers.canvases import scenes

    return scenes(tmp_path_factory.mktemp("scenes"))
