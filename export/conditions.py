"""The conditions of a measurement: machine, versions, settings, and who else runs.

Numbers of two runs are compared only where these are the same.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from teacher.errors import UsageError


def conditions(
    *, provider: str, threads: int, rounds: int, size: tuple[int, int], others: float
) -> dict[str, Any]:
    """What two runs must share for their numbers to be compared.

    ``busy``: whether ``others``, the threads that run beside us, leave fewer cores than we use.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "cpu": cpu,
        "cores": cores,
        "busy": others + threads > (cores or 1),
        "gpu": _gpu() if provider != "cpu" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("onnxruntime", "torch", "tensorrt", "numpy")},
        "provider": provider,
        "threads": threads,
        "rounds": rounds,
        "size": list(size),
    }


def others_running(samples: int = 20) -> float:
    """Threads of others that run or wait for a core now; the load average lags by minutes."""
    told = Path("/proc/loadavg")
    if not told.is_file():
        return os.getloadavg()[0]
    counts = []
    for _ in range(samples):
        time.sleep(0.05)
        counts.append(int(told.read_text().split()[3].partition("/")[0]) - 1)  # without us
    return float(np.median(counts))


def _version(package: str) -> str | None:
    """What is imported under that name, without importing it; None if it is not there."""
    for name in (package, f"{package}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _gpu() -> str:
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip()


def same_conditions(earlier: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """`UsageError` naming what differs; numbers of other conditions are never set side by side."""
    differ = [k for k in dict.fromkeys([*earlier, *now]) if earlier.get(k) != now.get(k)]
    if differ:
        told = "; ".join(f"{k}: {earlier.get(k)!r} then, {now.get(k)!r} now" for k in differ)
        raise UsageError(
            f"against={where}: made under other conditions ({told}). Such numbers are not "
            "compared; measure both on one machine with the same settings."
        )
