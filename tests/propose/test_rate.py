from __future__ import annotations

import subprocess
import sys

import pytest

from largescale.propose.rate import Usage, others, rate_of


def test_of_rows_the_first_are_left_out_and_phases_stand_apart():
    rows = [{"images_per_s": rate} for rate in (1.0, 2.0, 3.0, 4.0, 10.0, 12.0, 11.0)]
    assert rate_of(rows, 0)[:1] + rate_of(rows, 0)[2:] == (11.0, 0.0, 0.0)
    rows[0] |= {"phase_s": 50.0, "phase_embedding_s": 44.0}
    rows[5] |= {"phase_s": 8.0, "phase_embedding_s": 0.0, "images_per_s": 0.5}
    assert rate_of(rows, 0).images_per_s == 10.5  # without the row whose rate counts a phase
    found = rate_of(rows, 4)
    assert (found.images_per_s, found.embedding_s, found.solving_s) == (42.0, 11.0, 7.0 / 4)
    assert found.source == "4 times what was measured here on 3 steps on one GPU"


def test_cores_that_other_programs_use_are_told_from_those_of_the_training():
    before, after = Usage(100.0, 50.0, 7.0), Usage(110.0, 62.0, 16.0)
    assert others(before, after) == pytest.approx(0.3)  # 12 s in 10, of which the training had 9
    assert others(before, after._replace(all_programs=58.0)) == 0  # ticks are coarse
    began = Usage.now()
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    ended = Usage.now()
    assert ended.children - began.children >= 0.45 and ended.wall > began.wall
    if sys.platform == "linux":
        assert ended.all_programs - began.all_programs >= 0.4
