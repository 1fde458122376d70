"""Signs that an answer is wrong, without truth: one map per sign, larger = more doubtful.

A generator hallucinates in ways that betray themselves: colours off the code (residual), seeds
that disagree (spread), a depth map whose surfaces face elsewhere than its normals say (surface),
silhouettes in depth where no object ends (outline), and answers that change when the same thing is
seen larger (zoom). How well each finds wrong pixels is in docs/results.md; `calibrate` turns them
into a probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.ndimage import (
    distance_transform_edt,
    gaussian_filter,
    maximum_filter,
    minimum_filter,
)

from teacher.errors import UsageError
from teacher.label import Answer, Camera, Task

EDGE_LOG = 0.1  # step of log depth between neighbours that counts as a silhouette
NEAR_SHARE, NEAR_MOST = 24.0, 60.0  # `signs`: blur of 1/24 of the height, outliers cut at 60
WIDE_SHARE = 8.0  # `signs`: the wide blur, 1/8 of the height
OUTLINE_REACH_PX = 8.0  # distance beyond which a silhouette is wholly unexplained


def normals_of_depth(depth_m: np.ndarray, camera: Camera) -> np.ndarray:
    """Unit normals [H, W, 3] of a z-depth map, our frame (x right, y up, z toward the viewer).

    Cross product of the tangents; of the two one-sided differences along each axis the one with
    the smaller step in log depth is taken, so that a normal never spans a silhouette. NaN where
    depth or a needed neighbour is unknown or sky.
    """
    if depth_m.shape != (camera.height, camera.width):
        raise UsageError(
            f"normals_of_depth: depth is {depth_m.shape[1]}x{depth_m.shape[0]}, the camera"
            f" {camera.width}x{camera.height}"
        )
    depth = np.where(np.isfinite(depth_m) & (depth_m > 0), depth_m, np.nan).astype(np.float64)
    points = camera.rays() * depth[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        right = _tangent(points, np.log(depth), axis=1)
        down = _tangent(points, np.log(depth), axis=0)
        normal = -np.cross(right, down)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    return (normal * (1, -1, -1)).astype(np.float32)


def _tangent(points: np.ndarray, log_depth: np.ndarray, *, axis: int) -> np.ndarray:
    """Difference to the neighbour (after or before, along ``axis``) nearer in log depth."""
    step = np.diff(points, axis=axis)
    jump = np.abs(np.diff(log_depth, axis=axis))
    pad = [(0, 0), (0, 0)]
    after, before = list(pad), list(pad)
    after[axis], before[axis] = (0, 1), (1, 0)
    forward = np.pad(step, [*after, (0, 0)], constant_values=np.nan)
    backward = np.pad(step, [*before, (0, 0)], constant_values=np.nan)
    there = np.pad(np.nan_to_num(jump, nan=np.inf), after, constant_values=np.inf)
    here = np.pad(np.nan_to_num(jump, nan=np.inf), before, constant_values=np.inf)
    return np.where((here < there)[..., None], backward, forward)


def surface(depth_m: np.ndarray, normals: np.ndarray, camera: Camera) -> np.ndarray:
    """Angle [deg] between the normals answered and those of the depth answered; NaN unknown."""
    cosine = (normals_of_depth(depth_m, camera) * normals).sum(-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1))).astype(np.float32)


def steepness(depth_m: np.ndarray) -> np.ndarray:
    """Range of log depth in the 3x3 neighbourhood; sky counts as 1000 m, unknown as no step."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_depth = np.log(np.clip(depth_m, 1e-3, 1e3))
    unknown = np.isnan(log_depth)
    high = maximum_filter(np.where(unknown, -np.inf, log_depth), 3)
    low = minimum_filter(np.where(unknown, np.inf, log_depth), 3)
    return np.where(np.isfinite(high - low), high - low, 0.0).astype(np.float32)


def outline(depth_m: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Unexplained silhouettes: steps of log depth times how far the next class border is.

    0 on smooth depth and where a border lies within a pixel; grows to the step's size at
    `OUTLINE_REACH_PX`. ``classes`` are class or instance ids [H, W].
    """
    unexplained = np.clip((border_distance(classes) - 1) / (OUTLINE_REACH_PX - 1), 0, 1)
    step = steepness(depth_m)
    return np.where(step > EDGE_LOG, step * unexplained, 0).astype(np.float32)


def zoom(whole_m: np.ndarray, windows_m: Sequence[np.ndarray]) -> np.ndarray:
    """Mean |log ratio| between the depth of the whole image and that of windows of it.

    ``windows_m`` are depths [H, W] in the whole image's pixels, NaN outside their window (what
    `consensus.Variant.undo` gives); each is first brought to the whole's scale by its median
    ratio. NaN where no window sees the pixel.
    """
    gaps = []
    for window in windows_m:
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = np.log(window.astype(np.float64)) - np.log(whole_m.astype(np.float64))
        gap = np.where(np.isfinite(gap), gap, np.nan)
        if np.isfinite(gap).any():
            gaps.append(np.abs(gap - np.nanmedian(gap)))
    if not gaps:
        return np.full(whole_m.shape, np.nan, np.float32)
    stack = np.stack(gaps)
    seen = np.isfinite(stack).sum(0)
    total = np.nan_to_num(stack).sum(0)
    return np.where(seen > 0, total / np.maximum(seen, 1), np.nan).astype(np.float32)


def border_distance(classes: np.ndarray) -> np.ndarray:
    """Distance [px] to the next class border, 0 on it; the diagonal where there is none."""
    border = maximum_filter(classes, 3) != minimum_filter(classes, 3)
    if not border.any():
        return np.full(classes.shape, np.hypot(*classes.shape), np.float32)
    return distance_transform_edt(~border).astype(np.float32)


def signs(answers: Mapping[Task, Answer], task: Task, camera: Camera) -> dict[str, np.ndarray]:
    """Every sign the answers to one image give about ``task``, each float32 [H, W], finite.

    ``residual`` and ``spread`` are there if the answer has them, as ``residual_depth`` and so on
    are of the other tasks' answers: what one answer stumbles over is hard for all;
    ``near_...`` are the same, blurred, because an object is wrong as a whole, and ``wide_spread``
    is blurred further, because a wall is too. ``surface`` needs depth and normals, ``outline``
    depth and semantic; ``steep`` and ``far`` (log metres) come with depth, ``lonely`` (distance to
    the next class border) with semantic. Residual, spread and surface are there once more as the
    image's mean (``image_...``), because a wrong scale is wrong everywhere. What is unknown at a
    pixel counts as most doubtful.
    """
    found: dict[str, np.ndarray] = {}
    for other, answer in answers.items():
        name = "" if other is task else f"_{other}"
        if answer.residual is not None:
            residual = _known(answer.residual, 255.0)
            found[f"residual{name}"] = residual
            near = gaussian_filter(np.minimum(residual, NEAR_MOST), residual.shape[0] / NEAR_SHARE)
            found[f"near_residual{name}"] = near
        if answer.uncertainty is not None:
            worst = {Task.NORMALS: 180.0}.get(other, 1.0)
            spread = _known(answer.uncertainty, worst)
            found[f"spread{name}"] = spread
            found[f"near_spread{name}"] = gaussian_filter(spread, spread.shape[0] / NEAR_SHARE)
            if other is task:
                found["wide_spread"] = gaussian_filter(spread, spread.shape[0] / WIDE_SHARE)
    depth = answers[Task.DEPTH].values if Task.DEPTH in answers else None
    if depth is not None:
        found["steep"] = np.clip(steepness(depth), 0, 3)
        found["far"] = np.log(np.clip(np.nan_to_num(depth, nan=1e-2), 1e-2, 200)).astype(np.float32)
        if Task.NORMALS in answers:
            found["surface"] = _known(surface(depth, answers[Task.NORMALS].values, camera), 90.0)
        if Task.SEMANTIC in answers:
            found["outline"] = outline(depth, answers[Task.SEMANTIC].values)
    if Task.SEMANTIC in answers:
        found["lonely"] = border_distance(answers[Task.SEMANTIC].values)
    for name in ("residual", "spread", "surface"):
        if name in found:
            found[f"image_{name}"] = np.full_like(found[name], found[name].mean())
    return found


def _known(values: np.ndarray, worst: float) -> np.ndarray:
    return np.nan_to_num(values, nan=worst, posinf=worst).clip(0, worst).astype(np.float32)
