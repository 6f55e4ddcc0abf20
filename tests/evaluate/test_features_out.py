"""`largescale features`: what is written, what is kept, what is refused.

Covers: largescale/evaluate/feature_files.py, largescale/evaluate/features_wish.py, largescale/evaluate/projection.py,
largescale/evaluate/thumbnails.py
"""

from __future__ import annotations

import io
import logging
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import largescale
from largescale.checkpoint.folder import Checkpoint
from largescale.cli import main
from largescale.config import load_config
from largescale.data.corpora import open_corpus
from largescale.data.decode import decode
from largescale.data.reader import ShardReader
from largescale.evaluate.features_wish import Wish
from largescale.evaluate.projection import fitted
from shards.cli import main as convert
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT, TINY
from tests.helpers.launcher import run_largescale

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory, shard_folder, held_out_shards) -> Path:
    folder = tmp_path_factory.mktemp("featured") / "run"
    data = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}", "train.steps=2"]
    assert main(["pretrain", str(TINY), *data, f"run.dir={folder}", "train.precision=fp32"]) == 0
    return folder


@pytest.fixture(scope="module")
def written(run, shard_folder, tmp_path_factory) -> Path:
    """Features of the training images, with everything that can be asked for."""
    out = tmp_path_factory.mktemp("features") / "out"
    assert features(run, shard_folder, out, "--assign", "--thumbnails", "14") == 0
    return out


def features(run: Path, shards: Path, out: Path, *options: str) -> int:
    return main(["features", str(run), str(shards), str(out), *options])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(capsys, *arguments: object) -> str:
    """The one line that a command is refused with."""
    assert features(*arguments) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_every_image_has_its_features_key_label_and_prototype(run, written, shard_folder):
    network = largescale.load(run)
    corpus = open_corpus(str(shard_folder), network.config.data)
    reader, first = ShardReader([corpus]), corpus.first_samples
    assert names(written) == [f"train-00000{number}.parquet" for number in range(5)]
    for number in range(5):
        table = pq.read_table(written / f"train-00000{number}.parquet", page_checksum_verification=True)
        ids = [int(first[number]) + row for row in table["row"].to_pylist()]
        assert ids == list(range(40 * number, 40 * number + 40))
        assert table["key"].to_pylist() == [reader.key(one) for one in ids]
        assert table["label"].to_pylist() == [reader.label(one) for one in ids]
        assert table["class"].to_pylist() == [corpus.manifest.classes[reader.label(one)] for one in ids]
        images = torch.stack([network.prepare(decode(reader.read(one), max_pixels=2**20)) for one in ids])
        expected = network.encode(images)
        assert str(table.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[16]"
        assert torch.allclose(torch.tensor(table["embedding"].to_pylist()), expected, rtol=2e-3, atol=1e-4)
        scores, numbers = network.method.exemplar_scores(expected)[0].max(1)
        assert table["prototype"].to_pylist() == numbers.tolist()
        assert table["prototype_score"].to_pylist() == pytest.approx(scores.tolist(), abs=1e-5)
        small = Image.open(io.BytesIO(table["image"][0].as_py()["bytes"]))
        whole = decode(reader.read(ids[0]), max_pixels=2**20).float().mean()
        assert small.size == (14, 14) and abs(np.asarray(small).mean() - float(whole)) < 3


def test_only_what_does_not_fit_is_made_again(run, written, shard_folder, tmp_path, caplog):
    out = Path(shutil.copytree(written, tmp_path / "out"))
    before = {name: (out / name).read_bytes() for name in names(out)}
    (out / "train-000001.parquet").unlink()
    (out / "train-000003.parquet").write_bytes(before["train-000003.parquet"][:-50])
    (out / ".train-000002.parquet.1-ab.writing").write_bytes(b"half")
    stamps = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    with caplog.at_level(logging.INFO):
        assert features(run, shard_folder, out, "--assign", "--thumbnails", "14") == 0
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    kept = [name for name in before if (out / name).stat().st_mtime_ns == stamps.get(name)]
    assert kept == [f"train-00000{number}.parquet" for number in (0, 2, 4)]
    assert "making train-000003.parquet again: its file is damaged" in caplog.text
    with caplog.at_level(logging.INFO):
        assert features(run, shard_folder, out, "evaluate.size=20") == 0
    assert "and 2 more again: transform.size was 28 and is now 20" in caplog.text


def embeddings(out: Path) -> np.ndarray:
    return np.array(pq.read_table(out)["embedding"].to_pylist(), np.float64)


def test_components_are_those_of_all_features_and_serve_later_shards(
    run, written, shard_folder, held_out_shards, tmp_path, capsys, caplog
):
    whole, out, plain = tmp_path / "whole", tmp_path / "out", ("data.workers=0", "--dtype", "fp32")
    assert features(run, shard_folder, whole, *plain) == 0
    assert features(run, held_out_shards, whole, *plain) == 0
    with caplog.at_level(logging.INFO):
        assert features(run, shard_folder, out, *plain, "--dim", "5", "--assign") == 0
    assert "5 components, " in caplog.text and "of the variance of 200 images" in caplog.text
    x = embeddings(whole)[100:]  # test, then train
    _, spread, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    expected, found = (x - x.mean(0)) @ axes[:5].T, embeddings(out)
    signs = np.sign((expected * found).sum(0))
    np.testing.assert_allclose(found * signs, expected, rtol=1e-4, atol=1e-4 * spread[0] / len(x))
    tables = [pq.read_table(folder) for folder in (out, written)]
    for column in ("key", "prototype", "prototype_score"):  # assigned by all features, not by five numbers
        assert tables[0][column].equals(tables[1][column])
    kept = (out / "_projection.safetensors").read_bytes()
    (out / "train-000002.parquet").unlink()
    assert features(run, held_out_shards, out, *plain, "--dim", "5", "--assign") == 0
    assert features(run, shard_folder, out, *plain, "--dim", "5", "--assign") == 0
    assert "4 of them kept from before; 5 numbers per image" in capsys.readouterr().out
    assert (out / "_projection.safetensors").read_bytes() == kept and "do not compare" not in caplog.text
    later = (embeddings(whole)[:100] - x.mean(0)) @ (axes[:5] * signs[:, None]).T
    np.testing.assert_allclose(embeddings(out)[:100], later, rtol=1e-3, atol=1e-3 * spread[0] / len(x))
    with caplog.at_level(logging.INFO):
        assert features(run, held_out_shards, out, *plain, "--dim", "4") == 0
    assert "fitting a projection again: components was 5 and is now 4" in caplog.text
    assert "do not compare features of these files with the new ones: train-000000.parquet: projection" in caplog.text
    white = tmp_path / "white"
    assert features(run, shard_folder, white, *plain, "--dim", "5", "--whiten", "1") == 0
    found = embeddings(white)
    np.testing.assert_allclose(np.cov(found.T), np.eye(5), atol=1e-3)
    np.testing.assert_allclose(np.abs(np.corrcoef(found.T, expected.T)[:5, 5:]), np.eye(5), atol=1e-3)
    with caplog.at_level(logging.INFO):
        assert features(run, shard_folder, white, *plain, "--dim", "5") == 0
    assert "fitting a projection again: whitened was 1.0 and is now 0.0" in caplog.text


def test_half_whitened_components_keep_the_roots_of_their_deviations():
    spread = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 1.0, 0.1])
    plain, half = (fitted(spread, 3, {}, whiten=power).of(spread).std(0) for power in (0, 0.5))
    torch.testing.assert_close(half, plain.sqrt())


def test_a_component_without_variance_becomes_zeros_when_whitened():
    flat = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    flat[:, 2] = 1
    found = fitted(flat, 3, {}, whiten=1).of(flat)
    assert found.isfinite().all() and not found[:, 2].any()
    torch.testing.assert_close(found[:, :2].std(0), torch.ones(2))


@pytest.mark.distributed
def test_ranks_share_the_shards_and_write_the_same_files(run, written, shard_folder, tmp_path):
    out = tmp_path / "out"
    result = run_largescale("features", run, shard_folder, out, "--assign", "--thumbnails", "14", ranks=2)
    assert result.stdout.startswith(f"{out}: features of 200 images in 5 files; 16 numbers per image")
    assert names(out) == names(written)
    assert all((out / name).read_bytes() == (written / name).read_bytes() for name in names(out))


def test_npy_has_its_keys_beside_it_and_needs_no_labels(run, sample_images, tmp_path):
    shards = tmp_path / "plain"
    assert convert(["convert", str(sample_images / "test"), str(shards), "--workers", "1"]) == 0
    assert features(run, shards, tmp_path / "out", "--format", "npy", "--dtype", "fp32") == 0
    array, keys = np.load(tmp_path / "out/plain-000000.npy"), pq.read_table(tmp_path / "out/plain-000000.parquet")
    assert array.shape == (100, 16) and array.dtype == np.float32 and keys.column_names == ["key", "shard", "row"]
    (tmp_path / "out/plain-000000.npy").write_bytes(b"short")
    assert features(run, shards, tmp_path / "out", "--format", "npy", "--dtype", "fp32") == 0
    assert np.array_equal(np.load(tmp_path / "out/plain-000000.npy"), array)
    assert features(run, shards, tmp_path / "out") == 0 and not list((tmp_path / "out").glob("*.npy"))


def test_an_image_that_cannot_be_read_is_left_out_and_made_up_for(run, held_out_shards, tmp_path, capsys):
    shards = Path(shutil.copytree(held_out_shards, tmp_path / "damaged"))
    tar = shards / "test-000000.tar"
    good = tar.read_bytes()
    bad = bytearray(good)
    bad[bad.index(b"IDAT") + 9] ^= 1
    tar.write_bytes(bad)
    assert features(run, shards, tmp_path / "out") == 0
    assert "features of 99 images in 3 files, 1 unreadable images left out" in capsys.readouterr().out
    assert features(run, shards, tmp_path / "out") == 0
    assert "3 of them kept from before" in capsys.readouterr().out
    tar.write_bytes(good)
    assert features(run, shards, tmp_path / "out") == 0
    assert "features of 100 images in 3 files, 2 of them kept from before; " in capsys.readouterr().out


def test_what_cannot_be_done_is_one_line_and_leaves_nothing_half_written(run, held_out_shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert "expected parquet or npy" in refusal(capsys, run, held_out_shards, out, "--format", "csv")
    assert "expected fp16 or fp32" in refusal(capsys, run, held_out_shards, out, "--dtype", "int8")
    assert "expected 0 to evaluate.size=28" in refusal(capsys, run, held_out_shards, out, "--thumbnails", "99")
    assert "--dim=-1: expected" in refusal(capsys, run, held_out_shards, out, "--dim", "-1")
    words = "--whiten=0.5: is about principal components"
    assert words in refusal(capsys, run, held_out_shards, out, "--whiten", "0.5")
    words = "--whiten=2: expected 0 (not at all) to 1 (equal variances)"
    assert words in refusal(capsys, run, held_out_shards, out, "--dim", "4", "--whiten", "2")
    assert "--dim=17: expected 1 to 16, the numbers" in refusal(capsys, run, held_out_shards, out, "--dim", "17")
    (out / "_projection.safetensors").write_bytes(b"short")
    assert "not a projection that largescale wrote" in refusal(capsys, run, held_out_shards, out, "--dim", "2")
    shutil.rmtree(out)
    assert "is in the folder of the run" in refusal(capsys, run, held_out_shards, run / "eval" / "out")
    assert "is in the shard folder" in refusal(capsys, run, held_out_shards, held_out_shards)
    assert "no such folder" in refusal(capsys, run, tmp_path / "nothing", out)
    assert "no run here" in refusal(capsys, tmp_path, held_out_shards, out)
    (tmp_path / "file").touch()
    assert "is a file" in refusal(capsys, run, held_out_shards, tmp_path / "file")
    cut = Path(shutil.copytree(held_out_shards, tmp_path / "cut"))
    (cut / "test-000001.tar").write_bytes((cut / "test-000001.tar").read_bytes()[:-2000])
    assert "test-000001.tar: " in refusal(capsys, run, cut, out)
    assert not out.exists()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # as a disk that is full
    try:
        assert "test-000000.parquet" in refusal(capsys, run, held_out_shards, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(out) == []


def test_a_method_without_prototypes_assigns_nothing():
    config = load_config(ROOT / "configs/small/simclr.yaml", ["data.shards=x"])
    with pytest.raises(
        InputError,
        match=r"--assign: method.name=simclr has no lasting clusters to assign images to; use a run of swav, ",
    ):
        Wish(assign=True).check(config, Checkpoint(ROOT, {}))
