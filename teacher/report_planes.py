"""Small pictures of a label for the report, coded so that a browser's canvas can read values back.

A scalar plane (depth, uncertainty) becomes a PNG of codes: 0 unknown, 1..``levels`` the range
``low..high`` of this image, spaced uniformly in ``scale``, ``levels + 1`` sky. ``wide`` codes take
two bytes (red high, green low), the others one grey byte. Ids are stored as they are. Normals,
images and raw answers are WebP pictures. Nothing that is a label is ever averaged: pixels are
picked at nearest centres.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from teacher.label import Label, Task, unknown_class

WIDE_LEVELS, BYTE_LEVELS = 4093, 254
QUALITY = {"image": 82, "normals": 92, "answer": 85}
SCALES = {Task.DEPTH: "log", Task.NORMALS: "linear", Task.SEMANTIC: "linear"}


def small_size(height: int, width: int, side_px: int) -> tuple[int, int]:
    """Height and width with the longer side at most ``side_px``; never enlarged."""
    scale = min(1.0, side_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def nearest(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W, ...] picked at the nearest pixel centres of ``height x width``."""
    rows = ((np.arange(height) + 0.5) * array.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * array.shape[1] / width).astype(int)
    return array[rows][:, columns]


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """An image as a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def codes_uri(codes: np.ndarray, *, wide: bool) -> str:
    """[H, W] integer codes as a PNG: one grey byte, or red the high and green the low byte."""
    if not wide:
        return data_uri(Image.fromarray(codes.astype(np.uint8)), "PNG", compress_level=6)
    rgb = np.zeros((*codes.shape, 3), np.uint8)
    rgb[..., 0], rgb[..., 1] = codes >> 8, codes & 255
    return data_uri(Image.fromarray(rgb), "PNG", compress_level=6)


def scalar(values: np.ndarray, *, scale: str, levels: int) -> dict[str, Any]:
    """[H, W] float32 -> a coded plane with its own range (module docstring).

    The worst error of a log plane is ``(high / low) ** (0.5 / (levels - 1)) - 1``, relative.
    """
    known = np.isfinite(values) & ((values > 0) | (scale == "linear"))
    low, high = (float(f(values[known])) if known.any() else 1.0 for f in (np.min, np.max))
    codes = np.zeros(values.shape, np.int64)
    if high > low:
        with np.errstate(invalid="ignore", divide="ignore"):
            if scale == "log":
                t = np.log(values / low) / math.log(high / low)
            else:
                t = (values - low) / (high - low)
        codes[known] = 1 + np.rint(t[known].clip(0, 1) * (levels - 1)).astype(np.int64)
    else:
        codes[known] = 1
    codes[np.isposinf(values)] = levels + 1
    wide = levels + 1 > 255
    facts = {"kind": "scalar", "low": low, "high": high, "scale": scale, "levels": levels}
    return facts | {"wide": wide, "src": codes_uri(codes, wide=wide)}


def ids(values: np.ndarray, *, unknown: int) -> dict[str, Any]:
    """[H, W] class or instance ids; ``unknown`` is the id that means none."""
    wide = bool(values.max() > 255) if values.size else False
    return {"kind": "ids", "unknown": unknown, "wide": wide, "src": codes_uri(values, wide=wide)}


def picture(image: np.ndarray, size: tuple[int, int], *, what: str) -> dict[str, Any]:
    """uint8 [H, W, 3] as a small lossy picture (colours may differ a little)."""
    small = Image.fromarray(image)
    if what == "image":
        small = small.resize((size[1], size[0]), Image.Resampling.LANCZOS, reducing_gap=2.0)
    else:
        small = Image.fromarray(np.ascontiguousarray(nearest(image, *size)))
    src = data_uri(small, "WEBP", quality=QUALITY[what], method=2)
    return {"kind": "normals" if what == "normals" else "picture", "src": src}


def plane_names(label: Label) -> list[str]:
    """The planes of one label in the order in which they are shown."""
    names = ["image"]
    for task in Task:
        names += [str(task)] * (task in label.values)
        names += [f"answer.{task}"] * (task in label.pictures)
        names += [f"{task}_uncertainty"] * (task in label.uncertainty)
        names += [f"{task}_confidence"] * (task in label.confidence)
    return names


def planes(label: Label, *, side_px: int) -> dict[str, dict[str, Any]]:
    """Name -> coded plane, for everything the label has."""
    height, width = label.image.shape[:2]
    size = small_size(height, width, side_px)
    found = {"image": picture(label.image, size, what="image")}
    for task in Task:
        if task in label.values:
            found[str(task)] = _value(task, label.values[task], size)
        if task in label.pictures:
            found[f"answer.{task}"] = picture(label.pictures[task], size, what="answer")
        if task in label.uncertainty:
            spread = nearest(label.uncertainty[task], *size)
            scale = SCALES.get(task, "linear")
            found[f"{task}_uncertainty"] = scalar(spread, scale=scale, levels=BYTE_LEVELS)
        if task in label.confidence:
            sure = nearest(label.confidence[task], *size)
            found[f"{task}_confidence"] = scalar(sure, scale="linear", levels=BYTE_LEVELS)
    return found


def _value(task: Task, values: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    small = nearest(values, *size)
    if task is Task.DEPTH:
        return scalar(small, scale="log", levels=WIDE_LEVELS)
    if task is Task.NORMALS:
        rgb = np.rint((np.nan_to_num(small, nan=-1.0) + 1) * 127.5).clip(0, 255)
        return picture(rgb.astype(np.uint8), size, what="normals")
    return ids(small, unknown=unknown_class(small.dtype) if task is Task.SEMANTIC else 0)
