"""Where things stand: one seed gives one scene, a room or open ground, as a list of solids.

World frame: metres, x right, y up, z towards the viewer at yaw 0; the floor is y = 0. Angles are
anticlockwise from above (yaw) and upwards (tilt). The seed alone decides, through numpy.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from teacher.errors import UsageError
from teacher.scene_materials import Material, Palette, scaled
from teacher.scene_objects import BUILDERS, CLASS_ID, Part, block, hung, placed, radius_m, sheet

SPLIT_SEEDS = {
    "train": range(0, 1_000_000),
    "heldout": range(1_000_000, 2_000_000),
    "shifted": range(2_000_000, 3_000_000),
}
KINDS = ("room", "open")  # of scenes: indoors, outdoors
# how often each kind of thing is tried; small and bulky ones more, as they show or fit less
INDOORS = {"sofa": 4, "table": 3, "shelf": 1, "chair": 2, "lamp": 0.8, "ball": 3, "box": 2.5,
           "bin": 0.8, "person": 1, "plant": 1}  # fmt: skip
OUTDOORS = {"car": 4, "fence": 4, "tree": 2, "table": 2, "person": 1, "lamp": 0.8, "chair": 1.5,
            "box": 2.5, "ball": 3, "bin": 0.8, "plant": 1}  # fmt: skip
BULKY_FIRST = ("car", "tree", "fence", "sofa", "table", "shelf")


@dataclass(frozen=True, kw_only=True)
class View:
    """The camera: position [m], yaw, tilt, roll and horizontal field of view [deg]."""

    position: tuple[float, float, float]
    yaw_deg: float
    tilt_deg: float
    roll_deg: float
    fov_deg: float

    def axes(self) -> np.ndarray:
        """Rows: the camera's right, up and backward directions in the world, float64 [3, 3]."""
        a, t, r = np.radians([self.yaw_deg, self.tilt_deg, self.roll_deg])
        turn = np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
        nod = np.array([[1, 0, 0], [0, np.cos(t), np.sin(t)], [0, -np.sin(t), np.cos(t)]])
        roll = np.array([[np.cos(r), np.sin(r), 0], [-np.sin(r), np.cos(r), 0], [0, 0, 1]])
        return roll @ nod @ turn


@dataclass(kw_only=True)
class Scene:
    """Everything the renderer needs to know.

    Attributes:
        seed: of numpy and of the renderer's noise.
        split: ``train``, ``heldout`` or ``shifted``.
        kind: ``room`` or ``open``.
        view: the camera.
        parts: all solids; ``label`` is the class id, ``instance`` 0 for walls, floors and ground.
        things: instance id -> class name and the colour of its largest part.
        sky: open ground only: colours, clouds, sun direction (from which it shines) and strength.
        exposure: brightness of the finished picture, 1 is usual.
    """

    seed: int
    split: str
    kind: str
    view: View
    parts: list[Part] = field(default_factory=list)
    things: dict[int, dict[str, Any]] = field(default_factory=dict)
    sky: dict[str, Any] = field(default_factory=dict)
    exposure: float = 1.0


def sample_scene(seed: int, *, split: str) -> Scene:
    """The scene of a seed; every split has its own million seeds (`SPLIT_SEEDS`)."""
    if split not in SPLIT_SEEDS:
        raise UsageError(f"split is {split!r}; expected one of {sorted(SPLIT_SEEDS)}.")
    if seed not in SPLIT_SEEDS[split]:
        owned = SPLIT_SEEDS[split]
        raise UsageError(
            f"seed {seed} does not belong to split {split!r}, which owns {owned.start}.."
            f"{owned.stop - 1}; no seed belongs to two splits."
        )
    palette = Palette(np.random.default_rng(seed), other=split == "shifted")
    kind = _kind(palette)
    layout = _Layout(palette, seed=seed, split=split, kind=kind)
    layout.furnish()
    return layout.scene


def kind_of_scene(seed: int) -> str:
    """``room`` or ``open``: a scene's first draw, told without making it."""
    return _kind(Palette(np.random.default_rng(seed), other=False))


def _kind(palette: Palette) -> str:
    return KINDS[0] if palette.chance(0.62) else KINDS[1]


def _heading(yaw_deg: float) -> tuple[float, float]:
    """The level direction (x, z) that a camera of that yaw looks in."""
    return -math.sin(math.radians(yaw_deg)), -math.cos(math.radians(yaw_deg))


class _Layout:
    """A scene being filled; keeps the circles that are taken."""

    def __init__(self, p: Palette, *, seed: int, split: str, kind: str) -> None:
        self.p = p
        self.taken: list[tuple[float, float, float]] = []
        self.on_walls: list[tuple[int, float, float]] = []
        long = 1.35 if p.other else 1.0
        self.half = (p.between(1.6, 4.6) * long, p.between(1.6, 4.6) * long)
        self.height = p.between(2.7, 3.8) if p.other else p.between(2.35, 2.9)
        self.half = (60.0, 60.0) if kind == "open" else self.half
        self.scene = Scene(seed=seed, split=split, kind=kind, view=self._camera(kind))
        self.scene.exposure = p.between(0.6, 1.5) if p.other else p.between(0.8, 1.25)
        self.taken.append((*self.scene.view.position[::2], 0.35))

    def _camera(self, kind: str) -> View:
        p = self.p
        fov = p.between(55, 75)
        height, tilt, roll = p.between(1.2, 1.8), p.between(-10, 10), p.between(-1, 1)
        if p.other:
            fov = p.between(45, 55) if p.chance(0.5) else p.between(75, 88)
            height, tilt, roll = p.between(1.0, 2.0), p.between(-15, 15), p.between(-6, 6)
        best, where = -1.0, (0.0, 0.0, 0.0)
        for _ in range(12 if kind == "room" else 0):
            x, z = (p.between(-1, 1) * (h - 0.45) for h in self.half)
            yaw = p.between(0, 360)
            reach = min(self._wall(x, z, yaw + f * fov / 2)[0] * w
                        for f, w in ((0, 1), (-1, 2.2), (1, 2.2)))  # fmt: skip
            if reach > best:
                best, where = reach, (x, z, yaw)
            if best > 1.7:
                break
        x, z, yaw = where
        return View(position=(x, height, z), yaw_deg=yaw, tilt_deg=tilt, roll_deg=roll, fov_deg=fov)

    def _wall(self, x: float, z: float, yaw_deg: float) -> tuple[float, int]:
        """Distance along a heading to the first wall, and that wall's number (its yaw / 90)."""
        dx, dz = _heading(yaw_deg)
        tx = ((self.half[0] if dx > 0 else -self.half[0]) - x) / (dx or 1e-9)
        tz = ((self.half[1] if dz > 0 else -self.half[1]) - z) / (dz or 1e-9)
        return (tx, 3 if dx > 0 else 1) if tx < tz else (tz, 2 if dz > 0 else 0)

    def _bearing(self) -> tuple[float, float, float, float]:
        """A heading inside the picture: yaw and direction x, z; and the distance to the wall."""
        view = self.scene.view
        yaw = view.yaw_deg + self.p.between(-0.5, 0.5) * view.fov_deg
        distance, _ = self._wall(view.position[0], view.position[2], yaw)
        return yaw, *_heading(yaw), distance

    def _free(self, x: float, z: float, radius: float) -> bool:
        inside = abs(x) + radius < self.half[0] and abs(z) + radius < self.half[1]
        return inside and all(
            math.hypot(x - a, z - b) > radius + r + 0.04 for a, b, r in self.taken
        )

    def add(self, name: str, parts: list[Part], *, at: tuple, yaw_deg: float) -> None:
        """A thing (with an instance id) or, for walls, ceilings and ground, stuff (without)."""
        instance = 0
        if name not in ("wall", "floor", "ground", "ceiling"):
            instance = len(self.scene.things) + 1
            largest = max(parts, key=lambda part: sum(part.size))
            self.scene.things[instance] = {"class": name, "color": largest.material.color}
        label = CLASS_ID[name]
        self.scene.parts += placed(parts, at=at, yaw_deg=yaw_deg, label=label, instance=instance)

    def stand(self, name: str, parts: list[Part], *, nearest: float, farthest: float) -> bool:
        """Put a thing on the ground somewhere in view, if there is room; near places preferred."""
        view, radius = self.scene.view, radius_m(parts)
        for _ in range(24):
            _, dx, dz, wall = self._bearing()
            low, high = nearest + radius, min(farthest, wall - radius)
            if high <= low:
                continue
            distance = low * (high / low) ** self.p.between(0, 1)
            x, z = view.position[0] + dx * distance, view.position[2] + dz * distance
            if self._free(x, z, radius):
                self.taken.append((x, z, radius))
                self.add(name, parts, at=(x, 0, z), yaw_deg=self.p.between(0, 360))
                return True
        return False

    def against_wall(self, name: str, parts: list[Part]) -> bool:
        """Put a thing with its back to a wall in view."""
        width = max(2 * abs(part.center[0]) + part.size[0] for part in parts)
        depth = max(abs(part.center[2]) + part.size[2] / 2 for part in parts)
        spot = self._wall_spot(width, margin=depth + 0.02)
        if spot is None:
            return False
        (x, z), wall = spot
        if any(math.hypot(x - a, z - b) < width / 2 + r for a, b, r in self.taken):
            return False
        self.taken.append((x, z, width / 2))
        self.add(name, parts, at=(x, 0, z), yaw_deg=90.0 * wall)
        return True

    def _wall_spot(self, width: float, *, margin: float) -> tuple[tuple[float, float], int] | None:
        """A free stretch of a wall in view: the point ``margin`` in front of it, and the wall."""
        x0, _, z0 = self.scene.view.position
        for _ in range(24):
            yaw, dx, dz, distance = self._bearing()
            _, wall = self._wall(x0, z0, yaw)
            x, z = x0 + dx * distance, z0 + dz * distance
            along, half = (x, self.half[0]) if wall in (0, 2) else (z, self.half[1])
            taken = any(w == wall and abs(along - a) < (width + b) / 2 + 0.06
                        for w, a, b in self.on_walls)  # fmt: skip
            if abs(along) + width / 2 > half - 0.05 or distance < 0.9 or taken:
                continue
            self.on_walls.append((wall, along, width))
            nx, nz = math.sin(math.pi / 2 * wall), math.cos(math.pi / 2 * wall)
            return (x + nx * margin, z + nz * margin), wall
        return None

    def hang(self, name: str) -> None:
        """A door, window or picture on a wall in view."""
        parts, width, bottom = hung(name, self.p)
        if bottom + 0.9 > self.height:
            return
        spot = self._wall_spot(width, margin=0.0)
        if spot is not None:
            at = (spot[0][0], bottom, spot[0][1])
            self.add(name, parts, at=at, yaw_deg=90.0 * spot[1])

    def furnish(self) -> None:
        """Fill the scene: shell first, then what hangs, then what stands, then what lies on it."""
        p, indoors = self.p, self.scene.kind == "room"
        self._room() if indoors else self._open()
        count = int(p.rng.integers(5, 11) if indoors else p.rng.integers(8, 16))
        kinds = INDOORS if indoors else OUTDOORS
        odds = np.array(list(kinds.values())) / sum(kinds.values())
        names = [str(name) for name in p.rng.choice(list(kinds), size=count, p=odds)]
        for name in sorted(names, key=lambda name: name not in BULKY_FIRST):
            parts = BUILDERS[name](p)
            near = 0.8 if radius_m(parts) < 0.7 else 0.9 if indoors else 1.8
            if name in ("shelf", "sofa", "table") and p.chance(0.5) and indoors:
                done = self.against_wall(name, parts)
            else:
                far = 7.0 if name in ("ball", "box", "chair", "bin", "plant") else 24.0
                done = self.stand(name, parts, nearest=near, farthest=far)
            if done and name == "table" and p.chance(0.7):
                self._put_on(parts)

    def _put_on(self, parts: list[Part]) -> None:
        """A football, a shoe box or a small plant on the table that was placed last."""
        x, y, z = self.scene.parts[-len(parts)].center
        name = str(self.p.rng.choice(["ball", "box", "plant"]))
        small = BUILDERS[name](self.p)
        by = 0.45 if name != "ball" else 0.22 / small[0].size[0]
        small = [dataclasses.replace(q, center=scaled(q.center, by), size=scaled(q.size, by))
                 for q in small]  # fmt: skip
        height = y + parts[0].size[1] / 2
        self.add(name, small, at=(x, height, z), yaw_deg=self.p.between(0, 360))

    def _room(self) -> None:
        p, (w, d), h = self.p, self.half, self.height
        floor = dataclasses.replace(
            p.wood() if p.chance(0.4) else p.fabric(), pattern=p.pattern(), period_m=0.6
        )
        paint = Material(color=p.hsv((0, 1), (0.02, 0.45), (0.6, 0.95)))
        if p.other:
            paint = Material(color=p.hsv((0, 1), (0.3, 0.7), (0.4, 0.9)))
        self.add("floor", [sheet(0, w, d, floor)], at=(0, 0, 0), yaw_deg=0)
        pale = Material(color=p.hsv((0, 1), (0, 0.12), (0.75, 0.97)))
        self.add("ceiling", [sheet(h, w, d, pale)], at=(0, 0, 0), yaw_deg=0)
        for k in range(4):
            wide, away = (w, d) if k % 2 == 0 else (d, w)
            skin, size = paint, (2 * wide, h, 0.0)
            if p.chance(0.35):
                second = p.hsv((0, 1), (0.05, 0.5), (0.4, 0.9))
                skin = dataclasses.replace(paint, second=second, pattern=p.pattern())
                skin = dataclasses.replace(skin, period_m=p.between(0.4, 0.9))
            wall = Part(shape="panel", center=(0, h / 2, -away), size=size, material=skin)
            self.add("wall", [wall], at=(0, 0, 0), yaw_deg=90.0 * k)
        self._ceiling_light()
        for name, count in (("door", 2), ("window", 3), ("picture", 4)):
            for _ in range(int(p.rng.integers(1 if name == "door" else 0, count))):
                self.hang(name)
        if p.chance(0.5):  # a free-standing partition or a pillar, at any angle
            long, tall = p.between(0.3, 1.6), h if p.chance(0.6) else p.between(1.0, 1.6)
            parts = [block(0, tall / 2, 0, long, tall, p.between(0.12, 0.35), paint)]
            self.stand("wall", parts, nearest=1.5, farthest=8.0)

    def _ceiling_light(self) -> None:
        """One lamp panel over the view, bright enough for the room."""
        p, (w, d) = self.p, self.half
        size = 0.6 if not p.other else 0.3
        glow = 3.0 * (1 + w * d / 4) * (0.6 / size) ** 2
        panel = Part(
            shape="sheet",
            center=(p.between(-0.3, 0.3) * w, self.height - 0.03, p.between(-0.3, 0.3) * d),
            size=(2 * size, 0.0, size),
            material=Material(color=p.light(), glow=glow),
        )
        self.add("lamp", [panel], at=(0, 0, 0), yaw_deg=0)

    def _open(self) -> None:
        p = self.p
        color = p.hsv((0.06, 0.33), (0.1, 0.6), (0.35, 0.75))
        second = (color[0] * p.between(0.6, 0.95), color[1] * p.between(0.6, 0.95),
                  color[2] * p.between(0.6, 0.95))  # fmt: skip
        skin = Material(
            color=color, second=second, pattern=p.pattern(), period_m=p.between(0.8, 2.5)
        )
        self.add("ground", [sheet(0, 150, 150, skin)], at=(0, 0, 0), yaw_deg=0)
        blue = p.hsv((0.5, 0.68), (0.2, 0.7), (0.6, 0.95))
        if p.other:
            blue = p.hsv((0.8, 1.12), (0.2, 0.5), (0.6, 0.95))
        low = (8, 20) if p.other else (22, 65)
        self.scene.sky = {
            "zenith": blue,
            "clouds": p.between(0, 1),
            "sun_elevation_deg": p.between(*low),
            "sun_azimuth_deg": p.between(0, 360),
            "sun": p.between(0.5, 3.0) if p.chance(0.75) else 0.0,
            "sun_color": p.light(),
        }
        for _ in range(int(p.rng.integers(0, 4))):
            self._house()
        for _ in range(int(p.rng.integers(0, 3))):
            tall, long = p.between(1.0, 2.4), p.between(1.5, 5.0)
            brick = dataclasses.replace(p.wood(), pattern=p.pattern(), period_m=0.7)
            parts = [block(0, tall / 2, 0, long, tall, 0.25, brick)]
            self.stand("wall", parts, nearest=1.8, farthest=14.0)

    def _house(self) -> None:
        """A house of one or two storeys, its doors and windows at their usual size."""
        p = self.p
        w, d, storeys = p.between(5, 10), p.between(4, 7), int(p.rng.integers(1, 3))
        skin = Material(color=p.hsv((0, 1), (0.05, 0.5), (0.5, 0.95)),
                        second=p.hsv((0, 1), (0.05, 0.4), (0.4, 0.9)),
                        pattern=p.pattern(), period_m=0.8)  # fmt: skip
        h = 2.8 * storeys + 0.3
        roof = Material(color=p.hsv((0, 0.08), (0.3, 0.7), (0.25, 0.6)))
        parts = [
            block(0, h / 2, 0, w, h, d, skin),
            block(0, h, 0, w + 0.5, 0.3, d + 0.5, roof),
        ]
        if not self.stand("building", parts, nearest=2.0, farthest=26.0):
            return
        base, x0, z0 = self.scene.parts[-2], *self.scene.parts[-2].center[::2]
        view = self.scene.view.position
        for k in range(4):
            yaw, wide, away = base.yaw_deg + 90 * k, *((w, d) if k % 2 == 0 else (d, w))
            nx, nz = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
            if nx * (view[0] - x0) + nz * (view[2] - z0) < away / 2:
                continue  # a side that cannot be seen
            for column in range(slots := int(wide // 2.2)):
                along = (column + 0.5) * wide / slots - wide / 2
                x, z = x0 + nx * away / 2 + nz * along, z0 + nz * away / 2 - nx * along
                for storey in range(storeys):
                    name = "door" if storey == 0 and column == slots // 2 else "window"
                    fitting, _, bottom = hung(name, p, glow=0.0)
                    self.add(name, fitting, at=(x, 2.8 * storey + bottom, z), yaw_deg=yaw)
