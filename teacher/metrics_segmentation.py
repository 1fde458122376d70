"""The ruler for segmentation: sums over a whole set first, ratios last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from teacher.errors import UsageError
from teacher.metrics_checks import check_ids

Panoptic = tuple[np.ndarray, np.ndarray]  # class ids, instance ids
MATCH_IOU = 0.5


def unknown_id(dtype: np.dtype) -> int:
    """The class id that means "no class": 255 in uint8, 65535 in every wider integer type."""
    return 255 if dtype == np.uint8 else 65535


class _ClassTable:
    """Class ids to dense indices 0..K-1; index K stands for unknown."""

    def __init__(self, classes: Mapping[int, Any]) -> None:
        ids = sorted(classes)
        if not ids or ids[0] < 0 or ids[-1] > 65534:
            raise UsageError(f"classes: ids are {ids[:5]}..., expected some, within 0..65534")
        self.ids, self.names = ids, {i: str(classes[i]) for i in ids}
        self._index = np.full(65536, -1, np.int32)
        self._index[ids] = np.arange(len(ids))

    def index(self, ids: np.ndarray, where: str) -> np.ndarray:
        """Dense index per pixel; an id that is neither in the table nor unknown is refused."""
        low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
        if low < 0 or high > 65535:
            raise UsageError(f"{where}: ids span {low}..{high}, expected within 0..65535")
        lookup = self._index.copy()
        lookup[unknown_id(ids.dtype)] = len(self.ids)
        found = lookup[ids]
        if (found < 0).any():
            strange = np.unique(ids[found < 0])[:5].tolist()
            raise UsageError(
                f"{where}: class ids {strange} are not in the class table {self.ids[:20]}; unknown "
                f"is {unknown_id(ids.dtype)} for {ids.dtype}; map the ids to the table first"
            )
        return found


def _nanmean(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


class SemanticConfusion:
    """A confusion matrix summed over a set: the only right way to mIoU.

    ``classes``: class id -> name. Pixels whose truth is unknown are removed first; a prediction
    that is unknown on the rest is a miss of the true class and a false alarm of none (mmseg).
    """

    def __init__(self, *, classes: Mapping[int, Any]) -> None:
        """Start empty."""
        self._table = _ClassTable(classes)
        k = len(self._table.ids)
        self.matrix = np.zeros((k, k + 1), np.int64)  # [truth, prediction], last column unknown

    def add(self, pred: np.ndarray, truth: np.ndarray) -> None:
        """Count one image: integer class ids [H, W], unknown as in `unknown_id` of each dtype."""
        check_ids("semantic", pred, truth)
        k = len(self._table.ids)
        p, g = self._table.index(pred, "semantic pred"), self._table.index(truth, "semantic truth")
        counts = np.bincount((g * (k + 1) + p).ravel(), minlength=(k + 1) ** 2)
        self.matrix += counts.reshape(k + 1, k + 1)[:k]

    def merge(self, other: SemanticConfusion) -> None:
        """Take in what another of the same classes has counted."""
        self.matrix += other.matrix

    def result(self) -> dict[str, Any]:
        """``miou``, ``pixel_accuracy``, ``count``, ``coverage`` and ``per_class``.

        IoU_c = TP / (TP + FP + FN) (Everingham et al. 2010; Cityscapes); ``miou`` is its mean over
        the classes that occur in truth or prediction. One stray pixel of a class that is otherwise
        absent costs that whole class, so read ``per_class``: name -> iou, truth_pixels,
        predicted_pixels.
        """
        k = len(self._table.ids)
        hit, true = np.diag(self.matrix), self.matrix.sum(1)
        predicted = self.matrix[:, :k].sum(0)
        total, missed = int(true.sum()), int(self.matrix[:, k].sum())
        per_class = {}
        for i, class_id in enumerate(self._table.ids):
            per_class[self._table.names[class_id]] = {
                "iou": _ratio(hit[i], true[i] + predicted[i] - hit[i]),
                "truth_pixels": int(true[i]),
                "predicted_pixels": int(predicted[i]),
            }
        return {
            "miou": _nanmean(row["iou"] for row in per_class.values()),
            "pixel_accuracy": _ratio(hit.sum(), total),
            "count": total,
            "coverage": _ratio(total - missed, total),
            "per_class": per_class,
        }


def semantic_metrics(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], *, classes: Mapping[int, Any]
) -> dict[str, Any]:
    """`SemanticConfusion` over (prediction, truth) pairs of a whole set."""
    confusion = SemanticConfusion(classes=classes)
    for pred, truth in pairs:
        confusion.add(pred, truth)
    return confusion.result()


class PanopticTally:
    """Panoptic quality summed over a set (Kirillov et al. 2019, arXiv 1801.00868, eq. 1).

    An image is (class ids [H, W], instance ids [H, W]); a segment is all pixels of one class and
    one instance id, so id 0 gathers a class's "stuff". Unknown classes are VOID. A predicted and a
    true segment match if their classes agree and IoU > 0.5, with union = |p| + |g| - |p & g| -
    |p & VOID|; an unmatched prediction that lies by more than half in VOID is no false alarm (the
    rules of panopticapi). Not covered: crowd regions, which our labels do not have; mark them VOID.
    """

    def __init__(self, *, classes: Mapping[int, Any]) -> None:
        """Start empty; ``classes``: class id -> name."""
        self._table = _ClassTable(classes)
        self._sums = np.zeros((4, len(self._table.ids)))  # TP, FP, FN, summed IoU

    def add(self, pred: Panoptic, truth: Panoptic) -> None:
        """Match and count one image."""
        k = len(self._table.ids)
        p_code, p_class, p_area = self._segments(pred, "panoptic pred")
        g_code, g_class, g_area = self._segments(truth, "panoptic truth")
        check_ids("panoptic", pred[0], truth[0])
        shared = np.bincount(
            (g_code * len(p_class) + p_code).ravel(), minlength=len(g_class) * len(p_class)
        ).reshape(len(g_class), len(p_class))
        in_void = shared[g_class == k].sum(0)
        union = p_area + g_area[:, None] - shared - in_void
        iou = shared / np.maximum(union, 1)
        match = (iou > MATCH_IOU) & (g_class[:, None] == p_class) & (p_class < k)
        lone_g = ~match.any(1) & (g_class < k)
        lone_p = ~match.any(0) & (p_class < k) & (in_void <= 0.5 * p_area)
        rows, columns = np.nonzero(match)
        for row, where, weights in (
            (0, p_class[columns], None),
            (1, p_class[lone_p], None),
            (2, g_class[lone_g], None),
            (3, p_class[columns], iou[rows, columns]),
        ):
            self._sums[row] += np.bincount(where, weights=weights, minlength=k)

    def merge(self, other: PanopticTally) -> None:
        """Take in what another of the same classes has counted."""
        self._sums += other._sums

    def _segments(
        self, panoptic: Panoptic, where: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Segment number per pixel, then class index and area per segment."""
        class_ids, instance_ids = panoptic
        check_ids(f"{where} (instance ids against class ids)", instance_ids, class_ids)
        index = self._table.index(class_ids, where).astype(np.int64)
        code = index * 2**32 + instance_ids.astype(np.int64)
        code[index == len(self._table.ids)] = len(self._table.ids) * 2**32  # one VOID
        segments, number, area = np.unique(code, return_inverse=True, return_counts=True)
        return number.reshape(code.shape), segments >> 32, area

    def result(self) -> dict[str, Any]:
        """``pq``, ``sq``, ``rq`` (means over the classes that occur), ``per_class``, ``count``.

        Per class PQ = sum IoU / (TP + FP/2 + FN/2) = SQ * RQ; the means do not multiply.
        ``count`` is the number of true segments.
        """
        per_class = {}
        for i, class_id in enumerate(self._table.ids):
            tp, fp, fn, summed = self._sums[:, i].tolist()
            per_class[self._table.names[class_id]] = {
                "pq": _ratio(summed, tp + fp / 2 + fn / 2),
                "sq": _ratio(summed, tp) if tp else (0.0 if fp + fn else math.nan),
                "rq": _ratio(tp, tp + fp / 2 + fn / 2),
                "tp": int(tp),
                "fp": int(fp),
                "fn": int(fn),
            }
        means = {q: _nanmean(row[q] for row in per_class.values()) for q in ("pq", "sq", "rq")}
        return {**means, "count": int(self._sums[[0, 2]].sum()), "per_class": per_class}


def panoptic_quality(
    pairs: Iterable[tuple[Panoptic, Panoptic]], *, classes: Mapping[int, Any]
) -> dict[str, Any]:
    """`PanopticTally` over (prediction, truth) pairs of a whole set, each (class, instance) ids."""
    tally = PanopticTally(classes=classes)
    for pred, truth in pairs:
        tally.add(pred, truth)
    return tally.result()
