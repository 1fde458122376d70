"""Colours by tuple, hex or CSS name, and sets of colours that lie as far apart as possible."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from teacher.errors import UsageError

Colour = str | Sequence[int]
LEVELS = 9  # per channel, of the finest grid that is searched
MOST = LEVELS**3


def parse_colour(colour: Colour) -> tuple[int, int, int]:
    """(r, g, b) of 0..255 from such a tuple, "#80c000", or a CSS name such as "rebeccapurple"."""
    if not isinstance(colour, str):
        try:
            values = tuple(int(v) for v in colour)
            good = values == tuple(colour) and all(0 <= v <= 255 for v in values)
        except (TypeError, ValueError, OverflowError):
            good, values = False, ()
        if not good or len(values) != 3:
            found = f"colour {colour!r}: expected three whole numbers in 0..255"
            raise UsageError(f"{found}, '#rrggbb' or a CSS colour name")
        return values[0], values[1], values[2]
    from PIL import ImageColor

    name = colour.strip().lower().replace(" ", "")
    try:
        rgb = ImageColor.getrgb(name)
    except ValueError as error:
        near = difflib.get_close_matches(name, list(ImageColor.colormap), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(
            f"colour {colour!r}: neither #rrggbb nor a CSS colour name{hint}"
        ) from error
    return rgb[0], rgb[1], rgb[2]


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances of all colours [n, 3] to all colours [m, 3]: float64 [n, m]."""
    difference = a[:, None, :].astype(np.float64) - b[None, :, :].astype(np.float64)
    return np.sqrt((difference**2).sum(-1))


def smallest_distance(colours: np.ndarray) -> float:
    """The distance of the closest two of [n, 3]; infinity for fewer than two."""
    if len(colours) < 2:
        return float("inf")
    return float((distances(colours, colours) + np.diag(np.full(len(colours), np.inf))).min())


def spread_colours(n: int, *, keep: Sequence[Colour] = ()) -> UInt8[np.ndarray, "{n} 3"]:
    """``n`` colours whose smallest distance, to each other and to ``keep``, is as large as found.

    Searched on regular grids of the cube, from several starts: the colour with the nearest
    neighbour moves to the freest grid point until nothing gets better. Deterministic. Two colours
    are 442 apart, four 361, eight 255 (all optimal), nineteen about 131.
    """
    if n < 0:
        raise UsageError(f"spread_colours: n must not be negative, got {n}")
    fixed = np.array([parse_colour(c) for c in keep], np.int64).reshape(-1, 3)
    if n + len(fixed) > MOST:
        raise UsageError(
            f"spread_colours: {n + len(fixed)} colours are too many to be told apart, "
            f"the most is {MOST}; split the classes or instances over several pictures"
        )
    if n == 1:
        return _freest(fixed)[None]
    best, best_distance = np.zeros((n, 3), np.int64), -1.0
    for levels in range(2, LEVELS + 1):
        steps = np.round(np.linspace(0, 255, levels)).astype(np.int64)
        grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
        if len(grid) < n + len(fixed):
            continue
        for start in range(16 if n <= 64 else 4):
            rng = np.random.default_rng([levels, start])
            first = grid[rng.permutation(len(grid))[:n]] if start % 2 else _greedy(grid, n, rng)
            colours = _settle(grid, fixed, first)
            found = smallest_distance(np.concatenate([fixed, colours]))
            if found > best_distance + 1e-9:
                best, best_distance = colours, found
    return best.astype(np.uint8)


def _freest(fixed: np.ndarray) -> np.ndarray:
    """The colour, in steps of 15, farthest from all of ``fixed`` [n, 3]; black if there is none."""
    steps = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    freedom = np.full(len(grid), np.inf)
    for colour in fixed:
        freedom = np.minimum(freedom, ((grid - colour) ** 2).sum(-1))
    return grid[int(freedom.argmax())].astype(np.uint8)


def _greedy(grid: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Any grid point, then always one of those farthest from all chosen so far."""
    chosen = [int(rng.integers(len(grid)))]
    free = np.full(len(grid), np.inf)
    while len(chosen) < n:
        free = np.minimum(free, distances(grid, grid[chosen[-1:]])[:, 0])
        chosen.append(int(rng.choice(np.flatnonzero(free >= free.max() - 1))))
    return grid[chosen[:n]]


def _settle(grid: np.ndarray, fixed: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Move the most crowded colour to the freest grid point while that helps."""
    n = len(first)
    colours = np.concatenate([fixed, first])
    to_grid = distances(grid, colours)
    for _ in range(20 * n):
        apart = distances(colours, colours) + np.diag(np.full(len(colours), np.inf))
        crowded = np.argsort(apart.min(0)[len(fixed) :], kind="stable") + len(fixed)
        for victim in crowded[:4]:
            rest = np.delete(to_grid, victim, axis=1)
            freedom = rest.min(1, initial=np.inf)
            target = int(freedom.argmax())
            if freedom[target] > apart[victim].min() + 1e-9:
                colours[victim] = grid[target]
                to_grid[:, victim] = distances(grid, grid[target : target + 1])[:, 0]
                break
        else:
            break
    return colours[len(fixed) :]
