"""Every artefact against the reference runtime, the labels and the budgets: one verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from export.artefact import plain
from export.budgets import LABEL_TASKS, Finding
from export.delivery import EXPORT_JSON, REFERENCE
from export.judge import Judge
from export.parity import TASK_OF


def judge_all(
    judge: Judge,
    runs: Mapping[str, dict[str, Any]],
    *,
    promised: Mapping[str, Mapping[str, str]] | None,
    reference: str,
) -> dict[str, Any]:
    """Every artefact against the reference runtime, the labels and the budgets.

    ``promised``: file name -> what `distill export` wrote of it; None: there is no such list.
    """
    scores: dict[str, Any] = {}
    student = runs.get(reference)
    strata: dict[str, Any] = {}
    if student is not None:
        scores[reference] = judge.scores(reference, student["outputs"])
        strata = judge.strata(reference, student["outputs"])
    if told := judge.teacher_scores():
        scores["teacher"] = told
    expected = None if promised is None else {n: p["sha256"] for n, p in promised.items()}
    findings: list[Finding] = integrity(runs, expected, reference)
    findings += card_findings(runs, promised or {}, reference)
    table: dict[str, Any] = {}
    for name, run in runs.items():
        if name == reference or "error" in run:
            continue
        found, table[name], scores[name] = judge_one(judge, run, student, scores, strata, reference)
        findings += found
    judged = [n for n in runs if n != reference]
    unjudged = left_out(judge, [runs[n] for n in judged], reference)
    return plain(
        {
            "summary": "; ".join([summary_of(findings, judged, len(judge.keys)), *unjudged]),
            "exit": 1 if findings else 0,
            "not_judged": unjudged,
            "reference": reference,
            "findings": [dataclasses.asdict(f) | {"text": str(f)} for f in findings],
            "artefacts": table,
            "scores": scores,
            "runs": {n: {k: v for k, v in r.items() if k != "keys"} for n, r in runs.items()},
            "protocol": judge.bounds
            | {"tasks": list(judge.tasks), "images": len(judge.keys)}
            | {f"far_m ({n})": m for n, m in judge.far_m.items()},
            "budgets": judge.budgets.table,
            "keys": list(judge.keys),
        }
    )


def judge_one(
    judge: Judge,
    run: Mapping[str, Any],
    student: Mapping[str, Any] | None,
    scores: Mapping[str, Any],
    strata: Mapping[str, Any],
    reference: str,
) -> tuple[list[Finding], dict[str, Any], dict[str, Any]]:
    """(findings, what the report's tables say, scores) of one artefact that ran."""
    name = run["file"]
    findings = judge.contract_findings(run) + judge.consistency_findings(run)
    own = judge.scores(name, run["outputs"])
    findings += judge.score_findings(run, own)
    told: dict[str, Any] = {"consistency": run["consistency"], "parity": {}, "loss": {}}
    if student is None:
        return findings, told | {"strata": {}}, own
    wanted = [o for o in student["outputs"] if TASK_OF[o] in judge.tasks]
    wanted = [o for o in wanted if o != "semantic_logits" or o in run["outputs"]]
    shared = [o for o in wanted if o in run["outputs"]]
    findings += [
        Finding(
            artefact=name,
            task=TASK_OF[o],
            measure=f"output {o}",
            found="missing",
            budget="present",
            check="integrity",
        )
        for o in wanted
        if o not in shared
    ]
    told["parity"] = judge.parity(name, reference, shared, run["precision"])
    findings += judge.parity_findings(run, told["parity"])
    if all(t in run["outputs"] for t in judge.tasks if t in LABEL_TASKS):
        told["loss"], missed = judge.loss_findings(run, own, scores[reference])
        there = judge.strata(name, run["outputs"])
        told["strata"], worse = judge.strata_findings(run, there, strata)
        findings += missed + worse
    return findings, told, own


def left_out(judge: Judge, runs: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    """What the verdict does not cover, as sentences: nobody may take it for more than it is."""
    told = []
    known = {str(t) for ref in judge.references for t in ref.labels.tasks}
    if bare := [t for t in judge.tasks if t in LABEL_TASKS and t not in known]:
        how = "parity and consistency" if reference else "consistency"
        told.append(f"no labels of {', '.join(bare)}: judged by {how} alone")
    ran = [r for r in runs if "error" not in r]
    if not reference and ran and not any(judge.budgets.scored(t, r["precision"])
                                         for r in ran for t in judge.tasks):  # fmt: skip
        told.append(
            "accuracy was measured and not judged: give reference=, or a score in conf/task"
        )
    told += [
        f"{ref.name} lacks {len(ref.missing)} of {len(judge.keys)} images"
        for ref in judge.references
        if ref.missing
    ]
    return told


def summary_of(findings: Sequence[Finding], judged: Sequence[str], images: int) -> str:
    """The verdict in one line."""
    if not findings:
        return f"{len(judged)} artefact(s) within every budget on {images} images: " + ", ".join(
            judged
        )
    bad = {f.artefact for f in findings}
    more = f" (and {len(findings) - 3} more)" if len(findings) > 3 else ""
    first = "; ".join(str(f) for f in findings[:3])
    return f"REFUSED {len(bad)} of {len(judged)} artefacts on {images} images: {first}{more}"


def card_findings(
    runs: Mapping[str, dict[str, Any]],
    promised: Mapping[str, Mapping[str, str]],
    reference: str,
) -> list[Finding]:
    """Cards that say something else than the student and `distill export`'s list.

    The precision chooses the budgets, and the classes are the names that users will read.
    """
    findings = []
    for name, run in runs.items():
        if name == reference or "error" in run or name not in promised:
            continue
        pairs = {"precision": (run["precision"], promised[name].get("precision"))}
        if reference in runs:
            for fact in ("classes", "canonical_focal_px"):
                pairs[fact] = run[fact], runs[reference][fact]
        findings += [
            Finding(
                artefact=name,
                task="every task",
                measure=f"{fact} of its card",
                found=str(found),
                budget=str(wanted),
                check="integrity",
            )
            for fact, (found, wanted) in pairs.items()
            if wanted is not None and found != wanted
        ]
    return findings


def integrity(
    runs: Mapping[str, dict[str, Any]], expected: Mapping[str, str] | None, reference: str
) -> list[Finding]:
    """Files that do not run, that nobody vouches for, or that belong to another student.

    ``expected``: file name -> sha256 as `distill export` wrote them; None: there is no such list.
    The student is the one that ``reference`` is or was made from, else the list's.
    """
    findings = []

    def refuse(name: str, measure: str, found: str, budget: str) -> None:
        check = "runs" if measure == "runs" else "integrity"
        findings.append(
            Finding(
                artefact=name,
                task="every task",
                measure=measure,
                found=found,
                budget=budget,
                check=check,
            )
        )

    student = (expected or {}).get(REFERENCE, "")
    if reference:
        student = runs[reference].get("student_sha256") or runs[reference]["sha256"]
    for name, run in runs.items():
        if "error" in run:
            refuse(name, "runs", run["error"], "yes")
        if expected is not None and expected.get(name) != run["sha256"]:
            told = expected.get(name, f"in {EXPORT_JSON}")
            refuse(name, "sha256", run["sha256"], told)
        own = run.get("student_sha256", student)
        if name != reference and expected is not None and own != student:
            refuse(name, "sha256 of its student", own or "not told", student)
    return findings
