"""Scenes whose truth is a formula: a floor, a back wall or sky, and spheres; for the tests."""

from __future__ import annotations

import numpy as np

from teacher.label import Camera, Label, Task
from teacher.store import content_key, write_label_set

CLASSES = {0: "floor", 1: "wall", 2: "ball"}


def analytic_label(seed: int, *, height: int = 48, width: int = 64) -> Label:
    """Ray-cast floor, wall (or sky) and three spheres with exact depth, normals and classes."""
    rng = np.random.default_rng(seed)
    camera = Camera.assumed(width, height, fov_deg=float(rng.uniform(50, 70)))
    rays = camera.rays().astype(np.float64) * [1, -1, -1]  # x right, y up, z to the viewer
    depth = np.full((height, width), np.inf)
    normals = np.full((height, width, 3), np.nan)
    ids = np.full((height, width), 255, np.uint8)
    albedo = np.full((height, width, 3), (0.6, 0.75, 0.95))

    def cover(distance: np.ndarray, normal: np.ndarray, number: int, colour: np.ndarray) -> None:
        hit = (distance > 0.1) & (distance < depth)
        depth[hit] = distance[hit]
        normals[hit] = np.broadcast_to(normal, normals.shape)[hit]
        ids[hit], albedo[hit] = number, colour

    with np.errstate(divide="ignore", invalid="ignore"):
        cover(-1.5 / rays[..., 1], np.array([0.0, 1, 0]), 0, rng.uniform(0.3, 0.9, 3))
        if seed % 3:
            wall = np.full((height, width), rng.uniform(4, 9))
            cover(wall, np.array([0.0, 0, 1]), 1, rng.uniform(0.3, 0.9, 3))
        for _ in range(3):
            radius = rng.uniform(0.3, 0.6)
            centre = np.array([rng.uniform(-1.2, 1.2), radius - 1.5, -rng.uniform(2, 4)])
            a, b = (rays**2).sum(-1), rays @ centre
            root = b**2 - a * (centre @ centre - radius**2)
            t = np.where(root > 0, (b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
            point = rays * np.where(np.isfinite(t), t, 0)[..., None]
            cover(t, (point - centre) / radius, 2, rng.uniform(0.1, 1, 3))
    light = np.array([0.4, 0.8, 0.45])
    shade = 0.35 + 0.65 * np.clip(np.nan_to_num(normals, nan=1.0) @ light, 0, 1)
    image = (albedo * shade[..., None] * 255).clip(0, 255).astype(np.uint8)
    return Label(
        key=content_key(f"analytic {seed} {height} {width}".encode()),
        image=image,
        values={
            Task.DEPTH: depth.astype(np.float32),
            Task.NORMALS: normals.astype(np.float32),
            Task.SEMANTIC: ids,
        },
        camera=camera,
    )


def write_analytic_set(out, *, n: int, first_seed: int = 0, **size: int) -> None:
    """A sealed label set of ``n`` scenes."""
    write_label_set(
        out,
        n=n,
        make=lambda i: analytic_label(first_seed + i, **size),
        dataset={
            "tasks": ["depth", "normals", "semantic"],
            "classes": {str(k): v for k, v in CLASSES.items()},
            "teacher": {"name": "analytic"},
            "first_seed": first_seed,
        },
        shard_size=16,
    )
