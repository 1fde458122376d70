"""A student made right for one camera or place: its depth's scale, its uncertainties' size.

A few true measurements give a and b of ``depth -> a depth + b`` and, per task, g and p of
``u -> g u^p``, all in closed form (p by a search along a line), and a table of how often a pixel of
a given uncertainty is right. Each is kept only if images that it was not fitted on get better by
more than chance: otherwise the student stays as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from teacher.calibrate import rising

FOLDS = 5
POWERS = (0.25, 2.5)  # of an uncertainty; beyond, it would say something else than it was taught
NEAR = 1.5
V = TypeVar("V")
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Fit(Generic[V]):
    """Two numbers or a table, and what cross-validation says of them.

    Attributes:
        values: (a, b) of a depth, (g, p) of an uncertainty, (uncertainties, probabilities) of a
            confidence; what they would be without a fit if not kept.
        kept: whether images that it was not fitted on got better by more than two standard errors.
        before, after: mean loss over images without and with, each image judged by the fit of the
            others (depth: |ln ratio|; uncertainty: negative log likelihood; confidence: Brier).
        images: with something to judge.
    """

    values: V
    kept: bool
    before: float
    after: float
    images: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; None where nothing could be judged."""
        losses = {"before": self.before, "after": self.after}
        judged = {k: v if math.isfinite(v) else None for k, v in losses.items()}
        return dataclasses.asdict(self) | {"values": np.asarray(self.values).tolist()} | judged


Two = tuple[float, float]
Table = tuple[np.ndarray, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]


def fit_affine(depth: np.ndarray, truth: np.ndarray, *, shift: bool = True) -> tuple[float, float]:
    """(a, b) of a d + b = t, in closed form; b = 0 without ``shift``.

    a alone is exp(median ln(t / d)), best for |ln ratio|. With a shift: least squares of
    (a d + b - t)^2 / (d t), in which near and far, too large and too small count alike, over the
    points that the scale alone brings within a factor `NEAR`; a single near pixel taken for far
    would decide it otherwise. ``depth`` and ``truth`` are positive, in metres of one camera, of
    equal shape. No shift if there is but one depth, or if the line falls or puts a fitted point
    behind the camera: nearly flat points leave its slope to their noise.
    """
    d, t = np.asarray(depth, np.float64).ravel(), np.asarray(truth, np.float64).ravel()
    scale = math.exp(float(np.median(np.log(t / d))))
    if not shift:
        return scale, 0.0
    near = np.abs(np.log(scale * d / t)) < math.log(NEAR)
    d, t = d[near], t[near]
    w = 1 / (d * t)
    dd, d1, one, dt, t1 = w @ d**2, w @ d, w.sum(), w @ (d * t), w @ t
    determinant = dd * one - d1 * d1
    if len(d) < 2 or determinant <= 1e-9 * dd * one:
        return scale, 0.0
    a, b = float((dt * one - t1 * d1) / determinant), float((t1 * dd - dt * d1) / determinant)
    return (a, b) if a > 0 and a * d.min() + b > 0 else (scale, 0.0)


def fit_power(uncertainty: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """(g, p) that minimise the mean of log u' + e / u' for u' = g u^p.

    That is the negative log likelihood of a Laplace scale (log depth) or of an exponential mean
    (angle), up to a constant. For a given p, g = mean(e / u^p) exactly; p by golden section.
    """
    log_u = np.log(np.maximum(np.asarray(uncertainty, np.float64).ravel(), 1e-6))
    e = np.abs(np.asarray(error, np.float64).ravel())

    def loss(power: float) -> float:
        return math.log(max(float((e * np.exp(-power * log_u)).mean()), 1e-12)) + power * float(
            log_u.mean()
        )

    low, high = POWERS
    while high - low > 1e-4:
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    power = (low + high) / 2
    return float((e * np.exp(-power * log_u)).mean()), power


def log_ratio(pair: Pair, values: tuple[float, float]) -> float:
    """Mean |ln((a d + b) / t)| of one image; depths are kept above a millimetre."""
    depth, truth = (np.asarray(v, np.float64) for v in pair)
    changed = np.maximum(values[0] * depth + values[1], 1e-3)
    return float(np.abs(np.log(changed / truth)).mean())


def likelihood(pair: Pair, values: tuple[float, float]) -> float:
    """Mean of log u' + e / u' of one image, u' = g u^p."""
    uncertainty, error = (np.asarray(v, np.float64) for v in pair)
    u = np.maximum(values[0] * np.maximum(uncertainty, 1e-6) ** values[1], 1e-9)
    return float((np.log(u) + np.abs(error) / u).mean())


def cross_validated(
    keys: Sequence[str],
    pairs: Sequence[Pair],
    fit: Callable[[np.ndarray, np.ndarray], V],
    loss: Callable[[Pair, V], float],
    *,
    identity: V,
) -> Fit[V]:
    """Fit on all images; keep it only if it helps those that a fold's fit has not seen.

    Args:
        keys: of the images, which alone decide the folds.
        pairs: per image the two arrays that ``fit`` and ``loss`` take, equally long.
        fit: concatenated arrays -> the two numbers, or a table.
        loss: one image's arrays and what was fitted -> its loss.
        identity: what holds without a fit.
    """
    used = [(k, p) for k, p in zip(keys, pairs, strict=True) if len(p[0])]
    if len(used) < 2:
        return Fit(values=identity, kept=False, before=math.nan, after=math.nan, images=len(used))
    order = sorted(used, key=lambda item: hashlib.sha256(item[0].encode()).digest())
    folds = min(FOLDS, len(order))
    gains, before, after = [], [], []
    for fold in range(folds):
        others = [p for i, (_, p) in enumerate(order) if i % folds != fold]
        values = fit(*_joined(others))
        for _, pair in order[fold::folds]:
            before.append(loss(pair, identity))
            after.append(loss(pair, values))
            gains.append(before[-1] - after[-1])
    chance = float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    kept = float(np.mean(gains)) > 2 * chance
    values = fit(*_joined([p for _, p in order])) if kept else identity
    return Fit(
        values=values,
        kept=kept,
        before=float(np.mean(before)),
        after=float(np.mean(after)),
        images=len(order),
    )


def _joined(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    first, second = zip(*pairs, strict=True)
    return np.concatenate(first), np.concatenate(second)


def fit_scale(keys: Sequence[str], depths: Sequence[Pair]) -> Fit[Two]:
    """The scale, or scale and shift, of a student's depth against true depths, if either helps.

    Args:
        keys: of the images.
        depths: per image (student's depth, true depth) at the measured points [n], metres.
    """

    def scale_only(d: np.ndarray, t: np.ndarray) -> tuple[float, float]:
        return fit_affine(d, t, shift=False)

    found = [
        cross_validated(keys, depths, way, log_ratio, identity=(1.0, 0.0))
        for way in (scale_only, fit_affine)
    ]
    kept = [f for f in found if f.kept] or found[:1]
    return min(kept, key=lambda f: f.after)


def fit_uncertainty(keys: Sequence[str], pairs: Sequence[Pair]) -> Fit[Two]:
    """Gain and power of an uncertainty against true errors, if they help.

    Args:
        keys: of the images.
        pairs: per image (uncertainty, |error|) at the judged pixels [n]; log depth or degrees.
    """
    return cross_validated(keys, pairs, fit_power, likelihood, identity=(1.0, 1.0))


def fit_confidence(keys: Sequence[str], pairs: Sequence[Pair], *, right_below: float) -> Fit[Table]:
    """How often a pixel is right, by its uncertainty: the law of the losses, or a fitted table.

    By that law the error is exponential with mean u, so it stays below a limit t with probability
    1 - exp(-t / u); real errors have longer tails. The table is an isotonic regression on equally
    filled bins (Zadrozny & Elkan 2002), as the teacher's (`teacher.calibrate`).

    Args:
        keys: of the images.
        pairs: per image (uncertainty, |error|) at the judged pixels [n]; log depth or degrees.
        right_below: errors below it are right, in the same unit.
    """

    def table(uncertainty: np.ndarray, error: np.ndarray) -> Table:
        u, at = np.unique(np.asarray(uncertainty, np.float64), return_inverse=True)
        share = np.bincount(at, error < right_below) / np.bincount(at)  # equal ones lie together
        x, p = rising(-u[at], share[at])
        return -x[::-1], p[::-1]

    def brier(pair: Pair, values: Table) -> float:
        return float(((np.interp(pair[0], *values) - (pair[1] < right_below)) ** 2).mean())

    u = right_below * np.geomspace(1 / 64, 64, 97)
    return cross_validated(keys, pairs, table, brier, identity=(u, 1 - np.exp(-right_below / u)))
