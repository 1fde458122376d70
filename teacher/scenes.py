"""Synthetic scenes with exact truth: seed -> scene -> Mitsuba -> `Label`; the verb `scenes`.

The picture is path traced with many samples per pixel; the truth comes from one ray through each
pixel's centre and is never averaged, so that no value lies between two surfaces.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from teacher.errors import UsageError
from teacher.label import Camera, Label, Task
from teacher.scene_layout import KINDS, SPLIT_SEEDS, Scene, View, kind_of_scene, sample_scene
from teacher.scene_materials import color_name
from teacher.scene_objects import CLASSES
from teacher.scene_render import mitsuba, render_scene

__all__ = ["CLASSES", "make_scenes", "render", "sample_scene"]

TASKS = (Task.DEPTH, Task.NORMALS, Task.SEMANTIC, Task.INSTANCES)
VERSION = 1  # of the distribution of scenes: raise it whenever a seed's picture changes
SEEN_SHARE = 0.002  # a thing is named in the caption when it fills this share of the picture


def camera_of(view: View, *, width: int, height: int) -> Camera:
    """The pinhole camera of a view, its principal point in the middle."""
    focal_px = width / 2 / math.tan(math.radians(view.fov_deg) / 2)
    return Camera.centred(focal_px, width, height)


def render(scene: Scene, *, width: int, height: int, samples: int) -> Label:
    """Picture and exact truth of a scene.

    Same scene, size and libraries: same bytes, whatever the number of threads. Depth is z-depth
    in metres (relative error about 1e-5, float32 ray tracing), sky +inf; normals are geometric,
    face the camera and are NaN in the sky; class ids are those of `CLASSES`.

    Args:
        scene: from `sample_scene`.
        width: of the picture in pixels.
        height: of the picture in pixels.
        samples: paths per pixel of the picture; 12 leave little noise.
    """
    from teacher.images import encode_png
    from teacher.store import content_key

    image, values = render_scene(scene, width=width, height=height, samples=samples)
    ids, counts = np.unique(values[Task.INSTANCES], return_counts=True)
    seen = {int(i): int(n) for i, n in zip(ids, counts, strict=True) if i}
    data = encode_png(image)
    return Label(
        key=content_key(data),
        image=image,
        values=values,
        camera=camera_of(scene.view, width=width, height=height),
        provenance={
            "source": "scenes",
            "seed": scene.seed,
            "split": scene.split,
            "kind": scene.kind,
            "view": asdict(scene.view),
            "caption": _caption(scene, seen, width * height),
            "instances": {
                str(i): {"class": scene.things[i]["class"],
                         "color": color_name(scene.things[i]["color"]), "score": 1.0}
                for i in seen
            },
        },
        encoded=(data, "png"),
    )  # fmt: skip


NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _caption(scene: Scene, seen: dict[int, int], pixels: int) -> str:
    """``a room with a red chair, a table and two balls``, largest first; hidden things left out."""
    visible = [i for i in sorted(seen, key=lambda i: -seen[i]) if seen[i] >= SEEN_SHARE * pixels]
    counts = Counter(scene.things[i]["class"] for i in visible)
    words: list[str] = []
    for name, count in counts.items():
        if count == 1:
            thing = next(scene.things[i] for i in visible if scene.things[i]["class"] == name)
            colored = f"{color_name(thing['color'])} {name}" if len(words) % 2 == 0 else name
            words.append(f"{'an' if colored[0] in 'aeiou' else 'a'} {colored}")
        else:
            many = {"shelf": "shelves", "box": "boxes", "person": "people", "bench": "benches"}
            words.append(f"{NUMBERS[min(count, 9)]} {many.get(name, name + 's')}")
    place = "a room" if scene.kind == "room" else "open ground"
    if not words:
        return place
    listed = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
    return f"{place} with {listed}"


def make_scenes(
    *,
    out: str,
    n: int = 500,
    seed: int = 0,
    split: str = "train",
    kind: str = "all",
    width: int = 128,
    height: int = 96,
    samples: int = 12,
    shard_size: int = 64,
    threads: int = 0,
) -> dict[str, Any]:
    """Write ``n`` scenes as a label set whose teacher is ``truth``; resumable.

    ``seed`` counts from the start of the split's own million seeds, so that a call for training
    can never make a held-out scene. ``kind`` takes the next ``n`` seeds of that kind alone.
    ``threads`` 0 means all cores; the bytes are the same.
    """
    from teacher.store import write_label_set

    if split not in SPLIT_SEEDS:
        raise UsageError(f"split is {split!r}; expected one of {sorted(SPLIT_SEEDS)}.")
    seeds = SPLIT_SEEDS[split]
    if n < 1 or seed < 0 or seed + n > len(seeds):
        raise UsageError(
            f"seed={seed} with n={n}: expected seed >= 0, n >= 1 and seed + n <= {len(seeds)}, "
            "because every split owns that many seeds."
        )
    if kind not in ("all", *KINDS):
        raise UsageError(f"kind is {kind!r}; expected all, {' or '.join(KINDS)}.")
    own = (s for s in seeds[seed:] if kind == "all" or kind_of_scene(s) == kind)
    wanted = list(itertools.islice(own, n))
    if len(wanted) < n:
        raise UsageError(
            f"kind={kind}, seed={seed}: {len(wanted)} such scenes to the end of {split}'s seeds, "
            f"expected n={n}; begin at an earlier seed."
        )
    sizes = {"width": width, "height": height, "samples": samples, "shard_size": shard_size}
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name}={value}: expected at least 1.")
    if threads < 0:
        raise UsageError(f"threads={threads}: expected 0 (all cores) or more.")
    mitsuba_version = mitsuba().__version__
    if threads:
        import drjit

        drjit.set_thread_count(threads)
    dataset = {
        "tasks": [str(t) for t in TASKS],
        "classes": {str(k): v for k, v in CLASSES.items()},
        "teacher": {"name": "truth", "scenes_version": VERSION, "mitsuba": mitsuba_version,
                    "split": split, "seed": seeds[seed], "n": n, "width": width,
                    "height": height, "samples": samples,
                    **({"kind": kind} if kind != "all" else {})},
        "licences": {"images": "Apache-2.0 (made by this project)"},
    }  # fmt: skip

    def make(i: int) -> Label:
        scene = sample_scene(wanted[i], split=split)
        return render(scene, width=width, height=height, samples=samples)

    facts = write_label_set(
        out, n=n, make=make, dataset=dataset, shard_size=shard_size, progress="scenes"
    )
    what = split if kind == "all" else f"{split} {kind}"
    summary = f"{n} {what} scenes of {width}x{height} in {out}"
    if kind != "all":
        summary += f"; the next are from seed={wanted[-1] - seeds.start + 1} on"
    return {"summary": summary, "out": out, **facts}
