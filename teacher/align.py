"""Affine answers -> metres: one a and one b per image, fitted robustly in the teacher's own space.

A teacher that answers up to scale and shift gives y; the anchor gives metres z for some pixels.
With g(z) = z, 1/z, ln z or sqrt z, by the space of the answer, we solve g = a y + b, a > 0, and
take z = g^-1(a y + b) everywhere. Solving in another space would bend the answer.

Three solvers: closed-form weighted least squares; RANSAC with the inlier threshold of Depth
Anything 3 (arXiv 2511.10647, section 4.2: a > 0, mean absolute deviation from the median residual);
truncated weighted L1 (the objective of MoGe's alignment). An image whose fit cannot be trusted
raises `AlignmentError` with the reason; where the fit leaves no positive depth, it is unknown.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from teacher.label import Answer, LabelError, Space, Task

METHODS = ("ransac", "least-squares", "truncated-l1")
AFFINE = (
    Space.AFFINE_DEPTH,
    Space.AFFINE_DISPARITY,
    Space.AFFINE_LOG_DEPTH,
    Space.AFFINE_SQRT_DEPTH,
)
MIN_POINTS = 10  # fewer say nothing about their own outliers
MIN_SPREAD = 1e-3  # of the anchor, standard deviation of log depth among the points used
HYPOTHESES, SAMPLE, ROUNDS = 300, 2000, 8  # RANSAC: lines tried, points each is judged on


class AlignmentError(LabelError):
    """An image whose scale cannot be found; the text is the reason of its rejection."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """What made an answer metric: g(z) = a y + b.

    Attributes:
        space: of the answer, which names g.
        a: scale, positive; b: shift, both in units of g.
        covariance: of (a, b): (var a, cov a b, var b), from the inliers, as if pixels were
            independent; for dense anchors that is optimistic.
        spread: mean absolute residual of the inliers in units of g (a Laplace scale).
        residual: median |ln(z / anchor)| over all anchor points; None when it cannot be known.
        points: anchor points used; inliers: the share of them that the fit kept.
        method: the solver.
    """

    space: Space
    a: float
    b: float
    covariance: tuple[float, float, float] = (0.0, 0.0, 0.0)
    spread: float = 0.0
    residual: float | None = None
    points: int
    inliers: float = 1.0
    method: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as stored in a label's provenance."""
        about = dataclasses.asdict(self)
        about["covariance"] = list(self.covariance)
        return about | {"space": str(self.space)}


def to_space(depth_m: np.ndarray, space: Space) -> np.ndarray:
    """g(z) in float64; ``depth_m`` positive and finite."""
    z = np.asarray(depth_m, np.float64)
    if space is Space.AFFINE_DISPARITY:
        return 1 / z
    if space is Space.AFFINE_LOG_DEPTH:
        return np.log(z)
    return np.sqrt(z) if space is Space.AFFINE_SQRT_DEPTH else z


def to_depth(g: np.ndarray, space: Space) -> np.ndarray:
    """The inverse of `to_space`; NaN where no positive finite depth has that value."""
    g = np.asarray(g, np.float64)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if space is Space.AFFINE_LOG_DEPTH:
            z = np.exp(g)
        else:
            positive = np.where(g > 0, g, np.nan)
            z = positive
            if space is Space.AFFINE_DISPARITY:
                z = 1 / positive
            elif space is Space.AFFINE_SQRT_DEPTH:
                z = positive**2
        return np.where((z > 0) & (z <= np.finfo(np.float32).max), z, np.nan)


def log_slope(g: np.ndarray, space: Space) -> np.ndarray:
    """|d ln z / d g|: turns a deviation in the teacher's space into one of log depth."""
    if space is Space.AFFINE_LOG_DEPTH:
        return np.ones_like(g)
    return (2.0 if space is Space.AFFINE_SQRT_DEPTH else 1.0) / g


def least_squares(y: np.ndarray, g: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """(a, b) that minimise sum w (a y + b - g)^2, in closed form about the weighted means."""
    total = w.sum()
    mean_y, mean_g = (w @ y) / total, (w @ g) / total
    dy = y - mean_y
    a = float((w * dy) @ (g - mean_g) / ((w * dy) @ dy))
    return a, float(mean_g - a * mean_y)


def deviation(residuals: np.ndarray) -> float:
    """Mean absolute deviation from the median residual: the published threshold."""
    return float(np.abs(residuals - np.median(residuals)).mean())


def ransac(y: np.ndarray, g: np.ndarray, w: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(a, b, inliers [N] bool): lines through two points, judged by truncated residuals.

    The threshold is `deviation` of the residuals: first of plain least squares, then again among
    the inliers it left, as long as more than half of the points stay. Points are counted, weights
    enter the fit to the inliers alone: in disparity they grow with z^2, and points wrongly taken
    for far would outvote the rest of the image. Deterministic.
    """
    rng = np.random.Generator(np.random.Philox(key=len(y)))
    few = rng.choice(len(y), min(SAMPLE, len(y)), replace=False)
    i, j = rng.choice(few, (2, HYPOTHESES))
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = (g[i] - g[j]) / (y[i] - y[j])
    keep = np.isfinite(slopes) & (slopes > 0)
    slopes, shifts = slopes[keep], (g[i] - slopes * y[i])[keep]
    a, b = least_squares(y, g, np.ones(len(y)))
    if not len(slopes):  # no two points rise together
        return a, b, np.ones(len(y), bool)
    off = np.abs(slopes[:, None] * y[few] + shifts[:, None] - g[few])
    inside, smallest = np.ones(len(y), bool), 1e-9 * (np.abs(g).max() + 1e-300)
    for _ in range(ROUNDS):
        residuals = a * y + b - g
        limit = max(deviation(residuals[inside]), smallest)
        best = int(np.argmin(np.minimum(off, limit).sum(1)))
        close = np.abs(slopes[best] * y + shifts[best] - g) <= limit
        if close.mean() <= 0.5 or np.ptp(y[close]) == 0:
            break
        a, b = least_squares(y[close], g[close], w[close])
        if np.array_equal(close, inside):
            break
        inside = close
    return a, b, inside


def truncated_l1(y: np.ndarray, g: np.ndarray, w: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(a, b, inliers): a minimum of sum w min(limit, |a y + b - g|), from RANSAC's line downhill.

    Majorise-minimise: iterated least squares with weights 1 / |residual|; ``limit`` is RANSAC's
    last threshold, three times (so that the tails of the noise still pull).
    """
    a, b, inside = ransac(y, g, w)
    residuals = a * y + b - g
    limit = max(3 * deviation(residuals[inside]), 1e-9 * np.abs(g).max())
    for _ in range(50):
        size = np.abs(a * y + b - g)
        inside = size <= limit
        pull = np.where(inside, w / np.maximum(size, 1e-4 * limit), 0)
        if inside.sum() < 2 or np.ptp(y[inside]) == 0:
            break
        before = a, b
        a, b = least_squares(y, g, pull)
        if abs(a - before[0]) * np.ptp(y) + abs(b - before[1]) < 1e-9 * limit:
            break
    return a, b, inside


def fit(
    values: np.ndarray,
    anchor_m: np.ndarray,
    *,
    space: Space,
    weights: np.ndarray | None = None,
    method: str = "ransac",
) -> Alignment:
    """The alignment of ``values`` [H, W] in ``space`` to ``anchor_m`` [H, W] metres (NaN unknown).

    Args:
        values: the teacher's answer; pixels that are not finite take no part.
        anchor_m: z-depth in metres; NaN, inf and what is not positive take no part.
        space: affine depth, disparity, log depth or sqrt depth.
        weights: [H, W], inverse variances in units of g; None: all alike.
        method: one of `METHODS`.

    Raises:
        AlignmentError: too few points, a flat answer, a flat anchor, or a scale that is not
            positive.
    """
    if space not in AFFINE or method not in METHODS:
        raise LabelError(f"align: got {space!r}, {method!r}; expected one of {AFFINE}, {METHODS}")
    if values.shape != anchor_m.shape:
        raise LabelError(f"align: answer {values.shape}, anchor {anchor_m.shape}; same size needed")
    known = np.isfinite(values) & np.isfinite(anchor_m) & (np.nan_to_num(anchor_m) > 0)
    if weights is not None:
        known &= np.isfinite(weights) & (np.nan_to_num(weights) > 0)
    y, z = values[known].astype(np.float64), anchor_m[known].astype(np.float64)
    w = np.ones(len(y)) if weights is None else weights[known].astype(np.float64)
    if len(y) < MIN_POINTS:
        raise AlignmentError(
            f"the anchor has {len(y)} usable points in this image, at least {MIN_POINTS} are needed"
        )
    if np.log(z).std() < MIN_SPREAD:
        raise AlignmentError("the anchor is flat: all its points have the same depth")
    _refuse_flat(y)
    w = w / w.mean()
    g = to_space(z, space)
    if method == "least-squares":
        a, b = least_squares(y, g, w)
        inside = np.ones(len(y), bool)
    else:
        a, b, inside = (ransac if method == "ransac" else truncated_l1)(y, g, w)
    _refuse_flat(y[inside])
    if not a > 0:
        raise AlignmentError(
            f"negative scale: the answer falls where the anchor's {space.removeprefix('affine ')} "
            f"rises (a = {a:.4g})"
        )
    residuals = a * y + b - g
    with np.errstate(invalid="ignore"):
        off = np.abs(np.log(to_depth(a * y + b, space) / z))
    return Alignment(
        space=space,
        a=a,
        b=b,
        covariance=_covariance(y[inside], w[inside], noise=1.4826 * np.median(np.abs(residuals))),
        spread=float(w[inside] @ np.abs(residuals[inside]) / w[inside].sum()),
        residual=float(np.median(np.where(np.isnan(off), np.inf, off))),
        points=len(y),
        inliers=float(inside.mean()),
        method=method,
    )


def _refuse_flat(y: np.ndarray) -> None:
    if y.std() <= 1e-6 * max(float(np.abs(y).max()), 1e-30):
        raise AlignmentError("the answer is flat where the anchor has points; no scale fits it")


def _covariance(y: np.ndarray, w: np.ndarray, *, noise: float) -> tuple[float, float, float]:
    """noise^2 (X^T W X)^-1 for X = [y, 1]; ``noise`` is a robust standard deviation of g."""
    total, mean = w.sum(), (w @ y) / w.sum()
    var_a = noise**2 / float(w @ (y - mean) ** 2)
    return var_a, -var_a * float(mean), noise**2 / float(total) + var_a * float(mean) ** 2


def fit_range(values: np.ndarray, *, near_m: float, far_m: float, space: Space) -> Alignment:
    """The alignment that puts the nearest 2 % of the pixels at ``near_m``, the last at ``far_m``.

    The weakest anchor: nothing in it can contradict the answer, so its residual is unknown.
    """
    if not 0 < near_m < far_m < math.inf:
        raise LabelError(f"anchor near_m={near_m} far_m={far_m}: expected 0 < near_m < far_m")
    y = values[np.isfinite(values)].astype(np.float64)
    if len(y) < MIN_POINTS:
        raise AlignmentError(f"the answer has {len(y)} known pixels, {MIN_POINTS} are needed")
    _refuse_flat(y)
    low, high = np.quantile(y, [0.02, 0.98])
    first, last = to_space(np.array([near_m, far_m]), space)
    if space is Space.AFFINE_DISPARITY:
        first, last = last, first
    if not high > low:
        raise AlignmentError("the answer is flat: 96 % of its pixels have one value")
    a = float((last - first) / (high - low))
    b = float(first - a * low)
    return Alignment(space=space, a=a, b=b, points=2, method="range")


def weights_of(depth_m: np.ndarray, uncertainty: np.ndarray, *, space: Space) -> np.ndarray:
    """Inverse variances in units of g, of an anchor with Laplace scales of log depth."""
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = log_slope(to_space(depth_m, space), space)
        return (slope / (math.sqrt(2) * np.maximum(uncertainty, 1e-3))) ** 2


def apply(answer: Answer, alignment: Alignment) -> Answer:
    """The answer in metres; unknown where a y + b stands for no positive depth, +inf stays sky.

    ``uncertainty`` becomes the Laplace scale of log depth: the teacher's own (a Laplace scale in
    units of y), the misfit to the anchor and the covariance of a and b are taken as independent,
    their variances add up in units of g and go through |d ln z / d g|.
    """
    y = answer.values.astype(np.float64)
    sky = np.isposinf(y)
    y = np.where(np.isfinite(y), y, np.nan)
    g = alignment.a * y + alignment.b
    depth_m = to_depth(g, alignment.space)
    var_a, cov, var_b = alignment.covariance
    variance = np.maximum(var_a * y**2 + 2 * cov * y + var_b, 0) + 2 * alignment.spread**2
    if answer.uncertainty is not None:
        variance = variance + 2 * (alignment.a * answer.uncertainty.astype(np.float64)) ** 2
    known = np.isfinite(depth_m)
    scale = np.full(y.shape, np.nan, np.float32)
    scale[known] = np.sqrt(variance[known] / 2) * log_slope(g[known], alignment.space)
    has_uncertainty = answer.uncertainty is not None or alignment.residual is not None
    return dataclasses.replace(
        answer,
        task=Task.DEPTH,
        space=Space.METRIC,
        values=np.where(sky, np.inf, depth_m).astype(np.float32),
        uncertainty=scale if has_uncertainty else None,
    )
