"""Consensus: readings are never blended, spreads by hand, the mirror undone with x negated."""

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


def lower_median(*values, votes=None):
    stack = np.float32(values)[:, None, None]
    votes = np.ones(len(stack)) if votes is None else np.array(votes)
    return consensus.lower_median(stack, votes[:, None, None]).item()


def test_the_lower_median_is_a_member_and_never_between_two_readings():
    assert lower_median(2.0, 10.0, 2.1, 9.0) == np.float32(2.1)
    assert lower_median(2.0, INF, INF) == INF
    assert lower_median(3.0, NAN, 2.0) == 2.0
    assert np.isnan(lower_median(NAN, NAN))
    assert lower_median(2.0, 3.0, 3.0, 3.0, votes=[1, 0.5, 0.5, 0.5]) == 3.0
    assert lower_median(2.0, 3.0, 3.0, votes=[1, 0.5, 0.5]) == 2.0


def test_members_of_one_reading_are_averaged_and_those_of_another_are_not():
    """Three members near 2 m, two near 8 m, each with its own noise."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, (5, 12, 12))
    base = np.log([2, 2, 2, 8, 8])[:, None, None]
    merged = consensus.merge_depth(np.exp(base + noise).astype(np.float32))
    assert np.log(merged.values) == pytest.approx(np.log(2) + noise[:3].mean(0), abs=5e-3)
    flat = consensus.merge_depth(np.float32([0.50, 0.52, 0.9])[:, None, None], positive=False)
    weight = (1 - 0.2**2) ** 2  # of 0.50, whose gap to the centre is a fifth of the reach
    assert flat.values.item() == pytest.approx((0.52 + weight * 0.50) / (1 + weight))
    sky = consensus.merge_depth(np.float32([2, INF, INF])[:, None, None])
    assert sky.values.item() == INF


def test_what_most_answers_to_the_whole_image_do_not_know_is_unknown():
    stack = np.float32([[2, 2, 2], [NAN, 2, NAN], [NAN, NAN, 2], [2, 2, 2]])[:, None]
    values = consensus.merge_depth(stack, whole=3).values
    assert np.isnan(values[0, 0]) and (values[0, 1:] == 2).all()
    normals = np.where(np.isnan(stack)[..., None], np.nan, np.float32([0, 0, 1]))
    found, spread = consensus.merge_normals(normals, whole=3)
    assert np.isnan(found[0, 0]).all() and np.isnan(spread[0, 0])
    assert (found[0, 1:] == [0, 0, 1]).all() and (spread[0, 1:] == 0).all()


def test_a_pixel_is_merged_by_itself_and_the_residual_is_the_lower_median():
    """Also across the strips in which normals are merged; an unknown residual ranks last."""
    rng = np.random.default_rng(1)
    stack = rng.normal([0, 0, 1], 0.2, (5, 70, 6, 3)).astype(np.float32)
    stack /= np.linalg.norm(stack, axis=-1, keepdims=True)
    stack[rng.random(stack.shape[:3]) < 0.3] = NAN
    found = consensus.merge_normals(stack, whole=3)
    alone = [consensus.merge_normals(stack[:, [row]], whole=3) for row in range(70)]
    for one, parts in zip(found, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(one, np.concatenate(parts))
    for members in range(2, 7):
        residuals = rng.integers(0, 9, (members, 8, 9)).astype(np.float32)
        residuals[rng.random(residuals.shape) < 0.4] = NAN
        answers = [depth_answer(np.ones((8, 9))) for _ in residuals]
        for answer, residual in zip(answers, residuals, strict=True):
            answer.residual = residual
        expected = np.sort(residuals, axis=0)[(members - 1) // 2]  # NaN last
        np.testing.assert_array_equal(consensus.merge(answers).residual, expected)


def test_raw_spread_sees_scale_and_aligned_spread_does_not():
    truth = np.linspace(1, 5, 64).reshape(8, 8)
    factors = np.array([0.9, 1.0, 1.1])
    merged = consensus.merge_depth((truth * factors[:, None, None]).astype(np.float32))
    off = np.log(factors) - np.log(merged.values[0, 0] / truth[0, 0])
    assert abs(off[1]) < 0.006
    assert merged.raw == pytest.approx(np.abs(off).mean(), rel=1e-4)
    assert np.abs(merged.aligned).max() < 1e-6
    assert merged.scales == pytest.approx(off, abs=1e-6)


def test_normals_average_what_is_near_the_medoid_and_the_spread_is_the_mean_angle():
    def tilt(deg):
        return [np.sin(np.radians(deg)), 0, np.cos(np.radians(deg))]

    stack = np.array([[[tilt(0)]], [[tilt(10)]], [[tilt(80)]]], np.float32)
    values, spread = consensus.merge_normals(stack)
    x, y, z = values[0, 0]
    angle = np.degrees(np.arctan2(x, z))
    assert y == 0 and 5 < angle < 6 and np.hypot(x, z) == pytest.approx(1)
    assert spread.item() == pytest.approx((angle + 10 - angle + 80 - angle) / 3, abs=1e-3)


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


def test_two_members_that_differ_at_the_border_leave_the_reference_as_it_is():
    a = np.zeros((8, 8), np.uint16)
    a[1:6, 1:6] = 1
    rows = [[{"id": 1, "class": "ball"}]] * 2
    values, _ = consensus.merge_instances(np.stack([a, np.roll(a, 1, axis=1)]), rows)
    assert (values == a).all()


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


def test_windows_have_half_a_vote_where_they_see():
    """One whole answer against windows that agree on another: two are a draw, three win."""
    assert [v.whole for v in consensus.variants(seeds=1, crops=3)] == [True, False, False, False]
    depth, other = np.full((8, 8), 2.0), np.full((8, 8), 3.0)
    other[:, 7] = np.nan  # not seen
    for windows, found in ((2, 2.0), (3, 3.0)):
        members = [depth_answer(depth), *[depth_answer(other)] * windows]
        merged = consensus.merge(members, whole=1)
        assert (merged.values[:, 7] == 2).all() and (merged.values[:, :7] == found).all()
        assert merged.extras["members"] == 1 + windows
        assert windows == 3 or merged.uncertainty[0, 7] == 0
    stack = np.array([[[1, 1]], [[2, 255]], [[2, 255]]], np.uint8)
    classes, spread = consensus.merge_classes(stack, whole=1)
    assert classes.tolist() == [[1, 1]] and spread == pytest.approx(np.array([[1 / 2, 0]]))
    classes, spread = consensus.merge_classes(stack[[0, 1, 1, 1]], whole=1)
    assert classes.tolist() == [[2, 1]] and spread == pytest.approx(np.array([[0.4, 0]]))
    up, right = np.array([0, 1, 0.0]), np.array([1, 0, 0.0])
    normals, angle = consensus.merge_normals(np.array([[[up]], [[right]], [[right]]]), whole=1)
    assert (normals == up).all() and angle.item() == pytest.approx(60)


def test_variants_are_counted_and_bad_ones_refused():
    assert len(consensus.variants(seeds=3, mirror=True, crops=2)) == 8
    assert len({v.seed for v in consensus.variants(seeds=2, crops=2)}) == 4
    six = consensus.variants(mirror=True, crops=4)
    assert [v.mirror for v in six] == [False, True, False, False, True, True]
    assert not any(v.mirror for v in consensus.variants(seeds=2, crops=4))
    at = [v._box(100, 200) for v in six]
    corners = [(0, 0, 180, 90), (20, 10, 200, 100), (20, 0, 200, 90), (0, 10, 180, 100)]
    assert at == [(0, 0, 200, 100)] * 2 + corners
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
