"""Shared by all tests: one thread each, and small label sets with analytic truth."""

import os
import signal
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "2")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="distill-tests-")

import numpy as np
import pytest

from teacher.images import encode_png
from teacher.label import Camera, Label, Task
from teacher.store import content_key, write_label_set

# `make test &` hands down an ignored SIGINT, which the jobs that tests interrupt would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)

CLASSES = {0: "sky", 1: "ground", 2: "ball"}


def make_label(seed: int, *, height: int = 48, width: int = 64) -> Label:
    """A ball on open ground under a sky, in closed form; camera 1.5 m above the ground."""
    rng = np.random.default_rng(seed)
    focal_px = width * rng.uniform(0.8, 1.1)
    camera = Camera.centred(focal_px, width, height)
    rays = camera.rays().astype(np.float64)
    with np.errstate(divide="ignore"):
        depth_m = np.where(rays[..., 1] > 0, 1.5 / rays[..., 1], np.inf)
    depth_m = np.where(depth_m > 100, np.inf, depth_m)
    normals = np.zeros((height, width, 3))
    normals[..., 1] = 1
    centre = np.array([rng.uniform(-1, 1), rng.uniform(0.2, 1.0), rng.uniform(3, 8)])
    radius = rng.uniform(0.5, 0.9)
    a, b, c = (rays**2).sum(-1), rays @ centre, centre @ centre - radius**2
    root = b**2 - a * c
    z = np.where(root > 0, (b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
    ball = z < depth_m
    depth_m = np.where(ball, z, depth_m)
    outward = (rays * np.where(ball, z, 0)[..., None] - centre) / radius
    normals[ball] = (outward * [1, -1, -1])[ball]
    sky = np.isinf(depth_m)
    normals[sky] = np.nan
    semantic = np.where(sky, 0, np.where(ball, 2, 1)).astype(np.uint8)
    colours = rng.uniform(60, 200, (3, 3))
    shade = np.clip(np.nan_to_num(normals @ [0.3, 0.6, 0.7], nan=1), 0.2, 1)
    image = colours[semantic] * shade[..., None] + rng.normal(0, 4, (height, width, 3))
    image = image.clip(0, 255).astype(np.uint8)
    data = encode_png(image)
    return Label(
        key=content_key(data),
        image=image,
        values={
            Task.DEPTH: depth_m.astype(np.float32),
            Task.NORMALS: normals.astype(np.float32),
            Task.SEMANTIC: semantic,
            Task.INSTANCES: ball.astype(np.uint16),
        },
        camera=camera,
        encoded=(data, "png"),
    )


def write_balls(folder, n: int, *, first: int = 0, shard_size: int = 4):
    dataset = {
        "tasks": ["depth", "normals", "semantic", "instances"],
        "classes": {str(k): v for k, v in CLASSES.items()},
        "teacher": {"name": "truth"},
        "first": first,
    }
    write_label_set(
        folder, n=n, make=lambda i: make_label(first + i), dataset=dataset, shard_size=shard_size
    )
    return folder


@pytest.fixture(scope="session")
def balls(tmp_path_factory):
    """A label set of 10 analytic scenes in 3 shards; never written to."""
    return write_balls(tmp_path_factory.mktemp("balls") / "set", 10)
