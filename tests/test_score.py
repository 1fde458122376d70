"""The loop that applies the ruler: rows, means, set-level numbers, worst keys, errors."""

import json
import math

import numpy as np
import pytest

from teacher.errors import UsageError
from teacher.label import Camera, Label, Task
from teacher.score import score

H, W = 12, 16
CLASSES = {0: "wall", 1: "chair"}


def make_label(key: str, *, depth=None, semantic=None, instances=None, normals=None) -> Label:
    values = {
        Task.DEPTH: depth,
        Task.SEMANTIC: semantic,
        Task.INSTANCES: instances,
        Task.NORMALS: normals,
    }
    return Label(
        key=key,
        image=np.zeros((H, W, 3), np.uint8),
        values={task: array for task, array in values.items() if array is not None},
        camera=Camera.assumed(W, H),
    )


def step_depth(near_m=2.0, far_m=4.0) -> np.ndarray:
    depth_m = np.full((H, W), far_m, np.float32)
    depth_m[:, W // 2 :] = near_m
    return depth_m


def depth_set() -> list[Label]:
    return [make_label("a", depth=step_depth()), make_label("b", depth=step_depth(1.0, 8.0))]


def test_depth_rows_mean_and_worst():
    scale = {"a": 1.1, "b": 0.5}
    report = score(
        lambda label: {"depth": label.values[Task.DEPTH] * scale[label.key]},
        depth_set(),
        tasks=["depth"],
    )
    rows = {row["key"]: row for row in report["rows"]}
    assert rows["a"]["depth"]["abs_rel"] == pytest.approx(0.1)
    assert rows["b"]["depth"]["abs_rel"] == pytest.approx(0.5)
    assert report["mean"]["depth"]["abs_rel"] == pytest.approx(0.3)
    assert report["mean"]["depth"]["delta1"] == pytest.approx(0.5)
    assert report["mean"]["depth"]["boundary_f1"] == pytest.approx(1)
    assert report["mean"]["depth_aligned"]["abs_rel"] == pytest.approx(0, abs=1e-7)
    assert report["mean"]["depth"]["images"] == 2
    assert [row["key"] for row in report["worst"]["depth"]] == ["b", "a"]
    assert report["summary"].startswith("2 images: depth AbsRel 0.3, delta1 0.500")


def test_mean_is_per_image_and_names_the_unjudged():
    small = step_depth()
    small[1:] = np.nan  # 16 pixels against 192: a pooled mean would be 0.115
    labels = [
        make_label("full", depth=step_depth()),
        make_label("thin", depth=small),
        make_label("none", depth=np.full((H, W), np.nan, np.float32)),
    ]
    factor = {"full": 1.1, "thin": 1.3, "none": 1.0}
    report = score(
        lambda label: {"depth": label.values[Task.DEPTH] * factor[label.key]},
        labels,
        tasks=["depth"],
        align=None,
    )
    assert report["mean"]["depth"]["abs_rel"] == pytest.approx(0.2)
    assert report["mean"]["depth"]["images"] == 3
    assert report["mean"]["depth"]["judged"]["abs_rel"] == 2
    assert report["rows"][2]["depth"]["abs_rel"] is None
    assert "depth_aligned" not in report["mean"]


def test_report_is_strict_json():
    labels = [make_label("none", depth=np.full((H, W), np.nan, np.float32))]
    report = score(lambda label: {"depth": label.values[Task.DEPTH]}, labels, tasks=["depth"])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["mean"]["depth"]["abs_rel"] is None


def test_affine_disparity_is_judged_in_the_aligned_column():
    report = score(
        lambda label: {"depth": 3 / label.values[Task.DEPTH] + 0.2},
        depth_set(),
        tasks=["depth"],
        align="disparity",
    )
    assert report["mean"]["depth_aligned"]["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert report["mean"]["depth_aligned"]["boundary_f1"] == pytest.approx(1)
    assert report["mean"]["depth"]["delta1"] < 0.6


def test_sky_is_judged_over_the_set():
    truth = step_depth()
    truth[:4] = np.inf  # 64 pixels of sky
    pred = truth.copy()
    pred[3] = 30.0  # 16 of them not seen
    pred[11] = np.inf  # 16 false ones
    report = score(lambda _: {"depth": pred}, [make_label("a", depth=truth)], tasks=["depth"])
    assert report["set"]["sky"]["iou"] == pytest.approx(48 / 80)
    assert report["rows"][0]["depth"]["count"] == 8 * W
    without = score(lambda _: {"depth": pred}, depth_set(), tasks=["depth"])
    assert without["set"]["sky"]["iou"] is None


def test_semantic_over_the_set_is_not_the_mean_of_images():
    first, second = np.zeros((H, W), np.uint8), np.zeros((H, W), np.uint8)
    first[:6] = 1  # half chairs, all found
    second[0, :4] = 1  # 4 pixels of chair, none found
    labels = [make_label("a", semantic=first), make_label("b", semantic=second)]
    report = score(
        lambda label: {"semantic": first if label.key == "a" else np.zeros((H, W), np.int64)},
        labels,
        tasks=["semantic"],
        classes=CLASSES,
    )
    chair, wall = 96 / 100, (96 + 188) / (96 + 192)
    assert report["set"]["semantic"]["per_class"]["chair"]["iou"] == pytest.approx(chair)
    assert report["set"]["semantic"]["miou"] == pytest.approx((chair + wall) / 2)
    assert report["mean"]["semantic"]["image_miou"] == pytest.approx((1 + 188 / 192 / 2) / 2)
    assert report["worst"]["semantic"][0]["key"] == "b"


def test_instances_are_judged_as_objects():
    truth = np.zeros((H, W), np.uint16)
    truth[:4, :4], truth[6:10, 6:10] = 1, 2
    pred = np.zeros((H, W), np.uint16)
    pred[:4, :4], pred[8:12, 6:10] = 7, 8  # one exact, one at IoU 1/3
    label = make_label("a", instances=truth)
    report = score(lambda _: {"instances": pred}, [label], tasks=["instances"])
    assert report["rows"][0]["instances"]["pq"] == pytest.approx(1 / (1 + 0.5 + 0.5))
    assert report["set"]["instances"]["tp"] == 1
    empty = make_label("b", instances=np.zeros((H, W), np.uint16))
    both = score(
        lambda lb: {"instances": lb.values[Task.INSTANCES]}, [label, empty], tasks=["instances"]
    )
    assert both["mean"]["instances"]["pq"] == 1
    assert both["mean"]["instances"]["judged"]["pq"] == 1


def test_normals_per_image_and_pooled():
    facing = np.zeros((H, W, 3), np.float32)
    facing[..., 2] = 1
    part = facing.copy()
    part[1:] = np.nan
    turned = np.zeros_like(facing)
    turned[..., 0], turned[..., 2] = math.sin(math.radians(20)), math.cos(math.radians(20))
    labels = [make_label("full", normals=facing), make_label("part", normals=part)]
    report = score(
        lambda lb: {"normals": turned if lb.key == "part" else facing}, labels, tasks=["normals"]
    )
    assert report["mean"]["normals"]["mean_deg"] == pytest.approx(10, abs=1e-4)
    pooled = report["set"]["normals"]
    assert pooled["pooled_mean_deg"] == pytest.approx(20 / 13, abs=1e-4)
    assert pooled["count"] == 13 * W


def test_uncertainty_and_confidence_are_judged():
    truth = step_depth()
    pred = truth * np.linspace(1, 1.4, W, dtype=np.float32)
    right = (pred / truth < 1.25).astype(np.float32)
    truth[0], right[0] = np.nan, 1  # sure of itself where nobody knows
    answers = {
        "depth": pred,
        "depth_uncertainty": np.abs(np.log(pred / truth)),
        "depth_confidence": right,
    }
    report = score(lambda _: answers, [make_label("a", depth=truth)], tasks=["depth"])
    assert report["rows"][0]["depth"]["ause"] == pytest.approx(0, abs=1e-9)
    assert report["set"]["depth_calibration"]["ece"] == 0
    assert report["set"]["depth_calibration"]["count"] == (H - 1) * W
    answers["depth_confidence"] = 1 - right
    worse = score(lambda _: answers, [make_label("a", depth=truth)], tasks=["depth"])
    assert worse["set"]["depth_calibration"]["ece"] == pytest.approx(1)


def test_labels_without_the_task_are_left_out():
    labels = [make_label("a", depth=step_depth()), make_label("b")]
    report = score(lambda lb: {"depth": lb.values[Task.DEPTH]}, labels, tasks=["depth"])
    assert report["mean"]["depth"]["images"] == 1
    assert report["rows"][1] == {"key": "b"}


@pytest.mark.parametrize(
    ("answers", "tasks", "message"),
    [
        ({}, ["depth"], r"label 'a', depth: predict_fn returned \[\], expected 'depth'"),
        ({"depth": np.ones((3, 4))}, ["depth"], r"label 'a', depth: .*pred is \(3, 4\) but truth"),
        ({"depth": np.ones((H, W), np.uint16)}, ["depth"], "pred is uint16, expected a floating"),
        ({}, ["deep"], r"tasks is \['deep'\], expected some of"),
        ({}, ["semantic"], "semantic needs the class table"),
        ({}, ["normals"], "none of 2 labels carries normals"),
    ],
)
def test_errors_say_where_and_what(answers, tasks, message):
    with pytest.raises(UsageError, match=message):
        score(lambda _: answers, depth_set(), tasks=tasks)


def test_an_empty_set_is_refused():
    with pytest.raises(UsageError, match="none of 0 labels carries depth"):
        score(lambda _: {}, [], tasks=["depth"])
