"""Instance ids -> what the student learns of them: a heat map of centres, and offsets to them."""

from __future__ import annotations

import numpy as np

SIGMA = 0.012  # of a centre's Gaussian, in shares of the picture's diagonal; at least one pixel


def center_offset(ids: np.ndarray) -> np.ndarray:
    """Integer ids [H, W] (0 none, -1 unknown) -> float32 [3, H, W]: heat, offset right and down.

    The centre is the mean of an instance's visible pixels; the heat there is exactly 1, a Gaussian
    around it, the highest where several overlap (Cheng et al. 2020, "Panoptic-DeepLab", section
    3.2). Offsets are in px from the pixel's own centre, 0 where there is no instance. Unknown
    pixels are NaN in all three.
    """
    height, width = ids.shape
    out = np.zeros((3, height, width), np.float32)
    sigma = max(1.0, SIGMA * float(np.hypot(height, width)))
    reach = int(np.ceil(3 * sigma))
    flat = ids.ravel()
    places = np.flatnonzero(flat > 0)
    names, which = np.unique(flat[places], return_inverse=True)
    rows, columns = np.divmod(places, width)
    if len(names):
        count = np.bincount(which)
        x = np.bincount(which, weights=columns) / count
        y = np.bincount(which, weights=rows) / count
        out[1].ravel()[places] = x[which] - columns
        out[2].ravel()[places] = y[which] - rows
        for cx, cy in zip(np.rint(x).astype(int), np.rint(y).astype(int), strict=True):
            top, bottom = max(0, cy - reach), min(height, cy + reach + 1)
            left, right = max(0, cx - reach), min(width, cx + reach + 1)
            dy, dx = np.arange(top, bottom)[:, None] - cy, np.arange(left, right)[None] - cx
            heat = np.exp(-(dx**2 + dy**2) / (2 * sigma**2))
            region = out[0, top:bottom, left:right]
            np.maximum(region, heat, out=region, casting="same_kind")
    out[:, ids < 0] = np.nan
    return out
