"""The label contract: what a task's array means, how geometry acts on it, and what is refused.

Frames and units, fixed for the whole project:

* ``depth``: z-depth in metres to the camera plane; NaN unknown, +inf sky.
* ``normals``: unit vectors, camera frame x right, y up, z toward the viewer; NaN unknown.
* ``semantic``: class ids; 255 (uint8) or 65535 (uint16) unknown.
* ``instances``: instance ids, 0 none.
* pixel coordinates: the centre of the first pixel is (0, 0), so the centre of an image of width W
  is (W - 1) / 2. A mirror maps cx to W - 1 - cx, a resize by s maps cx to (cx + 0.5) s - 0.5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from teacher.errors import UsageError


class LabelError(UsageError):
    """A label, answer or camera that breaks the contract; the text says where and how."""


class Task(StrEnum):
    """What a teacher can be asked for."""

    DEPTH = "depth"
    NORMALS = "normals"
    SEMANTIC = "semantic"
    INSTANCES = "instances"


class Space(StrEnum):
    """What an answer claims. Claims only weaken; nothing affine becomes metric by itself."""

    METRIC = "metric"
    AFFINE_DEPTH = "affine depth"
    AFFINE_DISPARITY = "affine disparity"
    AFFINE_LOG_DEPTH = "affine log depth"
    AFFINE_SQRT_DEPTH = "affine sqrt depth"
    UNIT_NORMALS = "unit normals"
    CLASS_IDS = "class ids"
    INSTANCE_IDS = "instance ids"


SPACES: dict[Task, tuple[Space, ...]] = {
    Task.DEPTH: (
        Space.METRIC,
        Space.AFFINE_DEPTH,
        Space.AFFINE_DISPARITY,
        Space.AFFINE_LOG_DEPTH,
        Space.AFFINE_SQRT_DEPTH,
    ),
    Task.NORMALS: (Space.UNIT_NORMALS,),
    Task.SEMANTIC: (Space.CLASS_IDS,),
    Task.INSTANCES: (Space.INSTANCE_IDS,),
}

CAMERA_SOURCES = ("known", "exif", "estimated", "assumed")
UNIT_TOLERANCE = 1e-3  # how far a stored normal's length may be from 1


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera: focal lengths and principal point in pixels of a ``width x height`` image.

    ``source`` says how far the numbers can be trusted: ``known`` (calibrated), ``exif``,
    ``estimated`` (by a model) or ``assumed`` (a default, written down as such).
    """

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    source: str = "known"

    def __post_init__(self) -> None:
        """Refuse numbers no pinhole camera can have."""
        numbers = (self.fx, self.fy, self.cx, self.cy)
        if not all(math.isfinite(v) for v in numbers) or self.fx <= 0 or self.fy <= 0:
            raise LabelError(f"camera: fx, fy must be finite and positive, got {numbers}")
        if self.width < 1 or self.height < 1:
            raise LabelError(f"camera: size must be at least 1x1, got {self.width}x{self.height}")
        if self.source not in CAMERA_SOURCES:
            raise LabelError(f"camera: source must be one of {CAMERA_SOURCES}, got {self.source!r}")

    @classmethod
    def assumed(cls, width: int, height: int, fov_deg: float = 60.0) -> Camera:
        """The camera taken when none is known: ``fov_deg`` across the longer side, centred."""
        focal_px = max(width, height) / 2 / math.tan(math.radians(fov_deg) / 2)
        return cls.centred(focal_px, width, height, source="assumed")

    @classmethod
    def centred(cls, focal_px: float, width: int, height: int, source: str = "known") -> Camera:
        """Square pixels, and the principal point in the middle of the image."""
        cx, cy = (width - 1) / 2, (height - 1) / 2
        return cls(
            fx=focal_px, fy=focal_px, cx=cx, cy=cy, width=width, height=height, source=source
        )

    def mirrored(self) -> Camera:
        """The camera of the left-right mirrored image."""
        return dataclasses.replace(self, cx=self.width - 1 - self.cx)

    def cropped(self, *, left: int, top: int, width: int, height: int) -> Camera:
        """The camera of the window that starts at (left, top); negative offsets mean padding."""
        return dataclasses.replace(
            self, cx=self.cx - left, cy=self.cy - top, width=width, height=height
        )

    def resized(self, *, width: int, height: int) -> Camera:
        """The camera of the image resampled to ``width x height``."""
        sx, sy = width / self.width, height / self.height
        return dataclasses.replace(
            self,
            fx=self.fx * sx,
            fy=self.fy * sy,
            cx=(self.cx + 0.5) * sx - 0.5,
            cy=(self.cy + 0.5) * sy - 0.5,
            width=width,
            height=height,
        )

    def rays(self) -> np.ndarray:
        """Viewing directions with unit z-depth, OpenCV frame (right, down, forward): [H, W, 3]."""
        u = (np.arange(self.width, dtype=np.float32) - self.cx) / self.fx
        v = (np.arange(self.height, dtype=np.float32) - self.cy) / self.fy
        grid_u, grid_v = np.meshgrid(u, v)
        return np.stack([grid_u, grid_v, np.ones_like(grid_u)], axis=-1).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, as stored in ``KEY.json``."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class Answer:
    """One teacher's answer for one task, in the teacher's own space.

    Attributes:
        task: what was asked.
        space: what ``values`` claims (`Space`).
        values: [H, W] or [H, W, 3], same H x W as the image that was handed over.
        residual: [H, W] float32, the colour's distance to the code's curve (0..255), if decoded.
        picture: the raw RGB answer uint8 [H, W, 3], if the teacher draws.
        uncertainty: [H, W] float32 in the task's unit (see `Label`), if the teacher has one.
        extras: plain-JSON facts for the provenance (instance table, prompt, seed, ...).
    """

    task: Task
    space: Space
    values: np.ndarray
    residual: np.ndarray | None = None
    picture: np.ndarray | None = None
    uncertainty: np.ndarray | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the task and the claimed space fit together."""
        self.task, self.space = Task(self.task), Space(self.space)
        if self.space not in SPACES[self.task]:
            allowed = [str(s) for s in SPACES[self.task]]
            raise LabelError(f"{self.task} cannot be in space {self.space!r}; allowed: {allowed}")


@dataclass(kw_only=True)
class Label:
    """Everything known about one image, in metric form (units in this module's docstring).

    Attributes:
        key: content key, unique in the label set, no dot and no slash.
        image: uint8 [H, W, 3] upright sRGB, exactly what the teacher saw.
        values: per task the array; all share the image's H x W.
        uncertainty: per task float32 [H, W]: depth Laplace scale of log depth, normals expected
            angle in degrees, semantic 1 - p; NaN unknown.
        confidence: per task float32 [H, W] in [0, 1], only once calibrated; NaN unknown.
        camera: of this very image.
        provenance: plain JSON: original hash, source, seeds, alignment, instance table.
        encoded: the image file's bytes and suffix ("jpg"/"png") when those decode to ``image``.
        pictures: per task the teacher's raw answer uint8 [H, W, 3], when kept.
    """

    key: str
    image: np.ndarray
    values: dict[Task, np.ndarray]
    camera: Camera
    uncertainty: dict[Task, np.ndarray] = field(default_factory=dict)
    confidence: dict[Task, np.ndarray] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    encoded: tuple[bytes, str] | None = None
    pictures: dict[Task, np.ndarray] = field(default_factory=dict)


def _fail(key: str, what: str, found: object, expected: str) -> None:
    raise LabelError(f"label {key!r}: {what} is {found}, expected {expected}")


def _check_depth(key: str, depth_m: np.ndarray) -> None:
    if depth_m.dtype != np.float32:
        _fail(key, "depth dtype", depth_m.dtype, "float32")
    known = depth_m[~np.isnan(depth_m)]
    if known.size and not (known > 0).all():
        _fail(key, "smallest depth", f"{known.min():g} m", "more than 0 m (NaN when unknown)")


def _check_normals(key: str, normals: np.ndarray) -> None:
    if normals.dtype != np.float32:
        _fail(key, "normals dtype", normals.dtype, "float32")
    x, y, z = (np.isnan(normals[..., i]) for i in range(3))
    if ((x != y) | (y != z)).any():
        _fail(key, "a normal", "partly NaN", "three numbers or three NaN")
    length = np.sqrt(np.einsum("hwc,hwc->hw", normals, normals))[~x]
    if length.size and not np.abs(length - 1).max() <= UNIT_TOLERANCE:
        worst = length[np.abs(length - 1).argmax()]
        _fail(key, "the length of a normal", f"{worst:g}", f"1 within {UNIT_TOLERANCE}")


def unknown_class(dtype: np.dtype | type) -> int:
    """The class id that means "no class": 255 for uint8, 65535 for uint16."""
    return int(np.iinfo(dtype).max)


def _check_ids(key: str, task: Task, ids: np.ndarray, classes: Mapping[int, Any] | None) -> None:
    allowed = (np.uint8, np.uint16) if task is Task.SEMANTIC else (np.uint16,)
    if ids.dtype not in [np.dtype(t) for t in allowed]:
        _fail(key, f"{task} dtype", ids.dtype, " or ".join(t.__name__ for t in allowed))
    if task is Task.SEMANTIC and classes is not None:
        strange = set(np.unique(ids).tolist()) - set(classes) - {unknown_class(ids.dtype)}
        if strange:
            _fail(
                key, "class ids", sorted(strange)[:5], f"ids of the class table {sorted(classes)}"
            )


def _check_map(key: str, name: str, values: np.ndarray, upper: float) -> None:
    if values.dtype != np.float32:
        _fail(key, f"{name} dtype", values.dtype, "float32")
    known = values[~np.isnan(values)]
    if known.size and not ((known >= 0) & (known <= upper)).all():
        found = f"[{known.min():g}, {known.max():g}]"
        _fail(key, f"the range of {name}", found, f"within [0, {upper:g}]")


UNCERTAINTY_MAX = {Task.DEPTH: math.inf, Task.NORMALS: 180.0, Task.SEMANTIC: 1.0}


def validate(label: Label, *, classes: Mapping[int, Any] | None = None) -> Label:
    """Return ``label`` unchanged, or raise `LabelError` that names key, found and expected.

    ``classes`` (id -> anything) additionally bounds the semantic ids.
    """
    key = label.key
    if not key or any(c in key for c in "./\\ \n\0"):
        _fail(key, "the key", repr(key), "non-empty, without dots, slashes, spaces")
    if label.image.dtype != np.uint8 or label.image.ndim != 3 or label.image.shape[2] != 3:
        _fail(key, "image", f"{label.image.dtype} {label.image.shape}", "uint8 [H,W,3]")
    size = label.image.shape[:2]
    if (label.camera.height, label.camera.width) != size:
        _fail(key, "camera size (h,w)", (label.camera.height, label.camera.width), f"{size}")
    for task, values in label.values.items():
        want = (*size, 3) if task is Task.NORMALS else size
        if values.shape != want:
            _fail(key, f"{task} shape", values.shape, f"{want}")
        if task is Task.DEPTH:
            _check_depth(key, values)
        elif task is Task.NORMALS:
            _check_normals(key, values)
        else:
            _check_ids(key, Task(task), values, classes)
    for kind, maps in (("uncertainty", label.uncertainty), ("confidence", label.confidence)):
        for task, values in maps.items():
            if values.shape != size:
                _fail(key, f"{task} {kind} shape", values.shape, f"{size}")
            upper = 1.0 if kind == "confidence" else UNCERTAINTY_MAX.get(Task(task), math.inf)
            _check_map(key, f"{task} {kind}", values, upper)
    return label


def mirrored(label: Label) -> Label:
    """The label of the left-right mirrored image: normals' x changes sign, cx moves."""

    def flip(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[:, ::-1])

    values = {task: flip(a) for task, a in label.values.items()}
    if Task.NORMALS in values:
        values[Task.NORMALS][..., 0] *= -1
    return dataclasses.replace(
        label,
        image=flip(label.image),
        values=values,
        uncertainty={t: flip(a) for t, a in label.uncertainty.items()},
        confidence={t: flip(a) for t, a in label.confidence.items()},
        pictures={},
        camera=label.camera.mirrored(),
        encoded=None,
    )


def coverage(task: Task, values: np.ndarray) -> float:
    """Share of pixels that carry a value (sky counts as known depth; id 0 as known instances)."""
    if task in (Task.DEPTH, Task.NORMALS):
        unknown = np.isnan(values if values.ndim == 2 else values[..., 0])
        return float(1 - unknown.mean())
    if task is Task.SEMANTIC:
        return float((values != unknown_class(values.dtype)).mean())
    return 1.0
