"""The cube walk on 8-bit pictures, one pass, vector code; compiled on first use.

A level is the arc length along the walk in 8-bit colour steps, 0..1785. R, G and B are trapezoids
of the level, and a colour's distance to each of the seven edges is a sum of two squares.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from teacher.codecs._jit import inline, jit
from teacher.codecs._power_kernels import BLOCK, power_block

_f4, _i2, _u2, _u1 = np.float32, np.int16, np.uint16, np.uint8
# The walk is never farther than 179.7 from a colour, so a square above 32767 cannot win; clipping
# it there keeps every sum of two inside 16 bits.
_CLIP = _u2(32767)
TINY = _f4(np.nextafter(np.float32(0), np.float32(1)))  # the least depth above 0 m


@inline
@no_type_check
def _byte(value):
    return _u1(min(max(value, _i2(0)), _i2(255)))


@jit
@no_type_check
def encode_walk(depth_m, rgb, forward, near_m, far_m):
    """Depth float32 [N] to colours uint8 [3N]; forward = (o, m, p, a, b): a + b (o + m d)^p."""
    level0, level1 = _f4(forward[3] + 0.5), _f4(forward[4])
    near, far = max(_f4(near_m), TINY), _f4(far_m)
    first, last, white = _f4(1), _f4(1784), _f4(1785)
    powers, levels = np.empty(BLOCK, _f4), np.empty(BLOCK, _i2)
    for start in range(0, depth_m.size, BLOCK):
        stop = min(start + BLOCK, depth_m.size)
        source, target = depth_m[start:stop], rgb[3 * start : 3 * stop]
        raised, level = powers[: source.size], levels[: source.size]
        power_block(source, raised, forward[0], forward[1], forward[2])
        for j in range(source.size):
            at = min(max(level0 + level1 * raised[j], first), last)
            at = white if source[j] > far else at
            level[j] = _i2(np.int32(at)) if source[j] >= near else _i2(0)
        for j in range(source.size):  # apart from the loop above: 16-bit lanes, twice as many
            k = level[j]
            red = max(min(k, _i2(_i2(765) - k)), _i2(k - _i2(1275)))
            green = max(min(_i2(k - _i2(255)), _i2(_i2(1275) - k)), _i2(k - _i2(1530)))
            target[3 * j] = _byte(red)
            target[3 * j + 1] = _byte(green)
            target[3 * j + 2] = _byte(_i2(k - _i2(765)))


@jit
@no_type_check
def decode_walk(rgb, depth_m, residual, table_m, limit):
    """Colours uint8 [3N] to depth and residual float32 [N] through the depth of each level.

    ``table_m`` float32 [1786] holds NaN where a level means unknown; a squared distance above
    ``limit`` is unknown as well. Ties go to the smaller level. Returns the largest residual.
    """
    full, farthest = _u2(255), _u2(0)
    buffer = np.empty(BLOCK, _u2)
    for start in range(0, depth_m.size, BLOCK):
        stop = min(start + BLOCK, depth_m.size)
        source, target, off = rgb[3 * start : 3 * stop], depth_m[start:stop], residual[start:stop]
        levels, most = buffer[: stop - start], _u2(0)
        for j in range(levels.size):
            r, g, b = _u2(source[3 * j]), _u2(source[3 * j + 1]), _u2(source[3 * j + 2])
            nr, ng, nb = _u2(full - r), _u2(full - g), _u2(full - b)
            r2, g2, b2 = min(_u2(r * r), _CLIP), min(_u2(g * g), _CLIP), min(_u2(b * b), _CLIP)
            nr2, ng2 = min(_u2(nr * nr), _CLIP), min(_u2(ng * ng), _CLIP)
            nb2 = min(_u2(nb * nb), _CLIP)
            best, level = _u2(g2 + b2), r  # black to red
            other, at = _u2(nr2 + b2), _u2(_u2(255) + g)  # to yellow
            level, best = (at if other < best else level), min(other, best)
            other, at = _u2(ng2 + b2), _u2(_u2(510) + nr)  # to green
            level, best = (at if other < best else level), min(other, best)
            other, at = _u2(r2 + ng2), _u2(_u2(765) + b)  # to cyan
            level, best = (at if other < best else level), min(other, best)
            other, at = _u2(r2 + nb2), _u2(_u2(1020) + ng)  # to blue
            level, best = (at if other < best else level), min(other, best)
            other, at = _u2(g2 + nb2), _u2(_u2(1275) + r)  # to magenta
            level, best = (at if other < best else level), min(other, best)
            other, at = _u2(nr2 + nb2), _u2(_u2(1530) + g)  # to white
            level, best = (at if other < best else level), min(other, best)
            levels[j] = level if best <= limit else _u2(0)
            off[j] = np.sqrt(_f4(best))
            most = max(most, best)
        farthest = max(farthest, most)
        for j in range(levels.size):
            target[j] = table_m[levels[j]]
    return np.sqrt(_f4(farthest))
