from __future__ import annotations

import numpy as np
import torch

from largescale.data import device_random, random


def test_the_device_draws_what_the_host_draws():
    ids, views = np.array([0, 1, 5, 2**62, -3]), np.arange(5) * 7
    expected = random.uniform(2**62 - 1, ids, 3, views, num=11)
    found = device_random.uniform(
        2**62 - 1, torch.from_numpy(ids), 3, torch.from_numpy(views), num=11, device=torch.device("cpu")
    )
    assert found.dtype == torch.float64 and np.array_equal(found.numpy(), expected)
    single = device_random.uniform(4, 9, num=1000, device=torch.device("cpu"))
    assert np.array_equal(single.numpy(), random.uniform(4, 9, num=1000))
