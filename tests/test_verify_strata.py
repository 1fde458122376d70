"""Edges, far, dark and the worst image: masks and losses with values known beforehand."""

import numpy as np
import pytest

from export.strata import edges, far_m, masks, strata_table, worst_losses
from teacher.label import Camera, Label, Task


def label(key="a", *, depth=None, light=200, size=(20, 30)):
    """A wall at 2 m beside one at 8 m; the right half of the picture is dark."""
    values = np.full(size, 2.0, np.float32)
    values[:, size[1] // 2 :] = 8.0
    image = np.full((*size, 3), light, np.uint8)
    image[:, size[1] // 2 :] = 10
    return Label(
        key=key,
        image=image,
        values={Task.DEPTH: values if depth is None else depth},
        camera=Camera.assumed(size[1], size[0]),
    )


def test_edges_are_two_pixels_on_either_side_of_the_jump():
    found = edges(label())
    assert np.flatnonzero(found[0]).tolist() == [13, 14, 15, 16] and (found == found[0]).all()


def test_sky_against_ground_is_an_edge_and_unknown_is_none():
    depth = np.full((20, 30), np.inf, np.float32)
    depth[10:] = 3
    depth[:, :5] = np.nan
    found = edges(label(depth=depth))
    assert found[9:11, 10].all() and not found[:5].any() and not found[15:].any()
    assert not found[12:, 5:8].any()  # beside what is unknown


def test_without_depth_classes_and_creases_make_the_edges():
    ids = np.zeros((20, 30), np.uint8)
    ids[:, 10:] = 1
    one = label()
    one.values.clear()
    one.values[Task.SEMANTIC] = ids
    assert np.flatnonzero(edges(one)[0]).tolist() == [8, 9, 10, 11]
    normals = np.zeros((20, 30, 3), np.float32)
    normals[:, :7, 2] = 1
    normals[:, 7:, 1] = 1
    one.values.clear()
    one.values[Task.NORMALS] = normals
    assert np.flatnonzero(edges(one)[0]).tolist() == [5, 6, 7, 8]


def test_far_is_the_farthest_fifth_of_the_set():
    depth = np.tile(np.linspace(1, 11, 400, dtype=np.float32)[:, None], (1, 8))
    one = label(depth=depth, size=(400, 8))
    beyond = far_m([one], min_m=0.3, max_m=40)
    assert beyond == pytest.approx(9, abs=0.1)
    assert masks(one, beyond_m=beyond)["far"].mean() == pytest.approx(0.2, abs=0.01)
    assert far_m([], min_m=0.3, max_m=40) == np.inf


def table(answer, labels):
    found = strata_table(answer, labels, tasks=["depth"], beyond_m=5.0, min_m=0.3, max_m=40.0)
    return found


def test_a_fault_in_one_stratum_is_seen_there_and_diluted_in_the_whole():
    labels = [label("a"), label("b")]

    def right(one):
        return {"depth": one.values[Task.DEPTH]}

    def far_wrong_in_b(one):
        depth = one.values[Task.DEPTH].copy()
        if one.key == "b":
            depth[depth > 5] *= 1.5
        return {"depth": depth}

    clean, hurt = table(right, labels), table(far_wrong_in_b, labels)
    told = worst_losses(
        "depth.delta1", hurt["depth.delta1"], clean["depth.delta1"], larger_is_better=True
    )
    # half of b is wrong: its own loss 0.5; in far (and dark: the same half) all of b, so 1 / 2
    assert told["image"] == (0.5, "b") and told["stratum"][0] == pytest.approx(0.5)
    told = worst_losses(
        "depth.abs_rel", hurt["depth.abs_rel"], clean["depth.abs_rel"], larger_is_better=False
    )
    assert told["stratum"] == (pytest.approx(0.25), "far") and told["image"][0] == pytest.approx(
        0.25
    )
    assert hurt["depth.delta1"]["edges"]["b"] == pytest.approx(0.5)
    assert clean["depth.delta1"]["dark"] == {"a": 1.0, "b": 1.0}


def test_strata_too_small_to_count_are_left_out():
    tiny = label(size=(4, 6))
    assert table(lambda one: {"depth": one.values[Task.DEPTH]}, [tiny]) == {}
