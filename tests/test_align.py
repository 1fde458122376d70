"""Affine -> metric: planted scales come back, outliers do not count, the unknowable is refused."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from teacher.align import (
    AFFINE,
    METHODS,
    AlignmentError,
    apply,
    fit,
    fit_range,
    truncated_l1,
    weights_of,
)
from teacher.anchors import Anchor
from teacher.label import Answer, LabelError, Space, Task

RGBD = Path(__file__).parents[2] / "shared" / "rgbd"
FORWARD = {
    Space.AFFINE_DEPTH: lambda z: z,
    Space.AFFINE_DISPARITY: lambda z: 1 / z,
    Space.AFFINE_LOG_DEPTH: np.log,
    Space.AFFINE_SQRT_DEPTH: np.sqrt,
}


def scene(seed=0, size=(40, 50)):
    """Depth in metres: two slanted planes and a step."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    depth_m = 1.5 + 0.05 * columns + 0.03 * rows + rng.uniform(0, 0.2, size)
    return np.where(columns > 30, depth_m + 2, depth_m)


def planted(depth_m, space, *, a, b):
    """The affine answer y with g(z) = a y + b."""
    return (FORWARD[space](depth_m) - b) / a


def affine(values, space, uncertainty=None):
    return Answer(task=Task.DEPTH, space=space, values=values, uncertainty=uncertainty)


@pytest.mark.parametrize("space", AFFINE)
@pytest.mark.parametrize("method", METHODS)
def test_a_planted_scale_and_shift_come_back_exactly(space, method):
    depth_m = scene()
    y = planted(depth_m, space, a=2.5, b=0.07)
    anchor_m = np.where(np.arange(depth_m.size).reshape(depth_m.shape) % 7 == 0, depth_m, np.nan)
    found = fit(y, anchor_m, space=space, method=method)
    assert found.a == pytest.approx(2.5, rel=1e-9) and found.b == pytest.approx(0.07, abs=1e-9)
    assert found.residual < 1e-9 and found.inliers == 1 and found.points == 286
    metric = apply(affine(y.astype(np.float32), space), found)
    assert metric.space is Space.METRIC
    np.testing.assert_allclose(metric.values, depth_m, rtol=1e-5)


@pytest.mark.parametrize("space", AFFINE)
@pytest.mark.parametrize("method", ["ransac", "truncated-l1"])
@pytest.mark.parametrize("kind", ["anywhere", "all too near", "another plane"])
def test_forty_per_cent_outliers_move_the_depth_by_less_than_one_per_cent(space, method, kind):
    depth_m = scene(1)
    y = planted(depth_m, space, a=0.8, b=-0.02)
    rng = np.random.default_rng(5)
    anchor_m = depth_m * np.exp(rng.normal(0, 0.004, depth_m.shape))
    wrong = rng.random(depth_m.shape) < 0.4
    lies = {
        "anywhere": rng.uniform(0.5, 12, depth_m.shape),
        "all too near": depth_m * rng.uniform(0.2, 0.6, depth_m.shape),
        "another plane": np.full(depth_m.shape, 1.0),
    }
    anchor_m[wrong] = lies[kind][wrong]
    found = fit(y, anchor_m, space=space, method=method)
    metric = apply(affine(y.astype(np.float32), space), found).values
    assert np.abs(metric / depth_m - 1).max() < 0.01
    assert found.a == pytest.approx(0.8, rel=0.01)
    plain = apply(
        affine(y.astype(np.float32), space), fit(y, anchor_m, space=space, method="least-squares")
    ).values
    off = np.abs(plain / depth_m - 1)  # least squares shows that the outliers do pull
    assert not np.nanmax(off) < 0.05


def test_least_squares_is_that_of_numpy_with_and_without_weights():
    rng = np.random.default_rng(2)
    y, depth_m = rng.normal(3, 1, (30, 20)), rng.uniform(1, 9, (30, 20))
    depth_m += y
    weights = rng.uniform(0.1, 4, y.shape)
    for w in (None, weights):
        found = fit(y, depth_m, space=Space.AFFINE_DEPTH, weights=w, method="least-squares")
        root = np.sqrt(np.ones(y.size) if w is None else w.ravel())
        design = np.stack([y.ravel(), np.ones(y.size)], 1) * root[:, None]
        a, b = np.linalg.lstsq(design, depth_m.ravel() * root, rcond=None)[0]
        assert (found.a, found.b) == pytest.approx((a, b), rel=1e-9)


@pytest.mark.skipif(not RGBD.is_dir(), reason="no ../shared/rgbd on this machine")
@pytest.mark.parametrize("name", ["redwood_00000", "nyu_00000", "tum_1", "kitti_050"])
def test_real_pairs_agree_with_independent_least_squares(name):
    units = {"redwood_00000": 1000, "nyu_00000": 1000, "tum_1": 5000, "kitti_050": 256}[name]
    raw = np.asarray(Image.open(RGBD / f"{name}.depth.png")).astype(np.float64)
    depth_m = np.where(raw > 0, raw / units, np.nan)
    image = Image.open(next(p for p in RGBD.glob(f"{name}.*") if ".depth" not in p.name))
    red = np.asarray(image.convert("RGB"))[..., 0].astype(np.float64)
    known = np.isfinite(depth_m)
    for space, forward in FORWARD.items():
        # an answer that is partly right: the truth, warped by a power and by the picture
        y = forward(np.nan_to_num(depth_m, nan=1.0)) * 0.3 + 0.002 * red
        design = np.stack([y[known], np.ones(known.sum())], 1)
        a, b = np.linalg.lstsq(design, forward(depth_m[known]), rcond=None)[0]
        if a <= 0:
            with pytest.raises(AlignmentError, match="negative scale"):
                fit(y, depth_m, space=space, method="least-squares")
            continue
        found = fit(y, depth_m, space=space, method="least-squares")
        assert (found.a, found.b) == pytest.approx((a, b), rel=1e-7)
        assert found.points == known.sum()


def test_truncated_l1_is_a_minimum_that_no_line_through_two_points_beats():
    rng = np.random.default_rng(3)
    y = rng.uniform(0, 4, 60)
    g = 1.7 * y + 0.4 + rng.laplace(0, 0.05, 60)
    g[:24] += rng.uniform(1, 4, 24)  # all on one side: they would pull a plain L1 fit
    w = rng.uniform(0.5, 2, 60)
    a, b, inside = truncated_l1(y, g, w)
    limit = np.abs(a * y + b - g)[inside].max()

    def cost(a, b):
        return (w * np.minimum(np.abs(a * y + b - g), limit)).sum()

    lines = []
    for i, j in itertools.combinations(range(60), 2):  # an L1 optimum runs through two points
        slope = (g[i] - g[j]) / (y[i] - y[j])
        lines.append(cost(slope, g[i] - slope * y[i]))
    assert cost(a, b) <= min(lines) * 1.002
    assert not inside[:24].any() and inside[24:].mean() > 0.8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y, z: (np.full_like(y, 0.5), z), "answer is flat"),
        (lambda y, z: (y, np.full_like(z, 2.0)), "anchor is flat"),
        (lambda y, z: (y, np.where(np.arange(z.size).reshape(z.shape) < 2, z, np.nan)), "has 2 us"),
        (lambda y, z: (-y, z), "negative scale"),
        (lambda y, z: (np.full_like(y, np.nan), z), "has 0 usable points"),
        (lambda y, z: (y, -z), "has 0 usable points"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_inputs_are_rejected_with_a_reason(change, reason, method):
    y, anchor_m = change(scene() / 3, scene())
    with pytest.raises(AlignmentError, match=reason):
        fit(y, anchor_m, space=Space.AFFINE_DEPTH, method=method)


def test_a_disparity_that_becomes_negative_is_unknown_and_sky_stays():
    depth_m = scene()
    y = planted(depth_m, Space.AFFINE_DISPARITY, a=1.0, b=-0.1)  # disparity = y - 0.1
    found = fit(y, depth_m, space=Space.AFFINE_DISPARITY)
    y[0, :4] = 0.1, 0.05, np.nan, np.inf
    metric = apply(affine(y.astype(np.float32), Space.AFFINE_DISPARITY), found)
    assert np.isnan(metric.values[0, 1]) and np.isnan(metric.values[0, 2])
    assert np.isposinf(metric.values[0, 3]) and np.isnan(metric.uncertainty[0, 1:4]).all()
    assert not (metric.values[np.isfinite(metric.values)] <= 0).any()
    assert metric.values.dtype == metric.uncertainty.dtype == np.float32


@pytest.mark.parametrize("space", AFFINE)
def test_uncertainty_agrees_with_sampling_the_teacher_and_the_fit(space):
    """Laplace scale of log depth against 20 000 draws of y, a and b and no first-order formula."""
    rng = np.random.default_rng(4)
    depth_m = np.array([[0.7, 2.0, 4.0]])
    y = planted(depth_m, space, a=2.0, b=0.05)
    own = np.full(y.shape, 0.001)
    anchor_m = scene(2)
    noisy = planted(anchor_m, space, a=2.0, b=0.05) + rng.normal(0, 2e-3, anchor_m.shape)
    few = np.where(rng.random(anchor_m.shape) < 0.008, anchor_m, np.nan)
    found = fit(noisy, few, space=space, method="least-squares")
    got = apply(affine(y, space, own), found).uncertainty
    matrix = np.array([found.covariance[:2], found.covariance[1:]])
    a, b = rng.multivariate_normal([found.a, found.b], matrix, 20_000).T[..., None, None]
    drawn = y + rng.laplace(0, own, (20_000, *y.shape))
    g = a * drawn + b + rng.laplace(0, found.spread, (20_000, 1, 1))
    inverse = {"affine depth": lambda v: v, "affine disparity": lambda v: 1 / v}
    inverse |= {"affine log depth": np.exp, "affine sqrt depth": np.square}
    want = np.log(inverse[space](g)).std(0) / np.sqrt(2)  # a Laplace scale is std / sqrt 2
    np.testing.assert_allclose(got, want, rtol=0.04)
    assert found.covariance[0] > 0 and found.spread > 0


def test_covariance_is_the_scatter_of_repeated_fits():
    rng = np.random.default_rng(6)
    y = rng.uniform(1, 3, (12, 12))
    found = []
    for _ in range(400):
        z = 1.5 * y + 0.2 + rng.normal(0, 0.05, y.shape)
        found.append(fit(y, z, space=Space.AFFINE_DEPTH, method="least-squares"))
    scatter = np.cov(np.array([[f.a, f.b] for f in found]).T)
    stated = np.mean([f.covariance for f in found], axis=0)
    np.testing.assert_allclose(stated, [scatter[0, 0], scatter[0, 1], scatter[1, 1]], rtol=0.2)


def test_a_trusted_anchor_point_weighs_more():
    y = np.linspace(1, 3, 100).reshape(10, 10)
    z, b = 2 * y, np.full(y.shape, 0.01)
    z[:3] *= 1.2
    b[:3] = 1.0  # said to be bad
    weights = weights_of(z, b, space=Space.AFFINE_DEPTH)
    found = fit(y, z, space=Space.AFFINE_DEPTH, weights=weights, method="least-squares")
    assert found.a == pytest.approx(2, rel=1e-3)
    # sigma of z is sqrt(2) b z, its inverse square the weight
    assert weights[5, 5] == pytest.approx(1 / (2 * 0.01**2 * z[5, 5] ** 2))
    # sigma of 1/z is sqrt(2) b / z; of ln z sqrt(2) b; of sqrt z half of sqrt(2) b sqrt z
    for space, sigma in (
        (Space.AFFINE_DISPARITY, np.sqrt(2) * 0.01 / z[5, 5]),
        (Space.AFFINE_LOG_DEPTH, np.sqrt(2) * 0.01),
        (Space.AFFINE_SQRT_DEPTH, np.sqrt(2) * 0.01 * np.sqrt(z[5, 5]) / 2),
    ):
        assert weights_of(z, b, space=space)[5, 5] == pytest.approx(1 / sigma**2)


def test_weights_have_no_unit_and_ten_points_are_enough():
    rng = np.random.default_rng(9)
    y, weights = rng.uniform(1, 3, (8, 8)), rng.uniform(0.5, 2, (8, 8))
    z = 2 * y + rng.normal(0, 0.05, y.shape)
    one, thousand = (fit(y, z, space=Space.AFFINE_DEPTH, weights=k * weights) for k in (1, 1000))
    assert thousand.covariance == pytest.approx(one.covariance, rel=1e-9)
    for n in (9, 10):
        few = np.where(np.arange(64).reshape(8, 8) < n, z, np.nan)
        if n == 9:
            with pytest.raises(AlignmentError, match="has 9 usable points"):
                fit(y, few, space=Space.AFFINE_DEPTH)
        else:
            assert fit(y, few, space=Space.AFFINE_DEPTH).points == 10


def test_spread_is_that_of_the_inliers():
    depth_m = scene(4)
    anchor_m = np.where(np.random.default_rng(4).random(depth_m.shape) < 0.3, 50.0, depth_m)
    found = fit(depth_m / 2, anchor_m, space=Space.AFFINE_DEPTH)
    assert found.a == pytest.approx(2) and found.spread < 1e-9 and found.inliers < 0.8


def test_where_most_of_the_anchor_becomes_no_depth_the_residual_is_infinite():
    """A few trusted points on a steep line: it is below zero at two thirds of the others."""
    y = np.r_[np.linspace(3, 4, 10), np.linspace(0, 2, 20)][None]
    z = np.r_[5 * y[0, :10] - 14, np.linspace(0.1, 0.2, 20)][None]
    weights = np.r_[np.full(10, 1e9), np.full(20, 1e-9)][None]
    found = fit(y, z, space=Space.AFFINE_DEPTH, weights=weights, method="least-squares")
    assert found.a == pytest.approx(5, rel=1e-6) and found.residual == np.inf


def test_an_anchor_hands_its_method_limit_and_doubt_to_the_fit():
    rows, columns = np.mgrid[:10, :10]
    y = 1 + 0.2 * columns + 0.01 * rows
    z, doubt = 2 * y, np.full(y.shape, 0.01)
    z[:3] *= 1.2
    doubt[:3] = 1.0  # said to be bad

    def metric(z, doubt=None, *, y=y, space=Space.AFFINE_DEPTH, **settings):
        scale = Answer(task=Task.DEPTH, space=Space.METRIC, values=z, uncertainty=doubt)
        return Anchor(name="x", teacher=object(), **settings).metric(affine(y, space), scale)

    _, told = metric(z, doubt, method="least-squares")
    assert told["a"] == pytest.approx(2, rel=1e-3) and told["method"] == "least-squares"
    assert metric(z, method="least-squares")[1]["a"] > 2.02  # all points alike
    sign = np.where((rows + columns) % 2, 1, -1)
    for off, limit, kept in ((0.15, 0.2, True), (0.15, 0.1, False), (0.05, 0.1, True)):
        settings = {"method": "least-squares", "max_residual": limit}
        bent = np.exp(y + off * sign)  # median |ln| is off, by construction
        if kept:
            told = metric(bent, space=Space.AFFINE_LOG_DEPTH, **settings)[1]
            assert told["residual"] == pytest.approx(off, rel=0.05)
        else:
            with pytest.raises(AlignmentError, match=r"residual 0\.1.* is above align\.max_resid"):
                metric(bent, space=Space.AFFINE_LOG_DEPTH, **settings)


def test_an_anchor_that_is_wrong_and_sure_of_it_does_not_rule_the_fit():
    """A third of the points ten times too far: unbounded weights in disparity would follow them."""
    depth_m = scene(3)
    y = planted(depth_m, Space.AFFINE_DISPARITY, a=1.5, b=0.02)
    y = y * np.exp(np.random.default_rng(8).normal(0, 0.01, y.shape))
    anchor_m = np.where(np.random.default_rng(7).random(y.shape) < 0.33, 10 * depth_m, depth_m)
    sure = np.full(y.shape, 0.02)
    weights = weights_of(anchor_m, sure, space=Space.AFFINE_DISPARITY)
    found = fit(y, anchor_m, space=Space.AFFINE_DISPARITY, weights=weights)
    metric = apply(affine(y, Space.AFFINE_DISPARITY), found).values
    assert np.abs(metric / depth_m - 1).mean() < 0.03


@pytest.mark.parametrize("space", AFFINE)
def test_a_known_range_puts_both_ends_where_they_are(space):
    depth_m = np.linspace(1, 5, 10_001).reshape(73, 137)
    y = planted(depth_m, space, a=0.3, b=0.4)
    ends = np.quantile(FORWARD[space](depth_m), [0.02, 0.98])
    near, far = sorted({
        "affine depth": lambda v: v, "affine disparity": lambda v: 1 / v,
        "affine log depth": np.exp, "affine sqrt depth": np.square,
    }[space](ends))  # fmt: skip
    found = fit_range(y, near_m=near, far_m=far, space=space)
    assert found.residual is None and (found.a, found.b) == pytest.approx((0.3, 0.4))
    metric = apply(affine(y, space), found)
    np.testing.assert_allclose(metric.values, depth_m, rtol=1e-5)
    assert metric.uncertainty is None
    with pytest.raises(AlignmentError, match="flat"):
        fit_range(np.ones((9, 9)), near_m=1, far_m=2, space=space)
    with pytest.raises(LabelError, match="near_m"):
        fit_range(y, near_m=3, far_m=2, space=space)


def test_misuse_is_explained():
    with pytest.raises(LabelError, match=r"answer \(2, 2\), anchor \(3, 3\)"):
        fit(np.ones((2, 2)), np.ones((3, 3)), space=Space.AFFINE_DEPTH)
    with pytest.raises(LabelError, match="expected one of"):
        fit(np.ones((2, 2)), np.ones((2, 2)), space=Space.METRIC)
