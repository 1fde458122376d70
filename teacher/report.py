"""`distill inspect`: an HTML report of a label set that opens from disk, without any server.

A folder: ``index.html`` with its scripts, and ``data/``: ``meta.js`` and ``rows.js`` (the index,
by columns), ``part-00000.js`` ... (small pictures of `PART` samples each, loaded when scrolled
into view; data stands in scripts because a browser refuses to fetch files beside a local page).
Nothing is loaded from a network. The page's marks are saved as a selection file
(`teacher.jobs.selection`); the label set itself is never touched.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from teacher.errors import UsageError
from teacher.jobs.commit import OWNER, replace_atomically, tidy
from teacher.jobs.selection import identity
from teacher.jobs.threads import ahead
from teacher.label import LabelError, Task
from teacher.report_planes import plane_names, planes
from teacher.store import DamagedLabelSetError, LabelSet, decode_members, sealed_shards

FORMAT = "dense-report 1"
PART = 16  # samples per script: about a megabyte
PAGE = ("style.css", "core.js", "planes.js", "panel.js", "list.js", "app.js", "index.html")
RESULT = "report.json"
MARKER = "data/meta.js"  # the first file of a report, and there for as long as it is ours
OURS = re.compile(
    "|".join([*map(re.escape, (*PAGE, RESULT)), r"data/((meta|rows|start)|part-\d{5,})\.js"])
)
ABOUT_CHARS = 6000  # provenance shown of one sample
# columns of the index: (ending, unit, which end is bad)
KINDS = (
    ("_uncertainty", "", "high"),
    ("_residual", "", "high"),
    ("_coverage", "share", "low"),
    ("_share", "share", "high"),
    ("_confidence", "", "low"),
)
UNITS = {"depth_uncertainty": "relative", "normals_uncertainty": "deg"}
NOT_COLUMNS = {"key", "uri", "state", "reason", "shard", "offset", "size", "duplicate_of"}
FIRST = ("depth_uncertainty", "normals_uncertainty", "semantic_uncertainty", "alignment_residual")


def column_facts(name: str) -> dict[str, str]:
    """How a column of the index is shown: name, label, unit, and which end is the bad one."""
    unit, worst = next(((u, w) for end, u, w in KINDS if name.endswith(end)), ("", "high"))
    unit = UNITS.get(name, unit)
    text = name.replace("_m_p", " p").replace("_", " ")
    if "_m_p" in name:
        unit = "m"
    return {"name": name, "label": text, "unit": unit, "worst": worst}


def numeric_columns(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The columns of the labelled rows that hold numbers, those that tell good from bad first."""
    names = list(dict.fromkeys(n for row in rows for n in row if n not in NOT_COLUMNS))
    names = [
        n
        for n in names
        if any(isinstance(r.get(n), int | float) for r in rows)
        and not any(isinstance(r.get(n), str | dict | list) for r in rows)
    ]

    def rank(name: str) -> tuple[int, str]:
        place = next((i for i, (end, _, _) in enumerate(KINDS) if name.endswith(end)), len(KINDS))
        return (place, "") if name not in ("height", "width") else (len(KINDS) + 1, name)

    return [column_facts(n) for n in sorted(names, key=rank)]


def worst_first(
    rows: Sequence[dict[str, Any]], columns: Sequence[dict[str, str]]
) -> tuple[list[dict[str, Any]], dict[str, str] | None]:
    """Rows in the order in which the report opens, and the column that decided it."""
    by_name = {c["name"]: c for c in columns}
    column = next((by_name[n] for n in FIRST if n in by_name), None)
    column = column or next((c for c in columns if c["name"].endswith("_coverage")), None)
    if column is None:
        return list(rows), None
    name, sign = column["name"], -1 if column["worst"] == "high" else 1

    def place(row: dict[str, Any]) -> tuple[bool, float]:
        value = row.get(name)
        return (value is None, sign * (value or 0.0))

    return sorted(rows, key=place), column


def script(call: str, *values: Any) -> bytes:
    """A line of JavaScript that hands plain values to the page."""
    texts = [json.dumps(v, separators=(",", ":"), allow_nan=False) for v in values]
    return f"report.{call}({','.join(texts)});\n".encode()


def sample_of(row: dict[str, Any], *, labels: LabelSet, side_px: int) -> dict[str, Any]:
    """What the page shows of one sample; a damaged one says so instead of ending the report."""
    key = row["key"]
    try:
        label = decode_members(key, labels.members(key))
        pictures = planes(label, side_px=side_px)
    except (DamagedLabelSetError, LabelError, ValueError, KeyError, OSError) as error:
        return {"damaged": f"{type(error).__name__}: {error}"[:500]}
    about = json.dumps(label.provenance, indent=1, ensure_ascii=False)
    if len(about) > ABOUT_CHARS:
        about = about[:ABOUT_CHARS] + f"\n... {len(about) - ABOUT_CHARS} more characters"
    order = plane_names(label)
    return {
        "planes": {name: pictures[name] for name in order},
        "camera": label.camera.to_json(),
        "about": about,
    }


def common_range(ends: Sequence[tuple[float, float]]) -> list[float]:
    """The range of most pictures, for one colour scale: 5 % and 95 % of their own ends."""
    low, high = np.array(ends, float).T
    return [float(np.percentile(low, 5)), float(np.percentile(high, 95))]


def set_facts(labels: LabelSet, counts: Counter[str]) -> list[list[str]]:
    """Name and text of what the label set says of itself."""
    meta = labels.meta
    teacher = meta.get("teacher", {})
    sealed = len(sealed_shards(labels.path)) - len(labels.damaged_seals)
    facts = [
        ["folder", str(labels.path)],
        ["plan", meta["plan_hash"]],
        ["tasks", ", ".join(map(str, labels.tasks))],
        ["inputs", f"{sum(counts.values())}: " + ", ".join(f"{n} {s}" for s, n in counts.items())],
        ["shards", f"{sealed} sealed of {meta['shards']}"],
        ["damaged seals, left out", "\n".join(labels.damaged_seals.values())],
        ["teacher", str(teacher.get("name", "not stated"))],
        ["licences", json.dumps(meta.get("licences", "not stated"), indent=1, ensure_ascii=False)],
        ["teacher, in full", json.dumps(teacher, indent=1, ensure_ascii=False)],
    ]
    return [[name, text] for name, text in facts if text]


def parse_out(out: str | None, labels: Path) -> Path:
    """The report's folder: new, empty, or an earlier report, which is made anew.

    A report is known by its `MARKER`. Only files that a report has are deleted, never a tree.
    """
    folder = Path(out) if out else labels / "report"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder}: found a file, expected a folder for the report.")
    data, marker = folder / "data", folder / MARKER
    paths = [p for p in (*folder.glob("*"), *data.glob("*")) if not OWNER.fullmatch(p.name)]
    found = {p.relative_to(folder).as_posix(): p for p in paths if p != data or not data.is_dir()}
    strangers = sorted(n for n, p in found.items() if not (OURS.fullmatch(n) and p.is_file()))
    begin = script("meta", {"format": FORMAT})
    head = begin[: begin.rindex(b" ")]  # of any version
    if strangers or (found and not (MARKER in found and marker.read_bytes().startswith(head))):
        raise UsageError(
            f"out={folder}: found {(strangers or sorted(found))[:3]}, expected a new or empty "
            f"folder, or an earlier report ({MARKER} tells), which is then made anew. Choose "
            "another out=."
        )
    data.mkdir(parents=True, exist_ok=True)
    replace_atomically(marker, begin)
    for name in sorted(found.keys() - {MARKER}, key=lambda n: n != "index.html"):
        found[name].unlink()
    tidy(folder)
    return folder


def write_parts(
    folder: Path, rows: Sequence[dict[str, Any]], labels: LabelSet, *, side_px: int, threads: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write all parts; yields (key, sample) in order so that the caller can count."""
    make = functools.partial(sample_of, labels=labels, side_px=side_px)
    part: list[dict[str, Any]] = []
    with ThreadPoolExecutor(threads) as pool:
        samples = ahead(rows, make, pool, 4 * threads)
        bar = tqdm(samples, total=len(rows), desc="inspect", unit="img", mininterval=1)
        for number, (row, sample) in enumerate(zip(rows, bar, strict=True)):
            part.append(sample)
            yield row["key"], sample
            if len(part) == PART or number + 1 == len(rows):
                path = folder / "data" / f"part-{number // PART:05d}.js"
                path.write_bytes(script("part", number // PART, part))
                part = []


def page_rows(
    rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], columns: Sequence[dict]
) -> bytes:
    """``rows.js``: the labelled rows by columns, the rejected and duplicate ones as they are."""
    names = [c["name"] for c in columns]
    table = {name: [row.get(name) for row in rows] for name in ("key", "uri", "shard")}
    kept = ("key", "uri", "state", "reason", "shard")
    return script(
        "rows",
        table | {"columns": {n: [row.get(n) for row in rows] for n in names}},
        [{n: row.get(n) for n in kept} for row in others],
    )


def inspect(
    *, labels: str, out: str | None = None, side_px: int = 192, threads: int = 2
) -> dict[str, Any]:
    """Write the HTML report of a label set; a set that is still growing is shown as far as it is.

    Args:
        labels: the label set.
        out: folder of the report (new, empty, or an earlier report); None: ``LABELS/report``.
        side_px: longer side of the pictures in the report, in pixels.
        threads: decoding threads.

    Returns:
        ``summary``, ``exit`` (1 when samples or seals cannot be read), ``page``, ``labelled``,
        ``rejected``, ``duplicates``, ``damaged`` (key -> why), ``damaged_seals`` (their inputs are
        not in the report); the same stands in ``report.json``.

    Raises:
        UsageError: no label set, or an ``out`` with something else in it.
    """
    if side_px < 16 or threads < 1:
        raise UsageError(f"side_px={side_px} threads={threads}: expected at least 16 and 1.")
    stored = LabelSet(labels, skip_damaged_seals=True)
    counts = Counter(str(row["state"]) for row in stored.rows)
    labelled = [r for r in stored.rows if r["state"] == "labelled"]
    others = [r for r in stored.rows if r["state"] != "labelled"]
    columns = numeric_columns(labelled)
    rows, first = worst_first(labelled, columns)
    folder = parse_out(out, stored.path)
    damaged: dict[str, str] = {}
    names: dict[str, list[tuple[float, float]]] = {}
    for key, sample in write_parts(folder, rows, stored, side_px=side_px, threads=threads):
        for name, plane in sample.get("planes", {}).items():
            ends = names.setdefault(name, [])
            if plane["kind"] == "scalar" and plane["high"] > plane["low"]:
                ends.append((plane["low"], plane["high"]))
        if "damaged" in sample:
            damaged[key] = sample["damaged"]
    order = ["image"]
    for task in Task:
        kinds = (f"{task}", f"answer.{task}", f"{task}_uncertainty", f"{task}_confidence")
        order += [n for n in kinds if n in names]
    meta = {
        "format": FORMAT,
        "title": stored.path.resolve().name,
        "labels": identity(stored),
        "sealed": len(sealed_shards(stored.path)) - len(stored.damaged_seals),
        "shards": stored.meta["shards"],
        "facts": set_facts(stored, counts),
        "classes": {str(k): v for k, v in stored.classes.items()},
        "columns": columns,
        "sort": first["name"] if first else None,
        "planes": order,
        "ranges": {name: common_range(ends) for name, ends in names.items() if ends},
        "part": PART,
    }
    page = files("teacher") / "report_page"
    replace_atomically(folder / MARKER, script("meta", meta))
    (folder / "data" / "rows.js").write_bytes(page_rows(rows, others, columns))
    (folder / "data" / "start.js").write_bytes(script("start"))
    for name in PAGE:
        replace_atomically(folder / name, (page / name).read_bytes())
    state = {s: counts.get(s, 0) for s in ("labelled", "rejected", "duplicate_of")}
    bad = f", {len(damaged)} cannot be read" if damaged else ""
    seals = list(stored.damaged_seals.values())
    if seals:
        bad += f", {len(seals)} shard(s) left out: {seals[0].rstrip('.')}"
    part = "" if meta["sealed"] == meta["shards"] else ", the set is not complete"
    result = {
        "summary": f"{folder / 'index.html'}: {len(rows)} labelled, {state['rejected']} rejected, "
        f"{state['duplicate_of']} duplicates{bad}{part}; open it in a browser",
        "exit": 1 if damaged or seals else 0,
        "page": str(folder / "index.html"),
        "labelled": len(rows),
        "rejected": state["rejected"],
        "duplicates": state["duplicate_of"],
        "damaged": damaged,
        "damaged_seals": seals,
    }
    replace_atomically(folder / RESULT, json.dumps(result, indent=1).encode() + b"\n")
    return result
