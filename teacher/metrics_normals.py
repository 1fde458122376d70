"""The ruler for surface normals: angles per image, and pooled over a set.

Both maps are in one frame (x right, y up, z toward the viewer, see `teacher.label`); the ruler
cannot see a wrong one: on an indoor scene a flipped x still scores a median near 34 deg.
"""

from __future__ import annotations

import math

import numpy as np

from teacher.metrics_checks import check_pair

MISSING_DEG = 90.0  # what a normal that was not predicted counts as
WITHIN_DEG = {"within_5": 5.0, "within_11_25": 11.25, "within_22_5": 22.5, "within_30": 30.0}


def angles_deg(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, int]:
    """Angle [deg] between predicted and true normals, float64 [H, W], and how many are missing.

    Both [H, W, 3], of any length. Judged where the truth has three finite numbers and is not zero;
    elsewhere the angle is NaN. A missing prediction (a NaN or inf in it, or the zero vector) on a
    judged pixel has the angle 90.
    """
    check_pair("normals", pred, truth, vectors=True)
    p, g = pred.astype(np.float64), truth.astype(np.float64)
    p_length, g_length = (np.sqrt(np.einsum("hwc,hwc->hw", n, n)) for n in (p, g))
    judged = np.isfinite(g_length) & (g_length > 0)
    present = np.isfinite(p_length) & (p_length > 0)
    both = judged & present
    cosine = np.zeros(truth.shape[:2])
    np.divide(np.einsum("hwc,hwc->hw", p, g), p_length * g_length, out=cosine, where=both)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    angle[judged & ~present] = MISSING_DEG
    angle[~judged] = np.nan
    return angle, int((judged & ~present).sum())


def normal_metrics(pred: np.ndarray, truth: np.ndarray) -> dict[str, float | int]:
    """Angular errors of one normal map [H, W, 3], both in one frame (`angles_deg`).

    With a = acos(p . g / (|p| |g|)) in degrees (Fouhey et al. 2013; Eigen and Fergus 2015):
    ``mean_deg``, ``median_deg``; ``within_5``, ``within_11_25``, ``within_22_5``, ``within_30``
    shares with a strictly below; ``count``, ``coverage``. A missing prediction counts as 90 deg.
    Averaged over images this is Marigold's protocol; DSINE's is `PooledNormals`.
    """
    angle, missing = angles_deg(pred, truth)
    angle = angle[~np.isnan(angle)]
    if not angle.size:
        names = ("mean_deg", "median_deg", *WITHIN_DEG, "coverage")
        return {**dict.fromkeys(names, math.nan), "count": 0}
    return {
        "mean_deg": float(angle.mean()),
        "median_deg": float(np.median(angle)),
        **{name: float((angle < bound).mean()) for name, bound in WITHIN_DEG.items()},
        "count": int(angle.size),
        "coverage": 1 - missing / angle.size,
    }


class PooledNormals:
    """Angular errors over all pixels of a set at once (the DSINE protocol), in constant memory.

    Mean and shares are exact; the median comes from a histogram of 0.01 deg bins, so it is within
    0.01 deg. Results are named ``pooled_*``: they differ from the mean of per-image values.
    """

    BIN_DEG = 0.01

    def __init__(self) -> None:
        """Start empty."""
        self._bins = np.zeros(round(180 / self.BIN_DEG) + 1, np.int64)
        self._within = dict.fromkeys(WITHIN_DEG, 0)
        self._sum_deg, self._missing = 0.0, 0

    def add(self, pred: np.ndarray, truth: np.ndarray) -> None:
        """Count one image, as `normal_metrics` judges it."""
        angle, missing = angles_deg(pred, truth)
        angle = angle[~np.isnan(angle)]
        self._bins += np.bincount(
            (angle / self.BIN_DEG).astype(np.int64), minlength=len(self._bins)
        )
        for name, bound in WITHIN_DEG.items():
            self._within[name] += int((angle < bound).sum())
        self._sum_deg += float(angle.sum())
        self._missing += missing

    def result(self) -> dict[str, float | int]:
        """``pooled_mean_deg``, ``pooled_median_deg``, ``pooled_within_*``, ``count``, coverage."""
        count = int(self._bins.sum())
        per = 1 / count if count else math.nan
        middle = [(count - 1) // 2, count // 2]  # two neighbours when the count is even
        median_bin = np.searchsorted(self._bins.cumsum(), middle, side="right").mean()
        return {
            "pooled_mean_deg": self._sum_deg * per,
            "pooled_median_deg": float(median_bin + 0.5) * self.BIN_DEG if count else math.nan,
            **{f"pooled_{name}": n * per for name, n in self._within.items()},
            "count": count,
            "coverage": 1 - self._missing * per,
        }
