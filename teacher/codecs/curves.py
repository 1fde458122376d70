"""The curves through the colour cube: the cube walk and the Hilbert curve of orders 1 to 8.

A curve visits every point of a lattice of side L (multiples of 255 / (L - 1) per channel) once and
moves to a neighbour at each step; between points it is straight. Its *level* is the arc length
in 8-bit colour steps: 0 at black, `Curve.length` at the end.

* ``cube-walk`` (Vision Banana, arXiv 2604.20329, figure 5): the eight corners black, red, yellow,
  green, cyan, blue, magenta, white; length 1785.
* ``hilbert``, order n: side 2^n, the 3-D curve of Skilling (AIP 707, 2004) with x = R the first
  axis, place for place that of the PyPI package ``numpy-hilbert-curve``. It starts at black and
  ends at pure red, one cube edge from where it starts; order 8 visits all 2^24 colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Integer, UInt8, UInt32

from teacher.errors import UsageError

WALK_POINTS = np.array(
    [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 1, 1]],
    np.uint8,
)
CURVES = ("cube-walk", "hilbert")
MAX_ORDER = 8


def _check_order(order: int) -> None:
    if not 1 <= order <= MAX_ORDER:
        raise UsageError(f"curve: order must be 1..{MAX_ORDER}, got {order}")


def hilbert_places(cells: Integer[np.ndarray, "*n 3"], *, order: int) -> UInt32[np.ndarray, "*n"]:
    """The places 0..8^order - 1 of lattice cells with coordinates 0..2^order - 1."""
    _check_order(order)
    if cells.size and not 0 <= cells.min() <= cells.max() < 2**order:
        found = f"{cells.min()}..{cells.max()}"
        raise UsageError(f"hilbert order {order}: cells must be 0..{2**order - 1}, got {found}")
    from teacher.codecs import _hilbert_kernels as kernels

    flat = np.ascontiguousarray(cells, np.uint8).reshape(-1)
    places = np.empty(flat.size // 3, np.uint32)
    kernels.places_of_cells(flat, places, np.uint32(order), kernels.automaton()[0])
    return places.reshape(cells.shape[:-1])


def hilbert_cells(places: Integer[np.ndarray, "*n"], *, order: int) -> UInt8[np.ndarray, "*n 3"]:
    """The lattice cells at the places 0..8^order - 1 of the curve; inverts `hilbert_places`."""
    _check_order(order)
    if places.size and not 0 <= places.min() <= places.max() < 8**order:
        found = f"{places.min()}..{places.max()}"
        raise UsageError(f"hilbert order {order}: places must be 0..{8**order - 1}, got {found}")
    from teacher.codecs import _hilbert_kernels as kernels

    flat = np.ascontiguousarray(places, np.uint32).reshape(-1)
    cells = np.empty(3 * flat.size, np.uint8)
    kernels.cells_of_places(flat, cells, np.uint32(order), kernels.automaton()[1])
    return cells.reshape(*places.shape, 3)


@dataclass(frozen=True)
class Curve:
    """One curve: its name, and its order (1 for the walk, whose lattice is the cube's corners)."""

    name: str = "cube-walk"
    order: int = 1

    def __post_init__(self) -> None:
        """Refuse unknown names and orders."""
        if self.name not in CURVES:
            raise UsageError(f"curve: {self.name!r} is unknown, choose one of {CURVES}")
        _check_order(self.order)
        if self.name == "cube-walk" and self.order != 1:
            raise UsageError(
                f"curve: the cube walk has no order {self.order}; use curve='hilbert' for orders"
            )

    @property
    def side(self) -> int:
        """Lattice points per channel."""
        return 2**self.order

    @property
    def step(self) -> float:
        """Distance of neighbouring lattice points in 8-bit colour steps."""
        return 255 / (self.side - 1)

    @property
    def length(self) -> float:
        """Arc length in 8-bit colour steps: 1785 for the walk."""
        return (self.side**3 - 1) * self.step

    def points(self) -> UInt8[np.ndarray, "n 3"]:
        """The lattice points in the order of the curve (times `step` they are colours)."""
        return _points(self.name, self.order)

    def table(self) -> Integer[np.ndarray, "n"]:
        """For each lattice point, x slowest, its place on the curve (int32)."""
        return _table(self.name, self.order)

    def edges(self) -> UInt32[np.ndarray, "n"]:
        """For each of the (side - 1)^3 cells, the edges the curve runs along (`edges_of_cells`)."""
        return _edges(self.name, self.order)


@cache
def _points(name: str, order: int) -> np.ndarray:
    if name == "cube-walk":
        return WALK_POINTS
    points = hilbert_cells(np.arange(8**order, dtype=np.uint32), order=order)
    points.flags.writeable = False
    return points


@cache
def _table(name: str, order: int) -> np.ndarray:
    points, side = _points(name, order), 2**order
    at = points[:, 0].astype(np.int32)
    for axis in (1, 2):
        at = at * side + points[:, axis]
    table = np.empty(side**3, np.int32)
    table[at] = np.arange(side**3, dtype=np.int32)
    table.flags.writeable = False
    return table


@cache
def _edges(name: str, order: int) -> np.ndarray:
    from teacher.codecs._lattice_kernels import edges_of_cells

    edges = edges_of_cells(_points(name, order), 2**order)
    edges.flags.writeable = False
    return edges
