"""Classes and instances as flat colours, and back.

`PaletteCodec`: one colour per class, all named in the prompt; a pixel is the class of the nearest
colour, or no class beyond a distance. `InstanceCodec`: one class per picture, the generator picks
a colour per object; only the background's colour is agreed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer, Shaped, UInt8, UInt16

from teacher.codecs._pixels import as_pixels
from teacher.codecs.colours import (
    Colour,
    distances,
    parse_colour,
    smallest_distance,
    spread_colours,
)
from teacher.errors import UsageError


@dataclass(frozen=True, init=False)
class PaletteCodec:
    """Class ids <-> colours; the id is the class's place in the mapping.

    Attributes:
        names: class names in the order of their ids.
        colours: their (r, g, b), 0..255.
        min_distance: the smallest distance two classes may have; 16 lets Cityscapes' colours pass.
        max_distance: a pixel farther than this from every class is no class (255 or 65535).
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    min_distance: float
    max_distance: float

    def __init__(
        self,
        classes: Mapping[str, Colour],
        *,
        min_distance: float | int = 16.0,
        max_distance: float | int = 64.0,
    ) -> None:
        """``classes``: name -> (r, g, b), "#rrggbb" or CSS colour name."""
        if not 1 <= len(classes) <= 65535:
            raise UsageError(f"PaletteCodec: needs 1 to 65535 classes, got {len(classes)}")
        object.__setattr__(self, "names", tuple(classes))
        object.__setattr__(self, "colours", tuple(parse_colour(c) for c in classes.values()))
        object.__setattr__(self, "min_distance", float(min_distance))
        object.__setattr__(self, "max_distance", float(max_distance))
        self._refuse_neighbours()

    def _refuse_neighbours(self) -> None:
        apart = distances(self.array, self.array) + np.diag(np.full(len(self.names), np.inf))
        i, j = np.unravel_index(int(apart.argmin()), apart.shape)
        if apart[i, j] < self.min_distance:
            others = np.delete(self.array, j, axis=0)
            free = spread_colours(1, keep=[tuple(int(v) for v in c) for c in others])[0].tolist()
            raise UsageError(
                f"PaletteCodec: {self.names[i]!r} {self.colours[i]} and {self.names[j]!r} "
                f"{self.colours[j]} are {apart[i, j]:.0f} apart, less than {self.min_distance:g}; "
                f"give {self.names[j]!r} another colour, {tuple(free)} for one, or take "
                f"PaletteCodec.automatic(names)"
            )

    @classmethod
    def automatic(
        cls,
        names: Sequence[str],
        *,
        fixed: Mapping[str, Colour] | None = None,
        **limits: float | int,
    ) -> PaletteCodec:
        """Colours as far apart as found for ``names``; those in ``fixed`` keep theirs."""
        fixed = dict(fixed or {})
        strange = set(fixed) - set(names)
        if strange or len(set(names)) != len(names):
            raise UsageError(
                f"PaletteCodec.automatic: names must be distinct and include all of fixed; "
                f"got {list(names)}, fixed {sorted(fixed)}"
            )
        open_names = [n for n in names if n not in fixed]
        found = spread_colours(len(open_names), keep=list(fixed.values())).tolist()
        chosen = {**fixed, **{n: tuple(c) for n, c in zip(open_names, found, strict=True)}}
        return cls({n: chosen[n] for n in names}, **limits)

    @property
    def array(self) -> UInt8[np.ndarray, "k 3"]:
        """The colours by id."""
        return np.array(self.colours, np.uint8).reshape(-1, 3)

    @property
    def dtype(self) -> np.dtype:
        """Of the ids: uint8 for up to 255 classes, else uint16; the largest value is no class."""
        return np.dtype(np.uint8 if len(self.names) <= 255 else np.uint16)

    @property
    def unknown_colour(self) -> tuple[int, int, int]:
        """What no class is painted in: the colour farthest from every class."""
        r, g, b = spread_colours(1, keep=self.colours)[0].tolist()
        return r, g, b

    def encode(self, ids: Integer[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n 3"]:
        """Paint class ids; the largest value of `dtype` is no class."""
        none = int(np.iinfo(self.dtype).max)
        table = np.zeros((none + 1, 3), np.uint8)
        table[: len(self.names)] = self.array
        known = (ids >= 0) & (ids < len(self.names))
        if not known.all():
            table[none] = self.unknown_colour
            strange = np.unique(ids[~known & (ids != none)])
            if strange.size:
                raise UsageError(
                    f"PaletteCodec.encode: ids {strange[:5].tolist()} are no class of "
                    f"{len(self.names)}; allowed are 0..{len(self.names) - 1} and {none}"
                )
            if distances(table[none : none + 1], self.array).min() <= self.max_distance:
                raise UsageError(
                    f"PaletteCodec.encode: {len(self.names)} classes leave no colour farther than "
                    f"max_distance={self.max_distance:g} for pixels of no class; lower it"
                )
        return table[ids]

    def decode(
        self, rgb: Shaped[np.ndarray, "*n 3"]
    ) -> tuple[Integer[np.ndarray, "*n"], Float32[np.ndarray, "*n"]]:
        """(ids of `dtype`, distance to the nearest class's colour in 8-bit steps)."""
        pixels = as_pixels(rgb, "PaletteCodec.decode")
        from teacher.codecs._segment_kernels import nearest_colour

        ids = np.empty(pixels.size // 3, self.dtype)
        distance = np.empty(pixels.size // 3, np.float32)
        scale = 1.0 if pixels.dtype == np.uint8 else 255.0
        nearest_colour(pixels, scale, self.array, ids, distance, self.max_distance)
        return ids.reshape(rgb.shape[:-1]), distance.reshape(rgb.shape[:-1])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, stored with the data; `from_json` reads it."""
        return {
            "classes": {n: list(c) for n, c in zip(self.names, self.colours, strict=True)},
            "min_distance": self.min_distance,
            "max_distance": self.max_distance,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> PaletteCodec:
        """The codec that `to_json` described."""
        try:
            return cls(**stored)
        except TypeError as error:
            raise UsageError(f"PaletteCodec.from_json: cannot read it: {error}") from error


@dataclass(frozen=True, kw_only=True)
class InstanceCodec:
    """One class's instances <-> a picture of flat colours; Vision Banana's decoder (appendix A).

    Five stages: what is closer than ``tau`` to the background is background; flood fill from
    seeds, by colour distance to the seed; drop components smaller than ``min_area``; drop those
    that an erosion leaves less than ``min_core`` of, if they are halos; merge pieces of one colour.
    Two departures from the paper: a component that erosion destroys is a halo only if its colour
    is a blend of the background (or a neighbour) with a solid neighbour, so thin objects live;
    and dropped specks inside an object are given back to it.

    Attributes:
        background: its colour.
        tau: colour distance that still means "the same", 0..255; see `for_noise`.
        min_area: smallest component, as a share of the picture.
        min_core: smallest share that must survive erosion.
        erosion_px: radius of the erosion; None: 1 px per 1024 px of the shorter side, at least 1.
        max_spread: two pieces merge if their common box is at most this many times both boxes.
    """

    background: Colour = "black"
    tau: float | int = 14.0
    min_area: float | int = 2e-4
    min_core: float | int = 0.1
    erosion_px: int | None = None
    max_spread: float | int = 5.0

    def __post_init__(self) -> None:
        """Refuse thresholds without a meaning."""
        object.__setattr__(self, "background", parse_colour(self.background))
        found = f"erosion_px={self.erosion_px} max_spread={self.max_spread}"
        if (self.erosion_px is not None and self.erosion_px < 1) or self.max_spread < 0:
            raise UsageError(
                f"InstanceCodec: needs erosion_px >= 1 or None, max_spread >= 0, got {found}"
            )
        found = f"tau={self.tau} min_area={self.min_area} min_core={self.min_core}"
        if self.tau <= 0 or not 0 <= self.min_area < 1 or not 0 <= self.min_core <= 1:
            raise UsageError(
                f"InstanceCodec: needs tau > 0, min_area in [0, 1), min_core in [0, 1], got {found}"
            )

    @classmethod
    def for_noise(cls, sigma: float | int, **others: Any) -> InstanceCodec:
        """Thresholds for a generator whose colours scatter by ``sigma`` (0..255) per channel.

        A pixel differs from its seed's mean of nine by sigma sqrt(10/9) per channel; tau is the
        99.9 % point of that distance (chi with 3 degrees of freedom), at least the paper's 14.
        """
        return cls(**{"tau": max(14.0, 4.033 * (10 / 9) ** 0.5 * sigma), **others})

    def encode(self, ids: Integer[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
        """Paint instance ids, 0 the background; colours as far apart as found, in id order."""
        present = np.unique(ids[ids != 0])
        if present.size and present[0] < 0:
            raise UsageError(f"InstanceCodec.encode: ids are 0 or more, got {present[0]}")
        table = np.zeros((int(ids.max(initial=0)) + 1, 3), np.uint8)
        table[0] = self.background
        table[present] = spread_colours(present.size, keep=[self.background])
        if smallest_distance(table[[0, *present.tolist()]]) <= 2 * self.tau:
            raise UsageError(
                f"InstanceCodec.encode: {present.size} instances do not fit into the colour cube "
                f"more than 2 tau = {2 * self.tau:g} apart; split the picture or lower tau"
            )
        return table[ids]

    def decode(
        self, rgb: Shaped[np.ndarray, "h w 3"]
    ) -> tuple[UInt16[np.ndarray, "h w"], list[dict[str, Any]]]:
        """(ids [H, W], 0 none; one dict per instance). No instance at all is a legal answer.

        The dicts hold id, colour (mean), area_px, box [x0, y0, x1, y1] (pixels, inclusive) and
        score: mean likeness 1 - distance / tau of its pixels to its mean colour, 0..1.
        """
        pixels = as_pixels(rgb, "InstanceCodec.decode")
        if rgb.ndim != 3:
            raise UsageError(f"InstanceCodec.decode: expected [H, W, 3], got shape {rgb.shape}")
        if pixels.dtype != np.uint8:
            pixels = np.rint(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
        from teacher.codecs._instances import decode_instances

        return decode_instances(self, pixels.reshape(rgb.shape))


def merge_passes(
    passes: Sequence[tuple[str, np.ndarray, list[dict[str, Any]]]],
    *,
    min_visible: float | int = 0.5,
) -> tuple[UInt16[np.ndarray, "h w"], list[dict[str, Any]]]:
    """Join the passes (class name, ids, table) of several classes; a higher score lies on top.

    An instance that keeps less than ``min_visible`` of its area under better ones is dropped, for
    it is the same object under a second name. Returns (ids, table with "class"), ids from 1 on.
    """
    if not passes:
        raise UsageError("merge_passes: needs at least one pass")
    joined = np.zeros(passes[0][1].shape, np.uint16)
    ranked = sorted(
        ((row["score"], -p, -row["id"]) for p, (_, _, table) in enumerate(passes) for row in table),
        reverse=True,
    )
    merged: list[dict[str, Any]] = []
    for _, minus_pass, minus_id in ranked:
        name, ids, table = passes[-minus_pass]
        row = next(r for r in table if r["id"] == -minus_id)
        mask = ids == row["id"]
        free = mask & (joined == 0)
        if free.sum() < max(1.0, min_visible * mask.sum()):
            continue
        joined[free] = len(merged) + 1
        merged.append(_seen(row, free) | {"id": len(merged) + 1, "class": name})
    return joined, merged


def _seen(row: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    ys, xs = np.nonzero(mask)
    box = [int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())]
    return {**row, "area_px": int(mask.sum()), "box": box}
