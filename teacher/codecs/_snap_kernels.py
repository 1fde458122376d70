"""Repair of colours blended across a depth edge; compiled on first use. See `teacher.codecs.edges`.

A *steady* pixel lies near the curve and looks like at least four of its eight neighbours (half of
them at the border): it shows one surface. Everything else may be a blend.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from teacher.codecs._jit import inline, jit

_f4 = np.float32
SURFACES = 4  # kept apart in one window


@inline
@no_type_check
def _apart(rgb, i, j):
    """Squared distance of two pixels in the picture's own unit."""
    r = _f4(rgb[3 * i]) - _f4(rgb[3 * j])
    g = _f4(rgb[3 * i + 1]) - _f4(rgb[3 * j + 1])
    b = _f4(rgb[3 * i + 2]) - _f4(rgb[3 * j + 2])
    return r * r + g * g + b * b


@jit
@no_type_check
def _is_steady(rgb, residual, known, x, y, height, width, same, calm):
    """Whether pixel (x, y) shows one surface; ``known`` uint8 remembers: 1 yes, 2 no."""
    i = y * width + x
    if known[i] == 0:
        alike, around = 0, 0
        for v in range(max(y - 1, 0), min(y + 2, height)):
            for u in range(max(x - 1, 0), min(x + 2, width)):
                around += 1
                alike += _apart(rgb, i, v * width + u) <= same
        steady = residual[i] <= calm and 2 * (alike - 1) >= around - 1
        known[i] = 1 if steady else 2
    return known[i] == 1


@jit
@no_type_check
def _gather(rgb, residual, known, x, y, shape, same, calm, radius, colour, count, nearest):
    """The surfaces around (x, y): mean colours [k, 3] and each one's nearest steady pixel."""
    height, width = shape
    k = 0
    reach = np.empty(SURFACES, np.int64)
    for v in range(max(y - radius, 0), min(y + radius + 1, height)):
        for u in range(max(x - radius, 0), min(x + radius + 1, width)):
            if not _is_steady(rgb, residual, known, u, v, height, width, same, calm):
                continue
            j = v * width + u
            r, g, b = _f4(rgb[3 * j]), _f4(rgb[3 * j + 1]), _f4(rgb[3 * j + 2])
            mine, closest = -1, same
            for s in range(k):
                dr, dg, db = colour[s, 0] - r, colour[s, 1] - g, colour[s, 2] - b
                apart = dr * dr + dg * dg + db * db
                if apart <= closest:
                    mine, closest = s, apart
            if mine < 0:
                if k == SURFACES:
                    continue
                mine, k = k, k + 1
                colour[mine] = 0.0
                count[mine], reach[mine] = 0, 1 << 30
            count[mine] += 1
            share = _f4(1.0) / _f4(count[mine])
            colour[mine, 0] += (r - colour[mine, 0]) * share
            colour[mine, 1] += (g - colour[mine, 1]) * share
            colour[mine, 2] += (b - colour[mine, 2]) * share
            distance = (v - y) * (v - y) + (u - x) * (u - x)
            if distance < reach[mine]:
                reach[mine], nearest[mine] = distance, j
    return k


@jit
@no_type_check
def _majority(r, g, b, colour, k, chord, jump):
    """The surface that holds most of a blended colour, or -1 when no chord explains it."""
    best, pick = chord, -1
    for p in range(k):
        for q in range(p):
            ax, ay, az = colour[p, 0], colour[p, 1], colour[p, 2]
            bx, by, bz = colour[q, 0] - ax, colour[q, 1] - ay, colour[q, 2] - az
            length = bx * bx + by * by + bz * bz
            if length < jump:
                continue
            t = ((r - ax) * bx + (g - ay) * by + (b - az) * bz) / length
            t = min(max(t, _f4(0)), _f4(1))
            dx, dy, dz = r - ax - t * bx, g - ay - t * by, b - az - t * bz
            off = dx * dx + dy * dy + dz * dz
            if off <= best:
                best, pick = off, (p if t < _f4(0.5) else q)
    return pick


@jit
@no_type_check
def snap(rgb, depth_m, residual, shape, radius, trigger, same, chord, jump):
    """Give blended pixels the depth of their majority surface, in place; returns how many.

    rgb [3HW] in any unit; ``same``, ``chord``, ``jump`` are squared distances in that unit,
    ``trigger`` a residual in 8-bit steps: above it a pixel is looked at, up to it it can be steady.
    """
    height, width = shape
    known = np.zeros(height * width, np.uint8)
    source = depth_m.copy()
    colour = np.empty((SURFACES, 3), _f4)
    count, nearest = np.empty(SURFACES, np.int64), np.empty(SURFACES, np.int64)
    same, chord, jump = _f4(same), _f4(chord), _f4(jump)
    changed = 0
    for i in range(height * width):
        if not residual[i] > trigger:
            continue
        y, x = i // width, i % width
        k = _gather(
            rgb, residual, known, x, y, shape, same, trigger, radius, colour, count, nearest
        )
        r, g, b = _f4(rgb[3 * i]), _f4(rgb[3 * i + 1]), _f4(rgb[3 * i + 2])
        pick = _majority(r, g, b, colour, k, chord, jump)
        if pick >= 0:
            dr, dg, db = colour[pick, 0] - r, colour[pick, 1] - g, colour[pick, 2] - b
            if dr * dr + dg * dg + db * db > same:
                depth_m[i] = source[nearest[pick]]
                changed += 1
    return changed
