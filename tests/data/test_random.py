from __future__ import annotations

import numpy as np

from largescale.data.random import uniform, uniform_at


def test_one_tuple_has_the_numbers_that_it_has_among_others():
    for coordinates in [(0, 3, 17, 0, 5), (-1, 2**40, 0, 1, 2), (2**63 - 1, 0, np.int64(2**62), 0, 4)]:
        assert uniform_at(*coordinates, num=4).tolist() == uniform(*coordinates, num=4).tolist()
