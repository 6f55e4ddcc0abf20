"""The report of a run that was evaluated on the zoo shows what can be read, as training sees it, and nothing else."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from largescale.cli import main
from largescale.config import DataConfig
from largescale.data.corpora import open_corpora
from largescale.data.decode import EncodedImage
from largescale.data.reader import ShardReader
from largescale.evaluate.feature_set import FeatureSet
from largescale.report import gallery
from shards.cleaning.rules import Cleaning
from shards.conversion.convert import Options, convert
from shards.inspection.verify import verify
from tests.helpers.commands import ROOT
from tests.shards.zoo import zoo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the zoo in two classes, of which only decoding shows that some cannot be read."""
    root = tmp_path_factory.mktemp("reported")
    for number, specimen in enumerate(zoo()):
        path = root / "pile" / f"class{number % 2}" / specimen.name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(specimen.payload)
    options = Options("zoo", labels="folder", shuffle=0, cleaning=Cleaning(decode=False))
    convert(root / "pile", root / "shards", options)
    return root / "shards"


def picture(pixels: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return pixels.shape, np.ascontiguousarray(pixels).tobytes()


def shown_by(uri: str) -> tuple[tuple[int, ...], bytes]:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.format == "PNG"  # small ones are shown as they are
        return picture(np.asarray(image.convert("RGB")))


def test_the_report_shows_what_can_be_read_and_nothing_else(shards, tmp_path):
    run = tmp_path / "run"
    overrides = [
        f"data.shards={shards}",
        f"data.eval_shards={shards}",
        f"run.dir={run}",
        "train.steps=2",
        "train.precision=fp32",
        "evaluate.knn_neighbours=[3]",
    ]
    assert main(["pretrain", str(ROOT / "tests/tiny.yaml"), *overrides]) == 0
    assert main(["evaluate", "knn", str(run)]) == 0
    assert main(["report", str(run)]) == 0

    damaged = {problem.key for problem in verify(shards, workers=1, decode=True)[1]}
    reader = ShardReader(open_corpora(DataConfig(shards=str(shards))))
    readable = [number for number in range(len(reader)) if reader.key(number) not in damaged]
    assert len(damaged) == sum(one.seen is None and one.headers_are_whole for one in zoo())
    for part in ("train", "test"):
        assert FeatureSet.load(run / f"eval/features/pretrained-{part}.safetensors").ids.tolist() == readable

    seen = {
        number: picture(EncodedImage(reader.read(number), max_pixels=10**9).decode().permute(1, 2, 0).numpy())
        for number in readable
    }
    for number, expected in seen.items():
        assert shown_by(gallery.data_url(gallery.picture(reader, number))) == expected, reader.key(number)
    # What is left of a damaged image stands with the reason, and with no other.
    shown = re.findall(r'<img src="(data:[^"]*)" alt="(?!what is left of )', (run / "report.html").read_text())
    assert len(shown) >= gallery.QUERIES * (1 + gallery.NEIGHBOURS)
    assert set(map(shown_by, shown)) <= set(seen.values())
