"""(o + m x)^p over a block of numbers, as vector code; compiled on first use."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from teacher.codecs._jit import inline, jit

BLOCK = 2048  # pixels per pass: the buffers stay in the first-level cache
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # the float64 nearest to sqrt(1/2)
LN2 = 0.6931471805599453
TWO_OVER_LN2 = 2.8853900817779268

_i8, _f8 = np.int64, np.float64


@inline
@no_type_check
def _log2(x):
    """log2 of a positive normal float64: exponent + artanh series of the mantissa."""
    bits = _f8(x).view(_i8)
    exponent = (bits - _i8(SQRT_HALF_BITS)) >> _i8(52)
    mantissa = _i8(bits - (exponent << _i8(52))).view(_f8)  # in [sqrt(1/2), sqrt(2))
    t = (mantissa - 1.0) / (mantissa + 1.0)
    q = t * t
    tail = 1 / 13 + q * (1 / 15 + q * (1 / 17 + q * (1 / 19)))
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * tail)))))
    return exponent + TWO_OVER_LN2 * t * series


@inline
@no_type_check
def _exp2(y):
    """2**y for -1000 <= y <= 1000: the power of two + Taylor series of the fraction."""
    whole = np.floor(y + 0.5)
    z = (y - whole) * LN2  # |z| <= 0.347
    tail = 1.0 + z / 9 * (1.0 + z / 10 * (1.0 + z / 11 * (1.0 + z / 12)))
    series = 1.0 + z / 5 * (1.0 + z / 6 * (1.0 + z / 7 * (1.0 + z / 8 * tail)))
    fraction = 1.0 + z * (1.0 + z / 2 * (1.0 + z / 3 * (1.0 + z / 4 * series)))
    return _i8(_f8(fraction).view(_i8) + (_i8(whole) << _i8(52))).view(_f8)


@jit
@no_type_check
def power_block(source, target, offset, slope, exponent):
    """target = max(offset + slope source, 0)**exponent, one block, computed in target's dtype.

    The exponents of the presets have loops of their own; any other one goes through
    2**(exponent log2 x) in float64, with a relative error below 1e-13.
    """
    kind = target.dtype.type
    one, least, start, per = kind(1.0), kind(1e-290), kind(offset), kind(slope)
    if exponent == -2.0:
        for j in range(target.size):
            x = max(start + per * kind(source[j]), least)
            target[j] = one / (x * x)
    elif exponent == -3.0:
        for j in range(target.size):
            x = max(start + per * kind(source[j]), least)
            target[j] = one / (x * x * x)
    elif exponent == -0.5:
        for j in range(target.size):
            target[j] = one / np.sqrt(max(start + per * kind(source[j]), least))
    else:
        for j in range(target.size):
            x = max(_f8(start + per * kind(source[j])), 1e-290)
            target[j] = _exp2(min(max(exponent * _log2(x), -1000.0), 1000.0))
