"""``report.html`` of a run: what was trained on what, curves, and the worst held-out cases.

One file without scripts or network: curves are SVG, pictures are embedded. It is written anew after
every validation, so that it can be looked at while the lesson goes on.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from student.checkpoint import write_atomic

REPORT = "report.html"
POINTS = 400  # of a curve that are drawn
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a", "#0a7ea4")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:70rem;padding:1.5rem;
color:#1f2328;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #d0d7de}
table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left;
vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}.charts{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(20rem,1fr))}
figure{margin:0}svg{width:100%;height:auto}
figcaption,.dim{color:#57606a;font-size:.85rem}img{max-width:100%;image-rendering:pixelated}
.case{margin:.8rem 0}.bad{color:#d1242f}code{font-size:.85rem;word-break:break-all}
"""


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a log of numbers; an unreadable number is NaN, a missing file no rows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: _number(v) for k, v in row.items() if k} for row in csv.DictReader(file)]


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def curve(rows: Sequence[Mapping[str, float]], names: Sequence[str], *, title: str) -> str:
    """An SVG chart of columns ``names`` over ``step``; empty without a finite number.

    Long logs are drawn as the median of equal stretches.
    """
    lines = [(name, _thinned(rows, name)) for name in names]
    lines = [(name, points) for name, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    low, high = min(ys), max(ys)
    span_y, span_x = (high - low) or 1.0, (max(xs) - min(xs)) or 1.0
    width, height, left, bottom = 480, 230, 52, 24
    parts = []
    for share in (0.0, 0.5, 1.0):
        y, value = 8 + (1 - share) * (height - bottom - 8), low + share * span_y
        parts.append(
            f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eaeef2"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>'
        )
    for share in (0.0, 1.0):
        anchor = "start" if share == 0 else "end"
        x = left + share * (width - left)
        parts.append(
            f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">'
            f"{min(xs) + share * span_x:.0f}</text>"
        )
    for (_, points), colour in zip(lines, COLOURS * 3, strict=False):
        drawn = " ".join(
            f"{left + (x - min(xs)) / span_x * (width - left):.1f},"
            f"{8 + (1 - (y - low) / span_y) * (height - bottom - 8):.1f}"
            for x, y in points
        )
        if len(points) == 1:
            at = drawn.split(",")
            parts.append(f'<circle cx="{at[0]}" cy="{at[1]}" r="3" fill="{colour}"/>')
        parts.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
    legend = ", ".join(
        f'<span style="color:{colour}">{html.escape(name)} {points[-1][1]:.4g}</span>'
        for (name, points), colour in zip(lines, COLOURS * 3, strict=False)
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" font-size="11" fill="#57606a" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
        f"<figcaption>{html.escape(title)}: {legend}</figcaption></figure>"
    )


def _tick(value: float) -> str:
    """A number that fits beside a chart."""
    text = f"{value:.3g}"
    return text if len(text) < 8 else f"{value:.1e}"


def _thinned(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) <= POINTS:
        return points
    pieces = np.array_split(np.array(points), POINTS)
    return [(float(p[-1, 0]), float(np.median(p[:, 1]))) for p in pieces]


def _charts(folder: Path) -> str:
    steps, validations = read_rows(folder / "metrics.csv"), read_rows(folder / "validation.csv")
    seen = list(steps[-1]) if steps else []
    terms = [n for n in seen if n not in ("step", "total", "grad_norm", "lr")]
    charts = [curve(steps, ["total"], title="training loss")]
    for task in ("depth", "normals", "semantic", "instances"):
        own = [n for n in terms if n.startswith(task) or (task == "depth" and n == "sky")]
        charts.append(curve(steps, own, title=f"terms of {task}"))
    charts.append(curve(steps, [n for n in terms if n == "features"], title="features"))
    charts.append(curve(steps, ["grad_norm"], title="gradient norm before clipping"))
    charts.append(curve(steps, ["lr"], title="learning rate"))
    names = [n for n in (validations[-1] if validations else ()) if n != "step"]
    charts += [curve(validations, [name], title=f"held-out {name}") for name in names]
    return "".join(charts)


def embedded(picture: np.ndarray) -> str:
    """uint8 [H, W, 3] as an <img> of its own."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'


def _cases(worst: Sequence[Mapping[str, Any]]) -> str:
    if not worst:
        return '<p class="dim">No held-out images.</p>'
    parts = []
    for case in worst:
        head = f"{case['task']}: {case['number']} {case['value']:.4g}"
        parts.append(
            f'<div class="case"><b>{html.escape(head)}</b> <code>{html.escape(case["key"])}</code>'
            f"<br>{embedded(case['picture'])}</div>"
        )
    return "".join(parts)


def _table(values: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        return html.escape(value if isinstance(value, str) else json.dumps(value))

    rows = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{shown(v)}</td></tr>" for k, v in values.items()
    )
    return f"<table>{rows}</table>"


def _sources(identity: Mapping[str, Any]) -> str:
    rows = ["<tr><th>label set</th><th>images</th><th>weight</th><th>teacher</th></tr>"]
    weights = identity.get("weights") or [None] * len(identity["data"])
    for number, (data, weight) in enumerate(zip(identity["data"], weights, strict=True), 1):
        teacher = data.get("teacher") or {}
        name = teacher.get("name", "") if isinstance(teacher, Mapping) else str(teacher)
        share = "by size" if weight is None else f"{weight:g}"
        rows.append(
            f"<tr><td>{number}: <code>{html.escape(data['plan_hash'][:12])}</code></td>"
            f'<td class="n">{data["images"]}</td><td class="n">{share}</td>'
            f"<td>{html.escape(str(name))}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def write_report(
    folder: Path,
    identity: Mapping[str, Any],
    *,
    worst: Sequence[Mapping[str, Any]],
    skipped: int,
    result: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.html`` from a run's logs.

    Args:
        folder: the run's folder, with ``metrics.csv`` and ``validation.csv``.
        identity: what the run is (`distill.train`).
        worst: cases of the last validation (`distill.journal.validate`).
        skipped: steps that were not finite so far.
        result: of a finished run.
    """
    last = (read_rows(folder / "metrics.csv") or [{}])[-1]
    done = int(last.get("step", 0))
    trainer = identity["trainer"]
    state = result["summary"] if result else f"step {done} of {trainer['steps']}"
    if not result and trainer.get("minutes"):
        state += f" at most, in {trainer['minutes']:g} minutes at most"
    warning = f'<p class="bad">{skipped} step(s) skipped, not finite.</p>' if skipped else ""
    numbers = _table(result["validation"]) if result else ""
    body = (
        f"<h1>Student of {html.escape(folder.resolve().name)}</h1>"
        f"<p>{html.escape(str(state))}</p>{warning}"
        f"<h2>Curves</h2><div class=charts>{_charts(folder)}</div>"
        f"<h2>Worst held-out cases</h2>"
        '<p class="dim">Image, answer, label. Grey is unknown.</p>'
        f"{_cases(worst)}"
        f"<h2>Held-out numbers</h2>{numbers}"
        f"<h2>Taught by</h2>{_sources(identity)}"
        f"<h2>Student</h2>{_table(identity['student'])}<h2>Trainer</h2>{_table(identity['trainer'])}"
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>distill train</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>"
    )
    path = folder / REPORT
    write_atomic(path, page.encode())
    return path
