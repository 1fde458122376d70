"""`distill calibrate`: learn on truth when a teacher is right, write `teacher.confidence`'s file.

Confidence is fitted by logistic regression, uncertainty by the Laplace likelihood log b + |e| / b
(so b is the mean |e|), on sampled pixels; a rising curve then puts each where it was found. One
half of the images fits, the other judges, by their keys; or another label set (``held``) judges.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from tqdm import tqdm

from teacher import doubt, metrics
from teacher.confidence import Calibration, Domain, Head, fingerprint, gentle, image_facts
from teacher.errors import UsageError
from teacher.generators import Query, Teacher, load_teacher
from teacher.jobs.licences import inherited, of_label_set
from teacher.label import SPACES, Answer, Label, Task, unknown_class
from teacher.score import RIGHT_DEG, RIGHT_RATIO
from teacher.store import LabelSet

TASKS = (Task.DEPTH, Task.NORMALS, Task.SEMANTIC)
NEAR_M, FAR_M, FAR_STRATUM_M = 0.3, 40.0, 10.0
PIXELS_PER_IMAGE = 400
RIDGE = 1e-3
CURVE_BINS = 40
LOWEST_ERROR = {Task.DEPTH: 1e-3, Task.NORMALS: 0.1}
KEPT = 0.97  # share of the pixels left when the least confident are dropped
STRATA = ("flat", "edges", "far")


def fit_head(
    signs: Mapping[str, np.ndarray], right: np.ndarray, error: np.ndarray | None, *, lowest: float
) -> Head:
    """Fit both models on flat arrays of N pixels; ``error`` None leaves the second out."""
    names = sorted(signs)
    x = np.stack([gentle(n, signs[n]) for n in names], axis=1)
    none = np.zeros((2, 1))
    head = Head(names, x.mean(0), x.std(0) + 1e-6, np.zeros(1), None, none, None)
    terms = head.terms(signs)
    y = right.astype(np.float64)

    def logistic(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = terms @ w
        p = 1 / (1 + np.exp(-np.clip(z, -30, 30)))
        loss = np.logaddexp(0, z) - y * z
        return loss.mean() + RIDGE * (w[1:] @ w[1:]), terms.T @ (p - y) / len(y) + 2 * RIDGE * (
            np.r_[0, w[1:]]
        )

    head.right = minimize(logistic, np.zeros(terms.shape[1]), jac=True, method="L-BFGS-B").x
    head.right_curve = rising(terms @ head.right, y)
    if error is not None:
        e = np.maximum(error.astype(np.float64), lowest)

        def laplace(w: np.ndarray) -> tuple[float, np.ndarray]:
            log_b = np.clip(terms @ w, -12, 6)
            ratio = e * np.exp(-log_b)
            loss = (log_b + ratio).mean() + RIDGE * (w[1:] @ w[1:])
            return loss, terms.T @ (1 - ratio) / len(e) + 2 * RIDGE * np.r_[0, w[1:]]

        start = np.r_[np.log(e.mean()), np.zeros(terms.shape[1] - 1)]
        head.error = minimize(laplace, start, jac=True, method="L-BFGS-B").x
        head.error_curve = rising(terms @ head.error, e)
    return head


def rising(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The rising curve [2, n] through the means of ``y`` over equally filled bins of ``x``.

    Isotonic regression on bins (Zadrozny and Elkan 2002).
    """
    parts = np.array_split(np.argsort(x, kind="stable"), min(CURVE_BINS, len(x)))
    middle = np.array([x[p].mean() for p in parts])
    level = isotonic_regression(np.array([y[p].mean() for p in parts])).x
    return np.stack([middle, level])


def truth_of(task: Task, answer: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel |error| (log depth, degrees; NaN not judged or semantic) and whether right."""
    if task is Task.DEPTH:
        clipped = np.clip(np.nan_to_num(answer, nan=NEAR_M, posinf=FAR_M), NEAR_M, FAR_M)
        judged = np.isfinite(truth) & (truth > NEAR_M) & (truth < FAR_M)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.where(judged, np.abs(np.log(clipped) - np.log(truth)), np.nan)
        return error, error < math.log(RIGHT_RATIO)
    if task is Task.NORMALS:
        ahead = np.array([0, 0, 1], np.float32)
        facing = np.where(np.isnan(answer[..., :1]), ahead, answer)
        error, _ = metrics.angles_deg(facing, truth)
        return error, error < RIGHT_DEG
    known = truth != unknown_class(truth.dtype)
    return np.where(known, 0.0, np.nan), answer == truth


@dataclass
class Pixels:
    """Sampled pixels of one task: signs, |error|, right, stratum (0 flat, 1 edge, 2 far)."""

    signs: dict[str, np.ndarray]
    error: np.ndarray
    right: np.ndarray
    stratum: np.ndarray


def sample(
    label: Label, answers: Mapping[Task, Answer], task: Task, *, count: int = PIXELS_PER_IMAGE
) -> Pixels:
    """``count`` judged pixels of one image, drawn by its key."""
    error, right = truth_of(task, answers[task].values, label.values[task])
    judged = np.flatnonzero(np.isfinite(error).ravel())
    seed = int(hashlib.sha256(f"{label.key}/{task}".encode()).hexdigest()[:12], 16)
    rng = np.random.default_rng(seed)
    at = rng.choice(judged, min(count, len(judged)), replace=False)
    signs = doubt.signs(answers, task, label.camera)
    return Pixels(
        {n: s.ravel()[at] for n, s in signs.items()},
        error.ravel()[at], right.ravel()[at], _strata(label).ravel()[at],
    )  # fmt: skip


def _strata(label: Label) -> np.ndarray:
    """Per pixel 1 within a pixel of a true silhouette or class border, else 2 if far, else 0."""
    shape = label.image.shape[:2]
    stratum = np.zeros(shape, np.uint8)
    if Task.DEPTH in label.values:
        depth = label.values[Task.DEPTH]
        stratum[np.nan_to_num(depth, posinf=1e9) > FAR_STRATUM_M] = 2
        stratum[doubt.steepness(depth) > math.log(RIGHT_RATIO)] = 1
    if Task.SEMANTIC in label.values:
        stratum[doubt.border_distance(label.values[Task.SEMANTIC]) < 1] = 1
    return stratum


def joined(parts: Iterable[Pixels]) -> Pixels:
    """Pixels of many images as one."""
    rows = list(parts)
    return Pixels(
        {n: np.concatenate([p.signs[n] for p in rows]) for n in rows[0].signs},
        np.concatenate([p.error for p in rows]),
        np.concatenate([p.right for p in rows]),
        np.concatenate([p.stratum for p in rows]),
    )


def judge(head: Head, pixels: Pixels) -> dict[str, Any]:
    """Brier skill, error AUROC, calibration errors per stratum, of pixels not fitted on."""
    terms = head.terms(pixels.signs)
    p, y = head.confidence(terms), pixels.right
    order = terms @ head.right  # as the confidence's, without its plateaus
    base = float(np.mean(y))
    brier = float(np.mean((p - y) ** 2))
    chance = base * (1 - base)
    found: dict[str, Any] = {
        "pixels": len(y),
        "right": round(base, 4),
        "right_of_kept": round(float(np.mean(y[order >= np.quantile(order, 1 - KEPT)])), 4),
        "brier": round(brier, 4),
        "brier_skill": round(1 - brier / chance, 4) if chance > 0 else None,
        "error_auroc": metrics.auroc(1 - p, ~y),
        "ece": _ece(p, y),
        "sign_auroc": {n: metrics.auroc(s, ~y) for n, s in sorted(pixels.signs.items())},
    }
    for i, name in enumerate(STRATA):
        inside = pixels.stratum == i
        if inside.any():
            found[f"ece_{name}"] = _ece(p[inside], y[inside])
    if head.error is not None:
        found["mean_error"] = round(float(pixels.error.mean()), 4)
        found["mean_uncertainty"] = round(float(head.scale(terms).mean()), 4)
    return found


def _ece(confidence: np.ndarray, right: np.ndarray) -> float:
    tally = metrics.calibration_error(confidence, right)
    assert isinstance(tally["ece"], float)
    return round(tally["ece"], 4)


def calibrate(
    *,
    teacher: dict[str, Any],
    labels: str,
    out: str,
    tasks: list[str],
    domain: str | None = None,
    limit: int | None = None,
    held: str | None = None,
) -> dict[str, Any]:
    """Ask a teacher about images with truth, learn when it is right, write ``out`` (JSON).

    Args:
        teacher: ``name`` and that teacher's own keys, exactly as the label job will give them.
        labels: label set with truth (`distill scenes`, or a data set read by teacher=folder).
        out: the calibration file.
        tasks: depth, normals, semantic; all that the label job will ask belong here.
        domain: name of the domain; null: the label set's folder name.
        limit: at most so many images of each label set; null: all.
        held: label set with truth to judge on, all of ``labels`` being fitted; null: one half of
            ``labels`` is fitted, the other judged.
    """
    chosen = _chosen(tasks)
    sets = {folder: LabelSet(folder) for folder in (labels, held) if folder}
    keys = {folder: list(label_set.keys)[:limit] for folder, label_set in sets.items()}
    for folder, found in keys.items():
        if len(found) < 8:
            raise UsageError(f"calibrate: {folder} has {len(found)} images, expected at least 8")
    if held and (both := set(keys[labels]) & set(keys[held])):
        raise UsageError(
            f"calibrate: {len(both)} images of held={held} are in labels={labels} too; judge on"
            " others, or leave held out"
        )
    if held and any(
        sets[held].classes.get(k, name) != name for k, name in sets[labels].classes.items()
    ):
        raise UsageError(f"calibrate: held={held} and labels={labels} name their classes otherwise")
    asked = load_teacher(**teacher)
    lacking = [str(t) for t in chosen if t not in asked.tasks]
    if lacking:
        raise UsageError(
            f"calibrate: teacher {teacher['name']} does not answer {', '.join(lacking)}; it answers"
            f" {[str(t) for t in asked.tasks]}"
        )
    halves: tuple[dict[Task, list[Pixels]], ...] = (
        {t: [] for t in chosen},
        {t: [] for t in chosen},
    )
    facts = []
    every = [(folder, key) for folder, some in keys.items() for key in some]
    for folder, key in tqdm(every, desc="calibrate", unit="img", mininterval=2):
        label = sets[folder][key]
        answers = answers_of(asked, label, chosen, folder)
        if folder == labels:
            facts.append(image_facts(label.image, answers))
        by_key = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 2
        half = int(folder == held) if held else by_key
        for task in chosen:
            halves[half][task].append(sample(label, answers, task))
    heads, report = {}, {}
    for task in chosen:
        if not halves[0][task] or not halves[1][task]:
            raise UsageError(
                f"calibrate: {labels}: too few images to fit on half and judge on half"
            )
        fitted, judged = joined(halves[0][task]), joined(halves[1][task])
        error = None if task is Task.SEMANTIC else fitted.error
        heads[task] = fit_head(
            fitted.signs, fitted.right, error, lowest=LOWEST_ERROR.get(task, 0.0)
        )
        report[str(task)] = judge(heads[task], judged)
    name = domain or Path(labels.rstrip("/")).name
    made = Calibration(
        fingerprint(asked.describe()), Domain.of(name, facts), heads,
        {"images": len(facts), "labels": labels, "held": held, "tasks": report},
        inherited(of_label_set(sets[labels].meta), images="calibration images"),
    )  # fmt: skip
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_text(json.dumps(made.to_json(), indent=1) + "\n")
    part.replace(target)
    said = ", ".join(
        f"{t}: right {r['right']:.3f}, Brier skill {r['brier_skill']}, error AUROC"
        f" {r['error_auroc']:.3f}, ECE {r['ece']}"
        for t, r in report.items()
    )
    return {"summary": f"calibrate: {said}; domain {name!r} -> {out}", **made.report}


def answers_of(
    teacher: Teacher, label: Label, tasks: list[Task], labels: str
) -> dict[Task, Answer]:
    """The teacher's answers to one labelled image; they must be in metric form."""
    missing = [str(t) for t in tasks if t not in label.values]
    if missing:
        raise UsageError(
            f"calibrate: {labels}: sample {label.key} has no {', '.join(missing)}; give a label set"
            " with truth of every task, or ask fewer tasks"
        )
    query = Query(key=label.key, image=label.image, camera=label.camera)
    answers = teacher.answer([query], tasks)[0]
    for task in tasks:
        if answers[task].space is not SPACES[task][0]:
            raise UsageError(
                f"calibrate: {task} comes in {answers[task].space}; only metric answers can be"
                " compared with truth. An affine teacher gets its uncertainty from its anchor"
                " (align), see docs/anchors.md"
            )
    return {t: answers[t] for t in tasks}


def _chosen(tasks: list[str]) -> list[Task]:
    known = [str(t) for t in TASKS]
    if not tasks or not set(tasks) <= set(known):
        raise UsageError(f"calibrate: tasks is {tasks}, expected some of {known}")
    return [Task(t) for t in tasks]
