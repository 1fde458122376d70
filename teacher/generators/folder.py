"""Labels that exist on disk, as a teacher: a label set by content key, a data set by file name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from teacher.errors import UsageError
from teacher.generators import Query
from teacher.generators.layouts import camera_of, layout_of, list_images
from teacher.jobs.licences import inherited, of_label_set
from teacher.label import Answer, Camera, Space, Task
from teacher.store import LabelSet, canonical_json

SPACE_OF = {
    Task.DEPTH: Space.METRIC,
    Task.NORMALS: Space.UNIT_NORMALS,
    Task.SEMANTIC: Space.CLASS_IDS,
    Task.INSTANCES: Space.INSTANCE_IDS,
}


class TruthTeacher:
    """Answers with the stored labels of the same image; an image it does not know gets none."""

    spaces: Mapping[Task, Space] = SPACE_OF

    def __init__(self, *, labels: str) -> None:
        """``labels``: a label set; it is verified before the first answer."""
        self.labels = LabelSet(labels)
        self.labels.verify()
        self.tasks = self.labels.tasks

    def describe(self) -> dict[str, Any]:
        """The set is pinned by its plan hash, not by its path; its ancestors are the labels'."""
        classes = {str(k): v for k, v in self.labels.classes.items()}
        ledger = inherited(of_label_set(self.labels.meta), images="truth images")
        about = {"name": "truth", "plan_hash": self.labels.meta["plan_hash"], "classes": classes}
        return about | {"licences": ledger}

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """The stored arrays, if the image has the size of the label.

        Raises:
            UsageError: depth that an assumed range made metric: as an answer it would claim more.
        """
        answers: list[dict[Task, Answer]] = []
        for query in queries:
            answers.append({})
            if query.key not in self.labels:
                continue
            label = self.labels[query.key]
            if label.image.shape != query.image.shape:
                continue
            alignment = label.provenance.get("alignment") or {}
            if Task.DEPTH in tasks and alignment.get("anchor") == "range":
                raise UsageError(
                    f"labels={self.labels.path}: its depth was brought to metres by an assumed "
                    "range (anchor=range), which nobody measured; it is nobody's truth or anchor. "
                    "Leave depth out of tasks, or label with another anchor"
                )
            for task in tasks:
                if task in label.values:
                    extras = label.provenance.get(str(task), {})
                    answers[-1][task] = Answer(
                        task=task, space=SPACE_OF[task], values=label.values[task], extras=extras
                    )
        return answers


class FolderTeacher:
    """Depth that lies beside the images, in the layout of a public data set or as plain pairs.

    Answers are metric and come from pixels or points of the file alone: the nearest one where the
    image was scaled, never a mixture of two, nothing where the file has a hole.
    """

    tasks = (Task.DEPTH,)
    spaces: Mapping[Task, Space] = MappingProxyType({Task.DEPTH: Space.METRIC})

    def __init__(self, *, layout: str, root: str) -> None:
        """``layout``: a name of `LAYOUTS`; ``root``: the folder that image names start from."""
        self.name, self.layout, self.root = layout, layout_of(layout), Path(root).expanduser()
        if not self.root.is_dir():
            raise UsageError(f"root={root}: no such folder; expected a data set of layout {layout}")

    @cached_property
    def _facts(self) -> dict[str, Any]:
        digest, count = hashlib.sha256(), 0
        for name in list_images(self.root, self.layout):
            path = self.layout.depth(self.root / name)
            if path.exists():
                about = path.stat()
                digest.update(canonical_json([name, about.st_size]))
                count += 1
        if not count:
            raise UsageError(
                f"root={self.root}: no image with depth in the layout {self.name!r}; it looks for "
                f"{list(self.layout.images)} below the root."
            )
        return {"depth_files": count, "depth_files_sha256": digest.hexdigest()}

    def describe(self) -> dict[str, Any]:
        """Pinned by names and sizes of the depth files; their bytes are not hashed."""
        data = {"role": "depth data", "name": self.name, "licence": self.layout.licence}
        return {"name": "folder", "layout": self.name, "licences": [data], **self._facts}

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """Depth per query, found by the image's name; without a file all unknown, with a reason."""
        return [
            {Task.DEPTH: self._depth(query)} if Task.DEPTH in tasks else {} for query in queries
        ]

    def _depth(self, query: Query) -> Answer:
        height, width = query.image.shape[:2]
        image = self.root / query.uri
        values = np.full((height, width), np.nan, np.float32)
        extras: dict[str, Any] = {"layout": self.name}
        path = self.layout.depth(image) if query.uri and image.is_file() else None
        if path is None or not path.is_file():
            missing = (
                f"no depth file {path.name}" if path else f"no image {query.uri!r} below root="
            )
            extras["reason"] = f"{missing} (layout {self.name})"
        else:
            stored = self.layout.metres(path, image)
            camera = camera_of(self.layout, image)
            k = self.layout.depth_camera(image)
            if stored.ndim == 2 and stored.shape[1] == 3 and path.suffix == ".txt":
                values = scattered(stored, path=path, image=image, width=width, height=height)
            elif camera is not None and k is not None:
                own = Camera(
                    fx=k[0], fy=k[1], cx=k[2], cy=k[3],
                    width=stored.shape[1], height=stored.shape[0],
                )  # fmt: skip
                values = seen_by(stored, own, camera.resized(width=width, height=height))
            elif unequal(stored.shape[:2], (height, width)):
                size = f"{stored.shape[1]}x{stored.shape[0]}"
                extras["reason"] = f"depth is {size}, the image {width}x{height}: another shape"
            else:
                values = nearest(stored, height=height, width=width)
        return Answer(task=Task.DEPTH, space=Space.METRIC, values=values, extras=extras)


def unequal(stored: tuple[int, ...], wanted: tuple[int, int]) -> bool:
    """Whether one size is not the other one scaled, to a pixel of the smaller."""
    scale = max(wanted) / max(stored)
    slack = max(1.0, scale)
    return any(abs(s * scale - w) > slack for s, w in zip(stored, wanted, strict=True))


def nearest(depth_m: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """[h, w] -> [height, width]: at each pixel's centre the stored pixel it falls into."""
    rows = ((np.arange(height) + 0.5) * depth_m.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * depth_m.shape[1] / width).astype(int)
    return np.ascontiguousarray(depth_m[rows[:, None], columns], np.float32)


def seen_by(depth_m: np.ndarray, own: Camera, colour: Camera) -> np.ndarray:
    """Depth of camera ``own`` on the pixels of ``colour``, which stands at the same place."""
    x = (np.arange(colour.width) - colour.cx) / colour.fx * own.fx + own.cx
    y = (np.arange(colour.height) - colour.cy) / colour.fy * own.fy + own.cy
    columns, rows = np.rint(x).astype(int), np.rint(y).astype(int)
    inside = ((rows >= 0) & (rows < own.height))[:, None] & (columns >= 0) & (columns < own.width)
    found = depth_m[rows.clip(0, own.height - 1)[:, None], columns.clip(0, own.width - 1)]
    return np.where(inside, found, np.nan).astype(np.float32)


def scattered(
    points: np.ndarray, *, path: Path, image: Path, width: int, height: int
) -> np.ndarray:
    """Points (x, y px of the stored image, z m) on a ``width x height`` image; the nearest wins."""
    from teacher.images import read

    stored = read(image.read_bytes()).image.shape
    x, y, z = points.T
    column = np.rint((x + 0.5) * width / stored[1] - 0.5).astype(int)
    row = np.rint((y + 0.5) * height / stored[0] - 0.5).astype(int)
    good = np.isfinite(z) & (z > 0)
    if not ((column >= 0) & (column < width) & (row >= 0) & (row < height))[good].all():
        raise UsageError(
            f"{path}: points outside the image of {stored[1]}x{stored[0]} pixels; expected x y in "
            "pixels of the upright image (first pixel's centre 0 0), z in metres."
        )
    depth_m = np.full((height, width), np.inf, np.float64)
    np.minimum.at(depth_m, (row[good], column[good]), z[good])
    return np.where(np.isinf(depth_m), np.nan, depth_m).astype(np.float32)
