"""Speed of the codecs beside PyPI packages and a copy of the same bytes.

``python bench_codecs.py [OUT]``: one process, one thread, hot buffers, least CPU time of N calls,
1920x1080 unless said; prints a Markdown table and writes OUT/bench_codecs.json.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hilbert
import hilbertmap
import numpy as np

from teacher.codecs.curves import hilbert_cells, hilbert_places
from teacher.codecs.depth import DepthCodec
from teacher.codecs.normals import NormalCodec
from teacher.codecs.segmentation import InstanceCodec, PaletteCodec

SIZE = (1080, 1920)


def best_ms(call: Callable[[], object], *, repeat: int = 40) -> float:
    """The least CPU time of ``repeat`` calls after one that is not counted.

    CPU time of this thread, not the clock on the wall: on an idle machine they agree, and on a
    shared one only the former says anything about the code.
    """
    call()
    times = []
    for _ in range(repeat):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times) * 1e3


def beside_copy_ms(call: Callable[[], object], *, total_bytes: int) -> tuple[float, float]:
    """(the call, a copy that reads and writes as many bytes in all), in turns, least of each."""
    half = np.random.default_rng(0).integers(0, 255, total_bytes // 2, np.uint8)
    target = np.empty_like(half)
    rounds = [
        (best_ms(call, repeat=25), best_ms(lambda: np.copyto(target, half), repeat=25))
        for _ in range(8)
    ]
    return min(ms for ms, _ in rounds), min(copy for _, copy in rounds)


def smooth_depth_m() -> np.ndarray:
    """A room-like depth, 0.6 to 60 m, with smooth and broken parts."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float32)
    depth = 6 + 4 * np.sin(x / 170) * np.cos(y / 130) + 50 * (y < 200)
    return np.where((x // 240 + y // 180) % 5 == 0, depth * 0.35, depth).astype(np.float32)


def two_threads(codec: DepthCodec, rgb: np.ndarray, count: int = 16, rounds: int = 8) -> float:
    """Pictures per second in two threads over one, best of rounds each."""

    def seconds(threads: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(lambda _: codec.decode(rgb), range(count)))
            return time.perf_counter() - start

    pairs = [(seconds(1), seconds(2)) for _ in range(rounds)]
    return min(a for a, _ in pairs) / min(b for _, b in pairs)


def instance_picture() -> np.ndarray:
    """1024x1024 with 60 disks, rims blended, noise of 2."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:1024, :1024]
    ids = np.zeros((1024, 1024), np.uint16)
    for i in range(60):
        cx, cy = 64 + 128 * (i % 8), 64 + 128 * (i // 8)
        ids[(x - cx) ** 2 + (y - cy) ** 2 < rng.uniform(30, 62) ** 2] = i + 1
    rgb = InstanceCodec().encode(ids).astype(np.float32)
    rgb = (rgb + np.roll(rgb, 1, 0) + np.roll(rgb, 1, 1)) / 3 + rng.normal(0, 2, rgb.shape)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def import_ms() -> float:
    """``import teacher`` and all codecs beyond ``import numpy``, best CPU time of 5 processes."""

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    codecs = "import teacher, teacher.codecs.depth, teacher.codecs.normals"
    codecs += ", teacher.codecs.segmentation"
    plain, ours = (min(seconds(c) for _ in range(5)) for c in ("import numpy", codecs))
    return (ours - plain) * 1e3


def measure() -> list[dict[str, object]]:
    """All rows: what, ms, and each ratio with its bar."""
    rows: list[dict[str, object]] = []

    def row(what: str, ms: float, **ratios: tuple[float, str]) -> None:
        rows.append({"what": what, "ms": round(ms, 3), "ratios": ratios})
        text = ", ".join(f"{k} {v:.3g} (bar {bar})" for k, (v, bar) in ratios.items())
        print(f"| {what} | {ms:.3g} | {text} |", flush=True)

    print("| what | ms | ratios |\n|---|---|---|")
    codec, depth_m = DepthCodec(), smooth_depth_m()
    pixels = depth_m.size
    rgb = codec.encode(depth_m)
    ms, copy = beside_copy_ms(lambda: codec.encode(depth_m), total_bytes=7 * pixels)
    theirs = best_ms(lambda: hilbertmap.depth_to_rgb(depth_m), repeat=3)
    ratios = {"x hilbertmap": (theirs / ms, ">= 15"), "x copy": (ms / copy, "<= 5")}
    row("walk encode", ms, **ratios)
    theirs = best_ms(lambda: hilbertmap.rgb_to_depth(rgb / 255), repeat=2)
    for what, call in {
        "walk decode (depth + residual)": lambda: codec.decode(rgb),
        'walk decode, edges="nearest"': lambda: codec.decode(rgb, edges="nearest"),
    }.items():
        ms, copy = beside_copy_ms(call, total_bytes=11 * pixels)
        ratios = {"x hilbertmap": (theirs / ms, ">= 200"), "x copy": (ms / copy, "<= 6")}
        row(what, ms, **ratios)
    noise = np.random.default_rng(0).normal(0, 4, rgb.shape)
    noisy = np.clip(np.rint(rgb + noise), 0, 255).astype(np.uint8)
    row("walk decode, noise 4, nearest", best_ms(lambda: codec.decode(noisy, edges="nearest")))
    row("walk decode, noise 4, snap", best_ms(lambda: codec.decode(noisy), repeat=8))
    floats = noisy.astype(np.float32) / 255
    row("walk decode, floats", best_ms(lambda: codec.decode(floats, edges="nearest"), repeat=5))
    places = np.random.default_rng(0).integers(0, 2**24, 512 * 512).astype(np.uint32)
    cells = hilbert_cells(places, order=8)
    theirs = best_ms(lambda: hilbert.decode(places, 3, 8), repeat=2)
    ms = best_ms(lambda: hilbert_cells(places, order=8))
    row("order 8, place to colour, 512x512", ms, **{"x numpy-hilbert": (theirs / ms, ">= 100")})
    theirs = best_ms(lambda: hilbert.encode(cells, 3, 8), repeat=2)
    ms = best_ms(lambda: hilbert_places(cells, order=8))
    row("order 8, colour to place, 512x512", ms, **{"x numpy-hilbert": (theirs / ms, ">= 100")})
    for order in (2, 4, 8):
        other = DepthCodec(curve="hilbert", order=order)
        coded = other.encode(depth_m)
        row(f"hilbert {order} encode", best_ms(partial(other.encode, depth_m), repeat=5))
        row(f"hilbert {order} decode", best_ms(partial(other.decode, coded), repeat=5))
    normals = NormalCodec()
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    row("normals decode", best_ms(lambda: normals.decode(picture)))
    palette = PaletteCodec.automatic([str(i) for i in range(19)])
    row("palette decode, 19 classes", best_ms(lambda: palette.decode(picture), repeat=10))
    objects, instances = instance_picture(), InstanceCodec()
    ms = best_ms(lambda: instances.decode(objects), repeat=20)
    found = len(instances.decode(objects)[1])
    row(f"instances, 1024x1024, {found} objects", ms, **{"absolute": (ms, "<= 50")})
    scale = two_threads(codec, rgb)
    row("walk decode, two threads", float("nan"), **{"x one thread": (scale, ">= 1.7")})
    ms = import_ms()
    row("import teacher + codecs beyond numpy", ms, **{"absolute": (ms, "< 300")})
    return rows


if __name__ == "__main__":
    result = measure()
    if len(sys.argv) > 1:
        Path(sys.argv[1], "bench_codecs.json").write_text(json.dumps(result, indent=1))
