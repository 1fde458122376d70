"""One label -> one training sample: the arrays a step needs, through one window and one mirror."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distill.augment import Window, letterbox, mirrored_normals, photometric, random_window
from distill.losses_depth import SPACES
from teacher.label import Camera, Label, Task, unknown_class

HALF_MAX = 60000.0  # metres; float16 holds 65504


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What the student sees and answers: size, canonical camera, tasks, class ids; whether a
    sample also brings the picture as it was before light and sensor were changed (``clean``)."""

    height: int
    width: int
    canonical_focal_px: float
    tasks: tuple[str, ...]
    class_ids: tuple[int, ...] = ()
    clean: bool = False


@dataclass(kw_only=True)
class Record:
    """One decoded label, small enough to be kept: halves for numbers, bytes for the image.

    ``space`` is what its depth claims, a code of `SPACES`; ``bad`` counts, per task, the pixels
    whose value no label may have. Those are unknown in ``maps``.
    """

    image: np.ndarray
    maps: dict[str, np.ndarray]
    camera: Camera
    space: int = 0
    bad: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory held by the arrays."""
        return self.image.nbytes + sum(a.nbytes for a in self.maps.values())


def claimed_space(label: Label) -> int:
    """The code in `SPACES` of what a label's depth claims.

    Depth that was brought to metres by an assumed range is affine still: nothing could contradict
    that range (`teacher.anchors`). All other depth of a label set is metric.
    """
    alignment = label.provenance.get("alignment") or {}
    if alignment.get("anchor") != "range":
        return 0
    return SPACES.index(alignment["space"]) if alignment.get("space") in SPACES else 1


def compact(label: Label, frame: Frame) -> Record:
    """Keep what ``frame`` needs; float16 costs 0.05 % of a depth and 0.03 degrees of a normal."""
    record = Record(image=label.image, maps={}, camera=label.camera, space=claimed_space(label))
    for name in frame.tasks:
        task = Task(name)
        if task not in label.values:
            continue
        values, bad = _checked(task, label.values[task], frame)
        if bad:
            record.bad[name] = bad
        if task is Task.DEPTH:
            values = np.where(np.isfinite(values), np.minimum(values, HALF_MAX), values)
        numbers = task in (Task.DEPTH, Task.NORMALS)
        record.maps[name] = values.astype(np.float16) if numbers else values
        if task in label.uncertainty:
            uncertainty = np.minimum(label.uncertainty[task], HALF_MAX)
            uncertainty = np.where(uncertainty >= 0, uncertainty, np.nan)
            record.maps[f"{name}_uncertainty"] = uncertainty.astype(np.float16)
    return record


def _checked(task: Task, values: np.ndarray, frame: Frame) -> tuple[np.ndarray, int]:
    """``values`` with what no label may have made unknown, and the number of such pixels."""
    if task is Task.DEPTH:
        bad = values <= 0
        return np.where(bad, np.nan, values), int(bad.sum())
    if task is Task.NORMALS:
        x, y, z = np.moveaxis(values, -1, 0)
        with np.errstate(over="ignore"):
            length = np.sqrt(x * x + y * y + z * z)
        bad = ~(np.abs(length - 1) <= 0.05) & ~(np.isnan(x) & np.isnan(y) & np.isnan(z))
        count = int(bad.sum())
        return np.where(bad[..., None], np.nan, values) if count else values, count
    if task is Task.SEMANTIC:
        bad = ~np.isin(values, frame.class_ids) & (values != unknown_class(values.dtype))
        return np.where(bad, unknown_class(values.dtype), values).astype(values.dtype), int(
            bad.sum()
        )
    return values, 0


def make_sample(
    record: Record, frame: Frame, *, rng: np.random.Generator | None, mode: str
) -> dict[str, np.ndarray]:
    """One training sample.

    Args:
        record: the decoded label.
        frame: what the student needs.
        rng: randomness of this visit; None for validation (whole picture, letterboxed).
        mode: ``strong`` geometry and light, ``geometry`` only, ``none``.

    Returns:
        ``image`` float32 [3,H,W] in [0, 1]; ``depth`` [1,H,W] canonical metres (NaN, +inf sky);
        ``normals`` [3,H,W]; ``semantic`` int64 [H,W] channel index, -1 unknown; ``instances`` int32
        [H,W] id, 0 none, -1 unknown; for each of the first three ``TASK_uncertainty`` [1,H,W]; of
        the sample's camera ``focal_px`` [], ``centre_px`` [2] and ``camera_known`` []; with depth
        ``depth_space`` []; ``clean`` as ``image`` if the frame asks for it. Tasks that the label
        lacks are unknown everywhere.
    """
    source, target = record.image.shape[:2], (frame.height, frame.width)
    plain = rng is None or mode == "none"
    window = letterbox(source, target) if plain else random_window(rng, source, target)  # type: ignore[arg-type]
    mirror = not plain and rng.uniform() < 0.5  # type: ignore[union-attr]
    clean = image = window.image(record.image)
    if not plain and mode == "strong":
        image = window.with_grey(photometric(rng, image), source)  # type: ignore[arg-type]
    if mirror:
        image, clean = image[:, ::-1], clean[:, ::-1]
    camera = window.camera(record.camera)
    camera = camera.mirrored() if mirror else camera
    focal_px = float(np.sqrt(camera.fx * camera.fy))
    sample = {
        "image": _planes(image),
        "focal_px": np.array(focal_px, np.float32),
        "centre_px": np.array([camera.cx, camera.cy], np.float32),
        "camera_known": np.array(camera.source in ("known", "exif")),
    }
    if "depth" in frame.tasks:
        sample["depth_space"] = np.array(record.space, np.int64)
    if frame.clean:
        sample["clean"] = _planes(clean)
    for task in frame.tasks:
        sample |= _targets(record, frame, task, window, mirror, focal_px)
    return sample


def _planes(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [0, 1]."""
    return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / np.float32(255)


def _targets(
    record: Record, frame: Frame, task: str, window: Window, mirror: bool, focal_px: float
) -> dict[str, np.ndarray]:
    """Target and label uncertainty of one task, through the same window and mirror."""
    size = (frame.height, frame.width)
    values = record.maps.get(task)
    if task == "instances":
        ids = np.full(size, -1, np.int32)
        if values is not None:
            ids = window.labels(values.astype(np.int32), -1)
        return {task: np.ascontiguousarray(ids[:, ::-1] if mirror else ids)}
    if task == "normals":
        normals = np.full((*size, 3), np.nan, np.float32)
        if values is not None:
            normals = window.labels(values, np.nan).astype(np.float32)
            normals /= np.sqrt(np.einsum("hwc,hwc->hw", normals, normals))[..., None]
        normals = mirrored_normals(normals) if mirror else normals
        out = normals.transpose(2, 0, 1)
    elif task == "depth":
        depth_m = np.full(size, np.nan, np.float32)
        if values is not None:
            depth_m = window.labels(values, np.nan).astype(np.float32)
        depth_m = depth_m[:, ::-1] if mirror else depth_m
        out = (depth_m * np.float32(frame.canonical_focal_px / focal_px))[None]
    else:
        out = np.full(size, -1, np.int64)
        if values is not None:
            table = np.full(int(np.iinfo(values.dtype).max) + 1, -1, np.int64)
            for channel, number in enumerate(frame.class_ids):
                if number < table.size - 1:  # the last id means unknown
                    table[number] = channel
            out = table[window.labels(values, np.iinfo(values.dtype).max)]
        out = out[:, ::-1] if mirror else out
    spread = np.full(size, np.nan, np.float32)
    if f"{task}_uncertainty" in record.maps:
        spread = window.labels(record.maps[f"{task}_uncertainty"], np.nan).astype(np.float32)
        spread = spread[:, ::-1] if mirror else spread
    return {
        task: np.ascontiguousarray(out),
        f"{task}_uncertainty": np.ascontiguousarray(spread[None]),
    }
