import os

import pytest

from teacher import cores


@pytest.mark.parametrize(
    "text, expected",
    [("200000 100000\n", 2), ("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 16)],
)
def test_a_container_quota_bounds_the_affinity_mask(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cores.usable_cores() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cores.usable_cores() == 3


def test_without_a_cgroup_the_affinity_mask_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "absent")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cores.usable_cores() == 3
