from __future__ import annotations

from largescale.propose.rate import rate_of


def test_of_rows_the_first_are_left_out_and_phases_stand_apart():
    rows = [{"images_per_s": rate} for rate in (1.0, 2.0, 3.0, 4.0, 10.0, 12.0, 11.0)]
    assert rate_of(rows, 0)[:1] + rate_of(rows, 0)[2:] == (11.0, 0.0, 0.0)
    rows[0] |= {"phase_s": 50.0, "phase_embedding_s": 44.0}
    rows[5] |= {"phase_s": 8.0, "phase_embedding_s": 0.0, "images_per_s": 0.5}
    found = rate_of(rows, 4)
    assert (found.images_per_s, found.embedding_s, found.solving_s) == (40.0, 11.0, 7.0 / 4)
    assert found.source == "4 times what was measured here on 3 steps on one GPU"
