"""How far two answers to the same images lie apart, in the unit of each output.

``depth`` and its uncertainty: |a - b| / b. ``normals``: the angle in degrees. ``offset``: the
distance in pixels. Probabilities, logits and degrees: |a - b|, the largest over the channels.
``semantic``: 1 where the class differs, pixels apart at which the student itself hardly decides
(`TIE`); of ``depth`` in half precision those apart that a moved step explains (`moved_steps`). A
value that is not finite is infinitely far from everything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

TASK_OF = {
    "depth": "depth",
    "sky": "depth",
    "depth_uncertainty": "depth",
    "normals": "normals",
    "normals_uncertainty": "normals",
    "semantic": "semantic",
    "semantic_logits": "semantic",
    "semantic_uncertainty": "semantic",
    "center": "instances",
    "offset": "instances",
}
UNITS = {
    "depth": "relative",
    "sky": "probability",
    "depth_uncertainty": "relative",
    "normals": "degrees",
    "normals_uncertainty": "degrees",
    "semantic": "share of pixels",
    "semantic_logits": "logit",
    "semantic_uncertainty": "probability",
    "center": "probability",
    "offset": "px",
}
TIE = 1e-2  # a probability margin of the first class over the second below this is a tie
STEP = 1.15  # depths of neighbours whose ratio is larger lie on the two sides of a step
MOVED = 1e-2  # relative difference of depth from which a step has moved
MOVED_SHARE = 3e-3  # of an image's pixels: more are not moved by rounding
MEASURES = ("max", "p999", "mean")


def margin(logits: np.ndarray) -> np.ndarray:
    """[N, C, H, W] logits -> [N, H, W]: probability of the best class minus the second's."""
    z = np.exp(logits - logits.max(1, keepdims=True))
    top = np.partition(z / z.sum(1, keepdims=True), -2, axis=1)[:, -2:]
    return (top[:, 1] - top[:, 0]).astype(np.float32)


def gap(name: str, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Per-pixel distance [N, H, W] float64 of output ``name``; inf where ``found`` is not finite.

    Both arrays [N, ...] as the output contract says (`export.artefact`).
    """
    if name == "semantic":
        return (found != expected).astype(np.float64)
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if name == "normals":
            # 2 atan2(|a - b|, |a + b|): exact where acos would lose half its digits (Kahan)
            angle = 2 * np.arctan2(_length(a - b), _length(a + b))
            distance = np.degrees(angle) + np.degrees(np.abs(_length(a) - 1))
        elif name == "offset":
            distance = _length(a - b)
        elif UNITS[name] == "relative":
            distance = np.abs(a - b) / np.maximum(np.abs(b), 1e-9)
        else:
            distance = np.abs(a - b)
            distance = distance.max(1) if distance.ndim == 4 else distance
    finite = np.isfinite(a).all(1) if a.ndim == 4 else np.isfinite(a)
    return np.where(finite & np.isfinite(distance), distance, np.inf)


def _length(vectors: np.ndarray) -> np.ndarray:
    """[N, C, H, W] -> [N, H, W]."""
    return np.sqrt(np.einsum("nchw,nchw->nhw", vectors, vectors))


def moved_steps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Pixels bool [H, W] whose depth differs as it would if a step had moved by a part of a pixel.

    Their depth lies between the least and the largest of the 3x3 pixels around, two neighbours of
    which are more than `STEP` apart, and differs by more than `MOVED`. The sharper a student, the
    larger a difference does the rounding of half precision make there; as with a class at a tie,
    neither answer is the better one. None where more than `MOVED_SHARE` of the image is so: that
    many steps are not moved by rounding.
    """
    moved = gap("depth", found[None], expected[None])[0] > MOVED
    if not moved.any():
        return moved
    edge = np.pad(expected, 1, mode="edge")
    least, largest = (_around(edge, rows=3, columns=3, of=f) for f in (np.minimum, np.maximum))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log = np.log(edge)
        across = _around(np.abs(np.diff(log, axis=1)), rows=3, columns=2, of=np.maximum)
        down = _around(np.abs(np.diff(log, axis=0)), rows=2, columns=3, of=np.maximum)
        moved &= (np.maximum(across, down) > np.log(STEP)) & (found >= least) & (found <= largest)
    moved &= np.isfinite(found)
    return moved if moved.mean() <= MOVED_SHARE else np.zeros_like(moved)


def _around(x: np.ndarray, *, rows: int, columns: int, of: np.ufunc) -> np.ndarray:
    """``of`` all values of each window of ``rows`` x ``columns``."""
    for axis, size in enumerate((rows, columns)):
        count = x.shape[axis] - size + 1
        x = functools.reduce(of, [x.take(range(k, k + count), axis) for k in range(size)])
    return x


def measures(
    name: str, found: np.ndarray, expected: np.ndarray, ties: np.ndarray | None = None
) -> dict[str, float]:
    """``max``, ``p999``, ``mean`` of `gap` over one image's pixels (arrays without N).

    For ``semantic`` the mean is the share of flipped pixels that are no ``ties`` (bool [H, W]),
    ``tie_flips`` the share of the others, and ``max`` and ``p999`` are left out. For another output
    ``ties`` (`moved_steps`) count in the mean alone, and ``tie_flips`` is their share.
    """
    distance = gap(name, found[None], expected[None])[0]
    if name == "semantic":
        tied = np.zeros(distance.shape, bool) if ties is None else ties
        flips = distance > 0
        return {"mean": float((flips & ~tied).mean()), "tie_flips": float((flips & tied).mean())}
    result = {"mean": float(distance.mean())}
    if ties is not None:
        distance = np.where(ties, 0.0, distance)
        result["tie_flips"] = float(ties.mean())
    rank = min(distance.size - 1, int(np.ceil(0.999 * distance.size)) - 1)
    p999 = np.partition(distance, rank, axis=None)[rank]
    return {"max": float(distance.max()), "p999": float(p999)} | result


def worst_gap(name: str, found: np.ndarray, expected: np.ndarray) -> float:
    """The largest `gap` of a batch; for ``semantic`` the largest share of flips of an image."""
    distance = gap(name, found, expected)
    if name == "semantic":
        return float(distance.mean((1, 2)).max())
    return float(distance.max())


def summarise(rows: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Per-image `measures` -> the set's: the worst image's max and p999, the mean of the means.

    ``worst_image`` is the key of the image that decides, ``worst_mean_image`` that of the mean.
    """
    listed = list(rows)
    names = {n for _, row in listed for n in row}
    result: dict[str, Any] = {}
    for name in sorted(names):
        values = [row[name] for _, row in listed]
        result[name] = float(np.mean(values)) if name in ("mean", "tie_flips") else max(values)
    decisive = "p999" if "p999" in names else "mean"
    result["worst_image"] = max(listed, key=lambda item: item[1][decisive])[0]
    result["worst_mean_image"] = max(listed, key=lambda item: item[1]["mean"])[0]
    return result
