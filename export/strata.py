"""Where an artefact got worse: per image, and in the parts of images where models break first.

Strata of a label: ``edges``, pixels within two of a jump in depth (or, without depth, of a border
of classes or a crease of normals); ``far``, the farthest fifth of the set's judged depth; ``dark``,
pixels whose sRGB luma is below `DARK`. Errors are those of `teacher.metrics` (one ruler): per
pixel, then the mean over a stratum's pixels in one image, then over the images that have at least
`FEWEST` of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from teacher.label import Label, Task, unknown_class
from teacher.metrics import angles_deg, depth_error_maps

STRATA = ("edges", "far", "dark")
WHOLE = "whole"
DARK = 50  # of 255
FEWEST = 50  # pixels of a stratum that an image must have to be counted
EDGE_RATIO, CREASE_DEG = 1.1, 30.0
Table = dict[str, dict[str, dict[str, float]]]  # metric -> stratum -> key of the image -> value


def far_m(labels: Iterable[Label], *, min_m: float, max_m: float) -> float:
    """The depth [m] beyond which the farthest fifth of the judged pixels lies; inf without any."""
    found = []
    for label in labels:
        if Task.DEPTH in label.values:
            depth = label.values[Task.DEPTH][::4, ::4]
            found.append(depth[(depth > min_m) & (depth < max_m)])
    known = np.concatenate(found) if found else np.empty(0)
    return float(np.percentile(known, 80)) if known.size else np.inf


def _jumps(values: np.ndarray, differ: Any) -> np.ndarray:
    """bool [H, W]: pixels that differ from a 4-neighbour."""
    found = np.zeros(values.shape[:2], bool)
    across, down = differ(values[:, 1:], values[:, :-1]), differ(values[1:], values[:-1])
    found[:, 1:] |= across
    found[:, :-1] |= across
    found[1:] |= down
    found[:-1] |= down
    return found


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(np.maximum(a / b, b / a), nan=0.0) > EDGE_RATIO  # NaN, sky/sky: none


def _crease(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("hwc,hwc->hw", a, b) < np.cos(np.radians(CREASE_DEG))


def edges(label: Label) -> np.ndarray:
    """bool [H, W], see the module."""
    values = label.values
    if Task.DEPTH in values:
        found = _jumps(values[Task.DEPTH], _ratio)
    elif Task.SEMANTIC in values:
        found = _jumps(values[Task.SEMANTIC], np.not_equal)
    elif Task.NORMALS in values:
        found = _jumps(values[Task.NORMALS], _crease)
    else:
        return np.zeros(label.image.shape[:2], bool)
    return _jumps(found, np.not_equal) | found


def masks(label: Label, *, beyond_m: float) -> dict[str, np.ndarray]:
    """Stratum -> bool [H, W]; ``whole`` is everything."""
    luma = label.image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    depth = label.values.get(Task.DEPTH)
    far = np.zeros(luma.shape, bool) if depth is None else np.nan_to_num(depth) > beyond_m
    return {
        WHOLE: np.ones(luma.shape, bool),
        "edges": edges(label),
        "far": far & np.isfinite(luma if depth is None else depth),
        "dark": luma < DARK,
    }


def error_maps(
    task: str, found: np.ndarray, truth: np.ndarray, *, min_m: float, max_m: float
) -> dict[str, np.ndarray]:
    """Metric -> float64 [H, W], NaN where nothing is judged; shares are 1 where right, else 0."""
    if task == Task.DEPTH:
        relative, ratio = depth_error_maps(found, truth, min_m=min_m, max_m=max_m)
        right = np.where(np.isnan(ratio), np.nan, ratio < 1.25)
        return {"depth.delta1": right, "depth.abs_rel": relative}
    if task == Task.NORMALS:
        angle, _ = angles_deg(found, truth)
        within = np.where(np.isnan(angle), np.nan, angle < 11.25)
        return {"normals.mean_deg": angle, "normals.within_11_25": within}
    unknown = truth == unknown_class(truth.dtype)
    return {"semantic.pixel_accuracy": np.where(unknown, np.nan, found == truth)}


def strata_table(
    answers_for: Any,
    labels: Iterable[Label],
    *,
    tasks: Sequence[str],
    beyond_m: float,
    min_m: float,
    max_m: float,
) -> Table:
    """Every metric in every stratum of every image. ``answers_for(label)``: {task: array}."""
    table: Table = {}
    for label in labels:
        answers = answers_for(label)
        where = masks(label, beyond_m=beyond_m)
        for task in tasks:
            if task not in answers or task not in label.values:
                continue
            truth = label.values[Task(task)]
            maps = error_maps(task, answers[task], truth, min_m=min_m, max_m=max_m)
            for metric, values in maps.items():
                for stratum, mask in where.items():
                    inside = values[mask & ~np.isnan(values)]
                    if inside.size >= FEWEST:
                        row = table.setdefault(metric, {}).setdefault(stratum, {})
                        row[label.key] = float(inside.mean())
    return table


def worst_losses(
    metric: str, found: Mapping[str, Any], reference: Mapping[str, Any], *, larger_is_better: bool
) -> dict[str, tuple[float, str]]:
    """How much worse than ``reference`` (tables of one metric: stratum -> key -> value).

    ``stratum``: (loss, name of the worst stratum), means over its images; ``image``: (loss, key
    of the worst image). Empty where nothing was judged.
    """
    sign = 1.0 if larger_is_better else -1.0
    per_stratum = [
        (float(np.mean([sign * (row[k] - found[name][k]) for k in row])), name)
        for name, row in reference.items()
        if name != WHOLE
    ]
    whole = reference.get(WHOLE, {})
    per_image = [(sign * (v - found[WHOLE][k]), k) for k, v in whole.items()]
    return {
        name: max(losses)
        for name, losses in (("stratum", per_stratum), ("image", per_image))
        if losses
    }
