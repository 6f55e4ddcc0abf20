from __future__ import annotations

import pytest

from largescale.plan.hardware import gpu_like


@pytest.mark.parametrize(
    "device, memory_gb, name",
    [
        ("NVIDIA H100 80GB HBM3", 85.0, "h100"),
        ("NVIDIA H200", 150.1, "h200"),
        ("NVIDIA A100-SXM4-80GB", 85.2, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 42.4, "a100-40"),
        ("Tesla V100-SXM2-32GB", 34.1, "v100-32"),
        ("NVIDIA L4", 23.0, ""),
    ],
)
def test_a_device_is_found_by_the_name_that_its_driver_has_for_it(device, memory_gb, name):
    assert gpu_like(device, memory_gb) == name
