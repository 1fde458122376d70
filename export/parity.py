"""How far two answers to the same images lie apart, in the unit of each output.

``depth`` and its uncertainty: |a - b| / b. ``normals``: the angle in degrees. ``offset``: the
distance in pixels. Probabilities, logits and degrees: |a - b|, the largest over the channels.
``semantic``: 1 where the class differs, pixels apart at which the student itself hardly decides
(`TIE`); of ``depth`` those apart that a step moved by a pixel explains (`moved_steps`). A value
that is not finite is infinitely far from everything.
"""

from __future__ import annotations

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
    """Pixels [N, H, W] bool whose difference is that of a step moved by a pixel or a part of one.

    Their depth lies between the least and the largest of the 3x3 pixels around, which are more than
    `STEP` apart, and differs by more than `MOVED`. The sharper a student, the larger a difference
    does the least rounding make there; as with a class at a tie, neither answer is the better one.
    """
    edge = np.pad(expected, ((0, 0), (1, 1), (1, 1)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(edge, (3, 3), axis=(1, 2))
    least, largest = around.min((-1, -2)), around.max((-1, -2))
    with np.errstate(invalid="ignore"):
        between = (found >= least) & (found <= largest) & (largest > STEP * least)
    return between & (gap("depth", found, expected) > MOVED)


def measures(
    name: str, found: np.ndarray, expected: np.ndarray, ties: np.ndarray | None = None
) -> dict[str, float]:
    """``max``, ``p999``, ``mean`` of `gap` over one image's pixels (arrays without N).

    For ``semantic`` the mean is the share of flipped pixels that are no ``ties`` (bool [H, W]),
    ``tie_flips`` the share of the others, and ``max`` and ``p999`` are left out. For ``depth``
    ``tie_flips`` is the share of `moved_steps`, which count in the mean alone.
    """
    distance = gap(name, found[None], expected[None])[0]
    if name == "semantic":
        tied = np.zeros(distance.shape, bool) if ties is None else ties
        flips = distance > 0
        return {"mean": float((flips & ~tied).mean()), "tie_flips": float((flips & tied).mean())}
    result = {"mean": float(distance.mean())}
    if name == "depth":
        moved = moved_steps(found[None], expected[None])[0]
        distance = np.where(moved, 0.0, distance)
        result["tie_flips"] = float(moved.mean())
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

    ``worst_image`` is the key of the image that decides.
    """
    listed = list(rows)
    names = {n for _, row in listed for n in row}
    result: dict[str, Any] = {}
    for name in sorted(names):
        values = [row[name] for _, row in listed]
        result[name] = float(np.mean(values)) if name in ("mean", "tie_flips") else max(values)
    decisive = "p999" if "p999" in names else "mean"
    result["worst_image"] = max(listed, key=lambda item: item[1][decisive])[0]
    return result
