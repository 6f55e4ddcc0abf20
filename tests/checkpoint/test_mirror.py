"""Checkpoints in an object store: a real S3 server on this machine, spoken to over HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
import s3fs

from largescale.checkpoint.folder import find_latest
from largescale.checkpoint.mirror import Mirror
from shards.ground.errors import InputError
from tests.helpers.commands import TINY
from tests.helpers.launcher import pretrain, run_largescale
from tests.helpers.runs import losses
from tests.helpers.servers import s3_server

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def store() -> Iterator[s3fs.S3FileSystem]:
    """A client of an S3 server with the bucket `runs`."""
    with s3_server() as server:
        client = server.client()
        client.mkdir("runs")
        yield client


def names_in(store: s3fs.S3FileSystem, folder: str) -> set[str]:
    store.invalidate_cache()
    return {path.removeprefix(f"{folder}/") for path in store.find(folder)}


def test_a_run_goes_on_from_the_store_on_a_machine_that_has_nothing(store, tiny_overrides, tmp_path):
    shared = ["checkpoint.mirror=s3://runs/a", "parallel.strategy=fsdp"]
    pretrain(tiny_overrides(*shared), 2)
    run = tmp_path / "run"
    kept = {
        f"step-{step:08d}/{path.name}"
        for step in (10, 14)
        for path in (run / "checkpoints" / f"step-{step:08d}").iterdir()
    }
    assert names_in(store, "runs/a") == kept  # as here: the two newest, step 5 is gone
    # As if it had been stopped after step 10, and its machine were lost.
    store.rm("runs/a/step-00000014", recursive=True)
    expected = losses(run)
    shutil.rmtree(run)
    pretrain(tiny_overrides(*shared), 2)
    assert losses(run) == expected[10:]
    assert names_in(store, "runs/a") == kept
    assert find_latest(run / "checkpoints").step == 14


def test_half_a_copy_does_not_count(store, tiny_overrides, tmp_path):
    pretrain(tiny_overrides("checkpoint.mirror=s3://runs/b"))
    store.rm("runs/b/step-00000014/progress.json")
    assert Mirror("s3://runs/b").steps() == [10]


@pytest.mark.parametrize(
    "files, says",
    [
        ({"../../evil.safetensors": {"size": 1, "sha256": ""}}, "is not a checkpoint file"),
        ({"code.py": {"size": 1, "sha256": ""}}, "is not a checkpoint file"),
        (None, "cannot be read"),
    ],
)
def test_a_foreign_copy_is_refused(store, tmp_path, files, says):
    store.pipe_file("runs/c/step-00000009/progress.json", json.dumps({"step": 9, "files": files}).encode())
    with pytest.raises(InputError, match=says):
        Mirror("s3://runs/c").fetch_newer(tmp_path)


def test_a_damaged_copy_is_refused(store, tiny_overrides, tmp_path):
    pretrain(tiny_overrides("checkpoint.mirror=s3://runs/d"))
    [piece] = [name for name in names_in(store, "runs/d") if name.startswith("step-00000014/shard")]
    content = bytearray(store.cat_file(f"runs/d/{piece}"))
    content[-1] ^= 1
    store.pipe_file(f"runs/d/{piece}", bytes(content))
    with pytest.raises(InputError, match="is not what was written"):
        Mirror("s3://runs/d").fetch_newer(tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("url", ["nowhere://bucket", "abfs://bucket/x", "s3://bucket/x"])
def test_a_store_that_cannot_be_used(tiny_overrides, url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    result = run_largescale("pretrain", TINY, *tiny_overrides(f"checkpoint.mirror={url}"), check=False)
    assert result.returncode == 2
    assert f"checkpoint.mirror={url}" in result.stderr and "Traceback" not in result.stderr
