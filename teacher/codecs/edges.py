"""What to do with colours blended across a depth edge.

A generator softens silhouettes: such a pixel's colour is w near + (1 - w) far, and the point of
the curve nearest to that mixture often is a third depth, on neither surface. But the mixture lies
on the straight chord between the two surfaces' colours, and both surfaces are visible a pixel or
two away. So a pixel far from the curve is compared with all chords between surfaces of its
neighbourhood; if one passes close by, the pixel takes the depth of the surface that holds more
than half of the mixture. Colours on the curve are never touched: what `DepthCodec.encode` painted
decodes to itself.

Not covered: a mixture whose chord runs along the curve (two depths on one edge of the walk); it
decodes to a depth between the two. docs/results.md has the measurements.
"""

from __future__ import annotations

import numpy as np

RADIUS_PX = 3  # where surfaces are looked for; blends up to about 4 px wide
SAMPLES = 4096  # pixels used to estimate the noise
QUANTILE = 0.8
QUANTILE_OF_CLIPPED = 1.31  # that quantile over sigma, for bytes on an edge of the colour cube
MIN_TRIGGER = 3.0  # residual in 8-bit steps below which a colour counts as on the curve


def colour_noise(residual: np.ndarray) -> float:
    """The per-channel noise (0..255) of a picture, from the 80 % point of its residual.

    Across an edge of the colour cube noise has two dimensions, each cut off at 0 or 255 on one
    side: 1/4 + (2 Phi(m) - 1) / 2 + (1 - exp(-m^2 / 2)) / 4 = 0.8 gives m = 1.31. Where nothing is
    cut off (floats, the inner edges of high orders) this overstates sigma by a factor of 1.37.
    """
    stride = max(1, residual.size // SAMPLES) | 1  # odd: never one column of a picture only
    sample = residual.reshape(-1)[::stride]
    sample = sample[~np.isnan(sample)]
    return float(np.quantile(sample, QUANTILE)) / QUANTILE_OF_CLIPPED if sample.size else 0.0


def snap_edges(pixels: np.ndarray, unit: float, depth_m: np.ndarray, residual: np.ndarray) -> int:
    """Repair one picture's depth [H, W] in place; returns the number of pixels changed.

    Args:
        pixels: the picture flat [3HW], ``unit`` at full brightness.
        unit: 255 for bytes, 1 for floats.
        depth_m: float32 [H, W] as the nearest point of the curve gives it.
        residual: float32 [H, W], the distance to the curve in 8-bit steps.
    """
    from teacher.codecs._snap_kernels import snap

    sigma = colour_noise(residual)
    scale = unit / 255
    trigger = max(MIN_TRIGGER, 3 * sigma)  # 0.4 % of a clean region lies beyond
    same = max(14.0, 3.5 * sigma) * scale  # two pixels of one surface
    chord = max(14.0, 4 * sigma) * scale  # a mixture and its chord
    jump = 24.0 * scale  # the shortest chord worth snapping
    return snap(
        pixels,
        depth_m.reshape(-1),
        residual.reshape(-1),
        depth_m.shape,
        RADIUS_PX,
        trigger,
        same**2,
        chord**2,
        jump**2,
    )
