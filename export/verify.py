"""`distill verify`: teacher, student and every artefact, one ruler, one report, an exit code.

Runs the torch student and each artefact of an export folder on the held-out images of a label set,
saves the answers, and judges those (`export.judge`): parity with the student, self-consistency,
and task metrics against the teacher and the truth, each within the budgets of ``conf/task``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from export import report as reporting
from export.answers import RUN, run_artefact, save_inputs
from export.artefact import plain
from export.judge import Finding, Judge, Reference
from export.onnx_graph import EXPORT_JSON, REFERENCE
from export.parity import TASK_OF
from export.runtimes import open_runtime
from teacher.errors import UsageError
from teacher.jobs.commit import replace_atomically
from teacher.store import LabelSet, hash_file

ANSWERS, TEACHER, REPORT = "answers", "teacher", "report.json"


def default_budgets() -> dict[str, Any]:
    """The budgets of ``conf/task/*.yaml``, by task."""
    import yaml

    folder = files("conf") / "task"
    return {
        task: yaml.safe_load((folder / f"{task}.yaml").read_text())
        for task in ("depth", "normals", "semantic")
    }


def verify(
    *,
    export: str,
    labels: str,
    out: str | None = None,
    teacher: str | dict[str, Any] | None = None,
    truth: str | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = 200,
    batch: int = 4,
    provider: str = "cpu",
    threads: int | None = None,
    min_m: float = 0.3,
    max_m: float = 40.0,
    rerun: bool = True,
    budgets: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge an export folder; ``exit`` is 1 if any artefact missed a budget.

    Args:
        export: folder with ``student.safetensors`` and ``*.onnx``.
        labels: label set with the held-out images and the teacher's answers (or the truth's).
        out: folder of the report and the answers; None: ``export``/verify.
        teacher: further answers to the same images: a label set's path, or a teacher to be asked
            now ({"name": ...}, as in ``conf/teacher``).
        truth: label set with the truth of the same images.
        tasks: which to judge; None: all that the student has.
        limit: at most this many images, spread evenly over the set; None: all.
        batch: images per call.
        provider: where ``.onnx`` must run: cpu, cuda, tensorrt.
        threads: CPU threads; None: all cores of this process.
        min_m, max_m: depth range in which depth is judged.
        rerun: False judges the answers that are saved in ``out`` and runs nothing.
        budgets: None: ``conf/task``.
    """
    source = Path(export)
    if not (source / REFERENCE).is_file():
        raise UsageError(
            f"export={source}: found no {REFERENCE} there, expected the folder that `distill "
            "export` wrote."
        )
    artefacts = sorted(source.glob("*.onnx"))
    if not artefacts:
        raise UsageError(f"export={source}: found no .onnx file; run `distill export` first.")
    if batch < 1 or (limit is not None and limit < 1):
        raise UsageError(f"batch={batch} limit={limit}: expected at least 1.")
    held_out = LabelSet(labels)
    held_out.verify()
    folder = Path(out) if out is not None else source / "verify"
    answers = folder / ANSWERS
    keys = spread(held_out.keys, limit)
    if not keys:
        raise UsageError(f"labels={labels}: no labelled image in it.")
    _open_folder(folder)
    answers.mkdir(exist_ok=True)
    names = [REFERENCE, *(p.name for p in artefacts)]
    if rerun:
        with open_runtime(source / REFERENCE, threads=threads) as runtime:
            save_inputs(held_out, keys, runtime.card, answers)
        for name in names:
            run_artefact(
                source / name,
                keys,
                answers,
                batch=batch,
                provider=provider,
                threads=threads,
                question=name != REFERENCE,
            )
    runs = {name: read_run(answers / name, source / name, keys) for name in names}
    student = runs[REFERENCE]
    if "error" in student:
        raise UsageError(f"the student itself does not run: {student['error']}")
    references = find_references(held_out, keys, teacher=teacher, truth=truth, folder=folder)
    judge = Judge(
        folder=answers,
        keys=keys,
        references=references,
        tasks=choose_tasks(tasks, student["outputs"]),
        budgets=default_budgets() if budgets is None else budgets,
        min_m=min_m,
        max_m=max_m,
    )
    result = judge_all(judge, runs, expected=promised_hashes(source))
    result["export"], result["labels"] = str(source), str(labels)
    result["missing"] = {ref.name: len(ref.missing) for ref in references if ref.missing}
    result["report"] = str(folder / "report.html")
    replace_atomically(folder / REPORT, json.dumps(result, indent=1).encode() + b"\n")
    replace_atomically(folder / "report.md", reporting.markdown(result).encode())
    replace_atomically(folder / "report.html", reporting.html(result, judge).encode())
    return {
        "summary": result["summary"],
        "exit": result["exit"],
        "report": result["report"],
        "findings": result["findings"],
        "scores": {n: _headline(s) for n, s in result["scores"].items()},
    }


def _open_folder(folder: Path) -> None:
    """Create the report's folder or accept an earlier report's; nothing else is written into."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder}: found a file, expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    own = {ANSWERS, TEACHER, REPORT, "report.md", "report.html"}
    strangers = sorted(p.name for p in folder.iterdir() if p.name not in own and p.name[0] != ".")
    if strangers:
        raise UsageError(
            f"out={folder}: found {', '.join(strangers[:3])}, expected a new or empty folder or an "
            "earlier report. Choose another out=."
        )


def spread(keys: Sequence[str], limit: int | None) -> list[str]:
    """At most ``limit`` keys, evenly spaced."""
    if limit is None or len(keys) <= limit:
        return list(keys)
    return [keys[i * len(keys) // limit] for i in range(limit)]


def choose_tasks(tasks: Sequence[str] | None, outputs: Sequence[str]) -> list[str]:
    """The tasks to judge, all of the student's if none are named."""
    own = [t for t in ("depth", "normals", "semantic") if t in outputs]
    strange = sorted(set(tasks or ()) - set(own))
    if strange:
        raise UsageError(f"tasks={list(tasks or ())}: the student answers {own}, not {strange}.")
    return own if tasks is None else [t for t in own if t in tasks]


def read_run(folder: Path, artefact: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What ran; refuses answers of another file or of other images."""
    path = folder / RUN
    if not path.is_file():
        raise UsageError(f"{path}: no saved answers; run with rerun=true once.")
    run = json.loads(path.read_bytes())
    if run["sha256"] != hash_file(artefact) or run["keys"] != list(keys):
        raise UsageError(
            f"{folder}: these answers are of another {artefact.name} or of other images; run with "
            "rerun=true."
        )
    return run


def promised_hashes(source: Path) -> dict[str, str]:
    """File name -> sha256 as `distill export` recorded them."""
    path = source / EXPORT_JSON
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_bytes())
        listed = {name: facts["sha256"] for name, facts in told["artefacts"].items()}
        return listed | {REFERENCE: told["reference"]["sha256"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not what `distill export` writes ({error}).") from error


def find_references(
    held_out: LabelSet,
    keys: Sequence[str],
    *,
    teacher: str | dict[str, Any] | None,
    truth: str | None,
    folder: Path,
) -> list[Reference]:
    """Whose answers everything is scored against: teacher, truth, or both."""
    asked = held_out.meta.get("teacher", {}).get("name")
    own = "truth" if asked in ("truth", "folder") else "teacher"
    given = {"teacher": teacher, "truth": truth}
    if given[own] is not None:
        if own == "truth" and truth == str(held_out.path):
            given["truth"] = None
        else:
            raise UsageError(
                f"labels={held_out.path}: already holds the {own}'s answers, and {own}= names "
                "others; give only one of them."
            )
    references = [Reference(own, held_out, keys)]
    if isinstance(teacher, str):
        references.append(Reference("teacher", LabelSet(teacher), keys))
    elif teacher is not None:
        references.append(Reference("teacher", ask(teacher, held_out, keys, folder), keys))
    if given["truth"] is not None:
        references.append(Reference("truth", LabelSet(str(truth)), keys))
    for reference in references[1:]:  # the first one, held_out, is verified
        reference.labels.verify()
    return sorted(references, key=lambda ref: ref.name)


def ask(teacher: dict[str, Any], held_out: LabelSet, keys: Sequence[str], folder: Path) -> LabelSet:
    """Let a live teacher label the held-out images, as a label set beside the report."""
    from teacher.jobs.run import label

    label(
        teacher=teacher,
        images=str(held_out.path),
        out=str(folder / TEACHER),
        tasks=[str(t) for t in held_out.tasks],
        max_side=None,
        shard_size=64,
        batch_size=4,
        keep_pictures=False,
        threads=2,
    )
    return LabelSet(folder / TEACHER)


def judge_all(
    judge: Judge, runs: Mapping[str, dict[str, Any]], *, expected: Mapping[str, str]
) -> dict[str, Any]:
    """Every artefact against the student, the references and the budgets."""
    student = runs[REFERENCE]
    scores = {REFERENCE: judge.scores(REFERENCE)}
    if told := judge.teacher_scores():
        scores["teacher"] = told
    findings: list[Finding] = integrity(runs, expected)
    table: dict[str, Any] = {}
    for name, run in runs.items():
        if name == REFERENCE:
            continue
        if "error" in run:
            continue
        wanted = [o for o in student["outputs"] if TASK_OF[o] in judge.tasks]
        shared = [o for o in wanted if o in run["outputs"]]
        findings += [
            Finding(
                artefact=name,
                task=TASK_OF[o],
                measure=f"output {o}",
                found="missing",
                budget="present",
            )
            for o in wanted
            if o not in shared
        ]
        parity = judge.parity(name, REFERENCE, shared)
        findings += judge.parity_findings(run, parity)
        if all(task in run["outputs"] for task in judge.tasks):
            scores[name] = judge.scores(name)
            losses, missed = judge.loss_findings(run, scores[name], scores[REFERENCE])
            findings += missed
        else:
            losses = {}
        table[name] = {"parity": parity, "loss": losses, "consistency": run["consistency"]}
    bad = sorted({f.artefact for f in findings})
    judged = [n for n in runs if n != REFERENCE]
    if findings:
        first = "; ".join(str(f) for f in findings[:3])
        more = f" (and {len(findings) - 3} more)" if len(findings) > 3 else ""
        summary = f"REFUSED {len(bad)} of {len(judged)} artefacts on {len(judge.keys)} images: "
        summary += first + more
    else:
        summary = (
            f"{len(judged)} artefact(s) within every budget on {len(judge.keys)} images: "
            + ", ".join(judged)
        )
    return plain(
        {
            "summary": summary,
            "exit": 1 if findings else 0,
            "findings": [dataclasses.asdict(f) | {"text": str(f)} for f in findings],
            "artefacts": table,
            "scores": scores,
            "runs": {n: {k: v for k, v in r.items() if k != "keys"} for n, r in runs.items()},
            "protocol": judge.bounds | {"tasks": list(judge.tasks), "images": len(judge.keys)},
            "budgets": judge.budgets,
            "keys": list(judge.keys),
        }
    )


def integrity(runs: Mapping[str, dict[str, Any]], expected: Mapping[str, str]) -> list[Finding]:
    """Files that do not run, were changed after the export, or belong to another student."""
    findings = []

    def refuse(name: str, measure: str, found: str, budget: str) -> None:
        findings.append(
            Finding(artefact=name, task="every task", measure=measure, found=found, budget=budget)
        )

    student = runs[REFERENCE]["sha256"]
    for name, run in runs.items():
        if "error" in run:
            refuse(name, "runs", run["error"], "yes")
        if expected.get(name, run["sha256"]) != run["sha256"]:
            refuse(name, "sha256", run["sha256"], expected[name])
        if name != REFERENCE and run.get("student_sha256", student) != student:
            refuse(name, "sha256 of its student", run["student_sha256"], student)
    return findings


def _headline(scores: Mapping[str, Any]) -> dict[str, Any]:
    """What the demo's table shows of one runtime: per reference the means over images."""
    return {ref: {"mean": s["mean"], "set": s["set"]} for ref, s in scores.items()}
