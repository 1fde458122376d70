"""Which images the report of `distill verify` shows, worst first, and their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import Any

import numpy as np

from export import pictures
from export.answers import INPUTS, load
from export.budgets import LABEL_TASKS
from export.delivery import REFERENCE
from export.judge import Judge
from export.letterbox import Letterbox
from export.parity import gap
from teacher.label import Label, Task
from teacher.metrics import angles_deg
from teacher.score import HEADLINE

PICTURED_ARTEFACTS = 2
NUMBERS = {
    "depth.abs_rel": "AbsRel",
    "normals.mean_deg": "normals °",
    "semantic.pixel_accuracy": "pixel accuracy",
}
NAMES = {REFERENCE: "student (torch)", "teacher": "teacher"}


def main_name(result: Mapping[str, Any]) -> str:
    """Who the pictures are about: the reference, or without one the first that ran."""
    return result["reference"] or next(iter(result["scores"]), "")


def worst_first(result: Mapping[str, Any]) -> list[str]:
    """Keys: those that missed a budget, then each task's worst, each task's second worst, ...

    By the student's error against the first reference; instances have no number there: by how far
    in pixels an artefact's ``offset`` is from the student's.
    """
    missed = [f["image"] for f in result["findings"] if f["image"] in result["keys"]]
    reports = list(result["scores"].get(main_name(result), {}).values())
    rows = reports[0]["rows"] if reports else []
    tables: list[dict[str, float]] = []
    for task in LABEL_TASKS:
        number, _, large_is_bad = HEADLINE[Task(task)]
        known = {r["key"]: r[task][number] for r in rows if task in r}
        way = 1 if large_is_bad else -1
        tables.append({key: way * value for key, value in known.items() if value is not None})
    gaps: dict[str, float] = {}
    for told in result["artefacts"].values():
        for key, row in told["parity"].get("offset", {"rows": {}})["rows"].items():
            gaps[key] = max(row["p999"], gaps.get(key, 0.0))
    orders = [sorted(t, key=t.__getitem__, reverse=True) for t in (*tables, gaps)]
    ranked = [key for rank in zip_longest(*orders) for key in rank if key is not None]
    return list(dict.fromkeys([*missed, *ranked, *result["keys"]]))


def _figure(picture: np.ndarray, caption: str) -> str:
    return (
        f'<figure><img src="{pictures.data_uri(picture)}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _scale(name: str, left: str, right: str) -> str:
    bar = f'<i style="background:{pictures.css_gradient(name)}"></i>'
    return f'<span class="scale">{escape(left)} {bar} {escape(right)}</span>'


def image_section(key: str, result: Mapping[str, Any], judge: Judge) -> str:
    """The HTML of one image: a row of pictures per task."""
    labels = {r.name: r[key] for r in judge.references if r.key_of.get(key)}
    artefacts = list(result["artefacts"])
    refused = {f["artefact"] for f in result["findings"]}
    artefacts.sort(key=lambda name: name not in refused)
    shown = artefacts[:PICTURED_ARTEFACTS]
    main = next(iter(labels.values()))
    numbers = []
    for against, report in result["scores"].get(main_name(result), {}).items():
        row: dict = next((r for r in report["rows"] if r["key"] == key), {})
        for metric, heading in NUMBERS.items():
            block, number = metric.split(".")
            if row.get(block, {}).get(number) is not None:
                numbers.append(f"{heading} {row[block][number]:.3g} vs {against}")
    rows = "".join(
        f'<div class="row">{"".join(figures)}</div>{legend}'
        for task in judge.tasks
        if task in labels_tasks(labels)
        for figures, legend in [_task(task, key, labels, shown, judge, result["reference"])]
    )
    seen = load(judge.folder, INPUTS, key)["image"]
    first = _figure(main.image, f"image {main.image.shape[1]}x{main.image.shape[0]}") + _figure(
        seen, f"as the artefacts see it {seen.shape[1]}x{seen.shape[0]}"
    )
    head = f"<b>{escape(key)}</b> <small>student: {escape('; '.join(numbers))}</small>"
    return f'<div class="image">{head}<div class="row">{first}</div>{rows}</div>'


def labels_tasks(labels: Mapping[str, Label]) -> set[str]:
    """The tasks that can be painted beside a label: those that one of them has."""
    return {str(task) for label in labels.values() for task in label.values} & set(LABEL_TASKS)


def _task(
    task: str,
    key: str,
    labels: Mapping[str, Label],
    artefacts: Sequence[str],
    judge: Judge,
    reference: str,
) -> tuple[list[str], str]:
    """Figures of one task: references, student, artefacts, student's error, artefacts' gaps."""
    known = {n: label.values[Task(task)] for n, label in labels.items() if task in label.values}
    size_label = next(iter(labels.values()))
    names = [reference, *artefacts] if reference else list(artefacts)
    everything = {n: judge.answers_for(n, size_label) for n in names}
    answers = {n: a[task] for n, a in everything.items() if task in a}
    near_m, far_m = pictures.depth_range(
        next(iter((known or answers).values())) if task == "depth" else np.empty(0)
    )

    def paint(values: np.ndarray) -> np.ndarray:
        if task == "depth":
            return pictures.depth_picture(values, near_m, far_m)
        return (pictures.normals_picture if task == "normals" else pictures.classes_picture)(values)

    figures = [_figure(paint(v), f"{task}: {name}") for name, v in known.items()]
    figures += [_figure(paint(v), f"{task}: {NAMES.get(n, n)}") for n, v in answers.items()]
    for name, label in labels.items():
        if name in known and answers:
            who = next(iter(answers))
            error, top = error_map(task, judge.answers_for(who, label)[task], known[name])
            title = f"{NAMES.get(who, who)}: error against {name}"
            figures.append(_figure(pictures.share_picture(error, top), title))
    for name in artefacts:
        if name in answers and reference in answers:
            picture = _gap_picture(task, key, name, judge, reference)
            figures.append(_figure(picture, f"{name} − student"))
    legend = {
        "depth": _scale(pictures.DEPTH_MAP, f"{near_m:.2g} m", f"{far_m:.2g} m (log)")
        + _scale(pictures.ERROR_MAP, "error 0", "50 %"),
        "normals": _scale(pictures.ERROR_MAP, "error 0°", "60°"),
        "semantic": _scale(pictures.ERROR_MAP, "right", "wrong"),
    }[task]
    gap_unit = {"depth": "relative", "normals": "degrees", "semantic": "flip"}[task]
    return figures, legend + _scale(pictures.ERROR_MAP, "artefact − student 1e-7", f"1 {gap_unit}")


def error_map(task: str, found: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, float]:
    """Per-pixel error [H, W] (NaN where nothing is known) and the value at the top of the scale."""
    with np.errstate(invalid="ignore", divide="ignore"):
        if task == "depth":
            error = np.abs(found - expected) / expected
            error[np.isposinf(found) != np.isposinf(expected)] = np.inf  # sky taken for ground
            error[np.isposinf(found) & np.isposinf(expected)] = 0
            error[np.isnan(expected)] = np.nan
            return error, 0.5
        if task == "normals":
            return angles_deg(found, expected)[0], 60.0
    unknown = expected == np.iinfo(expected.dtype).max
    return np.where(unknown, np.nan, found != expected), 1.0


def _gap_picture(task: str, key: str, name: str, judge: Judge, reference: str) -> np.ndarray:
    """How far the artefact is from the student at every pixel, log scale from 1e-7 to 1."""
    found, expected = (load(judge.folder, n, key)[task] for n in (name, reference))
    distance = gap(task, found[None], expected[None])[0]
    main = judge.references[0][key] if judge.references[0].key_of.get(key) else None
    if main is not None:
        distance = Letterbox.fit(main.image.shape[:2], distance.shape).back(distance)
    with np.errstate(divide="ignore"):
        share = (np.log10(np.maximum(distance, 1e-7)) + 7) / 7
    return pictures.share_picture(share, 1.0)
