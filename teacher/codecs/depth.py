"""Metric depth as a colour picture and back: a range transform, then a curve through the cube.

u = transform(depth) in [0, 1] is a place on a curve of `teacher.codecs.curves`, and the nearest
8-bit colour is painted. Decoding takes the nearest point of the curve; the distance to it is the
residual. What the ends mean:

* unknown (NaN, <= 0 m, nearer than ``near_m``) encodes as black; exact black, and what lies more
  than `DepthCodec.margin` nearer than ``near_m``, is NaN; the rest is at least ``near_m``. A known
  depth is at least one colour step away from black.
* sky (+inf, beyond ``far_m``) encodes as white. Decoding: exact white is +inf, and so is what lies
  more than the margin beyond ``far_m``; the rest is at most ``far_m``. On the cube walk,
  which ends in white, a *near-white* pixel therefore is sky exactly when it decodes beyond
  ``far_m`` (by default the last 15 of 1785 steps). White lies in the middle of a Hilbert curve, so
  there only exact white is sky and a near-white pixel is a finite depth: for a generator whose sky
  is noisy, take the walk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from teacher.codecs._pixels import as_pixels
from teacher.codecs.curves import MAX_ORDER, Curve
from teacher.codecs.edges import MIN_TRIGGER, snap_edges
from teacher.errors import UsageError

Number = float | int  # at run time beartype takes float alone literally
EDGES = ("snap", "nearest")
SKY_MARGIN = 1 / 121  # the share of the code beyond the default far_m: 15 steps of the walk


@dataclass(frozen=True, kw_only=True)
class PowerTransform:
    """u = 1 - (1 - d / (lam c))^(lam + 1), d in metres (Barron, arXiv 2502.10647).

    lam = -3, c = 10/3 is Vision Banana's: u = 1 - (1 + d / 10)^-2. lam = -4, c = 120 is for long
    ranges. Infinite depth is u = 1.
    """

    lam: Number = -3.0
    c: Number = 10 / 3

    def __post_init__(self) -> None:
        """Refuse parameters for which u does not grow from 0 to 1."""
        if not (self.lam < -1 and self.c > 0 and math.isfinite(self.lam * self.c)):
            raise UsageError(
                f"PowerTransform: needs lam < -1 and c > 0, got lam={self.lam} c={self.c}"
            )

    def coefficients(self) -> tuple[float, float, float, float, float]:
        """(o, m, p, a, b) of u = a + b (o + m d)^p."""
        return 1.0, -1 / (self.lam * self.c), float(self.lam + 1), 1.0, -1.0

    @property
    def range_m(self) -> tuple[float, float]:
        """Default (near, far): 0 and the depth at u = 1 - 1/121 (100 m for the defaults)."""
        return 0.0, self.lam * self.c * (1 - SKY_MARGIN ** (1 / (self.lam + 1)))


@dataclass(frozen=True, kw_only=True)
class PlainPower:
    """u = (d^gamma - near^gamma) / (far^gamma - near^gamma) between near and far.

    gamma = 1 is linear, 0.5 the square root, -1 disparity.
    """

    gamma: Number = 0.5
    near_m: Number = 0.1
    far_m: Number = 100.0

    def __post_init__(self) -> None:
        """Refuse gamma = 0 and an empty range."""
        if not (math.isfinite(self.gamma) and self.gamma != 0):
            raise UsageError(f"PlainPower: gamma must be finite and not 0, got {self.gamma}")
        if not 0 < self.near_m < self.far_m < math.inf:
            found = f"near_m={self.near_m} far_m={self.far_m}"
            raise UsageError(f"PlainPower: needs 0 < near_m < far_m, got {found}")

    def coefficients(self) -> tuple[float, float, float, float, float]:
        """(o, m, p, a, b) of u = a + b (o + m d)^p."""
        low, high = self.near_m**self.gamma, self.far_m**self.gamma
        return 0.0, 1.0, float(self.gamma), -low / (high - low), 1 / (high - low)

    @property
    def range_m(self) -> tuple[float, float]:
        """(near, far)."""
        return float(self.near_m), float(self.far_m)


TRANSFORMS: dict[str, type[PowerTransform] | type[PlainPower]] = {
    "power": PowerTransform,
    "plain-power": PlainPower,
}


@dataclass(frozen=True, kw_only=True)
class DepthCodec:
    """Depth in metres <-> colours; the module's docstring says what black and white mean.

    Attributes:
        curve: "cube-walk" or "hilbert".
        order: of the Hilbert curve, 1..8; it has no default (docs/results.md helps to choose).
        transform: `PowerTransform` or `PlainPower`.
        far_m: beyond it is sky; by default what the transform proposes.
        near_m: nearer is unknown; by default what the transform proposes.
    """

    curve: str = "cube-walk"
    order: int = 0
    transform: PowerTransform | PlainPower = PowerTransform()
    far_m: Number | None = None
    near_m: Number | None = None

    def __post_init__(self) -> None:
        """Fill in the default range and refuse an empty one."""
        if self.order == 0 and self.curve == "hilbert":
            raise UsageError(
                f"DepthCodec: curve='hilbert' needs an order, 1..{MAX_ORDER}; 2 withstands colour "
                "noise best, 8 is for lossless storage (docs/results.md, Codecs)"
            )
        object.__setattr__(self, "order", self.order or 1)  # of the walk
        near_m, far_m = self.transform.range_m
        if self.near_m is None:
            object.__setattr__(self, "near_m", near_m)
        if self.far_m is None:
            object.__setattr__(self, "far_m", far_m)
        if not 0 <= self._near < self._far < math.inf:
            found = f"near_m={self.near_m} far_m={self.far_m}"
            raise UsageError(f"DepthCodec: needs 0 <= near_m < far_m < inf, got {found}")
        Curve(self.curve, self.order)

    @property
    def path(self) -> Curve:
        """The curve itself."""
        return Curve(self.curve, self.order)

    @property
    def _near(self) -> float:
        return float(np.float32(self.near_m or 0.0))  # as float32, so that near_m itself is kept

    @property
    def _far(self) -> float:
        return float(np.float32(math.inf if self.far_m is None else self.far_m))

    def forward(self) -> tuple[float, float, float, float, float]:
        """(o, m, p, a, b) of level = a + b (o + m d)^p, the level in 8-bit colour steps."""
        o, m, p, a, b = self.transform.coefficients()
        return o, m, p, a * self.path.length, b * self.path.length

    def backward(self) -> tuple[float, float, float, float, float]:
        """(w0, w1, q, d0, d1) of d = d0 + d1 (w0 + w1 level)^q."""
        o, m, p, a, b = self.forward()
        return -a / b, 1 / b, 1 / p, -o / m, 1 / m

    def level(self, depth_m: Number) -> float:
        """Where a depth lies on the curve, in 8-bit colour steps, unrounded."""
        o, m, p, a, b = self.forward()
        return a + b * (o + m * depth_m) ** p

    @property
    def margin(self) -> float:
        """How far, in colour steps, 8 bits move a level: 1/2, or 1.2 where lattice points fall
        between bytes (orders 3 and 5 to 7), so that ``near_m`` and ``far_m`` survive a round trip.
        """
        return 0.5 if self.path.step.is_integer() else 1.2

    def ends(self) -> tuple[float, float, float, float]:
        """(near_m, far_m, the level below which is unknown, the level above which is sky)."""
        first = self.level(max(self._near, self.transform.range_m[0])) - self.margin
        last = min(self.level(self._far) + self.margin, self.path.length - 0.5)
        return self._near, self._far, max(0.5, first), last

    def encode(self, depth_m: Shaped[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n 3"]:
        """Paint depth in metres (any float array) as sRGB bytes."""
        if not np.issubdtype(depth_m.dtype, np.floating):
            raise UsageError(f"DepthCodec.encode: depth must be float metres, got {depth_m.dtype}")
        with np.errstate(over="ignore"):  # beyond float32 is beyond far_m
            flat = np.ascontiguousarray(depth_m, np.float32).reshape(-1)
        rgb = np.empty(3 * flat.size, np.uint8)
        curve, near_m, far_m = self.path, self._near, self._far
        if curve.name == "cube-walk":
            from teacher.codecs._walk_kernels import encode_walk

            encode_walk(flat, rgb, self.forward(), near_m, far_m)
        elif curve.order == 8:
            from teacher.codecs._hilbert_kernels import automaton, encode_full

            encode_full(flat, rgb, self.forward(), near_m, far_m, automaton()[1])
        else:
            from teacher.codecs._lattice_kernels import encode_lattice

            encode_lattice(flat, rgb, self.forward(), near_m, far_m, curve.points(), curve.step)
        return rgb.reshape(*depth_m.shape, 3)

    def decode(
        self,
        rgb: Shaped[np.ndarray, "*n 3"],
        *,
        max_residual: Number | None = None,
        edges: str = "snap",
    ) -> tuple[Float32[np.ndarray, "*n"], Float32[np.ndarray, "*n"]]:
        """Read a picture back: (depth in metres, residual 0..255).

        Args:
            rgb: bytes, or floats with 1.0 for 255 (a generator's raw answer; NaN is unknown).
            max_residual: a colour farther than this from the curve becomes NaN, whatever ``edges``.
            edges: "nearest" takes the nearest point of the curve everywhere; "snap" then gives
                colours blended across a depth edge the depth of one side (`teacher.codecs.edges`;
                for pictures [..., H, W, 3]). On colours of the curve both are the same.

        The residual is the colour's Euclidean distance to the curve in 8-bit steps: 0 on it, 86
        on average for a random colour on the walk, always 0 for bytes on order 8.
        """
        if edges not in EDGES:
            raise UsageError(f"DepthCodec.decode: edges={edges!r}, choose one of {EDGES}")
        pixels = as_pixels(rgb, "DepthCodec.decode")
        depth_m, residual, worst = self._nearest(pixels, max_residual)
        depth_m, residual = depth_m.reshape(rgb.shape[:-1]), residual.reshape(rgb.shape[:-1])
        if edges == "snap" and worst > MIN_TRIGGER and depth_m.ndim >= 2:
            unit = 255.0 if pixels.dtype == np.uint8 else 1.0
            self._snap(pixels, unit, depth_m, residual, max_residual)
        return depth_m, residual

    def _snap(
        self,
        pixels: np.ndarray,
        unit: float,
        depth_m: np.ndarray,
        residual: np.ndarray,
        max_residual: Number | None,
    ) -> None:
        height, width = depth_m.shape[-2:]
        rejected = residual > max_residual if max_residual is not None else None
        pictures = pixels.reshape(-1, 3 * height * width)
        parts = zip(
            pictures,
            depth_m.reshape(-1, height, width),
            residual.reshape(-1, height, width),
            strict=True,
        )
        for picture, depth_part, residual_part in parts:
            snap_edges(picture, unit, depth_part, residual_part)
        if rejected is not None:
            depth_m[rejected] = np.nan

    def _nearest(
        self, pixels: np.ndarray, max_residual: Number | None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Depth and residual of flat pixels, and the largest residual."""
        limit = math.inf if max_residual is None else max_residual**2
        depth_m = np.empty(pixels.size // 3, np.float32)
        residual = np.empty(pixels.size // 3, np.float32)
        curve = self.path
        if pixels.dtype == np.uint8 and curve.name == "cube-walk":
            from teacher.codecs._walk_kernels import decode_walk

            table_m = self._depth_of(np.arange(curve.length + 1))
            bound = np.uint16(min(limit, 65535))
            return depth_m, residual, decode_walk(pixels, depth_m, residual, table_m, bound)
        if pixels.dtype == np.uint8 and curve.order == 8:
            from teacher.codecs._hilbert_kernels import automaton, decode_full

            decode_full(pixels, depth_m, automaton()[0], self.backward(), self.ends())
            residual.fill(0.0)
            return depth_m, residual, 0.0
        from teacher.codecs import _lattice_kernels as lattice

        kernel = lattice.decode_bytes if pixels.dtype == np.uint8 else lattice.decode_floats
        how = (curve.table(), curve.edges(), curve.side, self.backward(), self.ends(), limit)
        return depth_m, residual, kernel(pixels, depth_m, residual, *how)

    def _depth_of(self, levels: np.ndarray) -> np.ndarray:
        from teacher.codecs._lattice_kernels import depth_of_levels

        depth_m = np.empty(levels.size, np.float32)
        depth_of_levels(levels, depth_m, self.backward(), self.ends())
        return depth_m

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, stored with the data; `from_json` reads it."""
        kind = next(k for k, t in TRANSFORMS.items() if isinstance(self.transform, t))
        transform = {"kind": kind, **asdict(self.transform)}
        return {**asdict(self), "transform": transform}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> DepthCodec:
        """The codec that `to_json` described."""
        try:
            transform = dict(stored["transform"])
            kind = TRANSFORMS[transform.pop("kind")]
            return cls(**{**stored, "transform": kind(**transform)})
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"DepthCodec.from_json: cannot read {dict(stored)!r} ({error}); expected the keys "
                f"curve, order, transform {{kind: {' | '.join(TRANSFORMS)}, ...}}, far_m, near_m"
            ) from error

    @classmethod
    def preset(cls, name: str) -> DepthCodec:
        """A codec by name, see `PRESETS`."""
        if name not in PRESETS:
            raise UsageError(f"DepthCodec: no preset {name!r}; there are {sorted(PRESETS)}")
        return PRESETS[name]


PRESETS: dict[str, DepthCodec] = {
    "vision-banana": DepthCodec(),
    "vision-banana-long": DepthCodec(transform=PowerTransform(lam=-4.0, c=120.0)),
    "plain-hilbert": DepthCodec(curve="hilbert", order=8, transform=PlainPower()),
}
