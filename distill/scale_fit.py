"""A student made right for one camera or place: its depth's scale, its uncertainties' size.

A few true measurements give a and b of ``depth -> a depth + b`` in closed form; per task g and p of
an uncertainty ``u -> g u^p``, or with powers of what else the answer says of a pixel
(`student.model.log_factors`); and a table of how often a pixel of a given uncertainty is
right. Each is kept only if images that it was not fitted on get better by more than chance:
otherwise the student stays as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from scipy.optimize import minimize

from teacher.calibrate import rising

FOLDS = 5
OWN_POWERS = (
    0.25,
    2.5,
)  # of an uncertainty; beyond, it would say something else than it was taught
OTHER_POWERS = (-1.0, 1.0)  # of its other factors
LEAST = 1e-6  # of an error, in its unit
NEAR = 1.5
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class Fit(Generic[V]):
    """A few numbers or a table, and what cross-validation says of them.

    Attributes:
        values: (a, b) of a depth, (g, p, ...) of an uncertainty, (uncertainties, probabilities) of
            a confidence; what they would be without a fit if not kept.
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
Powers = tuple[float, ...]
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


def fit_powers(logs: np.ndarray, error: np.ndarray) -> Powers:
    """(g, p, ...) that minimise the mean of log u + e / u for u = g times powers of the factors.

    That is the negative log likelihood of a Laplace scale (log depth) or of an exponential mean
    (angle), up to a constant. For given powers, g = mean(e / the product) exactly, and what is left
    is convex in them.

    Args:
        logs: of the factors [n,K]; the first is the uncertainty itself.
        error: [n].
    """
    logs = np.asarray(logs, np.float64)
    log_e = np.log(np.maximum(np.abs(np.asarray(error, np.float64)), LEAST))

    def gain_and_shares(powers: np.ndarray) -> tuple[float, np.ndarray]:
        ratio = log_e - logs @ powers
        most = float(ratio.max())
        shares = np.exp(ratio - most)
        return most + math.log(shares.mean()), shares / shares.sum()

    def loss(powers: np.ndarray) -> tuple[float, np.ndarray]:
        log_gain, shares = gain_and_shares(powers)
        mean = logs.mean(0)
        return log_gain + float(mean @ powers), mean - shares @ logs

    count = logs.shape[1]
    limits = [OWN_POWERS] + [OTHER_POWERS] * (count - 1)
    powers = minimize(
        loss, np.eye(count)[0], jac=True, method="L-BFGS-B", bounds=limits, options={"ftol": 1e-12}
    ).x
    return math.exp(gain_and_shares(powers)[0]), *map(float, powers)


def fitted_uncertainty(logs: np.ndarray, values: Powers) -> np.ndarray:
    """g times powers of the factors whose ``logs`` [n,K] these are, as many as there are: [n]."""
    powers = np.asarray(values[1:])
    return np.asarray(values[0] * np.exp(logs[:, : len(powers)] @ powers))


def log_ratio(pair: Pair, values: tuple[float, float]) -> float:
    """Mean |ln((a d + b) / t)| of one image; depths are kept above a millimetre."""
    depth, truth = (np.asarray(v, np.float64) for v in pair)
    changed = np.maximum(values[0] * depth + values[1], 1e-3)
    return float(np.abs(np.log(changed / truth)).mean())


def likelihood(pair: Pair, values: Powers) -> float:
    """Mean of log u + e / u of one image's (logs of factors, error)."""
    logs, error = pair
    u = np.maximum(fitted_uncertainty(logs, values), 1e-9)
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
        fit: concatenated arrays -> the numbers, or a table.
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

    return best_of(
        cross_validated(keys, depths, way, log_ratio, identity=(1.0, 0.0))
        for way in (scale_only, fit_affine)
    )


def best_of(fits: Iterable[Fit[V]]) -> Fit[V]:
    """Of those that are kept the best, else the first."""
    found = list(fits)
    return min([f for f in found if f.kept] or found[:1], key=lambda f: f.after)


def fit_uncertainty(keys: Sequence[str], pairs: Sequence[Pair]) -> Fit[Powers]:
    """An uncertainty's gain and powers against true errors, its own or all, if either helps.

    Args:
        keys: of the images.
        pairs: per image (logs of the factors [n,K], |error| [n]) at the judged pixels; the error in
            log depth or degrees.
    """

    def own_only(logs: np.ndarray, error: np.ndarray) -> Powers:
        return fit_powers(logs[:, :1], error)

    identity = (1.0, 1.0)
    return best_of(
        cross_validated(keys, pairs, way, likelihood, identity=identity)
        for way in (own_only, fit_powers)
    )


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
