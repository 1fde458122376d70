"""The surfaces of the synthetic scenes: colours, patterns of real size, gloss and glow.

``other`` (the shifted split) draws from other hues, patterns and finishes.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

PATTERNS = ("speckle", "tiles", "bricks", "planks", "stripes", "checker")
OTHER_PATTERNS = ("weave", "dots", "zigzag", "clouds")
Vector = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Material:
    """A surface: sRGB colours in [0, 1], a pattern repeated every ``period_m``, gloss, glow.

    ``glow`` is emitted radiance (relative units, times the colour); 0 for all but lights.
    """

    color: Vector
    second: Vector = (0.5, 0.5, 0.5)
    pattern: str = "plain"
    period_m: float = 1.0
    gloss: float = 0.0
    glow: float = 0.0


HUES = ("red", "orange", "yellow", "green", "green", "blue", "blue", "purple", "pink", "red")


def color_name(color: Vector) -> str:
    """The plain English name of an sRGB colour."""
    hue, saturation, value = colorsys.rgb_to_hsv(*color)
    if value < 0.22:
        return "black"
    if saturation < 0.18:
        return "white" if value > 0.8 else "grey"
    if 0.03 < hue < 0.14 and value < 0.68:
        return "brown"
    edges = (0.03, 0.115, 0.19, 0.3, 0.45, 0.56, 0.72, 0.83, 0.95, 1.01)
    return HUES[next(i for i, edge in enumerate(edges) if hue < edge)]


def scaled(vector: Vector, factor: float) -> Vector:
    """The vector times a number."""
    x, y, z = vector
    return (factor * x, factor * y, factor * z)


class Palette:
    """Draws materials; the shifted split draws from other hues, patterns and finishes."""

    def __init__(self, rng: np.random.Generator, *, other: bool) -> None:
        """``rng`` is shared with the layout, so that one seed fixes the scene."""
        self.rng, self.other = rng, other

    def between(self, low: float, high: float) -> float:
        """A uniform number."""
        return float(self.rng.uniform(low, high))

    def chance(self, p: float) -> bool:
        """True with probability ``p``."""
        return bool(self.rng.random() < p)

    def hsv(self, hue: tuple, saturation: tuple, value: tuple) -> Vector:
        """An sRGB colour from ranges of hue, saturation and value."""
        h, s, v = self.between(*hue), self.between(*saturation), self.between(*value)
        return colorsys.hsv_to_rgb(h % 1.0, s, v)

    def pattern(self) -> str:
        """The name of a pattern of this split."""
        return str(self.rng.choice(OTHER_PATTERNS if self.other else PATTERNS))

    def paint(self) -> Material:
        """A lively plain colour, often glossy."""
        color = self.hsv((0, 1), (0.45, 0.95), (0.45, 0.95))
        return Material(color=color, gloss=self.between(0.3, 0.9) * self.chance(0.5))

    def fabric(self) -> Material:
        """A colour with a small woven, striped or speckled pattern."""
        color = self.hsv((0, 1), (0.2, 0.8), (0.3, 0.9))
        second = self.hsv((0, 1), (0.1, 0.7), (0.3, 0.9))
        usual = ("stripes", "checker", "speckle", "plain", "plain")
        pattern = self.pattern() if self.other else str(self.rng.choice(usual))
        return Material(
            color=color, second=second, pattern=pattern, period_m=self.between(0.1, 0.3)
        )

    def wood(self) -> Material:
        """Brown planks; painted instead in the shifted split."""
        if self.other and self.chance(0.6):
            return Material(color=self.hsv((0.4, 0.9), (0.1, 0.5), (0.3, 0.8)), gloss=0.4)
        color = self.hsv((0.05, 0.1), (0.35, 0.7), (0.35, 0.8))
        dark = (color[0] * 0.75, color[1] * 0.7, color[2] * 0.65)
        return Material(color=color, second=dark, pattern="planks", period_m=0.5)

    def metal(self) -> Material:
        """Grey, black or white, glossy."""
        grey = float(self.rng.choice([0.1, 0.35, 0.6, 0.85]))
        return Material(color=(grey, grey, grey), gloss=0.6)

    def leaves(self) -> Material:
        """Green; autumn colours in the shifted split."""
        hue = (0.02, 0.15) if self.other else (0.2, 0.38)
        color = self.hsv(hue, (0.45, 0.85), (0.3, 0.65))
        dark = (color[0] * 0.5, color[1] * 0.6, color[2] * 0.4)
        return Material(color=color, second=dark, pattern="speckle", period_m=0.5)

    def light(self) -> Vector:
        """The colour of a light: warm to cool white; coloured in the shifted split."""
        if self.other:
            return self.hsv((0, 1), (0.15, 0.4), (1, 1))
        warm = self.between(-0.25, 0.12)
        return (min(1.0, 1 - warm), 0.9, min(1.0, 0.95 + warm))


TEXELS = 128


def texture(material: Material) -> np.ndarray:
    """One period of the pattern: uint8 [128, 128, 3] sRGB, seamless; the same every time."""
    rng = np.random.default_rng(TEXELS)
    v, u = np.mgrid[0:TEXELS, 0:TEXELS] / TEXELS
    grain = rng.random((TEXELS, TEXELS))
    share = _PATTERN[material.pattern](u, v, grain)[..., None]
    color = np.asarray(material.color) * (1 - share) + np.asarray(material.second) * share
    return (np.clip(color * (0.97 + 0.06 * grain[..., None]), 0, 1) * 255).astype(np.uint8)


def _smooth(grain: np.ndarray, waves: int) -> np.ndarray:
    """Seamless noise with up to ``waves`` waves per period, in [0, 1]."""
    k = np.abs(np.fft.fftfreq(TEXELS, 1 / TEXELS))
    low = np.fft.ifft2(np.fft.fft2(grain) * ((k[:, None] < waves) & (k < waves))).real
    return (low - low.min()) / np.ptp(low)


def _bricks(u: np.ndarray, v: np.ndarray, grain: np.ndarray) -> np.ndarray:
    row = np.floor(v * 8)
    column = u * 3 + 0.5 * (row % 2)
    joint = (v * 8 % 1 < 0.12) | (column % 1 < 0.05)
    return np.where(joint, 1.0, 0.25 * grain[row.astype(int), np.floor(column).astype(int) % 3])


def _planks(u: np.ndarray, v: np.ndarray, grain: np.ndarray) -> np.ndarray:
    row = np.floor(v * 4).astype(int)
    seam = (v * 4 % 1 < 0.06) | ((u + 0.37 * row) % 1 < 0.01)
    streaks = _smooth(np.repeat(grain[:, :1], TEXELS, 1), 40)
    return np.where(seam, 1.0, 0.45 * grain[row, 0] + 0.35 * streaks)


# share of the second colour in [0, 1] from texture coordinates and white noise
_PATTERN = {
    "speckle": lambda u, v, g: 0.5 * _smooth(g, 24) + 0.5 * _smooth(g.T, 6),
    "tiles": lambda u, v, g: ((u * 2 % 1 < 0.04) | (v * 2 % 1 < 0.04)).astype(float),
    "bricks": _bricks,
    "planks": _planks,
    "stripes": lambda u, v, g: (u * 4 % 1 < 0.5).astype(float),
    "checker": lambda u, v, g: ((u * 2 % 1 < 0.5) ^ (v * 2 % 1 < 0.5)).astype(float),
    "weave": lambda u, v, g: 0.5 + 0.5 * np.sin(2 * np.pi * 6 * u) * np.sin(2 * np.pi * 6 * v),
    "dots": lambda u, v, g: (np.hypot(u * 3 % 1 - 0.5, v * 3 % 1 - 0.5) < 0.28).astype(float),
    "zigzag": lambda u, v, g: ((v * 4 + np.abs(u * 4 % 1 - 0.5)) % 1 < 0.5).astype(float),
    "clouds": lambda u, v, g: _smooth(g, 4),
    "plain": lambda u, v, g: np.zeros_like(u),
}


def linear(color: Vector) -> list[float]:
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
