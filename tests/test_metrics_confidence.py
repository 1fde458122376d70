"""Sparsification, calibration and flicker against hand-worked numbers and independent code."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.errors import UsageError
from teacher.metrics import CalibrationBins, ause, calibration_error, temporal_flicker

NAN = math.nan


def reference_areas(error, uncertainty, root):
    """The published procedure as written: percentiles, subsets, trapezoids, one step at a time."""

    def area(order):
        curve = []
        for step in range(50):
            kept = error[order <= np.percentile(order, 100 - 2 * step, method="lower")]
            curve.append(math.sqrt(kept.mean()) if root else kept.mean())
        curve.append(0)
        return sum((a + b) / 2 / 50 for a, b in itertools.pairwise(curve))

    whole = math.sqrt(error.mean()) if root else error.mean()
    return area(uncertainty) - area(error), whole - area(uncertainty)


def test_sparsification_by_hand():
    # 2 pixels: the larger one leaves after the first step, where the percentile falls below it
    error = np.array([0.0, 1.0])
    best = ause(error, np.array([1.0, 2.0]))
    assert best["ause"] == 0
    assert best["aurg"] == pytest.approx(0.5 - 0.5 * 0.01)  # curve .5, 0, 0 ...
    worst = ause(error, np.array([2.0, 1.0]))
    # curve .5, 1 ... 1 (49 points), 0: area (.75 + 48 + .5) / 50
    assert worst["ause"] == pytest.approx((0.75 + 48 + 0.5) / 50 - 0.005)
    assert worst["aurg"] == pytest.approx(0.5 - (0.75 + 48 + 0.5) / 50)


@pytest.mark.parametrize("root", [False, True])
def test_ause_agrees_with_the_procedure_as_published(root):
    rng = np.random.default_rng(0)
    error = rng.exponential(size=(17, 59))
    uncertainty = error * rng.uniform(0.3, 3, error.shape)
    found = ause(error, uncertainty, root=root)
    expected = reference_areas(error.ravel(), uncertainty.ravel(), root)
    assert (found["ause"], found["aurg"]) == pytest.approx(expected, rel=1e-9)
    assert 0 < found["ause"] and 0 < found["aurg"]


def test_only_the_order_matters_and_ties_stay_together():
    rng = np.random.default_rng(1)
    error = rng.exponential(size=500)
    uncertainty = rng.integers(0, 4, 500).astype(float)  # large groups of ties
    found = ause(error, uncertainty)
    assert found == ause(error, np.exp(3 * uncertainty))
    assert found["ause"] == pytest.approx(reference_areas(error, uncertainty, False)[0])
    flat = ause(error, np.ones(500))  # knows nothing: the curve stays until the 0 at the end
    assert flat["aurg"] == pytest.approx(error.mean() * 0.01)


def test_unjudged_errors_are_left_out_and_unknown_uncertainty_is_the_largest():
    error, uncertainty = np.array([1.0, 2, 3, NAN]), np.array([1.0, 2, NAN, 0])
    assert ause(error, uncertainty)["ause"] == 0
    assert all(math.isnan(v) for v in ause(np.full(3, NAN), np.ones(3)).values())


@pytest.mark.parametrize(
    ("error", "uncertainty", "message"),
    [
        (np.ones(3), np.ones(4), "ause: shapes differ"),
        (-np.ones(3), np.ones(3), "the smallest error is -1, expected 0 or more"),
    ],
)
def test_ause_refuses(error, uncertainty, message):
    with pytest.raises(UsageError, match=message):
        ause(error, uncertainty)


def test_calibration_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55, NAN])
    correct = np.array([True, True, True, False, True, False, True])
    found = calibration_error(confidence, correct, bins=10)
    assert found["ece"] == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)
    assert found["mce"] == pytest.approx(0.2)
    assert found["rmsce"] == pytest.approx(math.sqrt((4 * 0.2**2 + 2 * 0.05**2) / 6))
    assert found["count"] == 6
    assert [row["count"] for row in found["bins"]] == [2, 4]


@pytest.mark.parametrize(("norm", "name"), [("l1", "ece"), ("max", "mce"), ("l2", "rmsce")])
def test_calibration_agrees_with_torchmetrics(norm, name):
    rng = np.random.default_rng(2)
    confidence = rng.random(4000).astype(np.float32)
    correct = rng.random(4000) < confidence**2
    # binary task of torchmetrics: confidence of class 1 against "is class 1"
    judge = torchmetrics.functional.classification.binary_calibration_error(
        torch.from_numpy(confidence), torch.from_numpy(correct.astype(int)), n_bins=15, norm=norm
    )
    assert calibration_error(confidence, correct)[name] == pytest.approx(float(judge), abs=1e-5)


def test_the_set_is_pooled():
    rng = np.random.default_rng(3)
    tally, confidence = CalibrationBins(), rng.random((3, 50))
    correct = rng.random((3, 50)) < 0.5
    for c, r in zip(confidence, correct, strict=True):
        tally.add(c, r)
    whole = calibration_error(confidence, correct)
    assert tally.result()["ece"] == pytest.approx(whole["ece"])
    each = [calibration_error(c, r)["ece"] for c, r in zip(confidence, correct, strict=True)]
    assert np.mean(each) > whole["ece"]


def test_calibration_with_nothing_is_nan():
    found = calibration_error(np.full((2, 2), NAN), np.ones((2, 2), bool))
    assert math.isnan(found["ece"]) and found["count"] == 0


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        (np.array([1.2]), np.array([True]), r"confidence spans 1.2..1.2, expected 0..1"),
        (np.array([0.2]), np.array([1]), "correct is int64, expected bool"),
        (np.ones(2), np.ones(3, bool), "calibration: shapes differ"),
    ],
)
def test_calibration_refuses(confidence, correct, message):
    with pytest.raises(UsageError, match=message):
        calibration_error(confidence, correct)


def test_flicker_by_hand():
    first = np.random.default_rng(0).uniform(1, 5, (6, 7))
    clip = np.stack([first, first * 1.1, first * 1.1 * 0.9, first * 1.1 * 0.9])
    found = temporal_flicker(clip)
    assert found["flicker"] == pytest.approx(np.std([1.1, 0.9, 1.0]))
    assert found["pixel_flicker"] == pytest.approx(0, abs=1e-12)
    assert found["pairs"] == 3


def test_pixel_flicker_sees_what_the_median_cannot():
    clip = np.ones((4, 4, 4))
    clip[1::2, ::2] = 1.2  # half of the rows breathe
    clip[1::2, 1::2] = 1 / 1.2
    found = temporal_flicker(clip)
    assert found["pixel_flicker"] == pytest.approx(math.log(1.2))


def test_flicker_ignores_unknown_and_sky_and_takes_warped_frames():
    clip = np.full((3, 2, 2), 2.0)
    clip[1, 0, 0], clip[2, 0, 1] = NAN, math.inf
    assert temporal_flicker(clip)["flicker"] == 0
    clip[2, :, 0] = math.inf  # three of four pixels
    assert temporal_flicker(clip)["flicker"] == 0
    moving = np.stack([np.roll(np.arange(1.0, 9).reshape(1, 8), t, 1) for t in range(3)])
    warped = np.roll(moving[:-1], 1, axis=2)
    warped[..., 0] = NAN
    assert temporal_flicker(moving, warped=warped)["pixel_flicker"] == 0
    assert temporal_flicker(moving)["pixel_flicker"] > 0.05


def test_flicker_without_pairs_is_nan():
    one = temporal_flicker(np.ones((1, 2, 2)))
    assert math.isnan(one["flicker"]) and one["pairs"] == 0
    blind = temporal_flicker(np.full((4, 2, 2), NAN))
    assert math.isnan(blind["flicker"]) and math.isnan(blind["pixel_flicker"])


def test_flicker_refuses_other_shapes():
    with pytest.raises(UsageError, match=r"expected \[T, H, W\]"):
        temporal_flicker(np.ones((2, 2)))
    with pytest.raises(UsageError, match="shapes differ"):
        temporal_flicker(np.ones((3, 2, 2)), warped=np.ones((3, 2, 2)))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300))
def test_the_oracle_is_never_beaten_by_much(seed, count):
    rng = np.random.default_rng(seed)
    error, uncertainty = rng.exponential(size=(2, count))
    assert ause(error, uncertainty)["ause"] >= -1e-12
    assert ause(error, error)["ause"] == 0
