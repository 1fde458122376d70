"""Depth from a colour picture in torch, differentiable, for losses on decoded values.

The same nearest point of the same curve as `DepthCodec.decode(edges="nearest")`: which edge of the
curve is nearest is decided without gradient, the place on it and the depth follow with gradient.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float

from teacher.codecs.depth import DepthCodec
from teacher.errors import UsageError

MAX_ORDER = 7  # the table of order 8 would be 128 MB on every device


@lru_cache(maxsize=16)
def _table(codec: DepthCodec, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(codec.path.table().copy()).to(device)


def _nearest_place(q: torch.Tensor, codec: DepthCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """Place on the curve and squared distance of colours [3, N] in lattice units."""
    side = codec.path.side
    table = _table(codec, q.device)
    cell = q.detach().floor().clamp(0, side - 2)
    offset = q - cell
    stride = (side * side, side, 1)
    base = sum(cell[c].long() * stride[c] for c in range(3))
    best = torch.full_like(q[0], torch.inf)
    place = torch.zeros_like(best)
    for corner in range(8):
        bit = (corner >> 2, (corner >> 1) & 1, corner & 1)
        at = base + sum(b * s for b, s in zip(bit, stride, strict=True))
        a = table[at]
        squares = [(offset[c] - bit[c]) ** 2 for c in range(3)]
        distance = squares[0] + squares[1] + squares[2]
        closer = distance < best
        best = torch.where(closer, distance, best)
        place = torch.where(closer, a.to(q.dtype), place)
        for axis in range(3):
            if bit[axis]:
                continue
            b = table[at + stride[axis]]
            along = offset[axis]
            across = squares[(axis + 1) % 3] + squares[(axis + 2) % 3]
            here = torch.where(b == a + 1, a + along, b + 1 - along)
            on_curve = ((b - a).abs() == 1) & (along > 0) & (along < 1)
            closer = on_curve & (across < best)
            best = torch.where(closer, across, best)
            place = torch.where(closer, here, place)
    return place, best


def decode_depth(
    rgb: Float[torch.Tensor, "*b 3 h w"], codec: DepthCodec
) -> tuple[Float[torch.Tensor, "*b h w"], Float[torch.Tensor, "*b h w"]]:
    """(depth in metres, residual 0..255) of pictures with 1.0 at full brightness.

    NaN is unknown and +inf sky, as in `DepthCodec`; those pixels pass no gradient, so mask them
    with ``isfinite`` before a mean. Where the nearest point is a corner of the curve, the depth
    does not move with the colour and its gradient is 0. The residual's gradient is a unit vector
    (0 on the curve itself). Computed in float32 at least: relative error of depth 1e-4 up to
    order 4, growing with the number of codes; orders up to 7.
    """
    if codec.order > MAX_ORDER:
        raise UsageError(
            f"decode_depth: order {codec.order} > {MAX_ORDER}; its colours are noise "
            "to a loss, take a lower order or the cube walk"
        )
    colours = rgb if rgb.dtype == torch.float64 else rgb.float()
    channels = colours.movedim(-3, 0)
    shape = channels.shape[1:]
    known = ~channels.isnan().any(0)
    flat = torch.where(known, channels, torch.zeros_like(channels)).reshape(3, -1)
    place, squared = _nearest_place(flat * (codec.path.side - 1), codec)
    step = codec.path.step
    level, squared = (place * step).reshape(shape), squared.reshape(shape)
    on_curve = squared <= 0
    residual = torch.where(on_curve, squared, torch.where(on_curve, 1.0, squared).sqrt()) * step
    near_m, far_m, first, last = codec.ends()
    white = (channels >= 1 - 0.5 / 255).all(0)
    sky = known & ((level > last) | white)
    finite = known & ~sky & (level >= first)
    w0, w1, q, d0, d1 = codec.backward()
    safe = torch.where(finite, level, torch.full_like(level, codec.path.length / 2))
    depth_m = (d0 + d1 * (w0 + w1 * safe) ** q).clamp(near_m, far_m)
    depth_m = torch.where(finite, depth_m, torch.full_like(depth_m, torch.nan))
    depth_m = torch.where(sky, torch.full_like(depth_m, torch.inf), depth_m)
    return depth_m, torch.where(known, residual, torch.full_like(residual, torch.nan))
