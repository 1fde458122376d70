"""Answers as pictures that a person can read: fixed colours, a scale beside them, unknown = black.

Nothing here is a label format; numbers are kept elsewhere.
"""

from __future__ import annotations

import base64
import functools
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

UNKNOWN, SKY, NO_ERROR = (0, 0, 0), (255, 255, 255), (150, 150, 150)
DEPTH_MAP, ERROR_MAP = "turbo_r", "inferno"


@functools.cache
def table(name: str) -> np.ndarray:
    """256 colours, uint8 [256, 3], of a matplotlib colour map."""
    from matplotlib import colormaps

    return (colormaps[name](np.arange(256))[:, :3] * 255 + 0.5).astype(np.uint8)


def _paint(share: np.ndarray, name: str, unknown: tuple[int, int, int] = UNKNOWN) -> np.ndarray:
    """Shares in [0, 1] (NaN: unknown) -> uint8 [H, W, 3]."""
    known = np.isfinite(share)
    index = (np.clip(np.where(known, share, 0), 0, 1) * 255).astype(np.uint8)
    picture = table(name)[index]
    picture[~known] = unknown
    return picture


def depth_range(depth_m: np.ndarray) -> tuple[float, float]:
    """Near and far [m] for a picture's scale: the 2nd and 98th percentile of what is known."""
    known = depth_m[np.isfinite(depth_m)]
    if not known.size:
        return 1.0, 10.0
    near, far = (float(v) for v in np.percentile(known, (2, 98)))
    return near, max(far, near * 1.5)


def depth_picture(depth_m: np.ndarray, near_m: float, far_m: float) -> np.ndarray:
    """Depth [H, W] on a logarithmic scale, near is red; sky (+inf) white, unknown black."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log(depth_m / near_m) / np.log(far_m / near_m)
    sky = np.isposinf(depth_m)
    picture = _paint(np.where(sky, np.nan, share), DEPTH_MAP)
    picture[sky] = SKY
    return picture


def normals_picture(normals: np.ndarray) -> np.ndarray:
    """Unit vectors [H, W, 3] as colour (n + 1) / 2: a wall facing the camera is light blue."""
    unknown = ~np.isfinite(normals).all(-1)
    colour = np.clip((np.where(unknown[..., None], 0, normals) + 1) / 2, 0, 1)
    picture = (colour * 255 + 0.5).astype(np.uint8)
    picture[unknown] = UNKNOWN
    return picture


def classes_picture(ids: np.ndarray) -> np.ndarray:
    """Class ids [H, W] in well-separated colours; 255 and 65535 are black."""
    golden = (ids.astype(np.int64) * 97 + 31) % 256  # 97 is odd: 256 different places
    picture = table("hsv")[golden]
    picture[(ids == 255) | (ids == 65535)] = UNKNOWN
    return picture


def share_picture(values: np.ndarray, top: float) -> np.ndarray:
    """Non-negative values [H, W]: 0 black, ``top`` and more light yellow, unknown (NaN) grey."""
    return _paint(np.where(np.isposinf(values), 1.0, values / top), ERROR_MAP, NO_ERROR)


def with_scale(picture: np.ndarray, labels: tuple[str, str], name: str) -> np.ndarray:
    """``picture`` with a colour bar below that names its two ends: uint8 [H + bar, W, 3]."""
    width = picture.shape[1]
    size = max(11, min(22, width // 28))
    bar = table(name)[np.linspace(0, 255, width).astype(int)][None].repeat(size, 0)
    strip = Image.new("RGB", (width, size * 5 // 2), (255, 255, 255))
    strip.paste(Image.fromarray(bar), (0, 2))
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=size)
    base = size + 2
    draw.text((3, base), labels[0], fill=(0, 0, 0), font=font)
    draw.text((width - 3, base), labels[1], fill=(0, 0, 0), font=font, anchor="ra")
    return np.concatenate([picture, np.asarray(strip)])


def data_uri(picture: np.ndarray, *, max_side: int = 320) -> str:
    """A picture as an ``<img src>`` that needs no file."""
    image = Image.fromarray(picture)
    if max(image.size) > max_side:
        factor = max_side / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def css_gradient(name: str) -> str:
    """The colour map as a CSS background."""
    stops = ", ".join("#" + bytes(c).hex() for c in table(name)[::15])
    return f"linear-gradient(to right, {stops})"
