"""The ruler for what a model says about itself: uncertainty, confidence, steadiness over time."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata

from teacher.errors import UsageError
from teacher.metrics_checks import check_same

SPARSIFICATION_STEPS = 50


def _area(error: np.ndarray, order: np.ndarray, *, root: bool) -> float:
    """Area under the sparsification curve of ``error`` when the largest ``order`` goes first."""
    rank = np.argsort(order, kind="stable")
    ordered, mean = order[rank], np.cumsum(error[rank]) / np.arange(1, error.size + 1)
    steps = SPARSIFICATION_STEPS
    last = (
        (error.size - 1) * (steps - np.arange(steps)) // steps
    )  # percentile's index, rounded down
    kept = np.searchsorted(ordered, ordered[last], side="right")  # ties stay together
    curve = np.append(np.sqrt(mean[kept - 1]) if root else mean[kept - 1], 0.0)
    return float(np.trapezoid(curve, dx=1 / steps))


def ause(error: np.ndarray, uncertainty: np.ndarray, *, root: bool = False) -> dict[str, float]:
    """Area under the sparsification error, and the gain over random, of one image.

    Poggi et al. 2020, arXiv 2005.06209, section 4.2: at 50 steps leave out the most uncertain
    share, take the mean error of the rest (0 at 100 %), integrate over [0, 1] by trapezoids.
    ``ause`` = area(uncertainty) - area(oracle, which sorts by the error itself), 0 is perfect;
    ``aurg`` = error of all - area(uncertainty), higher is better and below 0 is worse than chance.
    Not normalised by the first point.

    ``error`` is per pixel, any shape, at least 0, NaN where it is not judged: |p - g| / g for
    AbsRel, angles in degrees, 1 - [ratio < 1.25] for delta1, squared metres with ``root=True`` for
    RMSE. ``uncertainty``, of the same shape, matters by its order alone, so pair this with a
    calibration number; a NaN there is the most uncertain of all. Nothing judged gives NaN.
    """
    check_same("ause", error=error, uncertainty=uncertainty)
    judged = ~np.isnan(error)
    e, u = error[judged].astype(np.float64), uncertainty[judged].astype(np.float64)
    if not e.size:
        return {"ause": math.nan, "aurg": math.nan}
    if e.min() < 0:
        raise UsageError(f"ause: the smallest error is {e.min():g}, expected 0 or more: pass sizes")
    area = _area(e, np.where(np.isnan(u), np.inf, u), root=root)
    everything = math.sqrt(e.mean()) if root else float(e.mean())
    return {"ause": area - _area(e, e, root=root), "aurg": everything - area}


def auroc(doubt: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that a wrong pixel is doubted more than a right one; ties count half.

    The Mann-Whitney statistic (Hanley and McNeil 1982): (R - n (n + 1) / 2) / (n m) with R the sum
    of the ranks of the n wrong ones among m right ones. ``wrong`` bool, same shape; a NaN in
    ``doubt`` is the most doubtful. NaN if everything or nothing is wrong.
    """
    check_same("auroc", doubt=doubt, wrong=wrong)
    n = int(np.count_nonzero(wrong))
    m = wrong.size - n
    if not n or not m:
        return math.nan
    ranks = rankdata(np.where(np.isnan(doubt), np.inf, doubt).ravel())
    return float((ranks[wrong.ravel()].sum() - n * (n + 1) / 2) / (n * m))


class CalibrationBins:
    """Confidence against accuracy in equal-width bins, pooled over a set (the norm for ECE)."""

    def __init__(self, *, bins: int = 15) -> None:
        """Start empty; bin b holds confidences in (b / bins, (b + 1) / bins]."""
        if bins < 1:
            raise UsageError(f"calibration: bins={bins}, expected at least 1")
        self._inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
        self._sums = np.zeros((3, bins))  # pixels, summed confidence, right pixels

    def add(self, confidence: np.ndarray, correct: np.ndarray) -> None:
        """Count pixels: ``confidence`` in [0, 1] (NaN: not judged), ``correct`` bool."""
        check_same("calibration", confidence=confidence, correct=correct)
        if correct.dtype != np.bool_:
            raise UsageError(f"calibration: correct is {correct.dtype}, expected bool")
        judged = ~np.isnan(confidence)
        c, right = confidence[judged].astype(np.float64), correct[judged]
        if c.size and not (c.min() >= 0 and c.max() <= 1):
            raise UsageError(
                f"calibration: confidence spans {c.min():g}..{c.max():g}, expected 0..1"
            )
        bins = self._sums.shape[1]
        index = np.searchsorted(self._inner_edges, c, side="left")
        for row, weights in enumerate((None, c, right.astype(np.float64))):
            self._sums[row] += np.bincount(index, weights=weights, minlength=bins)

    def result(self) -> dict[str, float | int | list[dict[str, float | int]]]:
        """``ece``, ``mce``, ``rmsce``, ``count`` and the non-empty ``bins`` (Guo et al. 2017).

        arXiv 1706.04599, eq. 3 and 5: ECE = sum_b n_b / n |acc_b - conf_b|, MCE the largest gap;
        RMSCE = sqrt(sum_b n_b / n (acc_b - conf_b)^2). Each bin: mean confidence, accuracy, count.
        """
        used = self._sums[0] > 0
        n, confidence, right = self._sums[:, used]
        total = int(n.sum())
        if not total:
            return {"ece": math.nan, "mce": math.nan, "rmsce": math.nan, "count": 0, "bins": []}
        conf, acc = confidence / n, right / n
        gap = np.abs(acc - conf)
        rows = zip(conf.tolist(), acc.tolist(), n.tolist(), strict=True)
        return {
            "ece": float((n * gap).sum() / total),
            "mce": float(gap.max()),
            "rmsce": math.sqrt((n * gap**2).sum() / total),
            "count": total,
            "bins": [{"confidence": c, "accuracy": a, "count": int(k)} for c, a, k in rows],
        }


def calibration_error(
    confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15
) -> dict[str, float | int | list[dict[str, float | int]]]:
    """`CalibrationBins` of arrays that are at hand at once; pool a set, ECE per image is biased."""
    tally = CalibrationBins(bins=bins)
    tally.add(confidence, correct)
    return tally.result()


def temporal_flicker(depth_m: np.ndarray, *, warped: np.ndarray | None = None) -> dict[str, float]:
    """How unsteady the depth of one clip [T, H, W] is, without any truth (our own definition).

    With r_t = p_t / p_{t-1} on pixels where both are known, finite and positive:

    * ``flicker`` the standard deviation over t of median(r_t): the whole frame breathing;
    * ``pixel_flicker`` the mean over t of median |ln r_t - median(ln r_t)|: what moves inside it.

    Both are 0 for a steady answer and blind to the scale of the clip. Meant for a camera that
    stands still; else pass ``warped`` [T-1, H, W], frame t-1 brought to frame t's pixels with its
    depth in frame t (NaN where nothing lands). A pair without common pixels is left out;
    ``pairs`` counts the rest. ``flicker`` needs two pairs, ``pixel_flicker`` one, else NaN.
    """
    if depth_m.ndim != 3:
        raise UsageError(f"temporal_flicker: depth_m has shape {depth_m.shape}, expected [T, H, W]")
    before = depth_m[:-1] if warped is None else warped
    check_same("temporal_flicker (warped against frames 1..T-1)", warped=before, d=depth_m[1:])
    medians, spreads = [], []
    whole = zip(depth_m[1:].astype(np.float64), before.astype(np.float64), strict=True)
    for depth, earlier in whole:
        both = (depth > 0) & (earlier > 0) & np.isfinite(depth) & np.isfinite(earlier)
        if both.any():
            log_ratio = np.log(depth[both] / earlier[both])
            middle = np.median(log_ratio)
            medians.append(float(np.median(depth[both] / earlier[both])))
            spreads.append(float(np.median(np.abs(log_ratio - middle))))
    return {
        "flicker": float(np.std(medians)) if len(medians) > 1 else math.nan,
        "pixel_flicker": float(np.mean(spreads)) if spreads else math.nan,
        "pairs": len(medians),
    }
