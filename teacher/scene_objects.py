"""The things of the synthetic scenes, at their real sizes, and the materials they are made of.

Everything is built from five solids, so that the truth has a closed form. A thing stands on y = 0,
centred at the origin, its front towards +z; lengths in metres, y up, yaw anticlockwise from above.
``other`` (the shifted split) means: other shapes, proportions, patterns and hues.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from teacher.scene_materials import Material, Palette, Vector

STUFF = ("sky", "floor", "ground", "wall", "ceiling")  # never instances
THINGS = (
    *("door", "window", "picture", "table", "chair", "sofa", "shelf", "lamp", "ball", "box"),
    *("bin", "person", "car", "tree", "plant", "fence", "building"),
)
CLASSES: dict[int, str] = dict(enumerate(STUFF + THINGS))
CLASS_ID = {name: number for number, name in CLASSES.items()}
SHAPES = ("box", "sphere", "column", "roller", "panel", "sheet")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One solid: ``size`` along its own x, y, z in metres, turned by ``yaw_deg`` about y.

    ``box``; ``sphere`` (diameter size[0]); ``column`` (upright cylinder, diameter size[0], height
    size[1]); ``roller`` (lying cylinder along x: length size[0], diameter size[1]); ``panel``
    (upright rectangle facing z); ``sheet`` (level rectangle, size[0] by size[2]).
    """

    shape: str
    center: Vector
    size: Vector
    material: Material
    yaw_deg: float = 0.0
    label: int = 0
    instance: int = 0


def placed(parts: list[Part], *, at: Vector, yaw_deg: float, label: int, instance: int):
    """The parts of a thing, turned about y, moved, and told what they belong to."""
    c, s = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
    moved = []
    for part in parts:
        x, y, z = part.center
        center = (at[0] + c * x + s * z, at[1] + y, at[2] - s * x + c * z)
        turn = part.yaw_deg + yaw_deg
        moved.append(
            dataclasses.replace(part, center=center, yaw_deg=turn, label=label, instance=instance)
        )
    return moved


def radius_m(parts: list[Part]) -> float:
    """Radius of the smallest circle about the thing's axis that holds its footprint."""
    reach = [math.hypot(p.center[0], p.center[2]) + math.hypot(p.size[0], p.size[2]) / 2
             for p in parts]  # fmt: skip
    return max(reach)


def _legs(width: float, depth: float, height: float, thick: float, material: Material):
    x, z = width / 2 - thick, depth / 2 - thick
    return [
        Part(shape="box", center=(i * x, height / 2, j * z), size=(thick, height, thick),
             material=material)
        for i in (-1, 1) for j in (-1, 1)
    ]  # fmt: skip


def block(x: float, y: float, z: float, w: float, h: float, d: float, material: Material) -> Part:
    """A box around (x, y, z), w by h by d."""
    return Part(shape="box", center=(x, y, z), size=(w, h, d), material=material)


def _ball(x, y, z, diameter, material) -> Part:
    return Part(
        shape="sphere", center=(x, y, z), size=(diameter, diameter, diameter), material=material
    )


def _column(x, y, z, diameter, height, material) -> Part:
    return Part(
        shape="column", center=(x, y, z), size=(diameter, height, diameter), material=material
    )


def table(p: Palette) -> list[Part]:
    """0.72-0.77 m high; round on one foot in the shifted split."""
    top, height, wood = 0.035, p.between(0.72, 0.77), p.wood()
    if p.other:
        width = p.between(0.8, 1.2)
        return [_column(0, height - top / 2, 0, width, top, wood),
                _column(0, height / 2, 0, 0.1, height - top, p.metal()),
                _column(0, 0.015, 0, 0.5, 0.03, p.metal())]  # fmt: skip
    width, depth = p.between(1.0, 1.7), p.between(0.65, 0.95)
    legs = _legs(width, depth, height - top, 0.06, p.metal() if p.chance(0.5) else wood)
    return [block(0, height - top / 2, 0, width, top, depth, wood), *legs]


def chair(p: Palette) -> list[Part]:
    """Seat at 0.43-0.47 m, back up to 0.8-0.95 m; a stool with a round seat when shifted."""
    seat, width, cloth = p.between(0.43, 0.47), p.between(0.4, 0.48), p.paint()
    legs = _legs(width, width, seat - 0.04, 0.04, p.metal() if p.chance(0.5) else cloth)
    if p.other:
        return [_column(0, seat - 0.02, 0, width, 0.05, cloth), *legs]
    back = p.between(0.8, 0.95)
    return [block(0, seat - 0.02, 0, width, 0.05, width, cloth),
            block(0, (back + seat) / 2 + 0.05, 0.02 - width / 2, width, back - seat - 0.1, 0.04,
                 cloth), *legs]  # fmt: skip


def sofa(p: Palette) -> list[Part]:
    """1.5-2.1 m wide (an armchair of 0.9 m when shifted), seat at 0.42 m, back at 0.8 m."""
    width = p.between(0.85, 1.0) if p.other else p.between(1.5, 2.1)
    cloth, depth, arm = p.fabric(), p.between(0.8, 0.92), 0.18
    return [block(0, 0.24, 0, width - 2 * arm, 0.36, depth, cloth),
            block(0, 0.45, 0.1 - depth / 2, width, 0.74, 0.22, cloth),
            *(block(i * (width - arm) / 2, 0.33, 0.02, arm, 0.54, depth - 0.04, cloth)
              for i in (-1, 1))]  # fmt: skip


def shelf(p: Palette) -> list[Part]:
    """1.75-2.0 m high with books of 0.18-0.28 m; low (0.9-1.1 m) when shifted."""
    height = p.between(0.9, 1.1) if p.other else p.between(1.75, 2.0)
    width, depth, wood = p.between(0.75, 1.0), p.between(0.28, 0.36), p.wood()
    parts = [block(i * (width / 2 - 0.015), height / 2, 0, 0.03, height, depth, wood)
             for i in (-1, 1)]  # fmt: skip
    parts.append(block(0, height / 2, 0.01 - depth / 2, width, height, 0.02, wood))
    levels = 2 if p.other else 5
    for level in range(levels + 1):
        y = 0.05 + level * (height - 0.07) / levels
        parts.append(block(0, y, 0, width - 0.06, 0.025, depth, wood))
        x = -width / 2 + 0.04
        while level < levels and x < width / 2 - 0.3:
            run, tall = p.between(0.1, 0.26), p.between(0.18, 0.28)
            if p.chance(0.75):
                book = dataclasses.replace(p.paint(), gloss=0.0)
                parts.append(block(x + run / 2, y + tall / 2, 0.02, run, tall, depth * 0.7, book))
            x += run + 0.02
    return parts


def lamp(p: Palette) -> list[Part]:
    """A floor lamp of 1.45-1.7 m with a glowing globe (a glowing column when shifted)."""
    height, metal = p.between(1.45, 1.7), p.metal()
    glow = Material(color=p.light(), glow=p.between(2.0, 5.0))
    if p.other:
        return [_column(0, 0.6, 0, 0.2, 1.2, glow), _column(0, 1.22, 0, 0.26, 0.04, metal)]
    globe = p.between(0.26, 0.36)
    return [_column(0, 0.015, 0, 0.28, 0.03, metal),
            _column(0, (height - globe) / 2, 0, 0.035, height - globe, metal),
            _ball(0, height - globe / 2, 0, globe, glow)]  # fmt: skip


def ball(p: Palette) -> list[Part]:
    """A football of 0.21-0.25 m or a gym ball of 0.6-0.7 m; a beach ball of 0.4 m when shifted."""
    size = p.between(0.6, 0.7) if p.chance(0.4) else p.between(0.21, 0.25)
    if p.other:
        size = p.between(0.36, 0.44)
    material = p.paint()
    if size < 0.5:
        second = (0.95, 0.95, 0.95) if p.chance(0.5) else (0.05, 0.05, 0.05)
        pattern = "stripes" if p.other else "checker"
        material = dataclasses.replace(material, second=second, pattern=pattern, period_m=size)
    return [_ball(0, size / 2, 0, size, material)]


def box(p: Palette) -> list[Part]:
    """A removal carton of 0.35-0.6 m with tape, now and then two; painted crates when shifted."""
    card = p.paint() if p.other else Material(color=p.hsv((0.06, 0.1), (0.4, 0.6), (0.6, 0.8)))
    if p.chance(0.3):
        card = p.paint()
    w, h, d = p.between(0.35, 0.6), p.between(0.3, 0.5), p.between(0.35, 0.5)
    tape = Material(color=(0.9, 0.85, 0.7))
    parts = [
        block(0, h / 2, 0, w, h, d, card),
        block(0, h / 2, 0, 0.05, h + 0.004, d + 0.004, tape),
    ]
    if p.chance(0.35):
        s = p.between(0.6, 0.85)
        upper = block(0.02, h + s * h / 2, 0, s * w, s * h, s * d, card)
        parts.append(dataclasses.replace(upper, yaw_deg=p.between(-25, 25)))
    return parts


def bin_(p: Palette) -> list[Part]:
    """A wheeled bin of 1.0-1.1 m; a bucket-like litter bin of 0.6-0.7 m when shifted."""
    paint = p.paint()
    if p.other:
        height = p.between(0.6, 0.7)
        return [_column(0, height / 2, 0, 0.38, height, paint),
                _column(0, height, 0, 0.42, 0.04, p.metal())]  # fmt: skip
    height, black = p.between(1.0, 1.1), Material(color=(0.1, 0.1, 0.1))
    wheels = [Part(shape="roller", center=(i * 0.25, 0.1, -0.28), size=(0.05, 0.2, 0.2),
                   material=black) for i in (-1, 1)]  # fmt: skip
    return [block(0, height / 2 + 0.02, 0, 0.56, height - 0.1, 0.62, paint),
            block(0, height - 0.02, 0.02, 0.6, 0.06, 0.7, p.metal()), *wheels]  # fmt: skip


def person(p: Palette) -> list[Part]:
    """1.58-1.88 m tall; 1.1-1.3 m (a child) when shifted. Proportions of a lay figure."""
    k = p.between(1.1, 1.3) if p.other else p.between(1.58, 1.88)
    skin = Material(color=p.hsv((0.05, 0.08), (0.25, 0.6), (0.35, 0.95)))
    shirt, trousers = p.fabric(), p.paint()
    hair, shoe = Material(color=p.hsv((0.02, 0.1), (0.2, 0.7), (0.05, 0.6))), p.metal()
    parts = [_ball(0, 0.93 * k, 0.01 * k, 0.125 * k, skin),
             _ball(0, 0.945 * k, -0.012 * k, 0.11 * k, hair),
             _column(0, 0.855 * k, 0, 0.06 * k, 0.08 * k, skin),
             _column(0, 0.65 * k, 0, 0.19 * k, 0.33 * k, shirt),
             block(0, 0.79 * k, 0, 0.25 * k, 0.05 * k, 0.12 * k, shirt)]  # fmt: skip
    step = p.between(-0.05, 0.05) * k
    for i in (-1, 1):
        parts += [_column(i * 0.05 * k, 0.26 * k, i * step, 0.085 * k, 0.48 * k, trousers),
                  _column(i * 0.125 * k, 0.65 * k, -i * step, 0.055 * k, 0.28 * k, shirt),
                  _ball(i * 0.125 * k, 0.49 * k, -i * step, 0.06 * k, skin),
                  block(i * 0.05 * k, 0.02 * k, 0.02 * k + i * step, 0.055 * k, 0.04 * k, 0.15 * k,
                       shoe)]  # fmt: skip
    return parts


def car(p: Palette) -> list[Part]:
    """3.9-4.6 m long, 1.75 m wide, 1.4-1.5 m high; a van of 2 m height when shifted."""
    long, high, paint = p.between(3.9, 4.6), p.between(1.4, 1.5), p.paint()
    glass = Material(color=(0.08, 0.1, 0.13), gloss=0.9)
    black, light = Material(color=(0.06, 0.06, 0.06)), Material(color=(0.95, 0.9, 0.75))
    if p.other:
        body = [block(0, 1.15, -0.2, 1.85, 1.6, long - 0.4, paint),
                block(0, 0.75, long / 2 - 0.3, 1.85, 0.8, 0.6, paint),
                block(0, 1.5, long / 2 - 0.39, 1.6, 0.6, 0.04, glass)]  # fmt: skip
    else:
        cabin = p.between(0.5, 0.58) * long
        body = [block(0, 0.6, 0, 1.75, 0.62, long, paint),
                block(0, (0.9 + high) / 2, -0.06 * long, 1.5, high - 0.9, cabin, glass),
                block(0, high, -0.06 * long, 1.52, 0.05, cabin - 0.25, paint)]  # fmt: skip
    lamps = [block(i * 0.65, 0.68, long / 2 + 0.01, 0.28, 0.14, 0.03, light) for i in (-1, 1)]
    rear = Material(color=(0.75, 0.05, 0.05))
    lamps += [block(i * 0.68, 0.72, -long / 2 - 0.01, 0.2, 0.14, 0.03, rear) for i in (-1, 1)]
    wheels = [Part(shape="roller", center=(i * 0.8, 0.32, j * 0.31 * long), size=(0.22, 0.64, 0.64),
                   material=black) for i in (-1, 1) for j in (-1, 1)]  # fmt: skip
    return body + lamps + wheels


def tree(p: Palette) -> list[Part]:
    """3-6 m: a trunk and overlapping crowns."""
    height, leaves = p.between(3.0, 6.0), p.leaves()
    bark = Material(color=p.hsv((0.05, 0.09), (0.3, 0.6), (0.2, 0.45)))
    parts = [_column(0, height * 0.3, 0, 0.2 + 0.03 * height, height * 0.6, bark)]
    for _ in range(int(p.rng.integers(3, 6))):
        x, z = p.between(-0.14, 0.14) * height, p.between(-0.14, 0.14) * height
        size = height * p.between(0.28, 0.45)
        parts.append(_ball(x, height * p.between(0.55, 0.8), z, size, leaves))
    return parts


def plant(p: Palette) -> list[Part]:
    """A pot of 0.3-0.4 m with foliage up to 0.7-1.3 m."""
    pot, height, leaves = p.between(0.28, 0.4), p.between(0.7, 1.3), p.leaves()
    parts = [_column(0, 0.16, 0, pot, 0.32, p.paint()),
             _column(0, 0.4, 0, 0.05, 0.3, p.wood())]  # fmt: skip
    for i in range(5):
        y = 0.5 + (height - 0.65) * i / 4
        x, z = p.between(-0.12, 0.12), p.between(-0.12, 0.12)
        parts.append(_ball(x, y, z, p.between(0.22, 0.34), leaves))
    return parts


def fence(p: Palette) -> list[Part]:
    """0.9-1.15 m high, posts every 1.2 m, two rails; closed boards when shifted."""
    height, spans, wood = p.between(0.9, 1.15), int(p.rng.integers(2, 5)), p.wood()
    long = 1.2 * spans
    parts = [block(-long / 2 + 1.2 * i, height / 2, 0, 0.1, height, 0.1, wood)
             for i in range(spans + 1)]  # fmt: skip
    if p.other:
        return [*parts, block(0, height / 2 + 0.03, 0, long, height - 0.1, 0.03, wood)]
    return parts + [block(0, height * f, 0.03, long, 0.12, 0.03, wood) for f in (0.3, 0.6, 0.9)]


def sheet(y: float, half_width: float, half_depth: float, material: Material) -> Part:
    """A level rectangle at height y."""
    size = (2 * half_width, 0.0, 2 * half_depth)
    return Part(shape="sheet", center=(0, y, 0), size=size, material=material)


def hung(name: str, p: Palette, *, glow: float = 2.5) -> tuple[list[Part], float, float]:
    """A thing for a wall, its back on z = 0, its base on y = 0; its width; its base's height [m].

    Doors are 1.98-2.05 m by 0.8-0.95 m, sills at 0.85-1.0 m, pictures hang at eye level.
    """
    if name == "door":
        w, h, leaf = p.between(0.8, 0.95), p.between(1.98, 2.05), p.wood()
        leaf = p.paint() if p.chance(0.5) else leaf
        frame = Material(color=(0.92, 0.92, 0.9))
        parts = [block(0, h / 2, 0.02, w, h, 0.04, leaf), block(0, h, 0.03, w + 0.14, 0.07, 0.06,
                 frame), block(w * 0.4, 1.03, 0.07, 0.12, 0.03, 0.06, p.metal())]  # fmt: skip
        parts += [block(i * (w / 2 + 0.035), h / 2, 0.03, 0.07, h, 0.06, frame) for i in (-1, 1)]
        return parts, w + 0.14, 0.0
    if name == "window":
        w, h = p.between(0.8, 1.5), p.between(1.0, 1.3)
        sky = p.hsv((0.5, 0.62), (0.05, 0.35), (0.85, 1.0))
        pane = Material(color=sky, glow=glow) if glow else Material(color=(0.15, 0.2, 0.26))
        frame = Material(color=(0.93, 0.93, 0.93) if p.chance(0.7) else (0.25, 0.15, 0.1))
        parts = [
            block(0, h / 2, 0.02, w + 0.1, h + 0.1, 0.04, frame),
            Part(shape="panel", center=(0, h / 2, 0.045), size=(w, h, 0.0), material=pane),
            block(0, h / 2, 0.035, 0.07, h, 0.06, frame),
        ]
        return parts, w + 0.1, p.between(0.85, 1.0)
    w, h, inner = p.between(0.4, 1.0), p.between(0.4, 0.8), p.fabric()
    inner = dataclasses.replace(inner, pattern=p.pattern(), period_m=0.5)
    parts = [block(0, h / 2, 0.015, w, h, 0.03, p.metal()),
             block(0, h / 2, 0.03, w - 0.08, h - 0.08, 0.01, inner)]  # fmt: skip
    return parts, w, p.between(1.2, 1.4)


BUILDERS: dict[str, Callable[[Palette], list[Part]]] = {
    **{f.__name__: f for f in (table, chair, sofa, shelf, lamp, ball, box, person, car)},
    **{f.__name__: f for f in (tree, plant, fence)},
    "bin": bin_,
}
