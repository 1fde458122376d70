"""Mitsuba renders a `Scene`: the picture by many rays per pixel, the truth by one.

The only module that knows the renderer. Its frame is the world's; `View.axes` leads to ours.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from teacher.errors import EnvironmentFailure
from teacher.label import Task
from teacher.scene_layout import Scene, View
from teacher.scene_materials import Material, linear, texture
from teacher.scene_objects import Part

EMITTER_SAMPLES = 2  # shadow rays per path


@functools.cache
def mitsuba() -> Any:
    """The renderer, or a message that says how to install it."""
    try:
        import mitsuba as mi
    except ImportError as error:
        raise EnvironmentFailure(
            f"the renderer Mitsuba is missing ({error}); install it with: "
            "pip install 'dense-distill[scenes]'"
        ) from error
    mi.set_variant("scalar_rgb")
    return mi


def render_scene(
    scene: Scene, *, width: int, height: int, samples: int
) -> tuple[np.ndarray, dict[Task, np.ndarray]]:
    """The picture uint8 [H, W, 3] and the exact values of all tasks."""
    mi = mitsuba()
    world, owners = _world(scene, width, height)
    loaded = mi.load_dict(world, parallel=False, optimize=False)  # keeps our order of shapes
    values, shape = _truth(mi, loaded, scene.view, owners)
    light = _light(mi, loaded, scene, samples, shape=shape, normal=values[Task.NORMALS])
    return _develop(light, scene.exposure), values


def _light(
    mi: Any, loaded: Any, scene: Scene, samples: int, *, shape: np.ndarray, normal: np.ndarray
) -> np.ndarray:
    """Radiance [H, W, 3]: direct light by ray tracing; what walls reflect, as a level ambient.

    Sampled bounces looked noisier at 32 samples than this does at 12. The noise of soft shadows is
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
    mi = mitsuba()
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
