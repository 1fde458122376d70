"""Curves over the points of a colour lattice, of any order, on bytes or floats; exact.

A lattice of side L has its points at multiples of h = 255 / (L - 1) in each channel; a curve is a
polyline that visits every point once, each step to a neighbour. A level is the arc length along
it in 8-bit colour steps. ``table`` int32 [L^3] gives each point's place on the curve (x slowest),
``points`` uint8 [L^3, 3] the reverse.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from teacher.codecs._jit import inline, jit
from teacher.codecs._power_kernels import BLOCK, raise_block

_f8 = np.float64


@inline
@no_type_check
def _channel(value):
    return np.uint8(value + 0.5)


@jit
@no_type_check
def _paint(level, points, step, rgb, at):
    """Write the colour of the curve at ``level`` to rgb[at:at + 3]."""
    place = level / step
    i = min(int(place), points.shape[0] - 2)
    t = place - i
    for c in range(3):
        a, b = _f8(points[i, c]), _f8(points[i + 1, c])
        rgb[at + c] = _channel((a + t * (b - a)) * step)


@jit
@no_type_check
def encode_lattice(depth_m, rgb, forward, near_m, far_m, points, step):
    """Depth float32 [N] to colours uint8 [3N]; ``forward`` as in `encode_walk`.

    Sky is white. A finite depth whose colour would be white is moved one colour step on.
    """
    last = (points.shape[0] - 1) * step
    buffer = np.empty(BLOCK, _f8)
    for start in range(0, depth_m.size, BLOCK):
        stop = min(start + BLOCK, depth_m.size)
        block = buffer[: stop - start]
        for j in range(block.size):
            block[j] = forward[0] + forward[1] * max(_f8(depth_m[start + j]), 0.0)
        raise_block(block, forward[2])
        for j in range(block.size):
            d, at = depth_m[start + j], 3 * (start + j)
            if d > far_m:
                rgb[at : at + 3] = 255
            elif (d >= near_m) & (d > 0.0):
                level = min(max(forward[3] + forward[4] * block[j], 1.0), last - 1.0)
                _paint(level, points, step, rgb, at)
                if rgb[at] == 255 and rgb[at + 1] == 255 and rgb[at + 2] == 255:
                    _paint(level + 1.0, points, step, rgb, at)
            else:
                rgb[at : at + 3] = 0


@inline
@no_type_check
def _square(x):
    return x * x


@jit
@no_type_check
def nearest_on_lattice(red, green, blue, table, side):
    """The nearest point of the curve to a colour in lattice units: (place, squared distance).

    Every lattice point is on the curve, so the nearest point lies on one of the twelve edges of
    the colour's cell that the curve uses, or is one of its corners: an edge outside the cell is
    at least 1 away across, and a corner saves at most 1/4 less. Ties go to the smaller place.
    """
    x = min(max(int(np.floor(red)), 0), side - 2)
    y = min(max(int(np.floor(green)), 0), side - 2)
    z = min(max(int(np.floor(blue)), 0), side - 2)
    offset = (red - x, green - y, blue - z)
    stride = (side * side, side, 1)
    base = x * stride[0] + y * stride[1] + z
    best, place = np.inf, 0.0
    for corner in range(8):
        bit = (corner >> 2, (corner >> 1) & 1, corner & 1)
        a = table[base + bit[0] * stride[0] + bit[1] * stride[1] + bit[2]]
        distance = _square(offset[0] - bit[0]) + _square(offset[1] - bit[1])
        distance += _square(offset[2] - bit[2])
        if distance < best or (distance == best and a < place):
            best, place = distance, _f8(a)
        for axis in range(3):
            along = offset[axis]
            if bit[axis] == 0 and 0.0 < along < 1.0:
                b = table[base + bit[0] * stride[0] + bit[1] * stride[1] + bit[2] + stride[axis]]
                across = distance - along * along
                s = a + along if b == a + 1 else b + 1.0 - along
                near = abs(b - a) == 1 and (across < best or (across == best and s < place))
                if near:
                    best, place = across, s
    return place, max(best, 0.0)


@jit
@no_type_check
def depth_of_levels(levels, depth_m, backward, ends):
    """Levels float64 [N] (NaN: unknown) to depth float32 [N]; levels are overwritten.

    backward = (w0, w1, q, d0, d1): depth = d0 + d1 (w0 + w1 level)^q. ends = (near_m, far_m, first,
    last): below level ``first`` is unknown, above ``last`` is sky, the rest is near_m..far_m.
    """
    near_m, far_m, first, last = ends
    work = np.empty(BLOCK, _f8)
    for start in range(0, levels.size, BLOCK):
        source = levels[start : min(start + BLOCK, levels.size)]
        target = depth_m[start : start + source.size]
        block = work[: source.size]
        for j in range(block.size):
            block[j] = max(backward[0] + backward[1] * source[j], 1e-290)
        raise_block(block, backward[2])
        for j in range(block.size):
            d = max(min(backward[3] + backward[4] * block[j], far_m), near_m)
            d = d if source[j] >= first else np.nan
            target[j] = np.inf if source[j] > last else d


@jit
@no_type_check
def decode_lattice(rgb, unit, depth_m, residual, table, side, backward, ends, limit):
    """Colours [3N] (``unit`` of them is 255) to depth and residual float32 [N].

    ends as in `depth_of_levels`; a squared distance above ``limit`` is unknown. White is sky.
    Returns the largest residual.
    """
    step = 255.0 / (side - 1)
    scale = (side - 1) / unit
    white = unit * (1.0 - 0.5 / 255.0)
    farthest = 0.0
    buffer = np.empty(BLOCK, _f8)
    for start in range(0, depth_m.size, BLOCK):
        stop = min(start + BLOCK, depth_m.size)
        levels = buffer[: stop - start]
        for j in range(levels.size):
            at = 3 * (start + j)
            r, g, b = _f8(rgb[at]), _f8(rgb[at + 1]), _f8(rgb[at + 2])
            if np.isnan(r + g + b):
                levels[j], residual[start + j] = np.nan, np.nan
                continue
            place, distance = nearest_on_lattice(r * scale, g * scale, b * scale, table, side)
            distance *= step * step
            residual[start + j] = np.sqrt(distance)
            farthest = max(farthest, distance)
            levels[j] = place * step if distance <= limit else np.nan
            if r >= white and g >= white and b >= white:
                levels[j] = np.inf
        depth_of_levels(levels, depth_m[start:stop], backward, ends)
    return np.sqrt(farthest)
