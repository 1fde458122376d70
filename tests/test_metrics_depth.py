"""Depth errors, alignment and boundaries against hand-worked numbers and the references' rules."""

import math

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.errors import UsageError
from teacher.metrics import align_depth, boundary_f1, depth_error_maps, depth_metrics

NAN, SKY = np.nan, np.inf
BOUNDS = {"min_m": 0.3, "max_m": 40.0}


def grid(*rows) -> np.ndarray:
    return np.array(rows, np.float32)


def scene(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """Boxes before a wall, 1 to 30 m, edges in all four directions."""
    rng = np.random.default_rng(seed)
    depth_m = np.full((height, width), 30.0, np.float32)
    for _ in range(40):
        y, x = rng.integers(0, height - 8), rng.integers(0, width - 8)
        h, w = rng.integers(2, 9, 2)
        depth_m[y : y + h, x : x + w] = rng.uniform(1, 25)
    return depth_m


def test_four_pixels_worked_by_hand():
    # truth 1 2 4 8; prediction 1.1 2 5 4: errors .1 0 1 -4, ratios 1.1 1 1.25 2
    numbers = depth_metrics(grid([1.1, 2, 5, 4]), grid([1, 2, 4, 8]), min_m=0.5, max_m=10)
    assert numbers["abs_rel"] == pytest.approx((0.1 + 0 + 0.25 + 0.5) / 4, rel=1e-6)
    assert numbers["sq_rel"] == pytest.approx((0.01 + 0 + 0.25 + 2) / 4, rel=1e-6)
    assert numbers["rmse"] == pytest.approx(math.sqrt((0.01 + 1 + 16) / 4), rel=1e-6)
    logs = [math.log(1.1), 0, math.log(1.25), -math.log(2)]
    square, mean = sum(v * v for v in logs) / 4, sum(logs) / 4
    assert numbers["rmse_log"] == pytest.approx(math.sqrt(square), rel=1e-6)
    assert numbers["silog"] == pytest.approx(100 * math.sqrt(square - mean**2), rel=1e-6)
    log10 = (math.log10(1.1) + math.log10(1.25) + math.log10(2)) / 4
    assert numbers["log10"] == pytest.approx(log10, rel=1e-6)
    assert numbers["delta1"] == 0.5  # 1.25 itself is outside
    assert (numbers["delta2"], numbers["delta3"]) == (0.75, 0.75)
    assert (numbers["count"], numbers["coverage"]) == (4, 1.0)


def test_rmse_is_torchmetrics_rmse_and_silog_is_blind_to_scale():
    truth = scene(0)
    pred = truth * np.random.default_rng(1).uniform(0.8, 1.2, truth.shape).astype(np.float32)
    numbers = depth_metrics(pred, truth, **BOUNDS)
    rmse = torchmetrics.functional.mean_squared_error(
        torch.from_numpy(np.minimum(pred, 40)), torch.from_numpy(truth), squared=False
    )
    assert numbers["rmse"] == pytest.approx(float(rmse), rel=1e-5)
    assert depth_metrics(truth * 1.2, truth, **BOUNDS)["silog"] == pytest.approx(0, abs=1e-4)


def test_bounds_drop_truth_and_clip_the_prediction():
    truth = grid([0.3, 1, 39, 40, 500])
    pred = grid([9, 0.1, 100, 9, 9])
    numbers = depth_metrics(pred, truth, **BOUNDS)
    assert numbers["count"] == 2  # the bounds themselves are outside
    assert numbers["abs_rel"] == pytest.approx((0.7 + 1 / 39) / 2, rel=1e-6)


def test_missing_predictions_are_misses_and_are_reported():
    truth = grid([0.35, 1, 2, 4])
    numbers = depth_metrics(grid([NAN, 1, 2, NAN]), truth, **BOUNDS)
    assert numbers["coverage"] == 0.5
    # 0.3 for 0.35 would be within 1.25, yet nothing was predicted there
    assert (numbers["delta1"], numbers["delta3"]) == (0.5, 0.5)
    assert numbers["abs_rel"] == pytest.approx((0.05 / 0.35 + 3.7 / 4) / 4, rel=1e-5)
    nothing = depth_metrics(np.full((1, 4), NAN, np.float32), truth, **BOUNDS)
    assert (nothing["coverage"], nothing["delta3"]) == (0, 0)


def test_sky_in_truth_is_not_judged_and_in_the_prediction_is_far():
    numbers = depth_metrics(grid([5, 1, SKY, SKY]), grid([SKY, 1, 20, SKY]), **BOUNDS)
    assert (numbers["count"], numbers["coverage"]) == (2, 1)
    assert numbers["abs_rel"] == pytest.approx(0.5)  # 40 m for 20 m, and 1 for 1


@pytest.mark.parametrize("align", [None, "scale", "depth", "disparity"])
def test_nothing_to_judge_is_nan_not_zero(align):
    numbers = depth_metrics(grid([1, 2]), grid([NAN, SKY]), **BOUNDS, align=align)
    assert numbers["count"] == 0
    assert all(math.isnan(v) for name, v in numbers.items() if name != "count")


@pytest.mark.parametrize(
    ("align", "distort"),
    [
        ("scale", lambda d: 0.37 * d),
        ("depth", lambda d: 0.2 * d - 3),
        ("depth", lambda d: -0.2 * d + 1),
        ("disparity", lambda d: 7 / d + 0.5),
    ],
)
def test_alignment_undoes_what_it_names(align, distort):
    truth = scene(2)
    truth[0], truth[1] = NAN, SKY
    with np.errstate(invalid="ignore"):
        pred = distort(truth).astype(np.float32)
    pred[2] = NAN
    pred[3] = SKY
    aligned = align_depth(pred, truth, **BOUNDS, align=align)
    np.testing.assert_allclose(aligned[4:], truth[4:], rtol=1e-4)
    assert np.isnan(aligned[2]).all() and np.isposinf(aligned[3]).all()
    assert depth_metrics(pred, truth, **BOUNDS, align=align)["coverage"] < 1


def test_alignment_is_least_squares():
    rng = np.random.default_rng(3)
    truth = rng.uniform(1, 30, (20, 30)).astype(np.float32)
    pred = (0.1 * truth + rng.normal(0, 0.3, truth.shape)).astype(np.float32)
    design = np.stack([pred.ravel(), np.ones(pred.size)], 1).astype(np.float64)
    for align, target in (("depth", truth), ("disparity", 1 / truth)):
        keep = pred.ravel() > (0 if align == "disparity" else -np.inf)
        solution, *_ = np.linalg.lstsq(design[keep], target.ravel()[keep], rcond=None)
        expected = (design @ solution).reshape(truth.shape)
        if align == "disparity":
            expected = 1 / np.maximum(expected, 1e-3)
        aligned = align_depth(pred, truth, **BOUNDS, align=align)
        np.testing.assert_allclose(aligned, expected, rtol=1e-6)


def test_scale_is_the_ratio_of_medians_on_judged_pixels():
    truth, pred = grid([2, 4, 6, 100]), grid([1, 1, 3, 900])
    np.testing.assert_allclose(
        align_depth(pred, truth, **BOUNDS, align="scale"), pred * 4.0, rtol=1e-7
    )


def test_a_constant_prediction_aligns_to_the_mean():
    truth = grid([2, 4, 6])
    aligned = align_depth(np.full_like(truth, 0.1), truth, **BOUNDS, align="depth")
    np.testing.assert_allclose(aligned, 4, rtol=1e-7)
    with_sky = align_depth(grid([1, 1, SKY]), truth, **BOUNDS, align="depth")  # 0 times inf
    np.testing.assert_allclose(with_sky, [[3, 3, SKY]])


def test_where_no_scale_exists_everything_is_missing():
    numbers = depth_metrics(grid([-1, -2]), grid([1, 2]), **BOUNDS, align="scale")
    assert (numbers["coverage"], numbers["delta3"]) == (0, 0)


def test_error_maps_are_the_metrics_before_the_mean():
    truth, pred = scene(4), scene(5)
    truth[:3], truth[3], pred[5:9], pred[9] = NAN, SKY, NAN, SKY
    truth[5] = 0.35  # filled with 0.3 it would be right
    abs_rel, ratio = depth_error_maps(pred, truth, **BOUNDS)
    numbers = depth_metrics(pred, truth, **BOUNDS)
    assert np.nanmean(abs_rel) == pytest.approx(numbers["abs_rel"])
    judged = ~np.isnan(ratio)
    assert (ratio[judged] < 1.25).mean() == pytest.approx(numbers["delta1"])
    assert judged.sum() == numbers["count"] == np.isfinite(truth).sum()


@pytest.mark.parametrize(
    ("pred", "truth", "options", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), {}, r"pred is \(2, 3\) but truth is \(3, 2\)"),
        (np.ones((1, 2, 3)), np.ones((1, 2, 3)), {}, "one image at a time"),
        (np.ones((2, 3), np.uint16), np.ones((2, 3)), {}, "pred is uint16, expected a floating"),
        (np.ones((2, 3)), np.ones((2, 3), int), {}, "truth is int64, expected a floating"),
        (np.ones((2, 3)), np.ones((2, 3)), {"min_m": 0.0}, "expected 0 < min_m < max_m < inf"),
        (np.ones((2, 3)), np.ones((2, 3)), {"max_m": math.inf}, "pass a large max_m"),
        (np.ones((2, 3)), np.ones((2, 3)), {"align": "shift"}, "align is 'shift', expected one of"),
    ],
)
def test_errors_say_what_was_found_and_expected(pred, truth, options, message):
    with pytest.raises(UsageError, match=message):
        depth_metrics(pred, truth, **{**BOUNDS, **options})


# ---- boundaries --------------------------------------------------------------------------------


def reference_boundary_f1(pred: np.ndarray, truth: np.ndarray) -> float:
    """Depth Pro's score as its paper defines it, on boolean maps, one threshold at a time."""
    inverse = [1 / np.maximum(d.astype(np.float64), 1e-6) for d in (pred, truth)]
    total, weights = 0.0, 0.0
    for t in np.linspace(1.05, 1.25, 10):
        recall = precision = 0.0
        for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
            edges = []
            for d in inverse:
                d = np.moveaxis(d, axis, 0)[::sign]
                edges.append(d[1:] / d[:-1] > t)
            both = np.count_nonzero(edges[0] & edges[1])
            precision += both / max(np.count_nonzero(edges[0]), 1) / 4
            recall += both / max(np.count_nonzero(edges[1]), 1) / 4
        if precision + recall > 0:
            total += t * 2 * precision * recall / (precision + recall)
        weights += t
    return total / weights


@pytest.mark.parametrize("seed", range(4))
def test_boundary_f1_is_depth_pro_on_dense_scenes(seed):
    rng = np.random.default_rng(seed)
    truth = scene(seed)
    pred = truth * rng.uniform(0.9, 1.1, truth.shape).astype(np.float32)
    pred[:, 3:] = np.where(rng.random(truth.shape) < 0.7, pred, np.roll(pred, 1, 1))[:, 3:]
    expected = reference_boundary_f1(pred, truth)
    assert 0.2 < expected < 0.95
    assert boundary_f1(pred, truth) == pytest.approx(expected, abs=1e-9)


def test_boundary_f1_of_random_maps_is_depth_pro():
    rng = np.random.default_rng(9)
    truth, pred = rng.uniform(1, 3, (2, 30, 30)).astype(np.float32)
    expected = reference_boundary_f1(pred, truth)
    assert boundary_f1(pred, truth) == pytest.approx(expected, abs=1e-9)


def test_boundary_f1_by_hand():
    # Truth: one step of 2x, two rows high. The prediction sees one row of it and makes up a step of
    # 1.1x in the same direction, an edge for the three t below 1.1.
    truth = grid([1, 1, 2, 2], [1, 1, 2, 2])
    pred = grid([1, 1, 2, 2], [1, 1, 1, 1.1])
    steps = np.linspace(1.05, 1.25, 10)
    # That direction: R = 1/2, P = 1/2 for low t, else 1. From row 1 up to row 0 it makes up steps
    # of 2x and 1.8x where nothing is true: P = 0 there at every t, so the mean P is halved.
    low, high = [2 * p * 0.5 / (p + 0.5) for p in (0.25, 0.5)]
    expected = np.average(np.where(steps < 1.1, low, high), weights=steps)
    assert boundary_f1(pred, truth) == pytest.approx(expected)


def test_boundary_f1_of_itself_is_one_whatever_the_scale():
    truth = grid([1, 1, 1.08, 1.08], [1, 1, 1.08, 1.08])  # one direction, two thresholds only
    assert boundary_f1(truth, truth) == pytest.approx(1)
    assert boundary_f1(scene(1) * 0.01, scene(1)) == pytest.approx(1)
    assert reference_boundary_f1(truth, truth) < 0.1  # what the reference says of a perfect answer


def test_one_pixel_of_shift_costs_most_of_a_disc():
    y, x = np.mgrid[-32:32, -32:32]
    disc = np.where(x * x + y * y < 400, 2.0, 5.0)
    assert boundary_f1(np.roll(disc, 1, 1), disc) < 0.6
    assert boundary_f1(np.full_like(disc, 3), disc) == 0


def test_no_edge_at_unknown_truth_and_a_missing_prediction_only_misses():
    truth = scene(6)
    pred = truth.copy()
    truth[10:20, 10:30] = NAN
    pred[12:18, 12:28] *= 3  # strange inside the hole only
    assert boundary_f1(pred, truth) == pytest.approx(1)
    pred, truth = scene(6), scene(6)
    pred[:, 28:] = NAN
    assert 0.2 < boundary_f1(pred, truth) < 0.9
    left = boundary_f1(pred[:, :28], truth[:, :28])
    assert left == pytest.approx(1)  # precision was never touched


def test_sky_outline_is_an_edge_and_sky_beside_sky_is_none():
    truth = np.full((8, 8), SKY, np.float32)
    truth[4:] = 10
    assert boundary_f1(truth, truth) == pytest.approx(1)
    assert boundary_f1(np.full_like(truth, 10), truth) == 0
    far = np.where(np.isinf(truth), np.float32(40), truth)
    assert boundary_f1(far, truth) == pytest.approx(1)
    assert math.isnan(boundary_f1(far, np.full_like(truth, SKY)))


@pytest.mark.parametrize("fill", [5.0, NAN])
def test_without_a_true_edge_there_is_no_score(fill):
    assert math.isnan(boundary_f1(scene(0), np.full((40, 56), fill, np.float32)))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.5))
def test_numbers_stay_in_range_whatever_is_missing(seed, holes):
    rng = np.random.default_rng(seed)
    pred, truth = rng.choice(np.float32([0, -1, 0.5, 2, 2.5, 60, SKY, NAN]), (2, 5, 7))
    truth[rng.random(truth.shape) < holes] = NAN
    numbers = depth_metrics(pred, truth, **BOUNDS)
    if numbers["count"]:
        assert all(math.isfinite(v) and v >= 0 for v in numbers.values())
        assert numbers["delta1"] <= numbers["delta2"] <= numbers["delta3"] <= numbers["coverage"]
    edge = boundary_f1(pred, truth)
    assert math.isnan(edge) or 0 <= edge <= 1 + 1e-12
