"""Centres and offsets -> instances: what stands outside the graph (numba on the CPU, no torch).

Cheng et al. 2020, "Panoptic-DeepLab", section 3.3: centres are the local maxima of the heat above a
threshold, and every pixel goes to the centre that its offset points at. Where no foreground is
given, a pixel of no instance betrays itself: it was taught to point at itself, so it lands at a
centre only if it stands there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

THRESHOLD = 0.3  # lowest score of a centre
MOST = 200  # instances per picture; the best centres are taken
NEAR = 0.35  # a pixel may land this share of its own offset beside the centre ...
NEAR_PX = 1.5  # ... or this far
SMALLEST = 8  # pixels of an instance


@functools.cache
def _kernels() -> tuple[Callable, Callable]:
    import numba

    @numba.njit(cache=True)
    def peaks(heat, threshold, reach):  # type: ignore[no-untyped-def]
        """Rows (y, x) that are the highest within ``reach``; of equals the first."""
        height, width = heat.shape
        found = []
        for y in range(height):
            for x in range(width):
                score = heat[y, x]
                if not score >= threshold:
                    continue
                highest = True
                for v in range(max(0, y - reach), min(height, y + reach + 1)):
                    for u in range(max(0, x - reach), min(width, x + reach + 1)):
                        other = heat[v, u]
                        if other > score or (other == score and (v < y or (v == y and u < x))):
                            highest = False
                            break
                    if not highest:
                        break
                if highest:
                    found.append((y, x))
        return found

    @numba.njit(cache=True)
    def assign(offset, wanted, centres, near, near_px):  # type: ignore[no-untyped-def]
        """Number of the centre (from 1) that each wanted pixel points at, 0 for none."""
        _, height, width = offset.shape
        ids = np.zeros((height, width), np.uint16)
        for y in range(height):
            for x in range(width):
                if not wanted[y, x]:
                    continue
                dx, dy = offset[0, y, x], offset[1, y, x]
                best = np.inf
                for k in range(len(centres)):
                    away = (x + dx - centres[k, 1]) ** 2 + (y + dy - centres[k, 0]) ** 2
                    if away < best:
                        best = away
                        ids[y, x] = k + 1
                allowed = max(near_px, near * np.sqrt(dx * dx + dy * dy))
                if not best <= allowed * allowed:
                    ids[y, x] = 0
        return ids

    return peaks, assign


def group(
    center: np.ndarray,
    offset: np.ndarray,
    *,
    foreground: np.ndarray | None = None,
    threshold: float = THRESHOLD,
) -> tuple[np.ndarray, np.ndarray]:
    """Instances of one image.

    Args:
        center: score [H, W] in [0, 1].
        offset: [2, H, W] px to the own centre, right and down.
        foreground: bool [H, W], where there may be instances (from semantic classes); None:
            anywhere.
        threshold: lowest score of a centre.

    Returns:
        ids uint16 [H, W], 0 none, 1.. by falling score; and the score of each, float32 [instances].
        A centre that gets fewer than `SMALLEST` pixels is dropped; NaN is nothing.
    """
    if center.ndim != 2 or offset.shape != (2, *center.shape):
        raise ValueError(
            f"group: center {center.shape}, offset {offset.shape}: expected [H, W] and [2, H, W]"
        )
    wanted = np.ones(center.shape, bool) if foreground is None else foreground.astype(bool)
    if wanted.shape != center.shape:
        raise ValueError(f"group: foreground {wanted.shape}: expected {center.shape} as center")
    peaks, assign = _kernels()
    heat = np.ascontiguousarray(center, np.float32)
    reach = max(1, round(0.012 * float(np.hypot(*heat.shape))))
    found = np.array(peaks(heat, np.float32(threshold), reach) or np.zeros((0, 2)), np.int64)
    scores = heat[found[:, 0], found[:, 1]]
    order = np.argsort(-scores, kind="stable")[:MOST]
    found, scores = found[order], scores[order]
    ways = np.ascontiguousarray(offset, np.float32)
    ids = assign(ways, wanted, found.astype(np.float32), np.float32(NEAR), np.float32(NEAR_PX))
    sizes = np.bincount(ids.ravel(), minlength=len(found) + 1)[1:]
    kept = sizes >= SMALLEST
    table = np.zeros(len(found) + 1, np.uint16)
    table[1:][kept] = np.arange(1, int(kept.sum()) + 1)
    return table[ids], scores[kept].astype(np.float32)
