"""Nearest class colour per pixel and the five stages of the instance decoder; compiled lazily."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from teacher.codecs._jit import inline, jit
from teacher.codecs._power_kernels import BLOCK

_f4 = np.float32
BACKGROUND, UNSEEN, MARGIN = 0, -1, 2  # label values, and the frame of background around them


@jit
@no_type_check
def nearest_colour(rgb, scale, colours, ids, distance, limit):
    """Colours [3N] (times ``scale`` 0..255) to class ids [N] and distances float32 [N].

    Beyond ``limit``, or for NaN, the id is the largest of its type. Ties go to the smaller id.
    """
    none = ids.dtype.type(np.iinfo(ids.dtype).max)
    red, green, blue = np.empty(BLOCK, _f4), np.empty(BLOCK, _f4), np.empty(BLOCK, _f4)
    best, winner = np.empty(BLOCK, _f4), np.empty(BLOCK, np.int32)
    factor, most = _f4(scale), _f4(limit)
    for start in range(0, ids.size, BLOCK):
        stop = min(start + BLOCK, ids.size)
        n = stop - start
        source = rgb[3 * start : 3 * stop]
        r, g, b, near, who = red[:n], green[:n], blue[:n], best[:n], winner[:n]
        for j in range(n):
            r[j] = _f4(source[3 * j]) * factor
            g[j] = _f4(source[3 * j + 1]) * factor
            b[j] = _f4(source[3 * j + 2]) * factor
            near[j], who[j] = _f4(np.inf), -1
        for k in range(colours.shape[0]):
            cr, cg, cb = _f4(colours[k, 0]), _f4(colours[k, 1]), _f4(colours[k, 2])
            me = np.int32(k)
            for j in range(n):
                dr, dg, db = r[j] - cr, g[j] - cg, b[j] - cb
                d = dr * dr + dg * dg + db * db
                closer = d < near[j]
                near[j] = d if closer else near[j]
                who[j] = me if closer else who[j]
        target, off = ids[start:stop], distance[start:stop]
        for j in range(n):
            d = np.sqrt(near[j])
            off[j] = d if who[j] >= 0 else _f4(np.nan)
            target[j] = ids.dtype.type(who[j]) if (who[j] >= 0) & (d <= most) else none


@inline
@no_type_check
def _apart(a, b):
    """Squared distance of two packed colours."""
    r = ((a >> 16) & 255) - ((b >> 16) & 255)
    g = ((a >> 8) & 255) - ((b >> 8) & 255)
    c = (a & 255) - (b & 255)
    return r * r + g * g + c * c


@inline
@no_type_check
def _mean_of_nine(packed, i, width):
    """The rounded mean of a pixel's 3x3 neighbourhood, packed."""
    r, g, b = 4, 4, 4
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            c = packed[i + dy * width + dx]
            r, g, b = r + ((c >> 16) & 255), g + ((c >> 8) & 255), b + (c & 255)
    return ((r // 9) << 16) | ((g // 9) << 8) | (b // 9)


@jit
@no_type_check
def prepare(rgb, background, limit, packed, labels):
    """Stage 1: pack the colours into a framed image and mark what is not background."""
    height, width = rgb.shape[0], rgb.shape[1]
    wide = width + 2 * MARGIN
    back = (np.int64(background[0]) << 16) | (np.int64(background[1]) << 8) | background[2]
    for y in range(height):
        at = (y + MARGIN) * wide + MARGIN
        for x in range(width):
            colour = (np.int64(rgb[y, x, 0]) << 16) | (np.int64(rgb[y, x, 1]) << 8) | rgb[y, x, 2]
            packed[at + x] = colour
            labels[at + x] = BACKGROUND if _apart(colour, back) < limit else UNSEEN


@jit
@no_type_check
def _fill(packed, labels, seed, colour, label, limit, offsets, stack):
    """Stage 2, one component: all unseen pixels linked to the seed and near its colour."""
    stack[0], top = seed, 1
    labels[seed] = label
    while top > 0:
        top -= 1
        here = stack[top]
        for k in range(offsets.size):
            there = here + offsets[k]
            if labels[there] == UNSEEN and _apart(packed[there], colour) <= limit:
                labels[there] = label
                stack[top] = there
                top += 1


@jit
@no_type_check
def flood(packed, labels, shape, limit, stack):
    """Stage 2: label everything unseen, 1, 2, ...; returns the number of components.

    Links reach the 8 neighbours and the 8 knight's moves. Seeds lie first where all eight
    neighbours look alike (their mean colour is the seed's), so that the blended rim of an object
    never speaks for it; what is left is seeded pixel by pixel.
    """
    height, width = shape
    wide = width + 2 * MARGIN
    moves = ((0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (2, 1), (2, -1), (1, -2))
    offsets = np.empty(16, np.int64)
    for k in range(8):
        offsets[k] = moves[k][0] * wide + moves[k][1]
        offsets[8 + k] = -offsets[k]
    count = 0
    for flat_only in (True, False):
        for y in range(height):
            for x in range(width):
                i = (y + MARGIN) * wide + MARGIN + x
                if labels[i] != UNSEEN:
                    continue
                colour = np.int64(packed[i])
                if flat_only:
                    flat = 0 < x < width - 1 and 0 < y < height - 1
                    for dy in range(-1, 2):
                        for dx in range(-1, 2):
                            there = i + dy * wide + dx
                            flat = flat and labels[there] != BACKGROUND
                            flat = flat and _apart(np.int64(packed[there]), colour) <= limit
                    if not flat:
                        continue
                    colour = _mean_of_nine(packed, i, wide)
                count += 1
                _fill(packed, labels, i, colour, count, limit, offsets, stack)
    return count


@jit
@no_type_check
def measure(packed, labels, shape, count, radius):
    """Per label: area, area after erosion by ``radius``, colour sums, box: int64 [count + 1, 9].

    Erosion keeps a pixel whose square neighbourhood has its label; the picture's border does not
    erode, for the object goes on beyond it.
    """
    height, width = shape
    wide = width + 2 * MARGIN
    facts = np.zeros((count + 1, 9), np.int64)
    facts[:, 5] = facts[:, 6] = 1 << 40
    facts[:, 7] = facts[:, 8] = -1
    for y in range(height):
        for x in range(width):
            i = (y + MARGIN) * wide + MARGIN + x
            label = labels[i]
            if label <= 0:
                continue
            row, colour = facts[label], np.int64(packed[i])
            row[0] += 1
            row[2] += (colour >> 16) & 255
            row[3] += (colour >> 8) & 255
            row[4] += colour & 255
            row[5], row[6] = min(row[5], x), min(row[6], y)
            row[7], row[8] = max(row[7], x), max(row[8], y)
            inside = True
            for v in range(max(y - radius, 0), min(y + radius, height - 1) + 1):
                for u in range(max(x - radius, 0), min(x + radius, width - 1) + 1):
                    if labels[(v + MARGIN) * wide + MARGIN + u] != label:
                        inside = False
            row[1] += inside
    return facts


@jit
@no_type_check
def contacts(labels, shape, thin, kept, thin_count, kept_count):
    """Which kept components (rows of ``kept`` by label) each thin one comes within 2 px of."""
    height, width = shape
    wide = width + 2 * MARGIN
    touching = np.zeros((thin_count, kept_count), np.bool_)
    for y in range(height):
        for x in range(width):
            i = (y + MARGIN) * wide + MARGIN + x
            label = labels[i]
            if label > 0 and thin[label] >= 0:
                for dy in range(-2, 3):
                    for dx in range(-2, 3):
                        other = labels[i + dy * wide + dx]
                        if other > 0 and kept[other] >= 0:
                            touching[thin[label], kept[other]] = True
    return touching


@jit
@no_type_check
def finish(packed, labels, shape, final, specks, means, tau, ids):
    """Write final ids [H, W]; returns each one's summed colour likeness 1 - distance / tau.

    A pixel of a dropped speck joins the instance that holds at least five of its neighbours.
    """
    height, width = shape
    wide = width + 2 * MARGIN
    likeness = np.zeros(means.shape[0], np.float64)
    for y in range(height):
        for x in range(width):
            i = (y + MARGIN) * wide + MARGIN + x
            label = labels[i]
            mine = final[label] if label > 0 else 0
            if label > 0 and specks[label]:
                for first in range(4):  # five of eight: one of any four is among them
                    near = labels[i + (first // 3 - 1) * wide + first % 3 - 1]
                    candidate = final[near] if near > 0 else 0
                    votes = 0
                    for k in range(9):
                        other = labels[i + (k // 3 - 1) * wide + k % 3 - 1]
                        votes += k != 4 and other > 0 and final[other] == candidate
                    if candidate > 0 and votes >= 5:
                        mine = candidate
            ids[y, x] = mine
            if mine > 0:
                colour = np.int64(packed[i])
                dr = ((colour >> 16) & 255) - means[mine, 0]
                dg = ((colour >> 8) & 255) - means[mine, 1]
                db = (colour & 255) - means[mine, 2]
                likeness[mine] += max(0.0, 1.0 - np.sqrt(dr * dr + dg * dg + db * db) / tau)
    return likeness
