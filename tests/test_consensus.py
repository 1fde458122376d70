"""Consensus: centres are members' values, spreads by hand, the mirror undone with x negated."""

import numpy as np
import pytest

from teacher import consensus
from teacher.consensus import Variant
from teacher.errors import UsageError
from teacher.generators import Query
from teacher.label import Answer, Camera, Space, Task

NAN, INF = np.nan, np.inf


def depth_answer(values):
    return Answer(task=Task.DEPTH, space=Space.METRIC, values=np.asarray(values, np.float32))


def test_the_lower_median_is_a_member_and_never_between_two_readings():
    stack = np.array([[[2.0]], [[10.0]], [[2.1]], [[9.0]]], np.float32)
    assert consensus.lower_median(stack).item() == np.float32(2.1)
    assert consensus.lower_median(np.float32([[[2.0]], [[NAN]], [[NAN]]])).item() != 2.0  # NaN wins
    assert np.isnan(consensus.lower_median(np.float32([[[2.0]], [[NAN]], [[NAN]]])).item())
    assert np.isinf(consensus.lower_median(np.float32([[[2.0]], [[INF]], [[INF]]])).item())


def test_two_readings_of_a_region_come_from_one_member():
    """Three members near 2 m, two near 8 m: every value is one member's, region by region."""
    rng = np.random.default_rng(0)
    base = np.array([2, 2, 2, 8, 8], float)[:, None, None]
    stack = (base * np.exp(rng.normal(0, 0.02, (5, 12, 12)))).astype(np.float32)
    merged = consensus.merge_depth(stack)
    source = (merged.values[None] == stack).argmax(0)
    assert (merged.values[None] == stack).any(0).all()
    assert set(np.unique(source)) <= {0, 1, 2}
    runs = (source[:, 1:] == source[:, :-1]).mean()
    assert runs > 0.6, "the chosen member changes from pixel to pixel"


def test_raw_spread_sees_scale_and_aligned_spread_does_not():
    truth = np.linspace(1, 5, 64).reshape(8, 8)
    factors = np.array([0.9, 1.0, 1.1])
    merged = consensus.merge_depth((truth * factors[:, None, None]).astype(np.float32))
    expected = np.abs(np.log(factors)).mean()  # the centre is the member with factor 1
    assert merged.raw == pytest.approx(expected, rel=1e-4)
    assert np.abs(merged.aligned).max() < 1e-6
    assert merged.scales == pytest.approx(np.log(factors), abs=1e-6)


def test_normals_take_the_medoid_and_the_spread_is_the_mean_angle():
    def tilt(deg):
        return [np.sin(np.radians(deg)), 0, np.cos(np.radians(deg))]

    stack = np.array([[[tilt(0)]], [[tilt(10)]], [[tilt(80)]]], np.float32)
    values, spread = consensus.merge_normals(stack)
    assert values[0, 0] == pytest.approx(tilt(10), abs=1e-6)
    assert spread.item() == pytest.approx((10 + 0 + 70) / 3, abs=1e-3)


def test_classes_vote_and_unknown_never_wins_against_a_class():
    stack = np.array([[[255]], [[255]], [[255]], [[3]], [[3]], [[4]]], np.uint8)
    values, spread = consensus.merge_classes(stack)
    assert values.item() == 3
    assert spread.item() == pytest.approx(1 - 2 / 6)


def test_instances_are_matched_before_voting():
    """The same two objects under other ids, one phantom in one member: two come out."""
    a = np.zeros((8, 12), np.uint16)
    a[1:5, 1:5], a[2:7, 7:11] = 1, 2
    b = np.where(a == 1, 2, np.where(a == 2, 1, 0)).astype(np.uint16)
    c = a.copy()
    c[7, 0:3] = 3
    rows = [{"id": 1, "class": "ball"}, {"id": 2, "class": "ball"}, {"id": 3, "class": "ball"}]
    values, table = consensus.merge_instances(np.stack([c, a, b]), [rows, rows[:2], rows[:2]])
    assert len(table) == 2
    for mask in (a == 1, a == 2):
        assert len(np.unique(values[mask])) == 1
    assert (values[a == 0] == 0).all()
    assert {row["score"] for row in table} == {1.0}


def test_instances_of_another_class_do_not_match():
    a = np.zeros((6, 6), np.uint16)
    a[1:4, 1:4] = 1
    _, table = consensus.merge_instances(
        np.stack([a, a, a]), [[{"id": 1, "class": n}] for n in ("ball", "box", "bin")]
    )
    assert table == []


def test_the_mirror_is_undone_exactly():
    rng = np.random.default_rng(0)
    camera = Camera(fx=9, fy=9, cx=3, cy=2, width=8, height=5)
    query = Query(key="k", image=rng.integers(0, 255, (5, 8, 3)).astype(np.uint8), camera=camera)
    variant = Variant(mirror=True)
    asked = variant.apply(query)
    assert (asked.image == query.image[:, ::-1]).all()
    assert asked.camera.cx == 8 - 1 - 3
    normals = rng.normal(size=(5, 8, 3)).astype(np.float32)
    seen = normals[:, ::-1] * np.float32([-1, 1, 1])
    answer = Answer(task=Task.NORMALS, space=Space.UNIT_NORMALS, values=seen)
    assert (variant.undo(answer, height=5, width=8).values == normals).all()


def test_a_window_leaves_the_rest_unknown():
    camera = Camera(fx=9, fy=9, cx=4.5, cy=4.5, width=10, height=10)
    query = Query(key="k", image=np.zeros((10, 10, 3), np.uint8), camera=camera)
    variant = Variant(window=(0.2, 0.0, 1.0, 0.8))
    asked = variant.apply(query)
    assert asked.image.shape == (8, 8, 3)
    assert (asked.camera.cx, asked.camera.cy) == (2.5, 4.5)
    whole = variant.undo(depth_answer(np.ones((8, 8))), height=10, width=10)
    assert np.isnan(whole.values[:, :2]).all() and np.isnan(whole.values[8:]).all()
    assert (whole.values[:8, 2:] == 1).all()


def test_windows_doubt_and_do_not_decide():
    """One whole answer against three windows that agree on another: it stands, in doubt."""
    assert [v.whole for v in consensus.variants(seeds=1, crops=3)] == [True, False, False, False]
    depth = np.full((8, 8), 2.0, np.float32)
    other = np.where(np.arange(8) < 4, 3.0, 2.0).astype(np.float32) * np.ones((8, 1), np.float32)
    other[:, 7] = np.nan  # not seen
    merged = consensus.merge([depth_answer(depth), *[depth_answer(other)] * 3], voters=1)
    assert (merged.values == 2).all() and merged.extras["members"] == 4
    assert merged.uncertainty[0, 7] == 0 and merged.uncertainty[0, 6] != merged.uncertainty[0, 1]
    stack = np.array([[[1, 1]], [[2, 255]], [[2, 255]]], np.uint8)
    classes, spread = consensus.merge_classes(stack, voters=1)
    assert classes.tolist() == [[1, 1]] and spread == pytest.approx(np.array([[2 / 3, 0]]))
    up, right = np.array([0, 1, 0.0]), np.array([1, 0, 0.0])
    normals, angle = consensus.merge_normals(np.array([[[up]], [[right]], [[right]]]), voters=1)
    assert (normals == up).all() and angle.item() == pytest.approx(60)


def test_variants_are_counted_and_bad_ones_refused():
    assert len(consensus.variants(seeds=3, mirror=True, crops=2)) == 8
    assert len({v.seed for v in consensus.variants(seeds=2, crops=2)}) == 4
    with pytest.raises(UsageError, match="seeds=0 must be >= 1"):
        consensus.variants(seeds=0)


def test_merge_fills_uncertainty_and_refuses_a_mixture():
    one = depth_answer(np.full((4, 4), 2.0))
    assert consensus.merge([one]) is one
    merged = consensus.merge([one, depth_answer(np.full((4, 4), 3.0)), one])
    assert merged.extras["members"] == 3
    assert merged.extras["raw_spread"] == pytest.approx(np.log(1.5) / 3, abs=1e-5)
    assert merged.uncertainty is not None and np.abs(merged.uncertainty).max() < 1e-6
    with pytest.raises(UsageError, match="cannot be merged"):
        consensus.merge([one, depth_answer(np.ones((3, 3)))])
    with pytest.raises(UsageError, match="no answer"):
        consensus.merge([])
