"""Normals to bytes and back, one pass, vector code; compiled on first use."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from teacher.codecs._jit import jit

_f4, _u1 = np.float32, np.uint8


@jit
@no_type_check
def encode_normals(normals, rgb, signs):
    """Normals float32 [3N] (NaN: unknown) to uint8 [3N]: (sign * n + 1) / 2; unknown is black."""
    sx, sy, sz = _f4(signs[0]), _f4(signs[1]), _f4(signs[2])
    half, full, zero = _f4(127.5), _f4(255), _f4(0)
    for i in range(normals.size // 3):
        x, y, z = normals[3 * i] * sx, normals[3 * i + 1] * sy, normals[3 * i + 2] * sz
        known = (x + y + z) == (x + y + z)
        # + 128 and not 127.5: the conversion to bytes cuts off, so this rounds.
        x = min(max(x * half + _f4(128), zero), full) if known else zero
        y = min(max(y * half + _f4(128), zero), full) if known else zero
        z = min(max(z * half + _f4(128), zero), full) if known else zero
        rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2] = _u1(x), _u1(y), _u1(z)


@jit
@no_type_check
def decode_normals(rgb, unit, normals, residual, signs, limit):
    """Colours [3N] (``unit`` of them is full) to unit normals [3N] and residual [N], float32.

    A vector shorter than 1.75 / 255 is what half a byte per channel (sqrt(3) / 255) makes of grey.
    """
    sx, sy, sz = _f4(signs[0]), _f4(signs[1]), _f4(signs[2])
    scale, one, nan = _f4(2 / unit), _f4(1), _f4(np.nan)
    dark, half, shortest = _f4(-1 + 1 / 255), _f4(127.5), _f4(1.75 / 255)
    most = _f4(limit)
    for i in range(residual.size):
        x = _f4(rgb[3 * i]) * scale - one
        y = _f4(rgb[3 * i + 1]) * scale - one
        z = _f4(rgb[3 * i + 2]) * scale - one
        length = np.sqrt(x * x + y * y + z * z)
        off = abs(length - one) * half
        residual[i] = off
        known = (max(max(x, y), z) > dark) & (length > shortest) & (off <= most)
        shrink = one / length if known else nan
        normals[3 * i] = x * shrink * sx
        normals[3 * i + 1] = y * shrink * sy
        normals[3 * i + 2] = z * shrink * sz
