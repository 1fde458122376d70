"""The report of `distill verify`: one Markdown text and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from export.budgets import lookup
from export.delivery import REFERENCE
from export.judge import Judge
from export.parity import TASK_OF
from export.readiness import TARGETS
from export.report_pictures import NAMES, image_section, worst_first

PICTURED_IMAGES = 12
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
    """Heading and rows: artefact, output, measures against budgets, what is at ties, verdict."""
    rows: list[Row] = [["artefact", "output", "unit", "p99.9", "max", "mean", "itself"]]
    rows[0] = [*rows[0], "budgets of these four", "at ties", "verdict"]
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


def sections(result: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """Title and table of all that there is to tell: a student alone has no artefact's tables."""
    every = [
        ("Scores: teacher, student and artefacts under one ruler", score_table(result)),
        ("IoU of each class", class_table(result)),
        ("Artefacts against the torch student, and against themselves", parity_table(result)),
        ("Where they lose most: edges, far, dark, and single images", strata_rows(result)),
        ("Would TensorRT take the graphs (published operator tables)", readiness_rows(result)),
    ]
    return [(title, rows) for title, rows in every if len(rows) > 1]


def markdown(result: Mapping[str, Any]) -> str:
    """The tables and findings as Markdown."""

    def table(rows: list[Row]) -> str:
        lines = ["| " + " | ".join(r) + " |" for r in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])

    parts = [f"# Verification of {result['export']}", result["summary"]]
    for title, rows in sections(result):
        parts += [f"## {title}", table(rows)]
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


def html(result: Mapping[str, Any], judge: Judge) -> str:
    """The whole page: verdict, tables, then pictures, worst images first."""
    bad = " bad" if result["exit"] else ""
    findings = "".join(f"<li>{escape(f['text'])}</li>" for f in result["findings"])
    keys = worst_first(result)[:PICTURED_IMAGES]
    images = "".join(image_section(key, result, judge) for key in keys)
    tables = "".join(
        f"<h2>{escape(title)}</h2>{_html_table(rows)}\n" for title, rows in sections(result)
    )
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
{tables}{f"<h2>Missed budgets</h2><ul>{findings}</ul>" if findings else ""}
<h2>Pictures: {len(keys)} of {len(result["keys"])} images, worst first</h2>
<p><small>Depth and normals: black is unknown, white is sky. Errors and differences: grey is
unknown.</small></p>{images}
<h2>How it was measured</h2>
<p>{escape(protocol)}. Labels: {escape(result["labels"])}.</p><ul>{runs}</ul>
</body></html>
"""
