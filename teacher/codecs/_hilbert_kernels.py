"""The standard 3-D Hilbert curve as a finite automaton; compiled on first use.

Skilling's procedure ("Programming the Hilbert curve", AIP 707, 2004) works down the bits of a
cell: each bit triple is read through a signed permutation of the axes that the triples above left
behind, and the Gray code of all triples is the place on the curve. Permutation and running parity
form a state, so one table look-up per level replaces the bit loops.
"""

from __future__ import annotations

from functools import cache
from typing import no_type_check

import numpy as np

from teacher.codecs._jit import jit
from teacher.codecs._lattice_kernels import depth_of_levels
from teacher.codecs._power_kernels import BLOCK, power_block

State = tuple[tuple[int, ...], tuple[int, ...], int]  # axis read, its inversion, parity


def _step(state: State, corner: int) -> tuple[State, int]:
    """Read one bit triple (x the highest bit): the next state and the three bits of the place."""
    axes, flips, parity = list(state[0]), list(state[1]), state[2]
    cell = ((corner >> 2) & 1, (corner >> 1) & 1, corner & 1)
    seen = [cell[axes[d]] ^ flips[d] for d in range(3)]
    place = 0
    for d in range(3):
        parity ^= seen[d]  # Gray code to binary: a running exclusive or
        place = 2 * place + parity
    for d in range(3):
        if seen[d]:
            flips[0] ^= 1
        else:
            axes[0], axes[d] = axes[d], axes[0]
            flips[0], flips[d] = flips[d], flips[0]
    return (tuple(axes), tuple(flips), parity), place


@cache
def automaton() -> tuple[np.ndarray, np.ndarray]:
    """(to place, to cell), uint16 [states * 8]: 8 * next state + three bits; state 0 starts."""
    start: State = ((0, 1, 2), (0, 0, 0), 0)
    states, found = {start: 0}, [start]
    to_place, to_cell = [], []
    for state in found:  # grows while it is walked
        rows = [0] * 8, [0] * 8
        for corner in range(8):
            following, place = _step(state, corner)
            if following not in states:
                states[following] = len(found)
                found.append(following)
            rows[0][corner] = 8 * states[following] + place
            rows[1][place] = 8 * states[following] + corner
        to_place.append(rows[0])
        to_cell.append(rows[1])
    return np.array(to_place, np.uint16).ravel(), np.array(to_cell, np.uint16).ravel()


@jit
@no_type_check
def place_of_cell(x, y, z, order, to_place):
    """The place on the curve of one cell, coordinates 0..2^order - 1."""
    state, place = np.uint32(0), np.uint32(0)
    for level in range(order - 1, -1, -1):
        shift = np.uint32(level)
        corner = ((x >> shift) & np.uint32(1)) << np.uint32(2)
        corner |= ((y >> shift) & np.uint32(1)) << np.uint32(1)
        corner |= (z >> shift) & np.uint32(1)
        entry = np.uint32(to_place[(state & np.uint32(0xFFF8)) | corner])
        place = (place << np.uint32(3)) | (entry & np.uint32(7))
        state = entry
    return place


@jit
@no_type_check
def cell_of_place(place, order, to_cell):
    """The cell (x, y, z) at one place of the curve, 0..8^order - 1."""
    state, x, y, z = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    for level in range(order - 1, -1, -1):
        digit = (place >> np.uint32(3 * level)) & np.uint32(7)
        entry = np.uint32(to_cell[(state & np.uint32(0xFFF8)) | digit])
        x = (x << np.uint32(1)) | ((entry >> np.uint32(2)) & np.uint32(1))
        y = (y << np.uint32(1)) | ((entry >> np.uint32(1)) & np.uint32(1))
        z = (z << np.uint32(1)) | (entry & np.uint32(1))
        state = entry
    return x, y, z


@jit
@no_type_check
def places_of_cells(cells, places, order, to_place):
    """Cells uint8 [3N] to places uint32 [N]."""
    for i in range(places.size):
        x, y, z = np.uint32(cells[3 * i]), np.uint32(cells[3 * i + 1]), np.uint32(cells[3 * i + 2])
        places[i] = place_of_cell(x, y, z, order, to_place)


@jit
@no_type_check
def cells_of_places(places, cells, order, to_cell):
    """Places uint32 [N] to cells uint8 [3N]."""
    for i in range(places.size):
        if order == 8:  # a constant, so that the levels are unrolled
            x, y, z = cell_of_place(np.uint32(places[i]), np.uint32(8), to_cell)
        else:
            x, y, z = cell_of_place(np.uint32(places[i]), order, to_cell)
        cells[3 * i], cells[3 * i + 1], cells[3 * i + 2] = np.uint8(x), np.uint8(y), np.uint8(z)


@jit
@no_type_check
def encode_full(depth_m, rgb, forward, near_m, far_m, to_cell):
    """Depth float32 [N] to the colours uint8 [3N] of order 8, whose places are all colours."""
    last, white = 16777215.0, np.uint32(0xFFFFFF)
    buffer = np.empty(BLOCK, np.float64)
    for start in range(0, depth_m.size, BLOCK):
        source = depth_m[start : min(start + BLOCK, depth_m.size)]
        block = buffer[: source.size]
        power_block(source, block, forward[0], forward[1], forward[2])
        for j in range(block.size):
            d, at = source[j], 3 * (start + j)
            colour = np.uint32(0)
            if d > far_m:
                colour = white
            elif (d >= near_m) & (d > 0.0):
                level = min(max(forward[3] + forward[4] * block[j] + 0.5, 1.0), last - 1.0)
                x, y, z = cell_of_place(np.uint32(level), np.uint32(8), to_cell)
                colour = (x << np.uint32(16)) | (y << np.uint32(8)) | z
                if colour == white:  # white is taken: one place further
                    x, y, z = cell_of_place(np.uint32(level + 1.0), np.uint32(8), to_cell)
                    colour = (x << np.uint32(16)) | (y << np.uint32(8)) | z
            rgb[at] = np.uint8(colour >> np.uint32(16))
            rgb[at + 1] = np.uint8((colour >> np.uint32(8)) & np.uint32(255))
            rgb[at + 2] = np.uint8(colour & np.uint32(255))


@jit
@no_type_check
def decode_full(rgb, depth_m, to_place, backward, ends):
    """Colours uint8 [3N] to depth float32 [N] on order 8, `depth_of_levels` of their places."""
    buffer = np.empty(BLOCK, np.float64)
    for start in range(0, depth_m.size, BLOCK):
        target = depth_m[start : min(start + BLOCK, depth_m.size)]
        levels = buffer[: target.size]
        for j in range(target.size):
            at = 3 * (start + j)
            r, g, b = np.uint32(rgb[at]), np.uint32(rgb[at + 1]), np.uint32(rgb[at + 2])
            place = place_of_cell(r, g, b, np.uint32(8), to_place)
            levels[j] = np.inf if r + g + b == 765 else np.float64(place)  # white is sky
        depth_of_levels(levels, target, backward, ends)
