"""Alignment on the six real pairs of ../shared/rgbd: error of depth, solver by solver, and time.

Per image and seed: 300 sensor points with 1 % noise, 30 % of them wrong by a factor 0.3 to 3, as
anchor; the answer is the sensor's depth in the teacher's space, its log bent by a smooth 3 % wave,
stripped of scale and shift. Run: `python tests/benchmarks/align_real.py ../shared/rgbd`.
"""

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from teacher.align import AFFINE, METHODS, fit, to_depth, to_space

UNITS_PER_M = {"redwood": 1000, "nyu": 1000, "tum": 5000, "kitti": 256}
SEEDS = 5


def load(path):
    raw = np.asarray(Image.open(path)).astype(np.float64)
    return np.where(raw > 0, raw / UNITS_PER_M[path.name.split("_")[0]], np.nan)


def one(depth_m, *, space, method, seed):
    """Mean |z / sensor - 1| over all pixels that the sensor knows."""
    known = np.isfinite(depth_m)
    rows, columns = np.indices(depth_m.shape) / 80
    answer = np.full(depth_m.shape, np.nan)
    bent = depth_m * np.exp(0.03 * np.sin(rows) * np.cos(columns))
    answer[known] = (to_space(bent[known], space) - 0.05) / 3
    rng = np.random.default_rng(seed)
    points = np.argwhere(known)[rng.choice(known.sum(), 300, replace=False)]
    z = depth_m[tuple(points.T)] * np.exp(rng.normal(0, 0.01, 300))
    z[:90] *= rng.uniform(0.3, 3, 90)
    anchor_m = np.full(depth_m.shape, np.nan)
    anchor_m[tuple(points.T)] = z
    found = fit(answer, anchor_m, space=space, method=method)
    return np.nanmean(np.abs(to_depth(found.a * answer + found.b, space) / depth_m - 1))


def main(folder):
    pairs = [load(path) for path in sorted(Path(folder).glob("*.depth.png"))]
    print("| space | method | mean error | worst image |\n|---|---|---|---|")
    for space in AFFINE:
        for method in METHODS:
            found = [
                one(depth_m, space=space, method=method, seed=seed)
                for depth_m in pairs
                for seed in range(SEEDS)
            ]
            print(f"| {space} | {method} | {np.mean(found):.2%} | {np.max(found):.2%} |")
    dense = pairs[-1]
    for method in METHODS:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            fit(1.1 * dense, dense, space=AFFINE[0], method=method)
            times.append(time.perf_counter() - start)
        size = f"{dense.shape[1]}x{dense.shape[0]}"
        print(f"{method}: {1e3 * min(times):.0f} ms for a dense {size} anchor (best of 5)")


if __name__ == "__main__":
    main(sys.argv[1])
