"""mIoU and panoptic quality against hand-worked sets, torchmetrics, pycocotools and the rules."""

import math

import numpy as np
import pycocotools.mask
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.errors import UsageError
from teacher.metrics import PanopticTally, SemanticConfusion, panoptic_quality, semantic_metrics

ABC = {0: "a", 1: "b", 2: "c"}


def ids(*rows) -> np.ndarray:
    return np.array(rows, np.uint8)


def test_miou_by_hand():
    truth, pred = ids([0, 0, 0, 1, 1, 255]), ids([0, 0, 1, 1, 2, 2])
    result = semantic_metrics([(pred, truth)], classes=ABC)
    ious = {name: row["iou"] for name, row in result["per_class"].items()}
    assert ious == pytest.approx({"a": 2 / 3, "b": 1 / 3, "c": 0})
    assert result["miou"] == pytest.approx(1 / 3)
    assert result["pixel_accuracy"] == pytest.approx(3 / 5)
    assert result["count"] == 5  # the unknown one is nobody's


def test_an_absent_class_is_skipped_and_one_stray_pixel_costs_a_class():
    truth = ids([0] * 50 + [1] * 50)
    clean = semantic_metrics([(truth, truth)], classes=ABC)
    assert clean["miou"] == 1 and math.isnan(clean["per_class"]["c"]["iou"])
    pred = truth.copy()
    pred[0, 0] = 2
    stray = semantic_metrics([(pred, truth)], classes=ABC)
    assert stray["miou"] == pytest.approx((49 / 50 + 1 + 0) / 3)
    assert stray["per_class"]["c"] == {"iou": 0, "truth_pixels": 0, "predicted_pixels": 1}


def test_an_unknown_prediction_is_a_miss_and_no_false_alarm():
    result = semantic_metrics([(ids([0, 255, 1, 1]), ids([0, 0, 1, 1]))], classes=ABC)
    assert result["per_class"]["a"]["iou"] == 0.5
    assert result["per_class"]["b"]["iou"] == 1
    assert result["coverage"] == 0.75


def test_the_set_is_summed_not_averaged():
    pairs = [(ids([0, 0, 0, 0]), ids([0, 0, 0, 1])), (ids([1, 1]), ids([1, 1]))]
    result = semantic_metrics(pairs, classes=ABC)
    assert result["miou"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    per_image = [semantic_metrics([pair], classes=ABC)["miou"] for pair in pairs]
    assert np.mean(per_image) == pytest.approx((3 / 8 + 1) / 2)


def test_dtypes_may_differ_and_each_has_its_unknown():
    truth = np.array([[0, 300, 65535]], np.uint16)
    pred = np.array([[0, 300, 0]], np.int64)
    result = semantic_metrics([(pred, truth)], classes={0: "a", 300: "z"})
    assert (result["miou"], result["count"]) == (1, 2)


@pytest.mark.parametrize("seed", range(3))
def test_miou_agrees_with_torchmetrics(seed):
    rng = np.random.default_rng(seed)
    confusion = SemanticConfusion(classes={i: str(i) for i in range(6)})
    judge = torchmetrics.classification.MulticlassJaccardIndex(
        num_classes=6, average="none", ignore_index=255
    )
    for _ in range(4):
        truth = rng.integers(0, 6, (20, 30)).astype(np.uint8)
        pred = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 6, truth.shape))
        truth[rng.random(truth.shape) < 0.1] = 255
        confusion.add(pred.astype(np.uint8), truth)
        judge.update(torch.from_numpy(pred).long(), torch.from_numpy(truth).long())
    rows = confusion.result()["per_class"].values()
    np.testing.assert_allclose([row["iou"] for row in rows], judge.compute().numpy(), atol=1e-6)


def test_merging_is_adding():
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.integers(0, 3, (2, 8, 8)).astype(np.uint8)) for _ in range(2)]
    parts = []
    for pair in pairs:
        part = SemanticConfusion(classes=ABC)
        part.add(*pair)
        parts.append(part)
    parts[0].merge(parts[1])
    assert parts[0].result() == semantic_metrics(pairs, classes=ABC)


def test_nothing_to_judge_is_nan():
    result = semantic_metrics([], classes=ABC)
    assert math.isnan(result["miou"]) and math.isnan(result["pixel_accuracy"])
    quality = panoptic_quality([], classes=ABC)
    assert math.isnan(quality["pq"]) and quality["count"] == 0


@pytest.mark.parametrize(
    ("pred", "truth", "message"),
    [
        (ids([7]), ids([0]), r"semantic pred: class ids \[7\] are not in the class table"),
        (ids([0]), ids([9]), r"semantic truth: class ids \[9\]"),
        (np.array([[255]]), ids([0]), "unknown is 65535 for int64"),
        (np.array([[-1]]), ids([0]), "ids span -1..-1, expected within 0..65535"),
        (np.zeros((1, 1)), ids([0]), "pred is float64"),
        (ids([0, 0]), ids([0]), "by nearest neighbour"),
    ],
)
def test_errors_say_what_was_found(pred, truth, message):
    with pytest.raises(UsageError, match=message):
        semantic_metrics([(pred, truth)], classes=ABC)


def test_an_empty_class_table_is_refused():
    with pytest.raises(UsageError, match="classes: ids are"):
        SemanticConfusion(classes={})


# ---- panoptic ----------------------------------------------------------------------------------


def segments(panoptic, unknown=255):
    class_ids, instance_ids = (a.astype(int) for a in panoptic)
    found = {}
    for key in set(zip(class_ids.ravel().tolist(), instance_ids.ravel().tolist(), strict=True)):
        if key[0] != unknown:
            found[key] = (class_ids == key[0]) & (instance_ids == key[1])
    return found


def reference_pq(pairs, classes):
    """Kirillov's definition on boolean masks, IoU without void from pycocotools."""
    sums = {c: [0, 0, 0, 0.0] for c in classes}
    for pred, truth in pairs:
        void = truth[0] == 255
        p_segments, g_segments = segments(pred), segments(truth)
        matched_p, matched_g = set(), set()
        for p_key, p in p_segments.items():
            for g_key, g in g_segments.items():
                if p_key[0] != g_key[0]:
                    continue
                outside = np.asfortranarray((p & ~void).astype(np.uint8))
                codes = [pycocotools.mask.encode(outside)]
                codes.append(pycocotools.mask.encode(np.asfortranarray(g.astype(np.uint8))))
                iou = pycocotools.mask.iou(codes[:1], codes[1:], [0])[0, 0]
                if iou > 0.5:
                    sums[p_key[0]][0] += 1
                    sums[p_key[0]][3] += iou
                    matched_p.add(p_key)
                    matched_g.add(g_key)
        for key, p in p_segments.items():
            if key not in matched_p and (p & void).sum() <= 0.5 * p.sum():
                sums[key[0]][1] += 1
        for key in set(g_segments) - matched_g:
            sums[key[0]][2] += 1
    return {
        c: s / (tp + fp / 2 + fn / 2) if tp + fp + fn else math.nan
        for c, (tp, fp, fn, s) in sums.items()
    }


def random_panoptic(rng, *, void_truth: bool, void_pred: bool):
    """Blocks of class and instance, and a prediction that moves, relabels and drops some."""
    blocks = rng.integers(0, 3, (4, 5)), rng.integers(0, 4, (4, 5))
    truth = [np.kron(b, np.ones((6, 6), int)).astype(np.uint8) for b in blocks]
    pred = [np.roll(a, rng.integers(0, 3), axis=1) for a in truth]
    wrong = rng.random(truth[0].shape) < 0.1
    pred[0] = np.where(wrong, rng.integers(0, 3, wrong.shape), pred[0]).astype(np.uint8)
    pred[1][12:18] += 4  # splits instances
    if void_truth:
        truth[0][:, 18:24] = 255
    if void_pred:
        pred[0][6:12] = 255
    return tuple(pred), tuple(truth)


def test_pq_by_hand():
    truth = ids([0] * 10 + [1] * 10), ids([0] * 10 + [1] * 5 + [2] * 5)
    pred = ids([0] * 8 + [1] * 12), ids([0] * 8 + [3] * 7 + [4] * 5)
    # a: IoU 8/10. b: instance 1 against 3 has IoU 5/7, instance 2 against 4 is exact
    result = panoptic_quality([(pred, truth)], classes=ABC)
    assert result["per_class"]["a"]["pq"] == pytest.approx(0.8)
    assert result["per_class"]["b"]["pq"] == pytest.approx((5 / 7 + 1) / 2)
    assert result["pq"] == pytest.approx((0.8 + 6 / 7) / 2)
    assert (result["count"], result["per_class"]["b"]["tp"]) == (3, 2)
    assert math.isnan(result["per_class"]["c"]["pq"])


def test_half_is_no_match_and_counts_twice():
    truth, pred = (ids([0] * 4), ids([1] * 4)), (ids([0] * 4), ids([1, 1, 2, 2]))
    result = panoptic_quality([(pred, truth)], classes=ABC)["per_class"]["a"]
    assert result == {"pq": 0, "sq": 0, "rq": 0, "tp": 0, "fp": 2, "fn": 1}


def test_void_of_the_truth_is_forgiven_and_void_of_the_prediction_is_not():
    truth = ids([0] * 6 + [255] * 4), ids([1] * 10)
    over = panoptic_quality([((ids([0] * 10), ids([1] * 10)), truth)], classes=ABC)
    assert over["pq"] == 1
    inside = ids([0] * 6 + [1] * 4), ids([1] * 10)  # a "b" that lies in VOID only: no false alarm
    assert panoptic_quality([(inside, truth)], classes=ABC)["per_class"]["b"]["fp"] == 0
    short = ids([0] * 4 + [255] * 6), ids([1] * 10)
    assert panoptic_quality([(short, truth)], classes=ABC)["pq"] == pytest.approx(4 / 6)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_pq_agrees_with_the_definition(seed, void_truth, void_pred):
    rng = np.random.default_rng(seed)
    pairs = [random_panoptic(rng, void_truth=void_truth, void_pred=void_pred) for _ in range(2)]
    result = panoptic_quality(pairs, classes=ABC)
    expected = reference_pq(pairs, ABC)
    for class_id, name in ABC.items():
        assert result["per_class"][name]["pq"] == pytest.approx(expected[class_id], nan_ok=True)


def test_pq_agrees_with_torchmetrics_while_nothing_is_predicted_void():
    judge = torchmetrics.detection.PanopticQuality(things={0, 1, 2}, stuffs={3})
    rng = np.random.default_rng(3)
    pairs = [random_panoptic(rng, void_truth=False, void_pred=False) for _ in range(4)]
    for pred, truth in pairs:
        judge.update(*(torch.from_numpy(np.stack(p, -1))[None].int() for p in (pred, truth)))
    ours = panoptic_quality(pairs, classes={**ABC, 3: "d"})
    assert 0.1 < ours["pq"] < 0.9
    assert ours["pq"] == pytest.approx(float(judge.compute()), abs=1e-6)


def test_pq_agrees_with_panopticapi():
    """TP, FP, FN and summed IoU that cocodataset/panopticapi 7bb4655 counts on these four images.

    It is on no package registry: `pq_compute_single_core` was run once (2026-11-23) on their PNGs.
    """
    counted = {
        "a": (6, 17, 6, 4.388749370199142),
        "b": (7, 16, 6, 4.545848595848596),
        "c": (7, 17, 6, 4.564714014935955),
    }
    rng = np.random.default_rng(11)
    pairs = [random_panoptic(rng, void_truth=True, void_pred=v) for v in (False, True) * 2]
    ours = panoptic_quality(pairs, classes=ABC)["per_class"]
    for name, (tp, fp, fn, iou) in counted.items():
        assert (ours[name]["tp"], ours[name]["fp"], ours[name]["fn"]) == (tp, fp, fn)
        assert ours[name]["sq"] * tp == pytest.approx(iou)


def test_instance_ids_are_local_to_an_image():
    pair = (ids([0] * 4), ids([1] * 4)), (ids([0] * 4), ids([9] * 4))
    tally = PanopticTally(classes=ABC)
    tally.add(*pair)
    other = PanopticTally(classes=ABC)
    other.add(*pair)
    tally.merge(other)
    assert tally.result()["per_class"]["a"]["tp"] == 2


def test_panoptic_shapes_are_checked():
    good = ids([0, 1]), ids([1, 1])
    with pytest.raises(UsageError, match=r"panoptic: pred is \(1, 2\) but truth is \(1, 1\)"):
        panoptic_quality([(good, (ids([0]), ids([0])))], classes=ABC)
    with pytest.raises(UsageError, match=r"instance ids against class ids\): pred is \(1, 1\)"):
        panoptic_quality([((ids([0, 1]), ids([1])), good)], classes=ABC)
