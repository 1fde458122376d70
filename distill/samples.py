"""One label -> one training sample: the arrays a step needs, through one window and one mirror."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill.augment import Window, letterbox, mirrored_normals, photometric, random_window
from teacher.label import Camera, Label, Task

HALF_MAX = 60000.0  # metres; float16 holds 65504


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What the student sees and answers: size, canonical camera, tasks, class ids."""

    height: int
    width: int
    canonical_focal_px: float
    tasks: tuple[str, ...]
    class_ids: tuple[int, ...] = ()


@dataclass(kw_only=True)
class Record:
    """One decoded label, small enough to be kept: halves for numbers, bytes for the image."""

    image: np.ndarray
    maps: dict[str, np.ndarray]
    camera: Camera

    @property
    def nbytes(self) -> int:
        """Memory held by the arrays."""
        return self.image.nbytes + sum(a.nbytes for a in self.maps.values())


def compact(label: Label, tasks: Sequence[str]) -> Record:
    """Keep what ``tasks`` need; float16 costs 0.05 % of a depth and 0.03 degrees of a normal."""
    maps: dict[str, np.ndarray] = {}
    for name in tasks:
        task = Task(name)
        if task not in label.values:
            continue
        values = label.values[task]
        if task is Task.DEPTH:
            values = np.where(np.isfinite(values), np.minimum(values, HALF_MAX), values)
        maps[name] = values if task is Task.SEMANTIC else values.astype(np.float16)
        if task in label.uncertainty:
            uncertainty = np.minimum(label.uncertainty[task], HALF_MAX)
            maps[f"{name}_uncertainty"] = uncertainty.astype(np.float16)
    return Record(image=label.image, maps=maps, camera=label.camera)


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
        ``normals`` [3,H,W]; ``semantic`` int64 [H,W] channel index, -1 unknown; for each task
        ``TASK_uncertainty`` [1,H,W]; ``focal_px`` float32 [] of the sample. Tasks that the label
        lacks are unknown everywhere.
    """
    source, target = record.image.shape[:2], (frame.height, frame.width)
    plain = rng is None or mode == "none"
    window = letterbox(source, target) if plain else random_window(rng, source, target)  # type: ignore[arg-type]
    mirror = not plain and rng.uniform() < 0.5  # type: ignore[union-attr]
    image = window.image(record.image)
    if not plain and mode == "strong":
        image = window.with_grey(photometric(rng, image), source)  # type: ignore[arg-type]
    if mirror:
        image = image[:, ::-1]
    camera = window.camera(record.camera)
    camera = camera.mirrored() if mirror else camera
    focal_px = float(np.sqrt(camera.fx * camera.fy))
    sample = {
        "image": np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / np.float32(255),
        "focal_px": np.array(focal_px, np.float32),
    }
    for task in frame.tasks:
        sample |= _targets(record, frame, task, window, mirror, focal_px)
    return sample


def _targets(
    record: Record, frame: Frame, task: str, window: Window, mirror: bool, focal_px: float
) -> dict[str, np.ndarray]:
    """Target and label uncertainty of one task, through the same window and mirror."""
    size = (frame.height, frame.width)
    uncertainty = record.maps.get(f"{task}_uncertainty")
    if uncertainty is None:
        spread = np.full(size, np.nan, np.float32)
    else:
        spread = window.labels(uncertainty, np.nan).astype(np.float32)
        spread = spread[:, ::-1] if mirror else spread
    values = record.maps.get(task)
    if task == "normals":
        normals = np.full((*size, 3), np.nan, np.float32)
        if values is not None:
            normals = window.labels(values, np.nan).astype(np.float32)
            normals /= np.sqrt((normals**2).sum(-1, keepdims=True))
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
    return {
        task: np.ascontiguousarray(out),
        f"{task}_uncertainty": np.ascontiguousarray(spread[None]),
    }
