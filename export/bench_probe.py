"""What one artefact costs by itself: first call and memory in a new process, time by operator."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from export.artefact import ArtefactError
from export.runtimes import open_runtime


def picture(size: tuple[int, int], count: int) -> np.ndarray:
    """uint8 [count, H, W, 3]: smooth light and dark, as time may depend on what is zero."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / max(size)
    planes = [127 + 120 * np.sin(7 * x * k + 5 * y + k) for k in range(1, 4)]
    image = np.stack(planes, -1).astype(np.uint8)
    return np.stack([np.roll(image, 7 * i, 1) for i in range(count)])


PROBE = """
import json, sys, time
from pathlib import Path
import numpy as np
from export.bench_probe import picture
from export.runtimes import open_runtime
path, provider, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
if path.endswith(".safetensors"):
    import torch
else:
    import onnx, onnxruntime
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name))
memory = Path("/proc/self/status").is_file()
before = status("VmRSS:") if memory else 0
if memory:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
begun = time.perf_counter()
with open_runtime(path, provider=provider, threads=threads) as runtime:
    opened = time.perf_counter()
    runtime(picture((runtime.card.height, runtime.card.width), 1))
    first = time.perf_counter()
    runtime(picture((runtime.card.height, runtime.card.width), 1))
after = status("VmHWM:") if memory else 0
print(json.dumps({"open_ms": 1e3 * (opened - begun), "first_call_ms": 1e3 * (first - opened),
                  "memory_kib": after - before if memory else None}))
"""


def probe(path: Path, *, provider: str, threads: int) -> dict[str, Any]:
    """Opening, first call [ms], and how far memory rose at its peak [KiB], in a new process.

    The memory is None where there is no /proc.
    """
    told = subprocess.run(
        [sys.executable, "-c", PROBE, str(path.resolve()), provider, str(threads)],
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode:
        raise ArtefactError(f"{path}: fails in a process of its own: {told.stderr[-300:]}")
    facts: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return facts


def operators(
    path: Path, size: tuple[int, int], *, provider: str, threads: int, calls: int = 5
) -> list[dict[str, Any]]:
    """Time per operator type as ONNX Runtime profiles it, largest first; empty for other files."""
    if path.suffix != ".onnx":
        return []
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "profile")
        with open_runtime(path, provider=provider, threads=threads, profile=prefix) as runtime:
            for _ in range(calls):
                runtime(picture(size, 1))
        events = [e for p in Path(folder).glob("profile*.json") for e in json.loads(p.read_text())]
    spent: dict[str, float] = {}
    for event in events:
        name = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and name and event["name"].endswith("kernel_time"):
            spent[name] = spent.get(name, 0.0) + event["dur"]
    total = sum(spent.values()) or 1.0
    return [
        {"operator": n, "ms": us / calls / 1e3, "share": us / total}
        for n, us in sorted(spent.items(), key=lambda item: -item[1])
    ]
