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
from teacher.codecs._power_kernels import BLOCK, power_block

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
        power_block(depth_m[start:stop], block, forward[0], forward[1], forward[2])
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


@jit
@no_type_check
def edges_of_cells(points, side):
    """uint32 [(L-1)^3]: the edges of each cell that the curve runs along, in the curve's order.

    Four bits an edge, the first lowest, 15 ends the list: at most seven of the twelve. An edge is
    4 axis + 2 (on the far side of the first other axis, in the order x, y, z) + 1 (of the second).
    """
    n = side - 1
    edges = np.full(n * n * n, np.uint32(0xFFFFFFFF), np.uint32)
    count = np.zeros(n * n * n, np.uint8)
    for place in range(points.shape[0] - 1):
        a, b = points[place], points[place + 1]
        axis = 0 if a[0] != b[0] else (1 if a[1] != b[1] else 2)
        x, y, z = min(a[0], b[0]), min(a[1], b[1]), min(a[2], b[2])
        for corner in range(4):  # the four cells around the edge, seen from which it is ``corner``
            u, v = corner >> 1, corner & 1
            cx, cy = x - (0 if axis == 0 else u), y - (u if axis == 0 else (v if axis == 2 else 0))
            cz = z - (0 if axis == 2 else v)
            if min(cx, cy, cz) < 0 or max(cx, cy, cz) >= n:
                continue
            i = (cx * n + cy) * n + cz
            shift = np.uint32(4 * count[i])
            edge = np.uint32(4 * axis + corner)
            edges[i] ^= (np.uint32(15) ^ edge) << shift
            count[i] += 1
    return edges


@inline
@no_type_check
def _far_or(inside, distance, far):
    return distance if inside else far


@jit
@no_type_check
def nearest_in_cell(x, y, z, offset, one, table, edges, side, across):
    """The nearest point of the curve to a colour: (place, squared distance in units of 1 / one).

    The colour is cell (x, y, z) of the lattice plus ``offset`` / ``one``, beyond 0..one only
    outside the cube. Every lattice point is on the curve, so the nearest point lies inside one of
    the edges of the cell that the curve uses, or is the cell's nearest corner: an edge outside the
    cell is at least 1 away across, and a corner saves at most 1/4 less. Ties go to the smaller
    place (an edge, before a corner). ``across`` [12] is scratch of the type of ``one``.
    """
    fx, fy, fz = offset
    hx, hy, hz = one - fx, one - fy, one - fz
    fx2, fy2, fz2, hx2, hy2, hz2 = fx * fx, fy * fy, fz * fz, hx * hx, hy * hy, hz * hz
    best = min(fx2, hx2) + min(fy2, hy2) + min(fz2, hz2)
    far = best + one
    inside = fx > 0 and hx > 0
    across[0], across[1] = _far_or(inside, fy2 + fz2, far), _far_or(inside, fy2 + hz2, far)
    across[2], across[3] = _far_or(inside, hy2 + fz2, far), _far_or(inside, hy2 + hz2, far)
    inside = fy > 0 and hy > 0
    across[4], across[5] = _far_or(inside, fx2 + fz2, far), _far_or(inside, fx2 + hz2, far)
    across[6], across[7] = _far_or(inside, hx2 + fz2, far), _far_or(inside, hx2 + hz2, far)
    inside = fz > 0 and hz > 0
    across[8], across[9] = _far_or(inside, fx2 + fy2, far), _far_or(inside, fx2 + hy2, far)
    across[10], across[11] = _far_or(inside, hx2 + fy2, far), _far_or(inside, hx2 + hy2, far)
    rest, winner = edges[(x * (side - 1) + y) * (side - 1) + z], np.uint32(15)
    edge = rest & np.uint32(15)
    while edge != 15:
        distance = across[edge]
        winner = edge if distance < best else winner
        best = min(distance, best)
        rest >>= np.uint32(4)
        edge = rest & np.uint32(15)
    base = (x * side + y) * side + z
    if winner == 15:
        return _first_corner(base, fx2, fy2, fz2, hx2, hy2, hz2, best, table, side), best
    axis = winner >> np.uint32(2)
    u, v = (winner >> np.uint32(1)) & np.uint32(1), winner & np.uint32(1)
    along = fx if axis == 0 else (fy if axis == 1 else fz)
    start = base + u * (side if axis == 0 else side * side) + v * (side if axis == 2 else 1)
    stride = side * side if axis == 0 else (side if axis == 1 else 1)
    a, b = table[start], table[start + stride]
    return (a + along / one if b > a else b + (one - along) / one), best


@jit
@no_type_check
def _first_corner(base, fx2, fy2, fz2, hx2, hy2, hz2, best, table, side):
    """The smallest place among the corners of a cell at squared distance ``best``."""
    place = np.inf
    for corner in range(8):
        i, j, k = corner >> 2, (corner >> 1) & 1, corner & 1
        apart = (hx2 if i else fx2) + (hy2 if j else fy2) + (hz2 if k else fz2)
        if apart == best:
            place = min(place, _f8(table[base + (i * side + j) * side + k]))
    return place


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
        power_block(source, block, backward[0], backward[1], backward[2])
        for j in range(block.size):
            d = max(min(backward[3] + backward[4] * block[j], far_m), near_m)
            d = d if source[j] >= first else np.nan
            target[j] = np.inf if source[j] > last else d


@jit
@no_type_check
def decode_bytes(rgb, depth_m, residual, table, edges, side, backward, ends, limit):
    """Colours uint8 [3N] to depth and residual float32 [N], in whole numbers up to the place.

    ends as in `depth_of_levels`; a squared distance above ``limit`` is unknown. White is sky.
    Returns the largest residual.
    """
    step, n, farthest = 255.0 / (side - 1), np.int32(side - 1), np.int32(0)
    cell, rest = np.empty(256, np.int32), np.empty(256, np.int32)
    for value in range(256):
        cell[value] = min(value * n // 255, n - 1)
        rest[value] = value * n - 255 * cell[value]
    one, bound, across = np.int32(255), limit * n * n, np.empty(12, np.int32)
    buffer = np.empty(BLOCK, _f8)
    for start in range(0, depth_m.size, BLOCK):
        stop = min(start + BLOCK, depth_m.size)
        levels = buffer[: stop - start]
        for j in range(levels.size):
            at = 3 * (start + j)
            r, g, b = rgb[at], rgb[at + 1], rgb[at + 2]
            x, y, z, fx, fy, fz = cell[r], cell[g], cell[b], rest[r], rest[g], rest[b]
            place, distance = nearest_in_cell(
                x, y, z, (fx, fy, fz), one, table, edges, side, across
            )
            residual[start + j] = np.sqrt(_f8(distance)) / n
            farthest = max(farthest, distance)
            levels[j] = place * step if distance <= bound else np.nan
            if r == 255 and g == 255 and b == 255:
                levels[j] = np.inf
        depth_of_levels(levels, depth_m[start:stop], backward, ends)
    return np.sqrt(_f8(farthest)) / n


@jit
@no_type_check
def decode_floats(rgb, depth_m, residual, table, edges, side, backward, ends, limit):
    """As `decode_bytes`, for float32 [3N] with 1.0 at full brightness; NaN is unknown."""
    step, scale, white, farthest = 255.0 / (side - 1), side - 1.0, 1.0 - 0.5 / 255.0, 0.0
    last, across = _f8(side - 2), np.empty(12, _f8)
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
            r, g, b = r * scale, g * scale, b * scale
            x = int(min(max(np.floor(r), 0.0), last))
            y = int(min(max(np.floor(g), 0.0), last))
            z = int(min(max(np.floor(b), 0.0), last))
            place, distance = nearest_in_cell(
                x, y, z, (r - x, g - y, b - z), 1.0, table, edges, side, across
            )
            distance *= step * step
            residual[start + j] = np.sqrt(distance)
            farthest = max(farthest, distance)
            levels[j] = place * step if distance <= limit else np.nan
            if r >= white * scale and g >= white * scale and b >= white * scale:
                levels[j] = np.inf
        depth_of_levels(levels, depth_m[start:stop], backward, ends)
    return np.sqrt(farthest)
