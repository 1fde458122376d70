"""Label planes as PNG files: depth, uncertainty and confidence in 16 bits, normals in 3 x 8 bits.

Every code point has a meaning, and the range stands in the file (PNG text chunks):

* scalar planes, 16-bit grey: 0 unknown (NaN), 65535 sky (+inf), 1..65534 the range ``low..high``,
  spaced uniformly in ``scale`` ("log" or "linear"). Depth is logarithmic between 0.05 m and
  2000 m, wider when an image needs it; worst relative error 8.1e-5 in the standard range.
* normals, 8-bit RGB: n = 2 v / 255 - 1, renormalised; (0, 0, 0) unknown; at most 0.39 degrees off.
* ids: as they are, 8- or 16-bit grey.
"""

from __future__ import annotations

import functools
import io
import math

import numpy as np
from PIL import Image, PngImagePlugin

SKY, TOP = 65535, 65534
# zlib's run-length strategy: after PNG's filters smaller and twice as fast for normals and ids
RUNS = {"compress_level": 1, "compress_type": 3}
# name -> (low, high, scale) of the standard range
RANGES: dict[str, tuple[float, float, str]] = {
    "depth": (0.05, 2000.0, "log"),
    "depth uncertainty": (1e-4, 100.0, "log"),
    "normals uncertainty": (0.0, 180.0, "linear"),
    "semantic uncertainty": (0.0, 1.0, "linear"),
    "instances uncertainty": (0.0, 1.0, "linear"),
    "depth confidence": (0.0, 1.0, "linear"),
    "normals confidence": (0.0, 1.0, "linear"),
    "semantic confidence": (0.0, 1.0, "linear"),
    "instances confidence": (0.0, 1.0, "linear"),
}


def quantise(values: np.ndarray, *, low: float, high: float, scale: str) -> np.ndarray:
    """[H, W] float -> uint16 codes; NaN -> 0, +inf -> 65535, the rest clamped to the range."""
    with np.errstate(invalid="ignore", divide="ignore"):
        if scale == "log":
            t = np.log(np.maximum(values, low) / low) / math.log(high / low)
        else:
            t = (values - low) / (high - low)
        codes = 1 + np.rint(np.clip(t, 0, 1) * (TOP - 1))
    codes = np.where(np.isnan(values), 0, codes)
    return np.where(np.isposinf(values), SKY, codes).astype(np.uint16)


def dequantise(codes: np.ndarray, *, low: float, high: float, scale: str) -> np.ndarray:
    """The inverse of `quantise`: uint16 codes -> float32."""
    return _values_of_codes(low, high, scale)[codes]


@functools.lru_cache(maxsize=32)  # 256 KiB each; all planes of a set but odd depths share theirs
def _values_of_codes(low: float, high: float, scale: str) -> np.ndarray:
    t = (np.arange(TOP + 2, dtype=np.float64) - 1) / (TOP - 1)
    table = low * np.exp(t * math.log(high / low)) if scale == "log" else low + t * (high - low)
    table[0], table[SKY] = np.nan, np.inf
    table = table.astype(np.float32)
    table.flags.writeable = False
    return table


def _png(image: Image.Image, text: dict[str, str], **deflate: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, **deflate)
    return buffer.getvalue()


def encode_plane(name: str, values: np.ndarray) -> bytes:
    """A plane as PNG bytes. ``name`` is a task, or ``"<task> uncertainty"`` / ``confidence``."""
    if name in ("semantic", "instances"):
        return _png(Image.fromarray(values), {}, **RUNS)
    if name == "normals":
        rgb = values + 1  # in place from here: this runs beside the teacher
        rgb *= 127.5
        np.rint(rgb, out=rgb)
        rgb[np.isnan(rgb)] = 0
        np.clip(rgb, 0, 255, out=rgb)
        return _png(Image.fromarray(rgb.astype(np.uint8)), {"code": "n = 2 v / 255 - 1"}, **RUNS)
    low, high, scale = RANGES[name]
    if name == "depth":
        known = values[np.isfinite(values)]
        if known.size:
            low, high = min(low, float(known.min())), max(high, float(known.max()))
    codes = quantise(values, low=low, high=high, scale=scale)
    text = {"low": repr(low), "high": repr(high), "scale": scale}
    return _png(Image.fromarray(codes), text, compress_level=2)


def decode_plane(name: str, data: bytes) -> np.ndarray:
    """The inverse of `encode_plane`."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.load()
        array, text = np.array(image), dict(getattr(image, "text", {}))
    if name in ("semantic", "instances"):
        return array
    if name == "normals":
        normals = array.astype(np.float32) / 127.5 - 1
        normals /= np.sqrt(np.einsum("hwc,hwc->hw", normals, normals))[..., None]
        normals[(array[..., 0] | array[..., 1] | array[..., 2]) == 0] = np.nan
        return normals
    return dequantise(array, low=float(text["low"]), high=float(text["high"]), scale=text["scale"])
