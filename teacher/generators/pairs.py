"""Images with a depth file of the same name beside them, and the readers of depth files.

``NAME.jpg`` goes with ``NAME.depth.png`` (16 bits, unit stated), ``NAME.depth.npy`` (float metres)
or ``NAME.points.txt`` (rows of x y [px] z [m]: LiDAR, SfM). ``pairs.json`` in the same folder maps
patterns of image names to ``units_per_m`` of the PNG and ``camera`` [fx, fy, cx, cy] in pixels.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from teacher.errors import UsageError

K4 = tuple[float, float, float, float]


def integers(path: Path) -> np.ndarray:
    """A single-channel PNG of 16 bits as uint16 [h, w]; anything else is refused."""
    with Image.open(path) as opened:
        if opened.mode not in ("I;16", "I", "I;16B"):
            raise UsageError(
                f"{path}: {opened.format} of mode {opened.mode}, expected depth as 16-bit grey PNG"
            )
        return np.asarray(opened).astype(np.uint16)


def scaled(per_m: float, sky: int | None = None) -> Callable[[Path, Path], np.ndarray]:
    """A reader of 16-bit PNGs: value / ``per_m`` metres, 0 unknown, ``sky`` infinitely far."""

    def read(path: Path, image: Path) -> np.ndarray:
        raw = integers(path)
        depth_m = np.where(raw > 0, raw / np.float32(per_m), np.nan).astype(np.float32)
        if sky is not None:
            depth_m[raw == sky] = np.inf
        return depth_m

    return read


def positive(values: np.ndarray) -> np.ndarray:
    """float32 with NaN for what is not a positive finite number."""
    values = np.asarray(values, np.float32)
    return np.where(np.isfinite(values) & (values > 0), values, np.nan).astype(np.float32)


PAIRS = "pairs.json"


def pair_facts(image: Path) -> dict[str, Any]:
    """What ``pairs.json`` beside an image says of it: the first pattern that matches its name."""
    path = image.parent / PAIRS
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        found = [facts for pattern, facts in table.items() if fnmatch.fnmatch(image.name, pattern)]
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{path}: expected JSON, pattern -> facts ({error})") from error
    facts = found[0] if found else {}
    strange = sorted(set(facts) - {"units_per_m", "camera"})
    if strange:
        raise UsageError(
            f"{path}: unknown {strange}; expected units_per_m and camera [fx,fy,cx,cy]"
        )
    return facts


def pair_depth(image: Path) -> Path:
    """The depth file of an image; of several kinds the dense one."""
    places = [image.with_name(image.stem + s) for s in (".depth.png", ".depth.npy", ".points.txt")]
    return next((p for p in places if p.exists()), places[0])


def pair_metres(path: Path, image: Path) -> np.ndarray:
    """Metres [h, w] of a depth file, or points [N, 3]; NaN unknown, +inf (.npy only) sky."""
    if path.suffix == ".npy":
        depth_m = np.load(path, allow_pickle=False).squeeze().astype(np.float32)
        return np.where(np.isposinf(depth_m), depth_m, positive(depth_m))
    if path.suffix == ".txt":
        points = np.loadtxt(path, ndmin=2)
        if points.shape[1] != 3:
            raise UsageError(f"{path}: {points.shape[1]} columns, expected x y [px] and z [m]")
        return points
    units = pair_facts(image).get("units_per_m")
    if not units:
        raise UsageError(
            f"{path}: 16-bit depth of unknown unit. Write {image.parent / PAIRS}, for example "
            '{"*": {"units_per_m": 1000, "camera": [fx, fy, cx, cy]}} (camera in pixels, optional).'
        )
    return scaled(float(units))(path, image)


def pair_camera(image: Path) -> K4 | None:
    """The camera that ``pairs.json`` states."""
    k = pair_facts(image).get("camera")
    if k is not None and len(k) != 4:
        raise UsageError(f"{image.parent / PAIRS}: camera {k}, expected [fx, fy, cx, cy] in pixels")
    return None if k is None else (float(k[0]), float(k[1]), float(k[2]), float(k[3]))
