"""`distill check`: is a label set whole, and would the teacher still say the same?

Seals are verified by hashing. With ``teacher=`` a seeded sample is asked again, through the same
code as a label job, stored and read back like a label, and compared: drift shows another GPU,
another library, other weights. ``salvage=`` writes what is whole of a damaged set into a new one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from teacher.anchors import Anchor, check_anchor, load_anchor
from teacher.codecs.planes import decode_plane, encode_plane
from teacher.errors import UsageError
from teacher.generators import Query, Teacher, load_teacher
from teacher.jobs.commit import claim_out, replace_atomically
from teacher.jobs.plan import Entry
from teacher.jobs.salvage import salvage_into
from teacher.jobs.samples import Prepared, answer_split, asked_camera, to_label
from teacher.label import Label, LabelError, Task, unknown_class
from teacher.shards import shard_name
from teacher.store import DamagedLabelSetError, LabelSet, problems_of

RESULT = "check.json"


def pick(keys: Sequence[str], n: int, *, seed: int) -> list[str]:
    """``n`` keys, in the order of a seeded hash: the same for any order of ``keys``."""
    ranked = sorted(keys, key=lambda k: hashlib.sha256(f"{seed}:{k}".encode()).digest())
    return ranked[:n]


def _share(mask: np.ndarray) -> float:
    return float(mask.mean()) if mask.size else 0.0


def depth_drift(now: np.ndarray, then: np.ndarray) -> dict[str, float]:
    """Two depth maps [H, W] in metres: relative differences, delta1, what changed its validity.

    ``rel_mean``, ``rel_p95`` of |now / then - 1| where both are finite; ``delta1`` the share with
    a ratio below 1.25; ``validity`` the share of pixels that changed between known, sky, unknown.
    """
    kind = [np.isnan(a).astype(np.int8) + 2 * np.isposinf(a) for a in (now, then)]
    both = np.isfinite(now) & np.isfinite(then)
    ratio = now[both].astype(np.float64) / then[both]
    rel = np.abs(ratio - 1)
    found = {"validity": _share(kind[0] != kind[1])}
    if rel.size:
        good = np.maximum(ratio, 1 / ratio) < 1.25
        found |= {"rel_mean": float(rel.mean()), "rel_p95": float(np.percentile(rel, 95))}
        found["delta1"] = float(good.mean())
    return found


def normals_drift(now: np.ndarray, then: np.ndarray) -> dict[str, float]:
    """Two normal maps [H, W, 3]: angles in degrees, and what changed its validity."""
    known = [~np.isnan(a[..., 0]) for a in (now, then)]
    both = known[0] & known[1]
    a, b = now[both].astype(np.float64), then[both].astype(np.float64)
    angle_deg = np.degrees(
        2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))
    )
    found = {"validity": _share(known[0] != known[1])}
    if angle_deg.size:
        found["mean_deg"] = float(angle_deg.mean())
        found["p95_deg"] = float(np.percentile(angle_deg, 95))
    return found


def semantic_drift(now: np.ndarray, then: np.ndarray) -> dict[str, float]:
    """Two class maps [H, W]: the share of pixels that flipped (unknown counts as a class)."""
    a, b = (np.where(x == unknown_class(x.dtype), -1, x.astype(np.int64)) for x in (now, then))
    return {"flips": _share(a != b)}


def instances_drift(now: np.ndarray, then: np.ndarray) -> dict[str, float]:
    """Two instance maps [H, W]: the share of pixels outside the best match of their instance.

    Ids may be permuted: each old id is matched with the new id that covers most of it, none with
    none.
    """
    same = (now == 0) & (then == 0)
    for number in np.unique(then[then > 0]):
        inside = then == number
        values, counts = np.unique(now[inside & (now > 0)], return_counts=True)
        if values.size:
            same |= inside & (now == values[counts.argmax()])
    return {"flips": _share(~same)}


DRIFT = {
    Task.DEPTH: depth_drift,
    Task.NORMALS: normals_drift,
    Task.SEMANTIC: semantic_drift,
    Task.INSTANCES: instances_drift,
}


def ask_again(
    teacher: Teacher,
    labels: LabelSet,
    keys: Sequence[str],
    tasks: Sequence[Task],
    *,
    anchor: Anchor | None = None,
) -> list[tuple[Label, Label | str]]:
    """Per key the stored label and the teacher's new one, or the reason why there is none.

    The new values pass through the store's own code, so storing adds no drift.
    """
    uris = {row["key"]: row["uri"] for row in labels.rows if row["state"] == "labelled"}
    pairs: list[tuple[Label, Label | str]] = []
    for key in tqdm(keys, desc="check", unit="img", mininterval=1):
        stored = labels[key]
        camera = asked_camera(stored)
        query = Query(key=key, image=stored.image, camera=camera, uri=uris[key])
        item = Prepared(entry=Entry(uri=uris[key], key=key), query=query, encoded=stored.encoded)
        (answers,) = answer_split(teacher, [query], tasks)
        scale = None
        if anchor is not None and Task.DEPTH in tasks:
            (scale,) = anchor.ask([query], answer_split)
        try:
            new = to_label(item, answers, tasks, anchor=anchor, scale=scale)
        except LabelError as error:
            pairs.append((stored, str(error)))
            continue
        new.values = {t: decode_plane(t, encode_plane(t, v)) for t, v in new.values.items()}
        pairs.append((stored, new))
    return pairs


def measure(pairs: Sequence[tuple[Label, Label | str]], tasks: Sequence[Task]) -> dict[str, Any]:
    """Per task: mean over images of each measure, the share of identical images, the worst one."""
    found: dict[str, Any] = {}
    for task in tasks:
        rows = []
        for then, now in pairs:
            if isinstance(now, str) or task not in then.values:
                continue
            one = DRIFT[task](now.values[task], then.values[task])
            same = np.array_equal(
                now.values[task], then.values[task], equal_nan=task in (Task.DEPTH, Task.NORMALS)
            )
            rows.append((then.key, one | {"identical": float(same)}))
        names = sorted({name for _, row in rows for name in row})
        means = {}
        for name in names:
            values = [row[name] for _, row in rows if name in row]
            means[name] = float(np.mean(values))
        worst_by = {Task.DEPTH: "rel_mean", Task.NORMALS: "mean_deg"}.get(task, "flips")
        ranked = sorted(rows, key=lambda r: r[1].get(worst_by, -1.0))
        worst = {"key": ranked[-1][0], **ranked[-1][1]} if ranked else None
        found[str(task)] = {"images": len(rows), **means, "worst": worst}
    return found


def missed(drift: Mapping[str, Any], budgets: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One sentence for each budget of a task in ``drift`` that was missed, or not measured at all.

    ``delta1`` and ``identical`` are floors, the others ceilings.
    """
    found = []
    for task in [t for t in budgets if t in drift]:
        for name, limit in budgets[task].items():
            value = drift[task].get(name)
            floor = name in ("delta1", "identical")
            if value is None:
                found.append(f"{task}.{name} could not be measured")
            elif not (value >= limit if floor else value <= limit):
                found.append(f"{task}.{name} {value:.4g} {'<' if floor else '>'} {limit:g}")
    return found


def parse_budgets(budgets: Mapping[str, Any] | None) -> dict[str, dict[str, float]]:
    """Task -> measure -> limit, checked; null takes a budget, or a task's budgets, away."""
    found: dict[str, dict[str, float]] = {}
    known = {
        "depth": {"rel_mean", "rel_p95", "delta1", "validity", "identical"},
        "normals": {"mean_deg", "p95_deg", "validity", "identical"},
        "semantic": {"flips", "identical"},
        "instances": {"flips", "identical"},
    }
    for task, limits in (budgets or {}).items():
        if not isinstance(limits, Mapping | None):
            raise UsageError(
                f"budgets.{task}={limits}: expected a table, as in budgets.{task}.MEASURE=0.01, or "
                "null."
            )
        strange = sorted(set(limits or {}) - known.get(task, set()))
        if task not in known or strange:
            raise UsageError(
                f"budgets.{task}: {strange or 'no such task'}; there are "
                f"{ {t: sorted(n) for t, n in known.items()} }."
            )
        found[task] = {name: v for name, v in (limits or {}).items() if v is not None}
        for name, v in found[task].items():
            if isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v):
                raise UsageError(f"budgets.{task}.{name}={v}: expected a number, or null for none.")
    return found


def differences(now: Any, then: Any, path: str = "") -> list[str]:
    """Dotted names of what a teacher says of itself that differs from what the set recorded."""
    if isinstance(now, dict) and isinstance(then, dict):
        names = sorted({*now, *then}, key=str)
        inner = [(n, now.get(n), then.get(n)) for n in names]
        return [x for n, a, b in inner for x in differences(a, b, f"{path}.{n}" if path else n)]
    short = [json.dumps(v)[:60] for v in (then, now)]
    return [] if now == then else [f"{path}: was {short[0]}, now {short[1]}"]


def check(
    *,
    labels: str,
    teacher: dict[str, Any] | None = None,
    n: int = 16,
    seed: int = 0,
    tasks: list[str] | None = None,
    budgets: dict[str, dict[str, float]] | None = None,
    salvage: str | None = None,
    out: str | None = None,
    anchor: dict[str, Any] | None = None,
    align: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Verify a label set's seals; ask the teacher again and judge the drift; salvage what is whole.

    Args:
        labels: the label set.
        teacher: ``name`` and that teacher's own keys; None: only the seals are verified.
        n: images asked again.
        seed: of the choice of images.
        tasks: what to ask for; None: what the set has and the teacher answers.
        budgets: task -> measure -> limit (`depth_drift` and the like); means over images. A limit
            of a task that was asked and gave no such measure is missed; None: no limit.
        salvage: a new folder for what is whole of a damaged set.
        out: the JSON report, new or an earlier one; None: ``LABELS/check.json``.
        anchor: what makes an affine teacher metric, as in the label job (`teacher.anchors`).
        align: ``method`` and ``max_residual``, as in the label job.

    Returns:
        ``summary``, ``exit`` (1: damaged, incomplete, or a budget missed), ``problems``,
        ``drift``, ``missed``, ``unanswered`` (key -> why), ``teacher_changed`` (anchor included),
        ``left_out`` (shards with a problem, of which nothing was asked), ``salvaged``.

    Raises:
        UsageError: no label set, a wrong budget or task, nothing to salvage.
    """
    folder = Path(labels)
    if n < 1:
        raise UsageError(f"n={n}: expected at least 1.")
    limits = parse_budgets(budgets)
    if not folder.is_dir():
        raise DamagedLabelSetError(f"{folder}: no such folder; expected a label set.")
    path = Path(out) if out else folder / RESULT
    claim_out(path, fields={"labels", "problems", "summary", "exit"}, what="report of a check")
    problems = problems_of(folder)
    result: dict[str, Any] = {"labels": labels, "problems": list(problems.values())}
    if salvage is not None:
        result["salvaged"] = salvage_into(folder, salvage, problems)
    if teacher is not None:
        result |= _rerun(
            LabelSet(folder, skip_damaged_seals=True),
            teacher,
            load_anchor(anchor, align),
            n=n,
            seed=seed,
            tasks=tasks,
            budgets=limits,
            damaged=problems,
        )
    bad = bool(problems) or bool(result.get("missed")) or bool(result.get("unanswered"))
    result |= {"summary": _summary(labels, result), "exit": 1 if bad else 0}
    replace_atomically(path, json.dumps(result, indent=1).encode() + b"\n")
    return result


def _rerun(
    labels: LabelSet,
    teacher: dict[str, Any],
    anchor: Anchor | None,
    *,
    n: int,
    seed: int,
    tasks: list[str] | None,
    budgets: Mapping[str, Mapping[str, float]],
    damaged: Mapping[int, str],
) -> dict[str, Any]:
    oracle = load_teacher(**teacher)
    able = [t for t in labels.tasks if t in oracle.tasks]
    wanted = able if tasks is None else [t for t in able if str(t) in tasks]
    if not wanted or (tasks is not None and set(tasks) - {str(t) for t in able}):
        raise UsageError(
            f"tasks={tasks}: the set has {[str(t) for t in labels.tasks]}, this teacher answers "
            f"{[str(t) for t in oracle.tasks]}; ask for what both have."
        )
    check_anchor(oracle, None if anchor is None else anchor.name, wanted)
    whole = [r for r in labels.rows if r["state"] == "labelled" and r["shard"] not in damaged]
    keys = pick([row["key"] for row in whole], n, seed=seed)
    pairs = ask_again(oracle, labels, keys, wanted, anchor=anchor)
    changed = differences(oracle.describe(), labels.meta.get("teacher", {}))
    if Task.DEPTH in wanted:
        now = None if anchor is None else anchor.describe()
        changed += differences(now, labels.meta.get("anchor"), "anchor")
    drift = measure(pairs, wanted)
    return {
        "images": len(pairs),
        "drift": drift,
        "missed": missed(drift, budgets),
        "unanswered": {then.key: now for then, now in pairs if isinstance(now, str)},
        "teacher_changed": changed,
        "left_out": [shard_name(n) for n in sorted(damaged)],
    }


def _summary(labels: str, result: Mapping[str, Any]) -> str:
    problems = result["problems"]
    parts = [f"{len(problems)} problem(s): {problems[0]}" if problems else "every seal holds"]
    if "drift" in result:
        same = [
            f"{task} {100 * d['identical']:.0f} % identical"
            for task, d in result["drift"].items()
            if d["images"]
        ]
        where = " of the shards without a problem" if result["left_out"] else ""
        parts.append(
            f"{result['images']} images{where} asked again: {', '.join(same) or 'no answer'}"
        )
        if result["unanswered"]:
            parts.append(f"{len(result['unanswered'])} no longer answered")
        if result["missed"]:
            parts.append(f"budgets missed: {', '.join(result['missed'])}")
        elif result["images"] and not result["unanswered"]:
            parts.append("within every budget")
        if result["teacher_changed"]:
            parts.append(f"the teacher changed ({result['teacher_changed'][0]})")
    if "salvaged" in result:
        saved = result["salvaged"]
        parts.append(
            f"{saved['images']} images salvaged into {saved['out']}, {len(saved['lost'])} lost"
        )
        if saved["inputs_unknown"]:
            parts.append(
                f"{saved['inputs_unknown']} inputs of shards without a seal are not in it; the "
                "same label job into another folder has them all"
            )
    elif problems:
        parts.append("salvage=FOLDER writes what is whole into a new set")
    return f"{labels}: " + "; ".join(parts)
