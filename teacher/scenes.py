"""Synthetic scenes with exact truth: seed -> scene -> Mitsuba -> `Label`; the verb `scenes`.

The picture is path traced with many samples per pixel; the truth comes from one ray through each
pixel's centre and is never averaged, so that no value lies between two surfaces.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from teacher.errors import EnvironmentFailure, UsageError
from teacher.label import Camera, Label, Task
from teacher.scene_layout import SPLIT_SEEDS, Scene, View, sample_scene
from teacher.scene_materials import Material, color_name, linear, texture
from teacher.scene_objects import CLASSES, Part

__all__ = ["CLASSES", "make_scenes", "render", "sample_scene"]

TASKS = (Task.DEPTH, Task.NORMALS, Task.SEMANTIC, Task.INSTANCES)
VERSION = 1  # of the distribution of scenes: raise it whenever a seed's picture changes
EMITTER_SAMPLES = 2  # shadow rays per path
SEEN_SHARE = 0.002  # a thing is named in the caption when it fills this share of the picture


@functools.cache
def _mitsuba() -> Any:
    try:
        import mitsuba
    except ImportError as error:
        raise EnvironmentFailure(
            f"the renderer Mitsuba is missing ({error}); install it with: "
            "pip install 'dense-distill[scenes]'"
        ) from error
    mitsuba.set_variant("scalar_rgb")
    return mitsuba


def camera_of(view: View, *, width: int, height: int) -> Camera:
    """The pinhole camera of a view, its principal point in the middle."""
    focal_px = width / 2 / math.tan(math.radians(view.fov_deg) / 2)
    return Camera(fx=focal_px, fy=focal_px, cx=(width - 1) / 2, cy=(height - 1) / 2,
                  width=width, height=height, source="known")  # fmt: skip


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

    mi = _mitsuba()
    world, owners = _world(scene, width, height)
    loaded = mi.load_dict(world, parallel=False, optimize=False)  # keeps our order of shapes
    values, shape = _truth(mi, loaded, scene.view, owners)
    light = _light(mi, loaded, scene, samples, shape=shape, normal=values[Task.NORMALS])
    image = _develop(light, scene.exposure)
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


def _light(
    mi: Any, loaded: Any, scene: Scene, samples: int, *, shape: np.ndarray, normal: np.ndarray
) -> np.ndarray:
    """Radiance [H, W, 3]: direct light by ray tracing; what walls reflect, as a level ambient.

    Real bounces would cost four times as much for the same noise. The noise of soft shadows is
    smoothed in the irradiance (radiance over albedo), where textures do not suffer.
    """
    direct = {"type": "direct", "emitter_samples": EMITTER_SAMPLES, "bsdf_samples": 0}
    integrator = mi.load_dict({"type": "aov", "aovs": "a:albedo,n:geo_normal", "direct": direct})
    seen = np.array(mi.render(loaded, integrator=integrator, seed=scene.seed, spp=samples))
    radiance, albedo, up = seen[..., :3], seen[..., 3:6], seen[..., 7:8]
    albedo = np.where(shape[..., None] == 0, 1.0, albedo + 0.01)
    radiance = albedo * _smoothed(radiance / albedo, shape, np.nan_to_num(normal))
    bounced = 0.45 * np.median(radiance.reshape(-1, 3), axis=0).mean() + 0.05
    ambient = 1.6 * bounced * (0.85 + 0.15 * up) if scene.kind == "room" else 0.03
    return radiance + ambient * albedo


def _truth(
    mi: Any, loaded: Any, view: View, owners: np.ndarray
) -> tuple[dict[Task, np.ndarray], np.ndarray]:
    """The values and the number of the shape that was hit (0 sky), one ray per pixel centre.

    One sample without jitter and a box filter send exactly that ray.
    """
    aov = mi.load_dict({"type": "aov", "aovs": "p:position,n:geo_normal,s:shape_index"})
    first_hit = np.array(mi.render(loaded, integrator=aov, sensor=1), dtype=np.float64)
    position, normal, shape = first_hit[..., :3], first_hit[..., 3:6], first_hit[..., 6]
    sky = shape == 0  # Mitsuba counts shapes from 1
    right_up_back = view.axes()
    point = (position - view.position) @ right_up_back.T
    depth_m = np.where(sky, np.inf, -point[..., 2])
    normal = normal @ right_up_back.T
    normal *= np.where((normal * point).sum(-1, keepdims=True) > 0, -1.0, 1.0)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    normal = np.where(sky[..., None], np.nan, normal / np.where(sky[..., None], 1, length))
    label, instance = owners[shape.astype(int)].transpose(2, 0, 1)
    values = {
        Task.DEPTH: depth_m.astype(np.float32),
        Task.NORMALS: normal.astype(np.float32),
        Task.SEMANTIC: label.astype(np.uint8),
        Task.INSTANCES: instance.astype(np.uint16),
    }
    return values, shape


def _smoothed(light: np.ndarray, shape: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Irradiance [H, W, 3] averaged over its neighbours on the same surface.

    Weights (Dammertz et al. 2010): B3 spline in the plane, equal shape, near normal, near
    brightness in the logarithm; so that neither edges nor the rims of lamps bleed.
    """
    guide = np.log(_atrous(light, shape, normal, step=1, guide=None).mean(-1) + 1e-3)
    light = _atrous(light, shape, normal, step=1, guide=guide)
    return _atrous(light, shape, normal, step=2, guide=guide)


def _atrous(light, shape, normal, *, step: int, guide: np.ndarray | None) -> np.ndarray:
    kernel = (0.375, 0.25, 0.0625)
    total, weights = np.zeros_like(light), np.zeros(shape.shape)
    for dy, dx in np.ndindex(5, 5):
        move = {"shift": ((2 - dy) * step, (2 - dx) * step), "axis": (0, 1)}
        facing = np.clip((np.roll(normal, **move) * normal).sum(-1), 0, 1) ** 16
        same = (np.roll(shape, **move) == shape) * np.where(shape > 0, facing, 1.0)
        weight = kernel[abs(dy - 2)] * kernel[abs(dx - 2)] * same
        if guide is not None:
            weight = weight * np.exp(-(((np.roll(guide, **move) - guide) / 0.6) ** 2))
        total += weight[..., None] * np.roll(light, **move)
        weights += weight
    return total / weights[..., None]


def _develop(light: np.ndarray, exposure: float) -> np.ndarray:
    """Linear radiance [H, W, 3] to uint8 sRGB: log-average exposure, a soft shoulder."""
    luminance = light @ np.array([0.2126, 0.7152, 0.0722])
    key = 0.3 * exposure / np.exp(np.log(luminance + 1e-3).mean())
    light = light.astype(np.float64) * key
    light = light * (1 + light / 6.0) / (1 + light)  # Reinhard et al. 2002, eq. 4, white at 2.4
    light = np.clip(light, 0, 1)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(curve * 255).astype(np.uint8)


def _world(scene: Scene, width: int, height: int) -> tuple[dict[str, Any], np.ndarray]:
    """Mitsuba's description, and (class, instance) of its shapes [1 + shapes, 2], row 0 the sky."""
    mi = _mitsuba()
    transform = mi.ScalarTransform4f
    position, backward = np.array(scene.view.position), scene.view.axes()
    sensor: dict[str, Any] = {
        "type": "perspective",
        "fov_axis": "x",
        "fov": scene.view.fov_deg,
        "to_world": transform().look_at(
            origin=list(position), target=list(position - backward[2]), up=list(backward[1])
        ),
    }
    film = {"type": "hdrfilm", "width": width, "height": height, "pixel_format": "rgb",
            "component_format": "float32", "rfilter": {"type": "box"}}  # fmt: skip
    centred = {"type": "stratified", "sample_count": 1, "jitter": False}
    world: dict[str, Any] = {
        "type": "scene",
        "eye": sensor | {"film": film, "sampler": {"type": "independent"}},
        "ruler": sensor | {"film": film, "sampler": centred},
    }
    owners, bsdfs = [(0, 0)], {}
    for number, part in enumerate(scene.parts):
        key = (part.material, _repeats(part), part.shape in ("panel", "sheet"))
        if key not in bsdfs:
            bsdfs[key] = mi.load_dict(_bsdf(mi, *key))
        shapes = _shapes(transform, part)
        for k, shape in enumerate(shapes):
            shape["bsdf"] = bsdfs[key]
            if part.material.glow:
                radiance = [part.material.glow * c for c in linear(part.material.color)]
                weight = part.material.glow**0.5 * max(part.size)  # the root of its power, nearly
                shape["emitter"] = {
                    "type": "area",
                    "sampling_weight": weight,
                    "radiance": {"type": "rgb", "value": radiance},
                }
            world[f"part_{number}_{k}"] = shape
            owners.append((part.label, part.instance))
    if scene.sky:
        world |= _sky(mi, scene)
    return world, np.array(owners)


def _shapes(transform: Any, part: Part) -> list[dict[str, Any]]:
    """Mitsuba's shapes for one solid; cylinders are open there and get their lids here."""
    w, h, d = part.size
    to_world = transform().translate(list(part.center)).rotate([0, 1, 0], part.yaw_deg)
    if part.shape == "sphere":
        return [{"type": "sphere", "to_world": to_world.scale([w / 2] * 3)}]
    if part.shape == "box":
        return [{"type": "cube", "to_world": to_world.scale([w / 2, h / 2, d / 2])}]
    if part.shape == "panel":
        return [{"type": "rectangle", "to_world": to_world.scale([w / 2, h / 2, 1])}]
    if part.shape == "sheet":
        tip = 90 if part.material.glow else -90  # a lamp in the ceiling shines down
        to_world = to_world.rotate([1, 0, 0], tip)
        return [{"type": "rectangle", "to_world": to_world.scale([w / 2, d / 2, 1])}]
    if part.shape == "column":
        to_world = to_world.rotate([1, 0, 0], -90)  # local z is the axis
        radius, half = w / 2, h / 2
    else:  # roller
        to_world = to_world.rotate([0, 1, 0], 90)
        radius, half = h / 2, w / 2
    lid = to_world.translate([0, 0, half]).scale([radius, radius, 1])
    base = to_world.translate([0, 0, -half]).rotate([0, 1, 0], 180).scale([radius, radius, 1])
    side = {"type": "cylinder", "p0": [0, 0, -half], "p1": [0, 0, half], "radius": radius}
    return [
        side | {"to_world": to_world},
        {"type": "disk", "to_world": lid},
        {"type": "disk", "to_world": base},
    ]


def _repeats(part: Part) -> tuple[float, float]:
    """How often the pattern repeats along a part's two texture coordinates."""
    if part.material.pattern == "plain":
        return 1.0, 1.0
    w, h, d = part.size
    if part.shape == "sphere":
        return max(1.0, round(2 * w / part.material.period_m)), 1.0
    if part.shape == "column":
        around = max(1, round(math.pi * w / part.material.period_m))
        return around, h / part.material.period_m
    flat = part.shape == "sheet" or (part.shape == "box" and h < 0.3 * min(w, d))
    u, v = (w, d) if flat else (max(w, d), h)
    return u / part.material.period_m, v / part.material.period_m


def _bsdf(
    mi: Any, material: Material, repeats: tuple[float, float], double: bool
) -> dict[str, Any]:
    color: dict[str, Any] = {"type": "rgb", "value": linear(material.color)}
    if material.pattern != "plain":
        scale = mi.ScalarTransform4f().scale([*repeats, 1])
        color = {"type": "bitmap", "bitmap": mi.Bitmap(texture(material)), "to_uv": scale}
    surface: dict[str, Any] = {"type": "diffuse", "reflectance": color}
    if material.gloss:
        roughness = 0.65 - 0.4 * material.gloss
        surface = {"type": "principled", "base_color": color, "roughness": roughness}
    return {"type": "twosided", "bsdf": surface} if double else surface


def _sky(mi: Any, scene: Scene) -> dict[str, Any]:
    """A gradient sky with clouds as environment, and the sun."""
    sky = scene.sky
    rows, columns = 128, 256
    elevation = np.linspace(math.pi / 2, -math.pi / 2, rows)[:, None]
    zenith = np.array(linear(sky["zenith"]))
    haze = np.exp(-4 * np.clip(elevation, 0, None))[..., None]
    clear = zenith * (1 - haze) + (0.35 + 0.65 * zenith) * haze
    puffs = texture(Material(color=(0, 0, 0), second=(1, 1, 1), pattern="clouds"))[..., :1] / 255.0
    puffs = np.tile(np.roll(puffs, scene.seed % 128, axis=1), (1, 2, 1))
    cover = np.clip((puffs - 0.75 + 0.5 * sky["clouds"]) * 4, 0, 1)
    cover = cover * np.clip(elevation * 3, 0, 1)[..., None]
    picture = clear * (1 - cover) + 0.95 * cover
    picture = np.where(elevation[..., None] < -0.02, 0.05, picture) * np.ones((rows, columns, 3))
    lights: dict[str, Any] = {
        "sky": {"type": "envmap", "bitmap": mi.Bitmap(picture.astype(np.float32))}
    }
    if sky["sun"]:
        up, around = math.radians(sky["sun_elevation_deg"]), math.radians(sky["sun_azimuth_deg"])
        down = [-math.cos(up) * math.sin(around), -math.sin(up), -math.cos(up) * math.cos(around)]
        irradiance = [2 * sky["sun"] * c for c in linear(sky["sun_color"])]
        lights["sun"] = {"type": "directional", "direction": down,
                         "irradiance": {"type": "rgb", "value": irradiance}}  # fmt: skip
    return lights


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
    width: int = 128,
    height: int = 96,
    samples: int = 12,
    shard_size: int = 64,
    threads: int = 0,
) -> dict[str, Any]:
    """Write ``n`` scenes as a label set whose teacher is ``truth``; resumable.

    ``seed`` counts from the start of the split's own million seeds, so that a call for training
    can never make a held-out scene. ``threads`` 0 means all cores; the bytes are the same.
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
    sizes = {"width": width, "height": height, "samples": samples, "shard_size": shard_size}
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name}={value}: expected at least 1.")
    if threads < 0:
        raise UsageError(f"threads={threads}: expected 0 (all cores) or more.")
    mitsuba_version = _mitsuba().__version__
    if threads:
        import drjit

        drjit.set_thread_count(threads)
    dataset = {
        "tasks": [str(t) for t in TASKS],
        "classes": {str(k): v for k, v in CLASSES.items()},
        "teacher": {"name": "truth", "scenes_version": VERSION, "mitsuba": mitsuba_version,
                    "split": split, "seed": seeds[seed], "n": n, "width": width,
                    "height": height, "samples": samples},
        "licences": {"images": "Apache-2.0 (made by this project)"},
    }  # fmt: skip

    def make(i: int) -> Label:
        scene = sample_scene(seeds[seed + i], split=split)
        return render(scene, width=width, height=height, samples=samples)

    facts = write_label_set(
        out, n=n, make=make, dataset=dataset, shard_size=shard_size, progress="scenes"
    )
    return {"summary": f"{n} {split} scenes of {width}x{height} in {out}", "out": out, **facts}
