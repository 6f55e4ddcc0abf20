from __future__ import annotations

import os

import pytest

from largescale.distributed import control_groups

V1, V2 = "4:cpu,cpuacct:/docker/a\n2:memory:/b", "0::/pod/a"


@pytest.mark.parametrize(
    "groups, files, cpus",
    [
        (V2, {"pod/a/cpu.max": "400000 100000"}, 4),
        (V2, {"pod/cpu.max": "150000 100000", "pod/a/cpu.max": "max 100000"}, 2),
        (V2, {"pod/a/cpu.max": "50000 100000"}, 1),
        (V2, {"pod/a/cpu.max": "6400000 100000"}, 16),
        ("0::/", {"cpu.max": "300000 100000"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),  # a container sees its own root
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "-1", "cpu/docker/a/cpu.cfs_period_us": "100000"}, 16),
        (V2, {}, 16),
        (None, {}, 16),
    ],
)
def test_cpus_are_those_that_control_groups_give_the_time_of(groups, files, cpus, monkeypatch, tmp_path):
    if groups:
        (tmp_path / "groups").write_text(groups)
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(control_groups, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(control_groups, "_ROOT", tmp_path / "root")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert control_groups.usable_cpus() == cpus
