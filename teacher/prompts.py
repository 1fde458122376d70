"""The sentences asked of an instruction-tuned generator, per task, with their palettes.

A label set records `VERSION`, that of the wordings (`teacher.wordings`), and the prompt itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import ImageColor

from teacher.errors import UsageError
from teacher.wordings import OPENERS, SENTENCES, SLOTS, TEMPLATES

KINDS = ("depth", "normals", "semantic", "instances", "generate", "other")
"""What a prompt can ask; ``other`` is everything a generator was not tuned for."""

RGB = tuple[int, int, int]
Notation = Literal["hex", "rgb", "json-hex", "json-rgb", "sentence"]
NOTATIONS: tuple[Notation, ...] = ("hex", "rgb", "json-hex", "json-rgb", "sentence")
COLOUR_MAPS = ("cube-walk", "plasma", "viridis", "grey")


def colour_text(rgb: Sequence[int], notation: Notation) -> str:
    """One colour as text: ``#rrggbb`` or ``<r, g, b>``."""
    r, g, b = (int(v) for v in rgb)
    return f"#{r:02x}{g:02x}{b:02x}" if "hex" in notation else f"<{r}, {g}, {b}>"


def palette_text(palette: Mapping[str, Sequence[int]], *, notation: Notation = "json-hex") -> str:
    """A class -> RGB (0..255) mapping as the text that stands in a prompt."""
    if notation not in NOTATIONS:
        raise UsageError(f"palette: notation must be one of {NOTATIONS}, got {notation!r}")
    if notation == "sentence":
        return " ".join(f"The {n} is {colour_text(c, 'hex')}." for n, c in palette.items())
    texts = {name: colour_text(c, notation) for name, c in palette.items()}
    if notation.startswith("json"):
        return json.dumps(texts)
    return ", ".join(f"{name}: {text}" for name, text in texts.items()) + "."


def _map_text(colour_map: str) -> str:
    if colour_map == "cube-walk":
        return ""
    if colour_map not in COLOUR_MAPS:
        raise UsageError(
            f"depth prompt: colour map must be one of {COLOUR_MAPS}, got {colour_map!r}"
        )
    return f", using the {colour_map} colour map"


def fill(wording: str, rng: np.random.Generator | None = None, **slots: str) -> str:
    """A wording with its slots filled; free slots take their first text, or a random one.

    One random text in five begins with one of `OPENERS`.
    """
    for name, texts in SLOTS.items():
        if f"{{{name}}}" in wording:
            chosen = texts[0] if rng is None else str(rng.choice(texts))
            slots[name] = chosen.format(**slots)  # "rest" names the background
    text = wording.format(**slots)
    if rng is not None and rng.random() < 0.2:
        return str(rng.choice(OPENERS)) + text[:1].lower() + text[1:]
    return text


def depth(*, colour_map: str = "cube-walk", rng: np.random.Generator | None = None) -> str:
    """A request for metric depth; a colour map other than the walk is named."""
    return _write("depth", rng, map=_map_text(colour_map))


def normals(*, rng: np.random.Generator | None = None) -> str:
    """A request for surface normals."""
    return _write("normals", rng)


def semantic(
    palette: Mapping[str, Sequence[int]],
    *,
    notation: Notation = "json-hex",
    rng: np.random.Generator | None = None,
) -> str:
    """A request for class colours; ``palette`` maps class names to RGB 0..255."""
    return _write("semantic", rng, palette=palette_text(palette, notation=notation))


def instances(
    name: str, *, background: str = "black", rng: np.random.Generator | None = None
) -> str:
    """A request for one colour per object of class ``name``, on ``background`` (any notation)."""
    return _write("instances", rng, name=name, background=background)


def generate(caption: str, *, rng: np.random.Generator | None = None) -> str:
    """A request to draw ``caption`` with no input image."""
    return _write("generate", rng, caption=caption)


def unknown(*, rng: np.random.Generator) -> str:
    """Something a vision generator of ours cannot do: it must be refused."""
    return _write("other", rng)


def template(kind: str, rng: np.random.Generator | None = None) -> str:
    """A wording of ``kind`` with its slots open: the default one, or a random one.

    Half of the random ones are templates, half sentences (`teacher.wordings`).
    """
    if rng is None:
        return TEMPLATES[kind][0]
    texts = TEMPLATES[kind]
    if SENTENCES.get(kind) and rng.random() < 0.5:
        texts = SENTENCES[kind]
    return texts[int(rng.integers(len(texts)))]


def _write(kind: str, rng: np.random.Generator | None, **slots: str) -> str:
    return fill(template(kind, rng), rng, **slots)


def distinct_colours(
    count: int, *, rng: np.random.Generator, distance: float = 80.0, avoid: Sequence[RGB] = ()
) -> list[RGB]:
    """Random colours, pairwise (and from ``avoid``) at least ``distance`` (of 0..255) apart.

    The distance shrinks when the cube is too full to keep it.
    """
    found: list[RGB] = list(avoid)
    tries = 0
    while len(found) < count + len(avoid):
        r, g, b = (int(v) for v in rng.integers(0, 256, 3))
        gaps = [np.hypot(np.hypot(r - p[0], g - p[1]), b - p[2]) for p in found]
        if not gaps or min(gaps) >= distance:
            found.append((r, g, b))
        tries += 1
        if tries % 200 == 0:
            distance *= 0.9
    return found[len(avoid) :]


def named_colours() -> dict[str, RGB]:
    """The CSS colour names and their RGB: what a palette may be written with."""
    return {name: ImageColor.getrgb(name)[:3] for name in ImageColor.colormap}
