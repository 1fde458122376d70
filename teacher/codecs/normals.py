"""Unit normals as colours and back, in any of the axis conventions teachers use.

Our frame: x right, y up, z toward the viewer; a wall facing the camera is (0, 0, 1). A colour
channel holds (component + 1) / 2 of the *teacher's* frame, so a codec is a triple of signs:

=====================================  ========================================  ============
names                                  red grows                                 signs
=====================================  ========================================  ============
ours, marigold                         to the right, green up, blue to viewer    (+, +, +)
vision-banana, lotus, dsine            to the LEFT, green up, blue to viewer     (-, +, +)
opencv, moge                           to the right, green DOWN, blue AWAY       (+, -, -)
=====================================  ========================================  ============

A wrong sign of x looks plausible and costs 30 degrees, so the name is stored with the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from teacher.codecs._pixels import as_pixels
from teacher.errors import UsageError

AXES: dict[str, tuple[int, int, int]] = {
    "ours": (1, 1, 1),
    "marigold": (1, 1, 1),
    "vision-banana": (-1, 1, 1),
    "lotus": (-1, 1, 1),
    "dsine": (-1, 1, 1),
    "opencv": (1, -1, -1),
    "moge": (1, -1, -1),
}


@dataclass(frozen=True, kw_only=True)
class NormalCodec:
    """Normals of our frame <-> colours of a teacher's convention; error of 8 bits: 0.39 degrees.

    Attributes:
        axes: the convention's name, a key of `AXES`.
    """

    axes: str = "ours"

    def __post_init__(self) -> None:
        """Refuse unknown conventions."""
        if self.axes not in AXES:
            raise UsageError(f"NormalCodec: axes {self.axes!r} unknown, choose one of {list(AXES)}")

    def to_teacher(self, normals: Shaped[np.ndarray, "*n 3"]) -> Shaped[np.ndarray, "*n 3"]:
        """Our frame -> the teacher's, without colours; its own inverse."""
        return normals * np.array(AXES[self.axes], normals.dtype)

    def encode(self, normals: Shaped[np.ndarray, "*n 3"]) -> UInt8[np.ndarray, "*n 3"]:
        """Paint unit normals of our frame; NaN becomes black, zero vectors mid grey: unknown."""
        if normals.shape[-1:] != (3,) or not np.issubdtype(normals.dtype, np.floating):
            found = f"{normals.dtype} {normals.shape}"
            raise UsageError(f"NormalCodec.encode: expected floats [..., 3], got {found}")
        from teacher.codecs._normal_kernels import encode_normals

        flat = np.ascontiguousarray(normals, np.float32).reshape(-1)
        rgb = np.empty(flat.size, np.uint8)
        encode_normals(flat, rgb, AXES[self.axes])
        return rgb.reshape(normals.shape)

    def decode(
        self, rgb: Shaped[np.ndarray, "*n 3"], *, max_residual: float | int | None = None
    ) -> tuple[Float32[np.ndarray, "*n 3"], Float32[np.ndarray, "*n"]]:
        """Read a picture back: (unit normals of our frame, residual 0..255).

        The residual is the colour's distance to the sphere of unit normals in 8-bit steps (at most
        0.9 for what `encode` painted; 93 for black). Exact black, mid grey (127 or 128, no
        direction), NaN and what lies farther than ``max_residual`` become NaN.
        """
        pixels = as_pixels(rgb, "NormalCodec.decode")
        from teacher.codecs._normal_kernels import decode_normals

        normals = np.empty(pixels.size, np.float32)
        residual = np.empty(pixels.size // 3, np.float32)
        unit = 255.0 if pixels.dtype == np.uint8 else 1.0
        limit = math.inf if max_residual is None else float(max_residual)
        decode_normals(pixels, unit, normals, residual, AXES[self.axes], limit)
        return normals.reshape(rgb.shape), residual.reshape(rgb.shape[:-1])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, stored with the data; `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> NormalCodec:
        """The codec that `to_json` described."""
        if set(stored) != {"axes"}:
            raise UsageError(f"NormalCodec.from_json: expected the key axes, got {dict(stored)!r}")
        return cls(axes=stored["axes"])
