"""Distances between answers, worked by hand in each output's unit."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from export import judge
from export.parity import gap, margin, measures, moved_steps, summarise, worst_gap


def test_depth_is_relative_to_the_student():
    found, expected = np.full((1, 2, 2), 2.002), np.full((1, 2, 2), 2.0)
    np.testing.assert_allclose(gap("depth", found, expected), 1e-3)
    np.testing.assert_allclose(gap("depth", expected, found), 0.002 / 2.002)


@pytest.mark.parametrize("angle_deg", [0.0, 1e-4, 0.5, 90.0, 180.0])
def test_normals_are_angles_even_tiny_ones(angle_deg):
    angle = math.radians(angle_deg)
    a = np.array([math.sin(angle), 0.0, math.cos(angle)]).reshape(1, 3, 1, 1)
    b = np.array([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert gap("normals", a, b)[0, 0, 0] == pytest.approx(angle_deg, rel=1e-9, abs=1e-12)


def test_a_normal_that_lost_its_length_is_seen():
    b = np.array([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert gap("normals", 0.5 * b, b)[0, 0, 0] > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["depth", "sky", "normals_uncertainty"])
def test_one_value_that_is_not_finite_is_infinitely_far(name, bad):
    found = np.ones((1, 10, 10), np.float32)
    found[0, 3, 3] = bad
    row = measures(name, found[0], np.ones((10, 10), np.float32))
    assert row["max"] == math.inf and row["mean"] == math.inf
    assert worst_gap(name, found, np.ones_like(found)) == math.inf


def test_both_not_finite_is_no_agreement():
    nan = np.full((1, 2, 2), np.nan)
    assert np.isinf(gap("depth", nan, nan)).all()


def test_p999_is_the_value_that_one_pixel_in_a_thousand_exceeds():
    found = np.ones((100, 100))
    found.flat[:10] = 3.0  # exactly 0.1 %: still within
    found.flat[10] = 2.0
    row = measures("sky", found, np.ones((100, 100)))
    assert row == {"max": 2.0, "p999": 1.0, "mean": pytest.approx((10 * 2 + 1) / 1e4)}


def test_flips_at_ties_are_counted_apart():
    expected = np.zeros((2, 5), np.int32)
    found = expected.copy()
    found[0, :3] = 1
    ties = np.zeros((2, 5), bool)
    ties[0, 0] = True
    assert measures("semantic", found, expected, ties) == {"mean": 0.2, "tie_flips": 0.1}


def step_at(column: int, *, near: float = 1.0, far: float = 2.0) -> np.ndarray:
    """[40, 50] metres: ``near``, and ``far`` from ``column`` on."""
    return np.where(np.arange(50) < column, near, far) * np.ones((40, 1))


def told(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """`measures` of depth with its moved steps."""
    return measures("depth", found, expected, moved_steps(found, expected))


def test_depth_that_a_moved_step_explains_is_counted_apart():
    expected = step_at(25)
    found = expected.copy()
    found[:4, 24] = 2.0  # 4 of 2000 pixels moved to the far side, 100 % away
    found[4, 25] = 1.5  # and one to the middle, 25 % away
    mean = pytest.approx(4.25 / 2000)
    assert told(found, expected) == {"max": 0.0, "p999": 0.0, "mean": mean, "tie_flips": 5 / 2000}
    assert measures("depth", found, expected)["max"] == 1.0  # not asked for


def test_more_moved_steps_than_rounding_makes_count_in_full():
    expected = step_at(25)
    found = expected.copy()
    found[:6, 24] = 2.0
    assert moved_steps(found, expected).sum() == 6
    found[6, 24] = 2.0  # 3.5 in 1000
    assert told(found, expected)["max"] == 1.0 and told(found, expected)["tie_flips"] == 0.0


@pytest.mark.parametrize(
    ("row", "column", "metres"),
    [
        (0, 26, 1.0),  # two pixels from the near side: no rounding moves a step so far
        (0, 24, 2.01),  # beyond the far side
        (0, 25, 0.99),  # before the near one
        (0, 24, math.nan),
        (0, 24, math.inf),
    ],
)
def test_depth_that_no_moved_step_explains_counts_in_full(row, column, metres):
    expected = step_at(25)
    found = expected.copy()
    found[row, column] = metres
    row = told(found, expected)
    assert row["tie_flips"] == 0.0 and row["max"] >= 0.01


def test_infinity_beside_infinity_is_no_moved_step():
    expected = np.ones((40, 50))
    expected[5, 25] = math.inf
    found = expected.copy()
    found[5, 24] = math.inf
    assert not moved_steps(found, expected).any()


@pytest.mark.parametrize("across", [True, False])
def test_a_step_needs_its_height_and_a_move_its_difference(across):
    def turned(depth: np.ndarray) -> np.ndarray:
        return depth if across else depth.T

    slope = np.geomspace(1, 1.14**49, 50) * np.ones((40, 1))  # 14 % a pixel, 30 % over two
    found = slope.copy()
    found[0, 20] = slope[0, 21]
    assert told(turned(found), turned(slope))["max"] == pytest.approx(0.14)
    found = step_at(25)
    found[0, 24] = 1.009
    row = told(turned(found), turned(step_at(25)))
    assert row["tie_flips"] == 0.0 and row["max"] == pytest.approx(0.009)
    found[0, 24] = 1.011
    row = told(turned(found), turned(step_at(25)))
    assert row["tie_flips"] == 1 / 2000 and row["max"] == 0.0


def test_steps_move_in_half_precision_alone_and_not_in_the_dark(monkeypatch):
    """What truth may not judge and what has no rounding is compared pixel by pixel."""
    found = step_at(25)
    found[0, 24] = 2.0
    answers = {"fp.onnx": {"depth": found}, "student": {"depth": step_at(25)}}
    monkeypatch.setattr(judge, "load", lambda folder, name, key: answers[name])
    asked = SimpleNamespace(keys=["a"], folder=None)
    for precision, least in (("fp32", 1.0), ("int8-trt", 1.0), ("fp16", 0.0), ("bf16", 0.0)):
        summary = judge.Judge.parity(asked, "fp.onnx", "student", ["depth"], precision)["depth"]
        assert (summary["max"], summary["dark"]["max"]) == (least, 1.0), precision


def test_margin_of_known_probabilities():
    probabilities = np.array([0.5, 0.3, 0.2]).reshape(1, 3, 1, 1)
    assert margin(np.log(probabilities) + 5)[0, 0, 0] == pytest.approx(0.2)


def test_summary_names_the_worst_image():
    rows = [
        ("a", {"max": 1.0, "p999": 0.1, "mean": 0.02}),
        ("b", {"max": 0.5, "p999": 0.3, "mean": 0.04}),
    ]
    assert summarise(rows) == {
        "max": 1.0, "p999": 0.3, "mean": 0.03, "worst_image": "b", "worst_mean_image": "b"
    }  # fmt: skip
    rows[0][1]["mean"] = 0.06
    assert summarise(rows)["worst_mean_image"] == "a" != summarise(rows)["worst_image"]
