"""The report of `distill verify`: one Markdown text and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import Any

import numpy as np

from export import pictures
from export.answers import INPUTS, load
from export.budgets import LABEL_TASKS, lookup
from export.judge import Judge
from export.letterbox import Letterbox
from export.onnx_graph import REFERENCE
from export.parity import TASK_OF, gap
from export.readiness import TARGETS
from teacher.label import Label, Task
from teacher.metrics import angles_deg
from teacher.score import HEADLINE

PICTURED_IMAGES, PICTURED_ARTEFACTS = 12, 2
MISSED = "MISSED"
COLUMNS = {  # metric -> heading, format
    "depth.delta1": ("depth δ1 ↑", "{:.3f}"),
    "depth.abs_rel": ("AbsRel ↓", "{:.3f}"),
    "depth_aligned.delta1": ("δ1 scaled ↑", "{:.3f}"),
    "depth_aligned.abs_rel": ("AbsRel scaled ↓", "{:.3f}"),
    "depth.boundary_f1": ("boundary F1 ↑", "{:.3f}"),
    "sky.iou": ("sky IoU ↑", "{:.3f}"),
    "normals.mean_deg": ("normals ° ↓", "{:.1f}"),
    "normals.within_11_25": ("< 11.25° ↑", "{:.3f}"),
    "semantic.miou": ("mIoU ↑", "{:.3f}"),
}
NUMBERS = {
    "depth.abs_rel": "AbsRel",
    "normals.mean_deg": "normals °",
    "semantic.pixel_accuracy": "pixel accuracy",
}
NAMES = {REFERENCE: "student (torch)", "teacher": "teacher"}
Row = Sequence[str]


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _reports(result: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Who, against whom, and the scores: by reference, then teacher, student, artefacts."""
    reports = [
        (who, against, report)
        for who, by_reference in result["scores"].items()
        for against, report in by_reference.items()
    ]
    order = {"teacher": 0, REFERENCE: 1}
    return sorted(reports, key=lambda item: (item[1], order.get(item[0], 2)))


def score_table(result: Mapping[str, Any]) -> list[Row]:
    """Heading and rows: who, against whom, the metrics that anybody has."""
    reports = _reports(result)
    used = [m for m in COLUMNS if any(lookup(r, m) is not None for _, _, r in reports)]
    rows: list[Row] = [["who", "against", *(COLUMNS[m][0] for m in used), "images"]]
    for who, against, report in reports:
        numbers = [_cell(lookup(report, m), COLUMNS[m][1]) for m in used]
        rows.append([NAMES.get(who, who), against, *numbers, str(report["images"])])
    return rows


def class_table(result: Mapping[str, Any]) -> list[Row]:
    """Heading and rows: the IoU of every class that occurs, for everybody; empty without classes.

    In order of the reference's pixels: the truth's, where there is one.
    """
    told = [
        (f"{NAMES.get(who, who)} against {against}", report["set"]["semantic"]["per_class"])
        for who, against, report in _reports(result)
        if "semantic" in report["set"]
    ]
    if not told:
        return []
    pixels = {name: row["truth_pixels"] for name, row in told[-1][1].items()}
    names = dict.fromkeys(
        name for _, table in told for name, row in table.items() if row["iou"] is not None
    )
    rows: list[Row] = [["class", "pixels", *(who for who, _ in told)]]
    for name in sorted(names, key=lambda n: -pixels.get(n, 0)):
        scores = [_cell(table.get(name, {}).get("iou"), "{:.3f}") for _, table in told]
        rows.append([name, str(pixels.get(name, "–")), *scores])
    return rows


def parity_table(result: Mapping[str, Any]) -> list[Row]:
    """Heading and rows: artefact, output, measures against budgets, flips at ties, verdict."""
    rows: list[Row] = [["artefact", "output", "unit", "p99.9", "max", "mean", "itself"]]
    rows[0] = [*rows[0], "budgets of these four", "flips at ties", "verdict"]
    missed = {(f["artefact"], f["measure"].split(" ")[0]) for f in result["findings"]}
    for name, table in result["artefacts"].items():
        for output, summary in table["parity"].items():
            own = list(table["consistency"].get(output, {"": 0.0}).values())
            itself = None if None in own else max(own)
            values = [summary.get(m) for m in ("p999", "max", "mean")]
            verdict = MISSED if (name, output) in missed else "ok"
            cells = [_cell(v, "{:.1e}") for v in (*values, itself)]
            precision = result["runs"][name]["precision"]
            limits = result["budgets"][TASK_OF[output]][precision]["parity"][output]
            allowed = " ".join(
                f"{limits[m]:g}" if m in limits else "–"
                for m in ("p999", "max", "mean", "consistency")
            )
            ties = _cell(summary.get("tie_flips"), "{:.1e}")
            rows.append([name, output, summary["unit"], *cells, allowed, ties, verdict])
    return rows


def strata_rows(result: Mapping[str, Any]) -> list[Row]:
    """Heading and rows: artefact, metric, its worst stratum and its worst image."""
    rows: list[Row] = [["artefact", "worst", "metric", "loss", "where", "verdict"]]
    bad = {
        (f["artefact"], f["check"], f["measure"].split(" ")[2])
        for f in result["findings"]
        if f["check"] in ("strata", "image")
    }
    for name, table in result["artefacts"].items():
        for title, told in table.get("strata", {}).items():
            kind, _, metric = title.removeprefix("worst ").partition(": ")
            part = "strata" if kind == "stratum" else "image"
            verdict = MISSED if (name, part, metric.split(" ")[0]) in bad else "ok"
            rows.append([name, kind, metric, _cell(told["loss"], "{:.2g}"), told["where"], verdict])
    return rows


def readiness_rows(result: Mapping[str, Any]) -> list[Row]:
    """Heading and rows: whether each TensorRT takes each graph (`export.readiness`)."""
    rows: list[Row] = [["artefact", *(f"TensorRT {t}" for t in TARGETS), "why not"]]
    for name, told in result.get("tensorrt", {}).items():
        why = dict.fromkeys(reason for t in TARGETS for reason in told[t]["why"])
        rows.append([name, *(told[t]["takes"] for t in TARGETS), "; ".join(why)])
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """The tables and findings as Markdown."""

    def table(rows: list[Row]) -> str:
        lines = ["| " + " | ".join(r) + " |" for r in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])

    parts = [
        f"# Verification of {result['export']}",
        result["summary"],
        "## Scores, teacher to artefact, one ruler",
        table(score_table(result)),
        "## Artefacts against the torch student",
        table(parity_table(result)),
        "## Where they lose most: edges, far, dark, and single images",
        table(strata_rows(result)),
        "## Would TensorRT take the graphs (published operator tables)",
        table(readiness_rows(result)),
    ]
    if classes := class_table(result):
        parts[4:4] = ["## IoU of each class", table(classes)]
    if result["findings"]:
        parts += ["## Missed budgets", "\n".join(f"- {f['text']}" for f in result["findings"])]
    protocol = ", ".join(f"{k} {v}" for k, v in result["protocol"].items())
    parts.append(f"Protocol: {protocol}. Labels: {result['labels']}.")
    return "\n\n".join(parts) + "\n"


# -- HTML ------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1500px;
       padding: 0 1rem; color: #1c1e21; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; text-align: right;
  border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; }
.wide { overflow-x: auto; }
.verdict { padding: .7rem 1rem; border-left: 6px solid #1a7f37; background: #eaf6ec;
  overflow-wrap: anywhere; }
.verdict.bad { border-color: #b3261e; background: #fcebea; } .missed { color: #b3261e;
  font-weight: 600; } li { overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 6px; margin: 4px 0; }
figure { margin: 0; width: 190px; } figure img { width: 100%; display: block; }
figcaption { font-size: 12px; color: #444; }
.scale { font-size: 12px; display: inline-flex; align-items: center; gap: .4rem;
  margin-right: 1.5rem; } .scale i { width: 140px; height: 11px; display: inline-block; }
.image { border-top: 1px solid #ccc; padding: .6rem 0; } small { color: #555; }
"""


def _html_table(rows: list[Row]) -> str:
    def line(cells: Row, tag: str) -> str:
        return "".join(
            f"<{tag}{' class=missed' if c == MISSED else ''}>{escape(c)}</{tag}>" for c in cells
        )

    body = "".join(f"<tr>{line(r, 'td')}</tr>" for r in rows[1:])
    return f"<div class=wide><table><tr>{line(rows[0], 'th')}</tr>{body}</table></div>"


def _figure(picture: np.ndarray, caption: str) -> str:
    return (
        f'<figure><img src="{pictures.data_uri(picture)}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _scale(name: str, left: str, right: str) -> str:
    bar = f'<i style="background:{pictures.css_gradient(name)}"></i>'
    return f'<span class="scale">{escape(left)} {bar} {escape(right)}</span>'


def html(result: Mapping[str, Any], judge: Judge) -> str:
    """The whole page: verdict, tables, then pictures, worst images first."""
    bad = " bad" if result["exit"] else ""
    findings = "".join(f"<li>{escape(f['text'])}</li>" for f in result["findings"])
    keys = worst_first(result)[:PICTURED_IMAGES]
    images = "".join(_image(key, result, judge) for key in keys)
    classes = class_table(result)
    runs = "".join(
        f"<li>{escape(n)}: {escape(str(r.get('runtime', r.get('error'))))}, sha256 "
        f"{r['sha256'][:16]}…</li>"
        for n, r in result["runs"].items()
    )
    protocol = ", ".join(f"{k} {v}" for k, v in result["protocol"].items())
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>distill verify: {escape(result["export"])}</title><style>{STYLE}</style></head><body>
<h1>Verification of {escape(result["export"])}</h1>
<p class="verdict{bad}">{escape(result["summary"])}</p>
<h2>Scores: teacher, student and artefacts under one ruler</h2>{_html_table(score_table(result))}
{f"<h2>IoU of each class</h2>{_html_table(classes)}" if classes else ""}
<h2>Artefacts against the torch student, and against themselves</h2>
{_html_table(parity_table(result))}
<h2>Where they lose most: edges, far, dark, and single images</h2>
{_html_table(strata_rows(result))}
<h2>Would TensorRT take the graphs (published operator tables)</h2>
{_html_table(readiness_rows(result))}
{f"<h2>Missed budgets</h2><ul>{findings}</ul>" if findings else ""}
<h2>Pictures: {len(keys)} of {len(result["keys"])} images, worst first</h2>
<p><small>Depth and normals: black is unknown, white is sky. Errors and differences: grey is
unknown.</small></p>{images}
<h2>How it was measured</h2>
<p>{escape(protocol)}. Labels: {escape(result["labels"])}.</p><ul>{runs}</ul>
</body></html>
"""


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


def _image(key: str, result: Mapping[str, Any], judge: Judge) -> str:
    """One image: a row of pictures per task."""
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
