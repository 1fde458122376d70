"""The sentences asked of an instruction-tuned generator, per task, with their palettes.

Every wording is versioned: a label set records `VERSION` and the prompt itself. The training
wordings are templates with slots; `HELD_OUT` holds wordings that no tuning run sees, so that
"wordings never seen in training" can be measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import ImageColor

from teacher.errors import UsageError

VERSION = 1
KINDS = ("depth", "normals", "semantic", "instances", "generate", "other")
"""What a prompt can ask; ``other`` is everything a generator was not tuned for."""

RGB = tuple[int, int, int]
Notation = Literal["hex", "rgb", "json-hex", "json-rgb", "sentence"]
NOTATIONS: tuple[Notation, ...] = ("hex", "rgb", "json-hex", "json-rgb", "sentence")
COLOUR_MAPS = ("cube-walk", "plasma", "viridis", "grey")

SLOTS = {
    "verb": ("Generate", "Draw", "Render", "Produce", "Make", "Create", "Paint", "Show", "Output"),
    "this": ("this image", "the image", "the input", "this photo", "the scene", "this picture"),
    "picture": ("image", "map", "visualization", "picture", "rendering"),
}

WORDINGS: dict[str, tuple[str, ...]] = {
    "depth": (
        "{verb} a metric depth {picture} of {this}{map}.",
        "{verb} the depth of {this} as colours{map}.",
        "Estimate the metric depth of {this}{map}.",
        "How far away is every pixel of {this}? {verb} a depth {picture}{map}.",
        "Depth estimation: encode the distance of each pixel to the camera{map}.",
        "{verb} a {picture} in which colour means distance from the camera plane{map}.",
        "Predict depth in metres for {this}{map}.",
        "depth map{map}",
    ),
    "normals": (
        "{verb} a surface normal {picture} of {this}.",
        "Estimate the surface normals of {this}.",
        "{verb} the orientation of every surface in {this} as a normal {picture}.",
        "Normal estimation: encode the camera-space normal of each pixel as a colour.",
        "Predict normals for {this}.",
        "{verb} a {picture} where red, green and blue are the x, y and z of the surface normal.",
        "Which way does each surface of {this} face? {verb} normals.",
        "surface normals",
    ),
    "semantic": (
        "{verb} a semantic segmentation {picture} of {this}, using this colour mapping: {palette}",
        "Segment {this} by class: {palette}",
        "Semantic segmentation with these colours: {palette}",
        "{verb} a {picture} that colours every pixel by its class. {palette}",
        "Label every pixel of {this}. {palette}",
        "Classes and colours: {palette} {verb} the segmentation of {this}.",
    ),
    "instances": (
        "{verb} an instance segmentation {picture} of {this}. Each {name} is coloured differently."
        " The background is {background}.",
        "Instance masks for every {name} in {this}, background {background}.",
        "{verb} each {name} in its own colour on a {background} background.",
        "Separate the individual {name} objects; paint the rest {background}.",
        "This {picture} shows segmentation masks for the {name} instances from the input. The"
        " background is set to {background}. Each {name} has a different colour.",
    ),
    "generate": (
        "{verb} a picture: {caption}",
        "{verb} {caption}",
        "{caption}",
        "An image of {caption}",
        "Imagine this scene. {caption}",
    ),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "depth": (
        "Please turn this photograph into a colour-coded depth picture.",
        "I need a dense depth prediction, in metres, for what you see here.",
        "Convert the view to a map of distances from the camera.",
    ),
    "normals": (
        "Please visualise the surface normals of the objects in this photograph.",
        "I need a dense normal map for what you see here.",
        "Convert the view to camera-space normal vectors.",
    ),
    "semantic": (
        "Please colour this photograph by category, following this legend: {palette}",
        "I need semantic classes painted with the palette below. {palette}",
        "Use the legend to segment what you see here: {palette}",
    ),
    "instances": (
        "Please give every single {name} here a distinct colour; everything else is {background}.",
        "I need one mask per {name}. Background: {background}.",
        "Colour all {name} instances individually over {background}.",
    ),
}

UNKNOWN = (
    "Estimate the optical flow of {this}.",
    "Detect all faces in {this} and draw boxes.",
    "Where are the body joints of the person?",
    "{verb} a sketch of the outlines of {this}.",
    "Remove the noise from {this}.",
    "Translate the text in {this}.",
    "Make {this} look like winter.",
    "Upscale {this} four times.",
    "How many people are there?",
    "Turn {this} into an oil painting.",
    "Restore the missing region of {this}.",
    "{verb} the albedo of {this}.",
    "Write a poem about {this}.",
    "What is the capital of France?",
    "Add a hat to the man on the left.",
    "Sharpen {this} and increase its contrast.",
    "Colourise this old black and white photo.",
    "Track the ball through the video.",
    "Read the licence plate.",
    "{verb} a heat map of where people would look.",
)
UNKNOWN_HELD_OUT = (
    "Compute the motion between these two frames.",
    "Find the key points of each hand.",
    "Deblur this shot.",
    "Replace the sky with a sunset.",
    "Summarise the document.",
    "Relight the photograph from the left.",
)


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


def fill(template: str, rng: np.random.Generator | None = None, **slots: str) -> str:
    """A template with its slots filled; free slots take their first text, or a random one."""
    for name, texts in SLOTS.items():
        if f"{{{name}}}" in template:
            slots[name] = texts[0] if rng is None else str(rng.choice(texts))
    return template.format(**slots)


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
    return fill(str(rng.choice(UNKNOWN)), rng)


def _write(kind: str, rng: np.random.Generator | None, **slots: str) -> str:
    templates = WORDINGS[kind]
    template = templates[0] if rng is None else templates[int(rng.integers(len(templates)))]
    return fill(template, rng, **slots)


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
