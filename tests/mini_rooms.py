"""Rooms with balls, traced in closed form with NumPy: scenes with exact truth for tuning tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from teacher.label import Camera, Label, Task
from teacher.store import write_label_set

TINY = {  # sizes of a `MiniNet` that trains in seconds
    "channels": 8, "width": 32, "image_blocks": 1, "blocks": 2, "heads": 2, "text_width": 16,
    "text_layers": 1,
}  # fmt: skip
CLASSES = {0: "wall", 1: "floor", 2: "ceiling", 3: "ball", 4: "globe", 5: "lamp"}


def room(seed: int, *, height: int = 48, width: int = 64) -> Label:
    """A box room of random size, 1.5 m camera height, with one to five balls of known size."""
    rng = np.random.default_rng(seed)
    focal_px = width / 2 / np.tan(np.radians(32.5))
    camera = Camera(
        fx=focal_px,
        fy=focal_px,
        cx=(width - 1) / 2,
        cy=(height - 1) / 2,
        width=width,
        height=height,
    )
    rays = camera.rays() * np.array([1, -1, -1], np.float32)  # x right, y up, z to the viewer
    half_width, back = rng.uniform(1.5, 4), rng.uniform(3, 7)
    depth = np.full((height, width), np.inf)
    normals = np.zeros((height, width, 3))
    semantic = np.full((height, width), 255, np.uint8)
    colour = np.zeros((height, width, 3))
    instances = np.zeros((height, width), np.uint16)
    planes = [((0, 1, 0), 1.5, 1), ((0, -1, 0), 1.1, 2), ((1, 0, 0), half_width, 0),
              ((-1, 0, 0), half_width, 0), ((0, 0, 1), back, 0)]  # fmt: skip
    for normal, distance, what in planes:
        n = np.array(normal, float)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(rays @ n < -1e-9, -distance / (rays @ n), np.inf)
        hit = t < depth
        depth[hit], normals[hit], semantic[hit] = t[hit], n, what
        colour[hit] = rng.uniform(0.3, 0.9, 3)
    for i in range(1, int(rng.integers(2, 6))):
        radius = rng.uniform(0.25, 0.6)
        centre = np.array([rng.uniform(-1.3, 1.3), radius - 1.5, -rng.uniform(2, back - 0.7)])
        a, b = (rays**2).sum(-1), rays @ centre
        inside = b**2 - a * (centre @ centre - radius**2)
        t = np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)
        hit = (t > 0) & (t < depth)
        depth[hit] = t[hit]
        normals[hit] = (rays[hit] * t[hit][:, None] - centre) / radius
        semantic[hit], instances[hit] = (3, i) if radius < 0.42 else (4, i)
        colour[hit] = rng.uniform(0.1, 0.9, 3)
    light = np.array([0.3, 0.8, 0.5]) / np.linalg.norm([0.3, 0.8, 0.5])
    shade = 0.35 + 0.65 * np.clip(normals @ light, 0, 1)
    image = (255 * np.clip(colour * shade[..., None], 0, 1) ** (1 / 2.2)).round().astype(np.uint8)
    return Label(
        key=f"room{seed:05d}",
        image=image,
        values={
            Task.DEPTH: depth.astype(np.float32),
            Task.NORMALS: normals.astype(np.float32),
            Task.SEMANTIC: semantic,
            Task.INSTANCES: instances,
        },
        camera=camera,
        provenance={"caption": f"a room with {int(instances.max())} balls"},
    )


def write_rooms(path: Path, *, n: int, height: int, width: int, start: int = 0) -> str:
    """A label set of ``n`` rooms from room ``start`` on, with truth of every task."""
    dataset = {
        "tasks": ["depth", "normals", "semantic", "instances"],
        "classes": {str(k): v for k, v in CLASSES.items()},
    }
    make = lambda i: room(start + i, height=height, width=width)  # noqa: E731
    write_label_set(path, n=n, make=make, dataset=dataset)
    return str(path)
