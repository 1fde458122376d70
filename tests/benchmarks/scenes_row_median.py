"""How far a guess from the row alone gets: the row medians of one label set judged on another.

    python tests/benchmarks/scenes_row_median.py TRAIN_SET HELDOUT_SET [...]

Depth between 0.3 and 40 m; delta1 per image, then the mean. Prints JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from teacher.label import Task
from teacher.store import LabelSet

NEAR_M, FAR_M = 0.3, 40.0


def known_depths(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Depths [N, H, W] with NaN outside the bounds, and the pixels per class."""
    labels = list(LabelSet(path))
    depth_m = np.stack([label.values[Task.DEPTH] for label in labels])
    pixels = sum(np.bincount(x.values[Task.SEMANTIC].ravel(), minlength=256) for x in labels)
    return np.where((depth_m >= NEAR_M) & (depth_m <= FAR_M), depth_m, np.nan), pixels


def main(train: str, *held_out: str) -> None:
    """Print the baseline of every held-out set and its class shares in percent."""
    depth_m, _ = known_depths(train)
    guess = np.nanmedian(depth_m, axis=(0, 2))[None, :, None]
    report: dict = {"train": train, "train_images": len(depth_m)}
    for path in held_out:
        truth, pixels = known_depths(path)
        right = np.maximum(guess / truth, truth / guess) < 1.25
        delta1 = right.sum((1, 2)) / np.isfinite(truth).sum((1, 2))
        spread = np.nanpercentile(truth, [5, 50, 95]).round(2).tolist()
        share = {name: round(100 * float(pixels[k] / pixels.sum()), 2)
                 for k, name in LabelSet(path).classes.items()}  # fmt: skip
        report[path] = {"images": len(truth), "delta1": round(float(delta1.mean()), 3),
                        "depth_p5_p50_p95_m": spread,
                        "share_percent": share}  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
