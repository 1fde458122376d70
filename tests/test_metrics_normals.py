"""Angular errors against hand-placed angles, per image and pooled."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.errors import UsageError
from teacher.metrics import PooledNormals, angles_deg, normal_metrics

FRONT = (0.0, 0.0, 1.0)


def tilted(*angles: float) -> np.ndarray:
    """One row of normals turned about y by these degrees from facing the camera."""
    a = np.radians(np.float64(angles))
    return np.stack([np.sin(a), np.zeros_like(a), np.cos(a)], -1)[None].astype(np.float32)


def facing(count: int) -> np.ndarray:
    return np.tile(np.float32(FRONT), (1, count, 1))


def test_angles_worked_by_hand():
    pred = tilted(0, 4, 6, 12, 25, 100)
    numbers = normal_metrics(pred, facing(6))
    assert numbers["mean_deg"] == pytest.approx(147 / 6, abs=1e-4)
    assert numbers["median_deg"] == pytest.approx(9, abs=1e-4)
    shares = [numbers[f"within_{b}"] for b in ("5", "11_25", "22_5", "30")]
    assert shares == pytest.approx([2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert (numbers["count"], numbers["coverage"]) == (6, 1)


def test_a_wrong_sign_of_x_is_seen():
    truth = tilted(-20, 20, 40)
    flipped = truth * np.float32([-1, 1, 1])
    assert normal_metrics(truth, truth)["mean_deg"] == pytest.approx(0, abs=0.05)
    assert normal_metrics(flipped, truth)["mean_deg"] == pytest.approx((40 + 40 + 80) / 3, abs=1e-3)


def test_length_does_not_matter():
    angle, missing = angles_deg(tilted(30, 60) * 7, facing(2) * 0.2)
    np.testing.assert_allclose(angle, [[30, 60]], atol=1e-4)
    assert missing == 0


def test_unknown_truth_is_not_judged_and_a_missing_prediction_is_90():
    truth, pred = facing(6), tilted(10, 10, 10, 10, 10, 10)
    truth[0, 0], truth[0, 1, 2] = np.nan, np.nan  # wholly and partly unknown
    truth[0, 2] = 0
    pred[0, 2], pred[0, 3], pred[0, 4] = np.nan, np.nan, 0
    angle, missing = angles_deg(pred, truth)
    np.testing.assert_allclose(angle, [[np.nan] * 3 + [90, 90, 10]], atol=1e-4)
    numbers = normal_metrics(pred, truth)
    assert missing == 2 and numbers["count"] == 3
    assert numbers["coverage"] == pytest.approx(1 / 3)
    assert numbers["within_30"] == pytest.approx(1 / 3)
    pool = PooledNormals()
    pool.add(pred, truth)
    assert pool.result()["coverage"] == pytest.approx(1 / 3)


def test_nothing_to_judge_is_nan():
    numbers = normal_metrics(facing(3), facing(3) * np.nan)
    assert numbers.pop("count") == 0
    assert all(math.isnan(v) for v in numbers.values())
    empty = PooledNormals().result()
    assert empty.pop("count") == 0
    assert all(math.isnan(v) for v in empty.values())


def test_opposite_and_equal_normals_survive_rounding():
    rng = np.random.default_rng(0)
    n = rng.normal(size=(20, 30, 3)).astype(np.float32)
    n /= np.linalg.norm(n, axis=-1, keepdims=True)
    assert normal_metrics(n, n)["mean_deg"] < 1e-3
    assert normal_metrics(-n, n)["mean_deg"] == pytest.approx(180, abs=1e-3)
    pool = PooledNormals()
    pool.add(-n, n)
    assert pool.result()["pooled_median_deg"] == pytest.approx(180, abs=0.011)


def test_pooled_is_another_number_than_the_mean_of_images():
    pool, images = PooledNormals(), [(tilted(*[2] * 9), facing(9)), (tilted(40), facing(1))]
    for pred, truth in images:
        pool.add(pred, truth)
    pooled = pool.result()
    assert pooled["pooled_mean_deg"] == pytest.approx(5.8, abs=1e-3)
    assert pooled["pooled_median_deg"] == pytest.approx(2, abs=0.01)
    assert pooled["pooled_within_5"] == 0.9
    assert np.mean([normal_metrics(p, g)["mean_deg"] for p, g in images]) == pytest.approx(21)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 1000))
def test_pooled_equals_one_long_image(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [tilted(*rng.uniform(0, 170, n)) for n in sizes]
    pool = PooledNormals()
    for part in parts:
        pool.add(part, facing(part.shape[1]))
    pooled, whole = pool.result(), np.concatenate(parts, axis=1)
    numbers = normal_metrics(whole, facing(whole.shape[1]))
    assert pooled["pooled_median_deg"] == pytest.approx(numbers["median_deg"], abs=0.0101)
    for name in ("mean_deg", "within_5", "within_11_25", "within_22_5", "within_30"):
        assert pooled[f"pooled_{name}"] == pytest.approx(numbers[name], rel=1e-9)


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        (np.ones((3, 2, 2)), r"pred has shape \(3, 2, 2\), expected \[H, W, 3\]"),
        (np.ones((2, 2, 3), np.uint8), "pred is uint8, expected a floating"),
        (np.ones((4, 4, 3)), "bring the prediction to the truth's resolution"),
    ],
)
def test_errors_say_what_was_found(pred, message):
    with pytest.raises(UsageError, match=message):
        normal_metrics(pred, np.ones((2, 2, 3)))
