"""The curves: place for place the package's Hilbert curve, and nearest points by brute force."""

import itertools

import hilbert
import numpy as np
import pytest

from teacher.codecs.curves import WALK_POINTS, Curve, hilbert_cells, hilbert_places
from teacher.codecs.depth import DepthCodec, PlainPower
from teacher.errors import UsageError


@pytest.mark.parametrize("order", range(1, 9))
def test_hilbert_equals_numpy_hilbert_curve(order):
    count = 8**order
    rng = np.random.default_rng(order)
    places = np.arange(count) if order <= 4 else rng.integers(0, count, 20_000)
    cells = hilbert_cells(places, order=order)
    np.testing.assert_array_equal(cells, hilbert.decode(places, 3, order))
    np.testing.assert_array_equal(hilbert_places(cells, order=order), places)


@pytest.mark.parametrize("curve", [Curve(), *(Curve("hilbert", n) for n in range(1, 6))])
def test_curves_visit_every_point_once_in_unit_steps(curve):
    points = curve.points().astype(int)
    assert len(np.unique(points, axis=0)) == len(points) == curve.side**3
    assert (np.abs(np.diff(points, axis=0)).sum(1) == 1).all()
    assert curve.length == pytest.approx((len(points) - 1) * 255 / (curve.side - 1))


def test_the_walk_is_vision_bananas():
    names = "black red yellow lime cyan blue magenta white".split()
    from PIL import ImageColor

    expected = [ImageColor.getrgb(n) for n in names]
    assert [tuple(p) for p in (WALK_POINTS * 255).tolist()] == expected


def test_walk_and_hilbert_order_1_are_different_curves():
    last = Curve("hilbert", 1).points()[-1]
    assert last.tolist() == [1, 0, 0]  # next to its start
    assert Curve().points()[-1].tolist() == [1, 1, 1]  # the opposite corner


def brute_force(colours, curve):
    """Nearest point over every segment: (levels of all nearest segments' points, distances)."""
    points = curve.points().astype(np.float64) * curve.step
    start, along = points[:-1], np.diff(points, axis=0) / curve.step
    best = np.full(len(colours), np.inf)
    level = np.zeros(len(colours))
    second = np.full(len(colours), np.inf)  # best distance at a clearly different level
    for i, (a, u) in enumerate(zip(start, along, strict=True)):
        t = np.clip((colours - a) @ u, 0, curve.step)
        d = np.sqrt(((colours - a - t[:, None] * u) ** 2).sum(1))
        at = i * curve.step + t
        other = np.abs(at - level) > 1e-6
        closer = d < best
        second = np.where(closer & other, best, np.where(other, np.minimum(second, d), second))
        level, best = np.where(closer, at, level), np.minimum(best, d)
    return level, best, second - best


def sample_colours(rng, kind):
    if kind == "bytes":
        grid = np.array(list(itertools.product([0, 1, 36, 85, 127, 128, 254, 255], repeat=3)))
        return np.concatenate([grid, rng.integers(0, 256, (1500, 3))]).astype(np.uint8)
    return rng.uniform(-0.2, 1.2, (2000, 3)).astype(np.float32)


CURVES = [("cube-walk", 1), *(("hilbert", n) for n in range(1, 5))]


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize(("name", "order"), CURVES)
def test_decode_is_the_nearest_point_of_the_whole_polyline(name, order, kind):
    codec = DepthCodec(curve=name, order=order)
    colours = sample_colours(np.random.default_rng(order), kind)
    if order == 4:
        colours = colours[-300:]
    depth_m, residual = codec.decode(colours, edges="nearest")
    full = colours.astype(np.float64) * (1 if kind == "bytes" else 255)
    level, distance, gap = brute_force(full, codec.path)
    np.testing.assert_allclose(residual, distance, rtol=1e-5, atol=2e-3)
    unique = (gap > 1e-3) & (level > 0.5) & (level < codec.ends()[3]) & (full < 254.5).any(1)
    assert unique.mean() > 0.5
    u = level[unique] / codec.path.length
    expected_m = 10 * ((1 - u) ** -0.5 - 1)  # lam = -3, c = 10/3 in closed form
    np.testing.assert_allclose(depth_m[unique], np.minimum(expected_m, 100), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "order"), CURVES[:4])
def test_of_equally_near_points_the_first_on_the_curve_is_taken(name, order):
    v = np.arange(3, 253, dtype=np.int64)  # two or three channels alike: as near to several edges
    rest = np.concatenate([v * 0, v * 0 + 255, v])
    colours = np.stack([np.tile(v, 3), rest, np.tile(v, 3)], 1).astype(np.uint8)
    curve = Curve(name, order)
    points = curve.points().astype(np.int64)  # distances in units of 1/255 of a lattice step
    q = colours.astype(np.int64)[:, None] * (curve.side - 1) - 255 * points[:-1]
    along = np.clip((q * np.diff(points, axis=0)).sum(2), 0, 255)
    squared = ((q - along[..., None] * np.diff(points, axis=0)) ** 2).sum(2)
    place = np.arange(len(points) - 1) + along / 255
    best = squared == squared.min(1, keepdims=True)
    first = np.where(best, place, np.inf).min(1)
    last = np.where(best, place, -np.inf).max(1)
    tied = last > first + 1e-9
    assert tied.mean() > 0.15
    codec = DepthCodec(curve=name, order=order, transform=PlainPower(gamma=1, near_m=1, far_m=9))
    depth_m, _ = codec.decode(colours, edges="nearest")
    expected_m = 1 + 8 * first / (len(points) - 1)
    white_or_black = np.isin(colours.astype(int).sum(1), [0, 765])
    keep = tied & ~white_or_black & np.isfinite(depth_m)
    assert keep.sum() > 0.9 * tied.sum()
    np.testing.assert_allclose(depth_m[keep], expected_m[keep], rtol=1e-6)


@pytest.mark.parametrize("order", [5, 6, 7])
def test_high_orders_are_nearest_among_all_segments_close_by(order):
    # Over a box of lattice points around each colour, edges of the curve found by its own places.
    curve, rng = Curve("hilbert", order), np.random.default_rng(order)
    colours = rng.integers(0, 256, (400, 3)).astype(np.uint8)
    _, residual = DepthCodec(curve="hilbert", order=order).decode(colours, edges="nearest")
    around = np.array(list(itertools.product(range(-2, 3), repeat=3)))
    for colour, found in zip(colours, residual, strict=True):
        q = colour / curve.step
        cells = np.clip(np.round(q) + around, 0, curve.side - 1).astype(np.int64)
        places = np.unique(hilbert.encode(cells, 3, order).astype(np.int64))
        places = np.unique(np.clip(np.concatenate([places, places - 1]), 0, 8**order - 2))
        a, b = (hilbert.decode(p, 3, order).astype(float) for p in (places, places + 1))
        t = np.clip(((q - a) * (b - a)).sum(1), 0, 1)[:, None]
        expected = np.sqrt((((q - a) - t * (b - a)) ** 2).sum(1).min()) * curve.step
        assert found == pytest.approx(expected, abs=1e-4)


def test_order_8_visits_every_colour():
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    depth_m, residual = DepthCodec(curve="hilbert", order=8).decode(colours)
    assert (residual == 0).all()
    codec = DepthCodec(curve="hilbert", order=8, far_m=1e4)
    depth_m, _ = codec.decode(colours)
    again = codec.encode(depth_m)
    near = depth_m < 20  # float32 depth separates all 2^24 codes only up close
    assert near.mean() > 0.3
    off = hilbert_places(again, order=8).astype(int) - hilbert_places(colours, order=8)
    assert np.abs(off[near]).max() <= 4


def test_curve_errors_say_what_to_do():
    with pytest.raises(UsageError, match="use curve='hilbert' for orders"):
        Curve("cube-walk", 2)
    with pytest.raises(UsageError, match=r"order must be 1..8, got 9"):
        Curve("hilbert", 9)
    with pytest.raises(UsageError, match=r"choose one of \('cube-walk', 'hilbert'\)"):
        DepthCodec(curve="morton")
    with pytest.raises(UsageError, match=r"cells must be 0..3, got 0..4"):
        hilbert_places(np.array([[0, 1, 4]]), order=2)
    with pytest.raises(UsageError, match=r"places must be 0..63, got -1..0"):
        hilbert_cells(np.array([0, -1]), order=2)
