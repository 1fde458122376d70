"""What one artefact costs by itself: first call and memory in a new process, time by operator."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.artefact import ArtefactError
from export.runtimes import Runtime, TorchRuntime, open_runtime


def picture(size: tuple[int, int], count: int) -> np.ndarray:
    """uint8 [count, H, W, 3]: smooth light and dark, as time may depend on what is zero."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / max(size)
    planes = [127 + 120 * np.sin(7 * x * k + 5 * y + k) for k in range(1, 4)]
    image = np.stack(planes, -1).astype(np.uint8)
    return np.stack([np.roll(image, 7 * i, 1) for i in range(count)])


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One artefact and how it is run; ``precision`` is for the student in torch alone."""

    path: Path
    provider: str
    threads: int
    precision: str = "fp32"

    @property
    def autocast(self) -> bool:
        """Whether torch computes in another precision than the file's."""
        return self.precision != "fp32"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU's memory is used."""
        return self.provider != "cpu" or self.path.suffix == ".engine"

    def open(self, *, profile: str = "") -> Runtime:
        """Its runtime; the student runs where ``.onnx`` do."""
        if self.path.suffix == ".safetensors":
            device = "cpu" if self.provider == "cpu" else "cuda"
            return TorchRuntime(
                self.path, threads=self.threads, device=device, precision=self.precision
            )
        return open_runtime(
            self.path, provider=self.provider, threads=self.threads, profile=profile
        )


PROBE = """
import json, sys, time
from pathlib import Path
import numpy as np
from export.bench_probe import Entrant, picture
about = json.loads(sys.argv[1])
entrant = Entrant(**about | {"path": Path(about["path"])})
if entrant.path.suffix == ".safetensors":
    import torch
else:
    import onnx, onnxruntime
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name))
cuda = None
if entrant.on_gpu:
    from export.cuda import Cuda
    cuda = Cuda()
free = cuda.free_bytes() if cuda else 0
memory = Path("/proc/self/status").is_file()
before = status("VmRSS:") if memory else 0
if memory:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
begun = time.perf_counter()
with entrant.open() as runtime:
    opened = time.perf_counter()
    runtime(picture((runtime.card.height, runtime.card.width), 1))
    first = time.perf_counter()
    runtime(picture((runtime.card.height, runtime.card.width), 1))
    taken = free - cuda.free_bytes() if cuda else 0  # allocators keep what they once had
after = status("VmHWM:") if memory else 0
print(json.dumps({"open_ms": 1e3 * (opened - begun), "first_call_ms": 1e3 * (first - opened),
                  "memory_kib": after - before if memory else None,
                  "gpu_memory_kib": taken // 1024 if cuda else None}))
"""


def probe(entrant: Entrant) -> dict[str, Any]:
    """Opening, first call [ms], and how far memory rose at its peak [KiB], in a new process.

    The memory is None where there is no /proc, the GPU's where none is used.
    """
    about = dataclasses.asdict(entrant) | {"path": str(entrant.path.resolve())}
    told = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(about)],
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode:
        raise ArtefactError(f"{entrant.path}: fails in a process of its own: {told.stderr[-300:]}")
    facts: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return facts


def operators(entrant: Entrant, size: tuple[int, int], *, calls: int = 5) -> list[dict[str, Any]]:
    """Time per operator for one image, largest first, as the runtime's own profiler tells it.

    ONNX Runtime: by operator type. TensorRT: by layer. torch: by kernel.
    """
    spent = {".onnx": _by_node, ".engine": _by_layer, ".safetensors": _by_kernel}[
        entrant.path.suffix
    ](entrant, picture(size, 1), calls)
    total = sum(spent.values()) or 1.0
    return [
        {"operator": n, "ms": ms / calls, "share": ms / total}
        for n, ms in sorted(spent.items(), key=lambda item: -item[1])
        if ms > 0
    ]


def _by_node(entrant: Entrant, image: np.ndarray, calls: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        with entrant.open(profile=str(Path(folder) / "profile")) as runtime:
            for _ in range(calls):
                runtime(image)
        events = [e for p in Path(folder).glob("profile*.json") for e in json.loads(p.read_text())]
    spent: dict[str, float] = {}
    for event in events:
        name = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and name and event["name"].endswith("kernel_time"):
            spent[name] = spent.get(name, 0.0) + event["dur"] / 1e3
    return spent


def _by_layer(entrant: Entrant, image: np.ndarray, calls: int) -> dict[str, float]:
    with entrant.open(profile="layers") as runtime:
        for _ in range(calls):
            runtime(image)
        return dict(runtime.layer_ms)  # type: ignore[attr-defined]


def _by_kernel(entrant: Entrant, image: np.ndarray, calls: int) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    gpu = [ProfilerActivity.CUDA] if entrant.on_gpu else []
    with entrant.open() as runtime:
        runtime(image)
        with profile(activities=[ProfilerActivity.CPU, *gpu]) as told:
            for _ in range(calls):
                runtime(image)
    clock = "self_device_time_total" if gpu else "self_cpu_time_total"
    return {row.key: getattr(row, clock) / 1e3 for row in told.key_averages()}
