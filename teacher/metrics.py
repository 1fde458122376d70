"""The ruler: every number that compares a prediction with a truth, NumPy in, floats out.

One reduction for all: a value per image, then the mean over images (`teacher.score`). What must not
be averaged per image is an accumulator fed image by image: `SemanticConfusion`, `PanopticTally`,
`PooledNormals`, `CalibrationBins`.

Rules that hold everywhere here:

* The truth decides which pixels are judged; an unknown truth is never judged.
* A prediction that is missing (NaN, unknown class) on a judged pixel is a miss, never left out;
  ``coverage`` is the share of judged pixels that carry a prediction.
* With nothing to judge the result is NaN and ``count`` is 0.
* Predictions come at the truth's resolution (bring the prediction to the truth, never the truth to
  the prediction: interpolating through holes costs a perfect answer 2 % of AbsRel).

This module holds depth and boundaries; `teacher.metrics_normals`, `teacher.metrics_segmentation`
and `teacher.metrics_confidence` hold the rest, importable from here.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Float64

from teacher.errors import UsageError
from teacher.metrics_checks import check_pair
from teacher.metrics_confidence import (
    CalibrationBins,
    auroc,
    ause,
    calibration_error,
    temporal_flicker,
)
from teacher.metrics_normals import PooledNormals, angles_deg, normal_metrics
from teacher.metrics_segmentation import (
    PanopticTally,
    SemanticConfusion,
    panoptic_quality,
    semantic_metrics,
)

__all__ = [
    "ALIGNMENTS",
    "CalibrationBins",
    "PanopticTally",
    "PooledNormals",
    "SemanticConfusion",
    "align_depth",
    "angles_deg",
    "auroc",
    "ause",
    "boundary_f1",
    "calibration_error",
    "depth_error_maps",
    "depth_metrics",
    "judged_depth",
    "normal_metrics",
    "panoptic_quality",
    "semantic_metrics",
    "temporal_flicker",
]

ALIGNMENTS = (None, "scale", "depth", "disparity")
DEPTH_NAMES = (
    "abs_rel",
    "sq_rel",
    "rmse",
    "rmse_log",
    "log10",
    "silog",
    "delta1",
    "delta2",
    "delta3",
)
DELTA = 1.25
NEAREST_DISPARITY = 1e-3  # 1/m: an aligned disparity is clipped here before it is inverted
EDGE_RATIOS = np.linspace(1.05, 1.25, 10)
NEAREST_M = 1e-6  # a depth is clipped here before ratios are taken


def judged_depth(
    truth: Float[np.ndarray, "h w"], *, min_m: float | int, max_m: float | int
) -> Bool[np.ndarray, "h w"]:
    """The pixels that depth metrics judge: known, finite, strictly inside (min_m, max_m).

    Depth beyond the bounds is dropped, never clipped; sky (+inf) is judged apart.
    """
    if not (0 < min_m < max_m and math.isfinite(max_m)):
        raise UsageError(
            f"depth bounds: min_m={min_m:g}, max_m={max_m:g}, expected 0 < min_m < max_m < inf; "
            "for an unbounded protocol pass a large max_m"
        )
    return (truth > min_m) & (truth < max_m)


def _line(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Least squares (s, t) of s x + t = y; a constant x gives s = 0."""
    dx = x - x.mean()
    square = float(dx @ dx)
    scale = float(dx @ (y - y.mean())) / square if square > 0 else 0.0
    return scale, float(y.mean() - scale * x.mean())


def align_depth(
    pred: np.ndarray,
    truth: np.ndarray,
    *,
    min_m: float | int,
    max_m: float | int,
    align: str | None,
) -> np.ndarray:
    """Bring a prediction [H, W] to metres with the best fit on the judged pixels.

    ``align``:

    * ``None``: the prediction is metric; returned as float64.
    * ``"scale"``: times median(truth) / median(pred) (Eigen 2014 as used by Monodepth2).
    * ``"depth"``: s p + t, least squares against depth (MiDaS, Marigold).
    * ``"disparity"``: s p + t, least squares against 1 / truth on p > 0, clipped at 1e-3 1/m, then
      inverted (MiDaS, Depth Anything).

    NaN stays NaN and +inf (sky) stays +inf. Where no fit exists (no judged pixel with a prediction,
    or a median that is not positive) every pixel comes back NaN, thus counts as missing.
    """
    check_pair("align_depth", pred, truth)
    if align not in ALIGNMENTS:
        raise UsageError(f"align is {align!r}, expected one of {ALIGNMENTS}")
    judged = judged_depth(truth, min_m=min_m, max_m=max_m)
    p = pred.astype(np.float64)
    if align is None:
        return p
    fit = judged & np.isfinite(p)
    if align == "disparity":
        fit &= p > 0
    x, y = p[fit], truth[fit].astype(np.float64)
    if not x.size or (align == "scale" and not np.median(x) > 0):
        return np.full_like(p, np.nan)
    sky = np.isposinf(p)
    p[sky] = np.nan
    if align == "scale":
        p *= np.median(y) / np.median(x)
    elif align == "depth":
        scale, shift = _line(x, y)
        p = scale * p + shift
    else:
        scale, shift = _line(x, 1 / y)
        p = 1 / np.maximum(scale * p + shift, NEAREST_DISPARITY)
    p[sky] = np.inf
    return p


def depth_metrics(
    pred: np.ndarray,
    truth: np.ndarray,
    *,
    min_m: float | int,
    max_m: float | int,
    align: str | None = None,
) -> dict[str, float | int]:
    """Errors of one depth map [H, W] in metres (affine when ``align`` is given, see `align_depth`).

    Over the n judged pixels (`judged_depth`) with prediction p clipped to [min_m, max_m], truth g,
    l = ln p - ln g (Eigen et al. 2014, arXiv 1406.2283, section 4; delta: Ladicky et al. 2014):

    * ``abs_rel`` mean |p - g| / g; ``sq_rel`` mean (p - g)^2 / g [m]; ``rmse`` [m];
    * ``rmse_log`` sqrt(mean l^2); ``log10`` mean |log10 p - log10 g|;
    * ``silog`` 100 sqrt(mean l^2 - (mean l)^2), the full population variance (lambda = 1);
    * ``delta1..3`` share with max(p/g, g/p) < 1.25^k, strictly;
    * ``count`` n; ``coverage`` the share of the n pixels with a prediction (sky is one).

    A predicted sky (+inf) counts as max_m. A missing prediction (NaN) is outside every delta and
    enters the errors as min_m (ZoeDepth's rule). Not covered: true sky, which is not judged here.
    """
    check_pair("depth_metrics", pred, truth)
    judged = judged_depth(truth, min_m=min_m, max_m=max_m)
    if align is not None:
        pred = align_depth(pred, truth, min_m=min_m, max_m=max_m, align=align)
    p, g = pred[judged].astype(np.float64), truth[judged].astype(np.float64)
    if not g.size:
        return {**dict.fromkeys(DEPTH_NAMES, math.nan), "count": 0, "coverage": math.nan}
    missing = np.isnan(p)
    p[missing] = min_m
    np.clip(p, min_m, max_m, out=p)
    numbers = _depth_errors(p, g, missing)
    return {**numbers, "count": int(g.size), "coverage": float(1 - missing.mean())}


def _depth_errors(
    p: Float64[np.ndarray, " n"], g: Float64[np.ndarray, " n"], missing: Bool[np.ndarray, " n"]
) -> dict[str, float]:
    """The nine numbers of `depth_metrics` on pixels that are already masked, filled and clipped."""
    error, ratio = p - g, p / g
    log_ratio = np.log(ratio)
    squared = error * error
    numbers = {
        "abs_rel": float((np.abs(error) / g).mean()),
        "sq_rel": float((squared / g).mean()),
        "rmse": math.sqrt(squared.mean()),
        "rmse_log": math.sqrt((log_ratio * log_ratio).mean()),
        "log10": float(np.abs(log_ratio).mean() / math.log(10)),
        "silog": float(100 * log_ratio.std()),
    }
    ratio = np.maximum(ratio, g / p)
    ratio[missing] = np.inf
    for power in (1, 2, 3):
        numbers[f"delta{power}"] = float((ratio < DELTA**power).mean())
    return numbers


def depth_error_maps(
    pred: np.ndarray, truth: np.ndarray, *, min_m: float | int, max_m: float | int
) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel |p - g| / g and max(p/g, g/p), float64 [H, W], as `depth_metrics` counts them.

    NaN where nothing is judged; a missing prediction has the ratio inf.
    """
    check_pair("depth_error_maps", pred, truth)
    judged = judged_depth(truth, min_m=min_m, max_m=max_m)
    g = np.where(judged, truth, np.nan).astype(np.float64)
    p = np.clip(np.where(np.isnan(pred), min_m, pred).astype(np.float64), min_m, max_m)
    ratio = np.maximum(p / g, g / p)
    ratio[judged & np.isnan(pred)] = np.inf
    return np.abs(p - g) / g, ratio


def _edge_counts(
    p_from: np.ndarray, p_to: np.ndarray, g_from: np.ndarray, g_to: np.ndarray
) -> np.ndarray:
    """Predicted, true and common edges of one direction at every threshold: [3, T]."""
    with np.errstate(invalid="ignore", over="ignore"):  # sky over sky is NaN: no edge
        p_ratio, g_ratio = p_from / p_to, g_from / g_to
    p_ratio[np.isnan(g_from) | np.isnan(g_to)] = 0.0  # nobody is judged where the truth is unknown
    lowest = EDGE_RATIOS[0]
    some = (p_ratio > lowest) | (g_ratio > lowest)
    # level = how many thresholds lie below the ratio, so "edge at threshold k" is "level > k"
    levels = [np.searchsorted(EDGE_RATIOS, np.nan_to_num(r[some])) for r in (p_ratio, g_ratio)]
    steps = len(EDGE_RATIOS)
    exact = [np.bincount(lv, minlength=steps + 1) for lv in (*levels, np.minimum(*levels))]
    return np.stack([e[::-1].cumsum()[::-1][1:] for e in exact])


def boundary_f1(pred: np.ndarray, truth: np.ndarray) -> float:
    """Scale-invariant boundary F1 of depth [H, W], metres or any scale (Depth Pro, section 4).

    Bochkovskii et al. 2024, arXiv 2410.02073, eq. 3-5. A pixel pair of 4-neighbours is an edge at
    threshold t where depth_i / depth_j > t, in four directions; per threshold precision and recall
    are means over directions, F1 that of the means; the score is the mean over ten t in 1.05..1.25
    weighted by t. No tolerance: one pixel of shift costs most of the score.

    Unknown: a pair with a NaN truth is not judged at all; a NaN prediction on a judged pair is no
    edge, so it misses recall and never harms precision. Sky (+inf) is infinitely far: the
    outline of an object against the sky is an edge, sky beside sky is none.

    Empty cases, where the reference counts 0 even for a perfect answer: a threshold without
    any true edge is left out; a direction without true edges is left out of recall, and of
    precision if nothing was predicted there either. Equal to the reference wherever the truth has
    edges in all directions at all thresholds. NaN when the truth has no edge at all.
    """
    check_pair("boundary_f1", pred, truth)
    p = np.maximum(pred, NEAREST_M, dtype=np.float64)
    g = np.maximum(truth, NEAREST_M, dtype=np.float64)
    left, right, top, bottom = np.s_[:, :-1], np.s_[:, 1:], np.s_[:-1], np.s_[1:]
    pairs = ((left, right), (right, left), (top, bottom), (bottom, top))
    counts = np.stack([_edge_counts(p[i], p[j], g[i], g[j]) for i, j in pairs])  # [4, 3, T]
    predicted, true, common = counts.transpose(1, 0, 2).astype(np.float64)  # each [4, T]
    asked = true.any(axis=0)
    if not asked.any():
        return math.nan
    predicted, true, common = predicted[:, asked], true[:, asked], common[:, asked]
    recall = (common / np.maximum(true, 1)).sum(0) / (true > 0).sum(0)
    precision = (common / np.maximum(predicted, 1)).sum(0) / (predicted + true > 0).sum(0)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(np.average(f1, weights=EDGE_RATIOS[asked]))
