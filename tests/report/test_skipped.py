"""Images that a run could not read are named in its report, with what can still be seen of them."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from largescale.report.reported_run import read_runs
from largescale.report.skipped import section_of
from tests.helpers.run_folders import make_run


@pytest.fixture
def run(tmp_path):
    """A run that skipped a JPEG that was cut, one overwritten by noise, and one whose shard is gone."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    payload, offsets = bytearray(buffer.getvalue()), []
    payload[len(payload) // 2 :] = bytes(len(payload) - len(payload) // 2)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "s-0.tar", "w") as tar:
        for number, content in enumerate((bytes(payload), noise.tobytes())):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(content)
            offsets.append(tar.offset + 512)
            tar.addfile(info, io.BytesIO(content))
    path = make_run(tmp_path / "run", f"data.shards={tmp_path / 'shards'}")
    rows = [
        {"step": 1, "shard": "s-0.tar", "key": "cut<", "offset": offsets[0], "reason": "decoding <failed>"},
        {"step": 2, "shard": "s-0.tar", "key": "noise", "offset": offsets[1], "reason": "checksum differs"},
        {"step": 3, "shard": "s-0.tar", "key": "noise", "offset": offsets[1], "reason": "checksum differs"},
        {"step": 4, "shard": "../s-0.tar", "key": "gone", "offset": None, "reason": "checksum differs"},
    ]
    (path / "skipped").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows) + '{"st'
    (path / "skipped" / "rank-00000.jsonl").write_text(lines)
    return path


def test_reasons_are_counted_and_pictures_are_shown_where_bytes_are_left(run):
    page = section_of(read_runs([run])[0])
    assert "3 images could not be read, 4 times in all" in page
    assert page.count("<img") == 1 and 'alt="what is left of cut&lt;"' in page and page.count("no picture") == 2
    assert "decoding &lt;failed&gt;" in page and "<failed>" not in page
    assert "<td>3</td>" in page


def test_nothing_skipped_is_no_section(tmp_path):
    assert section_of(read_runs([make_run(tmp_path / "run")])[0]) == ""
