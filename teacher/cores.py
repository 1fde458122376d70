"""How many CPU cores this process may really use: what a container grants, not what a host has."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: "QUOTA PERIOD" in microseconds, or "max ..."


def usable_cores() -> int:
    """At least 1: ``OMP_NUM_THREADS`` if set, else the affinity mask, bounded by the CPU quota.

    Libraries count a host's cores; 64 threads under a quota of two cores stand still most of the
    time.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, _quota_cores(cores)))


def _quota_cores(otherwise: int) -> int:
    try:
        quota, period = CPU_MAX.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no quota
        return otherwise
