"""The one loop that applies the ruler: teacher against truth, student against teacher, engine
against student, over any iterable of labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from teacher import metrics
from teacher.errors import UsageError
from teacher.label import Label, Task, unknown_class

Predict = Callable[[Label], Mapping[Any, np.ndarray]]
Block = dict[str, Any]

# per task: the number that ranks images, how it is said, and whether larger is worse
HEADLINE = {
    Task.DEPTH: ("abs_rel", "AbsRel", True),
    Task.NORMALS: ("mean_deg", "mean deg", True),
    Task.SEMANTIC: ("pixel_accuracy", "pixel accuracy", False),
    Task.INSTANCES: ("pq", "PQ", False),
}
OBJECT = {0: "none", 1: "object"}
RIGHT_RATIO, RIGHT_DEG = 1.25, 11.25  # what "right" means to a confidence (docs/design.md, 3)


def score(
    predict_fn: Predict,
    label_set: Iterable[Label],
    *,
    tasks: Sequence[str],
    min_m: float = 0.3,
    max_m: float = 40.0,
    align: str | None = "scale",
    classes: Mapping[int, Any] | None = None,
    worst: int = 5,
) -> dict[str, Any]:
    """Judge ``predict_fn`` against every label of ``label_set``; plain JSON, None for "no number".

    ``predict_fn(label)`` returns {task: array [H, W] or [H, W, 3]} at the label's resolution in the
    units of `teacher.label`; depth may be affine if ``align`` says which (`metrics.align_depth`),
    then the raw column means nothing. Beside an answer ``<task>_uncertainty`` [H, W] is judged by
    AUSE (depth: AbsRel, normals: degrees) and ``<task>_confidence`` by its calibration. Depth is
    judged strictly inside ``min_m``..``max_m``, the prediction clipped to it. A label that lacks a
    task is left out of that task.

    Returns:
        ``images``; ``rows``, one per image: ``key`` and a block per task, for depth also
        ``depth_aligned`` if ``align`` is set; ``mean``: per block the mean over images of each
        number, every image weight 1, ``images`` of them, and in ``judged`` the numbers that fewer
        images have; ``set``: what is summed over the set (``semantic`` mIoU and classes,
        ``instances`` PQ without regard to class, ``normals`` pooled, ``sky`` IoU,
        ``<task>_calibration``); ``worst``: per task the worst keys; ``protocol``; ``summary``.

    Raises:
        UsageError: a missing or misshapen prediction (with the label's key), semantic asked without
            ``classes`` (default: ``label_set.classes``), no label with a task, an empty set.
    """
    chosen = _chosen(tasks)
    table = getattr(label_set, "classes", None) if classes is None else classes
    ruler = _Ruler(tasks=chosen, min_m=min_m, max_m=max_m, align=align, classes=table)
    rows = []
    for label in tqdm(label_set, desc="score", unit="image", disable=None, leave=False):
        row: Block = {"key": label.key}
        present = [task for task in chosen if task in label.values]
        answers = predict_fn(label) if present else {}
        for task in present:
            try:
                row |= ruler.judge(task, answers, label.values[task])
            except UsageError as error:
                raise UsageError(f"score: label {label.key!r}, {task!s}: {error}") from error
        rows.append(row)
    for task in chosen:
        if not any(task in row for row in rows):
            raise UsageError(f"score: none of {len(rows)} labels carries {task!s}; ask other tasks")
    mean, over_set = _mean(rows), ruler.over_set()
    report = {
        "summary": _summary(len(rows), mean, over_set),
        "images": len(rows),
        "protocol": {"min_m": min_m, "max_m": max_m, "align": align, "tasks": list(chosen)},
        "mean": mean,
        "set": over_set,
        "worst": {task: _worst(rows, task, worst) for task in chosen},
        "rows": rows,
    }
    return _plain(report)


def _chosen(tasks: Sequence[str]) -> list[Task]:
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    known = [str(task) for task in Task]
    if not names or not set(names) <= set(known):
        raise UsageError(f"score: tasks is {names}, expected some of {known}")
    return [Task(name) for name in names]


class _Ruler:
    """Judges one answer at a time and remembers what must be summed over the set."""

    def __init__(
        self,
        *,
        tasks: Sequence[Task],
        min_m: float,
        max_m: float,
        align: str | None,
        classes: Mapping[int, Any] | None,
    ) -> None:
        self._bounds: dict[str, Any] = {"min_m": min_m, "max_m": max_m}
        self._align, self._classes = align, classes or {}
        self._sums: dict[str, Any] = {}
        if Task.DEPTH in tasks:
            self._sums["sky"] = metrics.SemanticConfusion(classes={0: "ground", 1: "sky"})
        if Task.NORMALS in tasks:
            self._sums["normals"] = metrics.PooledNormals()
        if Task.SEMANTIC in tasks:
            if not classes:
                raise UsageError(
                    "score: semantic needs the class table: pass classes={id: name} "
                    "or a label set that has one"
                )
            self._sums["semantic"] = metrics.SemanticConfusion(classes=classes)
        if Task.INSTANCES in tasks:
            self._sums["instances"] = metrics.PanopticTally(classes=OBJECT)

    def judge(self, task: Task, answers: Mapping[Any, np.ndarray], truth: np.ndarray) -> Block:
        """The blocks of one image for one task."""
        if task not in answers:
            given = sorted(str(name) for name in answers)
            raise UsageError(f"predict_fn returned {given}, expected {str(task)!r} among them")
        extra = {
            name: answers[f"{task}_{name}"]
            for name in ("uncertainty", "confidence")
            if f"{task}_{name}" in answers
        }
        by_task = {
            Task.DEPTH: self._depth,
            Task.NORMALS: self._normals,
            Task.SEMANTIC: self._semantic,
            Task.INSTANCES: self._instances,
        }
        return by_task[task](answers[task], truth, extra)

    def _depth(self, pred: np.ndarray, truth: np.ndarray, extra: Block) -> Block:
        blocks = {"depth": self._depth_block(pred, truth, extra)}
        metres = pred
        if self._align is not None:
            aligned = metrics.align_depth(pred, truth, **self._bounds, align=self._align)
            blocks["depth_aligned"] = self._depth_block(aligned, truth, extra)
            metres = pred if self._align == "scale" else aligned
        _, ratio = metrics.depth_error_maps(metres, truth, **self._bounds)
        self._calibrate("depth", extra, judged=~np.isnan(ratio), right=ratio < RIGHT_RATIO)
        sky = [np.where(np.isnan(d), 255, np.isposinf(d)).astype(np.uint8) for d in (pred, truth)]
        self._sums["sky"].add(*sky)
        return blocks

    def _depth_block(self, pred: np.ndarray, truth: np.ndarray, extra: Block) -> Block:
        block: Block = metrics.depth_metrics(pred, truth, **self._bounds)
        block["boundary_f1"] = metrics.boundary_f1(pred, truth)
        if "uncertainty" in extra:
            abs_rel, _ = metrics.depth_error_maps(pred, truth, **self._bounds)
            block |= metrics.ause(abs_rel, extra["uncertainty"])
        return block

    def _normals(self, pred: np.ndarray, truth: np.ndarray, extra: Block) -> Block:
        block: Block = metrics.normal_metrics(pred, truth)
        self._sums["normals"].add(pred, truth)
        if extra:
            angle, _ = metrics.angles_deg(pred, truth)
            self._calibrate("normals", extra, judged=~np.isnan(angle), right=angle < RIGHT_DEG)
            if "uncertainty" in extra:
                block |= metrics.ause(angle, extra["uncertainty"])
        return {"normals": block}

    def _semantic(self, pred: np.ndarray, truth: np.ndarray, extra: Block) -> Block:
        confusion = self._sums["semantic"]
        one = metrics.SemanticConfusion(classes=self._classes)
        one.add(pred, truth)
        confusion.merge(one)
        self._calibrate(
            "semantic", extra, judged=truth != unknown_class(truth.dtype), right=pred == truth
        )
        result = one.result()
        keys = ("pixel_accuracy", "count", "coverage")
        return {"semantic": {"image_miou": result["miou"], **{k: result[k] for k in keys}}}

    def _instances(self, pred: np.ndarray, truth: np.ndarray, extra: Block) -> Block:
        tally = self._sums["instances"]
        one = metrics.PanopticTally(classes=OBJECT)
        one.add(((pred > 0).astype(np.uint8), pred), ((truth > 0).astype(np.uint8), truth))
        tally.merge(one)
        found = one.result()["per_class"]["object"]
        return {"instances": {**found, "count": found["tp"] + found["fn"]}}

    def _calibrate(self, task: str, extra: Block, *, judged: np.ndarray, right: np.ndarray) -> None:
        if "confidence" in extra:
            bins = self._sums.setdefault(f"{task}_calibration", metrics.CalibrationBins())
            bins.add(np.where(judged, extra["confidence"], np.nan), right)

    def over_set(self) -> Block:
        """What only the whole set can say."""
        results = {name: total.result() for name, total in self._sums.items()}
        if "sky" in results:
            sky = results["sky"]["per_class"]["sky"]
            results["sky"] = {**sky, "iou": sky["iou"] if sky["truth_pixels"] else math.nan}
        if "instances" in results:
            results["instances"] = results["instances"]["per_class"]["object"]
        return results


def _mean(rows: Sequence[Block]) -> Block:
    """Per block: the mean over images of every number; a NaN is counted in ``judged``, not lost."""
    means: Block = {}
    for name in dict.fromkeys(n for row in rows for n in row if n != "key"):
        blocks = [row[name] for row in rows if name in row]
        mean: Block = {"images": len(blocks), "judged": {}}
        for number in dict.fromkeys(n for block in blocks for n in block if n != "count"):
            known = [b[number] for b in blocks if number in b and not math.isnan(b[number])]
            mean[number] = float(np.mean(known)) if known else math.nan
            if len(known) < len(blocks):
                mean["judged"][number] = len(known)
        means[name] = mean
    return means


def _worst(rows: Sequence[Block], task: Task, many: int) -> list[Block]:
    """The ``many`` images with the worst headline number; those without a number do not rank."""
    number, _, large_is_bad = HEADLINE[task]
    known = [(row["key"], row[task][number]) for row in rows if task in row]
    known = [pair for pair in known if not math.isnan(pair[1])]
    known.sort(key=lambda pair: (-pair[1] if large_is_bad else pair[1], pair[0]))
    return [{"key": key, number: value} for key, value in known[:many]]


def _summary(images: int, mean: Block, over_set: Block) -> str:
    parts = []
    for task, (number, name, _) in HEADLINE.items():
        if task in mean:
            parts.append(f"{task} {name} {mean[task][number]:.3g}")
    if "depth" in mean:
        parts[0] += f", delta1 {mean['depth']['delta1']:.3f}"
    if "semantic" in over_set:
        parts.append(f"mIoU {over_set['semantic']['miou']:.3f}")
    return f"{images} images: " + "; ".join(parts)


def _plain(value: Any) -> Any:
    """Only what strict JSON can hold: a number that does not exist is None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
