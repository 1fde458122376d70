"""`distill calibrate`: a teacher's confidence, or a trained student's scale and uncertainties.

A student is fitted to truth by constants of its own graph; a teacher's part is `teacher.calibrate`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.run_folder import learnt_from, may_hold, set_identity
from distill.samples import Frame, compact, make_sample
from distill.scale_fit import (
    Fit,
    Pair,
    fit_confidence,
    fit_scale,
    fit_uncertainty,
    fitted_uncertainty,
)
from student.checkpoint import load_student, save_student, write_atomic
from student.model import FACTORS, Student, log_factors
from teacher.calibrate import calibrate as calibrate_teacher
from teacher.errors import UsageError
from teacher.jobs.licences import merged, of_label_set, of_student
from teacher.label import Task
from teacher.metrics import angles_deg
from teacher.score import RIGHT_DEG, RIGHT_RATIO
from teacher.store import LabelSet

POINTS = 2000  # per image that enter a fit, evenly spread


def calibrate(
    *,
    teacher: dict[str, Any],
    labels: str,
    out: str,
    tasks: list[str],
    domain: str | None = None,
    limit: int | None = None,
    held: str | None = None,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """`fit_student` if there is a ``checkpoint``, else `teacher.calibrate.calibrate`.

    With a ``checkpoint`` neither ``teacher`` nor ``tasks`` is looked at; ``domain`` and ``held``
    are refused: its domain is the plan hash of ``labels``, and cross-validation judges.
    """
    if checkpoint is None:
        return calibrate_teacher(
            teacher=teacher,
            labels=labels,
            out=out,
            tasks=tasks,
            domain=domain,
            limit=limit,
            held=held,
        )
    for name, value in (("domain", domain), ("held", held)):
        if value is not None:
            raise UsageError(f"{name}={value}: a student takes none; leave it out, or checkpoint=")
    return fit_student(checkpoint=checkpoint, labels=labels, out=out, limit=limit)


def fit_student(
    *, checkpoint: str, labels: str, out: str, limit: int | None = 200
) -> dict[str, Any]:
    """Write a copy of a student whose depth and uncertainties are fitted to true labels.

    Args:
        checkpoint: a ``student.safetensors``; may be the result of an earlier fit, which is undone.
        labels: label set with the truth (dense or a few points) of images it has not learnt from;
            its licences join those of the student.
        out: the new ``student.safetensors``; what is returned stands beside it in
            ``OUT.calibration.json`` (OUT less its suffix) too.
        limit: at most so many images, evenly spread; None: all.

    Returns:
        ``summary``; ``depth``, ``depth_uncertainty``, ``normals_uncertainty``: `scale_fit.Fit` as
        JSON, for what student and labels both have; ``confidence``: such a one per task, of the
        uncertainties as they were fitted, if two images or more could judge it; ``images``;
        ``left_out``: those that the student may have learnt from (hardly any of the others, see
            `distill.run_folder.may_hold`).

    Raises:
        UsageError: no labelled image, no task to fit, the images of the training itself, depth that
            nobody measured (`distill.samples`), or ``out`` is ``checkpoint``.
    """
    if Path(out).suffix != ".safetensors":
        raise UsageError(f"out={out}: expected a file name that ends in .safetensors")
    if Path(out).resolve() == Path(checkpoint).resolve():
        raise UsageError(f"out={out}: that is the checkpoint itself; a fit is a new file")
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit}: expected at least one image, or null for all")
    old = load_student(checkpoint)
    model = Student(**{**old.config, "calibration": {}}).eval()
    model.load_state_dict(old.state_dict())
    truth = LabelSet(labels)
    if not truth.keys:
        raise UsageError(f"labels={labels}: no labelled image in it")
    others = _unlearnt(old, truth)
    if not others:
        raise UsageError(
            f"labels={labels}: the very images that {checkpoint} learnt from, where it is better "
            "and surer than elsewhere. Give true labels of other images"
        )
    left_out = len(truth.keys) - len(others)
    keys = [others[i] for i in _evenly(len(others), len(others) if limit is None else limit)]
    both = [t for t in ("depth", "normals") if t in model.tasks and Task(t) in truth.tasks]
    if not both:
        raise UsageError(
            f"labels={labels}: has {', '.join(truth.tasks)}, the student answers "
            f"{', '.join(model.tasks)}; depth or normals in both can be fitted"
        )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    pairs = measured(model, truth, keys)
    found: dict[str, Fit] = {}
    errors: dict[str, list[Pair]] = {}
    if "depth" in pairs:
        found["depth"] = fit_scale(keys, pairs["depth"])
        a, b = found["depth"].values
        errors["depth"] = [
            (logs, np.abs(np.log(np.maximum(a * d + b, 1e-3) / t)))
            for logs, (d, t) in zip(pairs["depth_logs"], pairs["depth"], strict=True)
        ]
    if "normals" in pairs:
        errors["normals"] = pairs["normals"]
    sure: dict[str, Fit] = {}
    for task in errors if model.config["uncertainty"] else ():
        fit = found[f"{task}_uncertainty"] = fit_uncertainty(keys, errors[task])
        fitted_u = [(fitted_uncertainty(logs, fit.values), e) for logs, e in errors[task]]
        right_below = {"depth": math.log(RIGHT_RATIO), "normals": RIGHT_DEG}[task]
        confidence = fit_confidence(keys, fitted_u, right_below=right_below)
        if confidence.images > 1:  # else nothing judged it
            sure[task] = confidence
    kept = {name: list(fit.values) for name, fit in found.items() if fit.kept}
    fitted = Student(**{**old.config, "calibration": kept}).eval()
    fitted.load_state_dict(old.state_dict())
    about: dict[str, Any] = {name: fit.to_json() for name, fit in found.items()}
    about["confidence"] = {t: fit.to_json() for t, fit in sure.items()}
    domain = {"plan_hash": truth.meta["plan_hash"], "images": len(keys)}
    licences = merged(of_student(old.provenance), of_label_set(truth.meta))
    provenance = {"calibration": {"domain": domain, **about}, "licences": licences}
    save_student(fitted, out, old.provenance | provenance)
    shown = "; ".join(
        f"{name} {_shown(name, fit)} ({fit.before:.3g} -> {fit.after:.3g})"
        if fit.images > 1
        else f"{name} as it was (too few images: {fit.images}, two are needed to judge a fit)"
        for name, fit in found.items()
    ) + "".join(
        f"; {task} confidence {'by table' if fit.kept else 'by its law'}, Brier "
        f"{fit.before:.3g} -> {fit.after:.3g}"
        for task, fit in sure.items()
    )
    aside = f"; {left_out} images left out, which it may have learnt from" if left_out else ""
    counts = {"images": len(keys), "left_out": left_out}
    result = {"summary": f"{out}: {shown}{aside}", **counts, **about}
    beside = Path(out).with_suffix(".calibration.json")
    write_atomic(beside, (json.dumps(result, indent=1, sort_keys=True) + "\n").encode())
    return result


def _unlearnt(student: Student, truth: LabelSet) -> list[str]:
    """The keys of ``truth`` that neither the student nor what it began as learnt from."""
    parts = learnt_from(student.provenance)
    if set_identity(truth)["keys"] in [part.get("keys") for part in parts]:
        return []
    learnt = np.zeros(len(truth.keys), bool)
    for part in parts:
        try:
            if "seen" in part:  # students of before 2026-11-29 have none
                learnt |= may_hold(part["seen"], truth.keys)
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"the checkpoint's record of the images that it learnt from is damaged ({error})"
            ) from error
    return [key for key, known in zip(truth.keys, learnt, strict=True) if not known]


def _shown(name: str, fit: Fit[Any]) -> str:
    """A fit in a few characters, in the letters of `distill.scale_fit`."""
    if not fit.kept:
        return "as it was"
    letters = "ab" if name == "depth" else "gp"
    shown = [f"{x}={v:.3g}" for x, v in zip(letters, fit.values, strict=False)]
    others = zip(FACTORS.get(name, ()), fit.values[2:], strict=False)
    return " ".join([*shown, *(f"{factor}^{power:.3g}" for factor, power in others)])


@torch.inference_mode()
def measured(model: Student, truth: LabelSet, keys: list[str]) -> dict[str, list[Any]]:
    """Per image what the fits need, at the student's size, in its canonical camera.

    ``depth``: (depth, true depth) [n]; ``depth_logs``: `student.model.log_factors` of its
    uncertainty [n,K]; ``normals``: (those of its uncertainty [n,K], angle in degrees [n]). Only for
    tasks that the student has; images without truth give empty arrays.
    """
    frame = Frame(
        height=model.config["height"],
        width=model.config["width"],
        canonical_focal_px=model.canonical_focal_px,
        tasks=tuple(t for t in model.tasks if t in ("depth", "normals")),
    )
    pairs: dict[str, list[Any]] = {}
    for key in keys:
        sample = make_sample(
            compact(truth.lesson(key, frame.tasks), frame), frame, rng=None, mode="none"
        )
        answer = model(torch.from_numpy(sample["image"])[None])
        said = {k: v[0].float().numpy() for k, v in answer.items()}
        logs = {}
        for name in (n for n in FACTORS if n in answer):
            maps = log_factors(name, answer).values()
            logs[name] = torch.cat(list(maps), dim=1)[0].movedim(0, -1).double().numpy()
        if "depth" in said:
            if sample["depth_space"]:
                raise UsageError(
                    f"labels={truth.path}: its depth was brought to metres by an assumed range "
                    "(anchor=range); a scale is fitted to measured depth only"
                )
            t = sample["depth"][0]
            at = _spread(np.isfinite(t) & (said["sky"][0] <= 0))  # a sky has no depth
            pairs.setdefault("depth", []).append((said["depth"][0][at], t[at]))
            of_depth = logs.get("depth_uncertainty", said["depth"][0][..., None])
            pairs.setdefault("depth_logs", []).append(of_depth[at])
        if "normals_uncertainty" in said:
            angle, _ = angles_deg(*(v["normals"].transpose(1, 2, 0) for v in (said, sample)))
            at = _spread(~np.isnan(angle))
            pair: Pair = (logs["normals_uncertainty"][at], angle[at])
            pairs.setdefault("normals", []).append(pair)
    return pairs


def _spread(mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Indices of at most `POINTS` pixels of a mask, evenly spread over it."""
    flat = np.flatnonzero(mask)
    return np.unravel_index(flat[_evenly(len(flat), POINTS)], mask.shape)


def _evenly(count: int, most: int) -> np.ndarray:
    """At most ``most`` of the numbers below ``count``, evenly spread."""
    kept = min(count, most)
    return np.arange(kept) * count // max(kept, 1)
