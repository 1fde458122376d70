"""Orientation and camera from EXIF: the focal length in pixels, where a file tells it."""

from __future__ import annotations

import math
import struct
from typing import Any

from PIL import Image

from teacher.label import Camera

# The frame that FocalLengthIn35mmFilm refers to, by its diagonal (CIPA DCG-001).
FILM_DIAGONAL_MM = math.hypot(36.0, 24.0)
MM_PER_UNIT = {2: 25.4, 3: 10.0, 4: 1.0}  # FocalPlaneResolutionUnit: inch, centimetre, millimetre


def read_exif(source: Image.Image) -> dict[str, Any]:
    """Orientation and the focal tags, positive and finite; unreadable EXIF reads as none.

    Read after loading: a PNG's may follow the pixels, and Pillow turns a TIFF upright itself.
    """
    facts: dict[str, Any] = {}
    try:
        exif = source.getexif()
        facts["orientation"] = exif.get(274, 1)
        tags = {**exif, **exif.get_ifd(0x8769)}
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error, OSError, UserWarning):
        return facts
    names = {
        41989: "film_mm",  # FocalLengthIn35mmFilm
        37386: "focal_mm",  # FocalLength
        41486: "plane_resolution",  # FocalPlaneXResolution
        41488: "plane_unit",  # FocalPlaneResolutionUnit
        40962: "width",  # PixelXDimension, before any resizing
        40963: "height",
    }
    for tag, name in names.items():
        try:
            number = float(tags[tag])
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            continue
        if math.isfinite(number) and number > 0:
            facts[name] = number
    return facts


def camera_of(exif: dict[str, Any], width: int, height: int) -> Camera:
    """The camera of the upright ``width x height`` image, centred, square pixels.

    From FocalLengthIn35mmFilm by the image's diagonal, else from FocalLength and the focal plane's
    resolution, which counts the pixels of the camera's own file. Both follow a resize; a changed
    aspect means that the file was cropped since, and the focal length is no longer known.
    """
    long, short = max(width, height), min(width, height)
    own_long = max(exif.get("width", long), exif.get("height", short))
    own_short = min(exif.get("width", long), exif.get("height", short))
    assumed = Camera.assumed(width, height)
    if abs(long * own_short / (short * own_long) - 1) > 0.02:
        return assumed
    if "film_mm" in exif:
        focal_px = exif["film_mm"] / FILM_DIAGONAL_MM * math.hypot(width, height)
    elif {"focal_mm", "plane_resolution"} <= exif.keys():
        unit_mm = MM_PER_UNIT.get(int(exif.get("plane_unit", 2)), math.inf)
        focal_px = exif["focal_mm"] * exif["plane_resolution"] / unit_mm * long / own_long
    else:
        return assumed
    if not 0.2 * long <= focal_px <= 50 * long:  # 136 to 1.1 degrees: no camera, a wrong tag
        return assumed
    return Camera(
        fx=focal_px,
        fy=focal_px,
        cx=assumed.cx,
        cy=assumed.cy,
        width=width,
        height=height,
        source="exif",
    )
