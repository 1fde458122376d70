"""What a picture may be when it is handed to a codec."""

from __future__ import annotations

import numpy as np

from teacher.errors import UsageError


def as_pixels(rgb: np.ndarray, where: str) -> np.ndarray:
    """A picture [..., 3] as flat bytes or float32 (1.0 = full); says what is wrong otherwise."""
    if rgb.ndim < 1 or rgb.shape[-1] != 3:
        raise UsageError(f"{where}: expected colours [..., 3], got shape {rgb.shape}")
    if rgb.dtype == np.uint8:
        return np.ascontiguousarray(rgb).reshape(-1)
    if not np.issubdtype(rgb.dtype, np.floating):
        raise UsageError(f"{where}: expected uint8 or floats in [0, 1], got {rgb.dtype}")
    with np.errstate(over="ignore"):  # becomes infinite and is refused
        pixels = np.ascontiguousarray(rgb, np.float32).reshape(-1)
    low, high = np.nanmin(pixels, initial=0.0), np.nanmax(pixels, initial=0.0)
    if low < -4 or high > 4:
        found = f"a maximum of {high:g}" if high > 4 else f"a minimum of {low:g}"
        raise UsageError(f"{where}: float pictures are 1.0 at full brightness, found {found}")
    return pixels
