"""`distill verify`: teacher, student and every artefact, one ruler, one report, an exit code.

Runs the torch student and each artefact of an export folder on the held-out images of a label set,
saves the answers, and judges those (`export.judge`): parity with the student, self-consistency,
and task metrics against the teacher and the truth, each within the budgets of ``conf/task``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export import report as reporting
from export.answers import RUN, run_artefact, save_inputs
from export.artefact import ArtefactError
from export.budgets import default_budgets
from export.delivery import EXPORT_JSON, REFERENCE
from export.judge import Judge
from export.onnx_files import read_model
from export.readiness import verdicts
from export.references import TEACHER, Reference, find_references
from export.runtimes import open_runtime
from export.trt_sidecar import record_acceptance
from export.verdict import judge_all
from teacher.errors import UsageError
from teacher.jobs.commit import replace_atomically
from teacher.store import LabelSet, hash_file

ANSWERS, REPORT = "answers", "report.json"
RUN_FACTS = {"file", "sha256", "keys", "precision", "outputs", "classes", "consistency", "broken",
             "runtime", "student_sha256", "canonical_focal_px"}  # fmt: skip


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
    io: str | None = None,
    reference: str | None = None,
    budgets: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge an export folder, or any model; ``exit`` is 1 if any artefact missed a budget.

    Args:
        export: folder with ``student.safetensors`` and ``*.onnx`` or ``*.engine``; or one model.
        labels: label set with the held-out images and the teacher's answers (or the truth's).
        out: folder of the report and the answers; None: ``export``/verify (of a file: beside it).
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
        io: description of models that we did not make (`export.foreign`).
        reference: what everything is held to: None is the folder's student; for a model that we
            did not make it may be another model's file, or stay None (then nothing is).
        budgets: None: ``conf/task``.
    """
    source = Path(export)
    contest = find_contest(source, reference)
    if batch < 1 or (limit is not None and limit < 1):
        raise UsageError(f"batch={batch} limit={limit}: expected at least 1.")
    if not 0 < min_m < max_m < math.inf:
        raise UsageError(f"min_m={min_m} max_m={max_m}: expected 0 < min_m < max_m.")
    if io is not None and not Path(io).is_file():
        raise UsageError(f"io={io}: found no file, expected a description (export/foreign.py).")
    held_out = LabelSet(labels)
    held_out.verify()
    folder = Path(out) if out is not None else contest.folder / "verify"
    answers = folder / ANSWERS
    keys = spread(held_out.keys, limit)
    if not keys:
        raise UsageError(f"labels={labels}: no labelled image in it.")
    _open_folder(folder)
    answers.mkdir(exist_ok=True)
    if rerun:
        first = next(iter(contest.paths.values()))
        save_inputs(held_out, keys, open_runtime(first, threads=threads, io=io).card, answers)
        logits = _want_logits(contest, io)
        for name, path in contest.paths.items():
            run_artefact(
                path,
                keys,
                answers,
                batch=batch,
                provider=provider,
                threads=threads,
                question=name != contest.reference,
                logits=logits,
                io=io if path.suffix != ".safetensors" else None,
            )
    runs = {n: read_run(answers / n, path, keys, io) for n, path in contest.paths.items()}
    if contest.reference and "error" in (student := runs[contest.reference]):
        raise UsageError(f"the student itself does not run: {student['error']}")
    ran = [r for r in runs.values() if "outputs" in r]
    judge = Judge(
        folder=answers,
        keys=keys,
        references=find_references(held_out, keys, teacher=teacher, truth=truth, folder=folder),
        tasks=choose_tasks(tasks, ran[0]["outputs"] if ran else held_out.tasks),
        budgets=default_budgets() if budgets is None else budgets,
        min_m=min_m,
        max_m=max_m,
    )
    if "semantic" in judge.tasks:
        for run in ran[: 1 if contest.reference else None]:  # the reference comes first
            check_classes(run, judge.references)
    alone = source.suffix == ".safetensors"  # a student before any export: nothing is promised
    promised = None if io is not None or alone else promises(contest.folder)
    result = judge_all(judge, runs, promised=promised, reference=contest.reference)
    result["export"], result["labels"] = str(source), str(labels)
    result["missing"] = {r.name: len(r.missing) for r in judge.references if r.missing}
    result["report"] = str(folder / "report.html")
    result["tensorrt"] = {
        n: verdicts(read_model(p))
        for n, p in contest.paths.items()
        if p.suffix == ".onnx"
        if "error" not in runs[n]
    }
    replace_atomically(folder / REPORT, json.dumps(result, indent=1).encode() + b"\n")
    replace_atomically(folder / "report.md", reporting.markdown(result).encode())
    replace_atomically(folder / "report.html", reporting.html(result, judge).encode())
    for name, path in contest.paths.items():
        if path.suffix == ".engine" and io is None and "error" not in runs[name]:
            refused = [f["text"] for f in result["findings"] if f["artefact"] == name]
            told = {"accepted": not refused, "images": len(keys), "findings": refused[:5]}
            record_acceptance(path, told | {"report": str(folder / REPORT)})
    return {
        "summary": result["summary"],
        "exit": result["exit"],
        "report": result["report"],
        "findings": result["findings"],
        "scores": {n: _headline(s) for n, s in result["scores"].items()},
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
    """Who is judged: name -> file, the reference first; ``reference`` is "" if there is none."""

    folder: Path
    paths: dict[str, Path]
    reference: str


def find_contest(source: Path, reference: str | None) -> Contest:
    """The files of an export folder, or a single model, and what they are held to."""
    if source.is_file():
        paths = {} if reference is None else {Path(reference).name: Path(reference)}
        if source.name in paths:
            raise UsageError(f"reference={reference}: has the name of export={source}; rename it.")
        first = next(iter(paths), "")
        return Contest(folder=source.parent, paths=paths | {source.name: source}, reference=first)
    if reference is not None:
        raise UsageError(
            f"reference={reference}: only for a single model; an export folder has {REFERENCE}."
        )
    if not (source / REFERENCE).is_file():
        raise UsageError(
            f"export={source}: found no {REFERENCE} there, expected the folder that `distill "
            "export` wrote, or a model's file."
        )
    artefacts = sorted([*source.glob("*.onnx"), *source.glob("*.engine")])
    if not artefacts:
        raise UsageError(f"export={source}: found no .onnx file; run `distill export` first.")
    if strange := [p.name for p in artefacts if not p.is_file()]:
        raise UsageError(
            f"export={source}: {', '.join(strange)}: found a folder or a link to nothing, expected "
            "a model's file. Move it away."
        )
    paths = {REFERENCE: source / REFERENCE} | {p.name: p for p in artefacts}
    return Contest(folder=source, paths=paths, reference=REFERENCE)


def _want_logits(contest: Contest, io: str | None) -> bool:
    """Whether any artefact delivers the classes' logits, so that they must be compared."""
    for path in contest.paths.values():
        if path.suffix == ".onnx" and io is None:
            with contextlib.suppress(ArtefactError):
                if "semantic_logits" in open_runtime(path).card.outputs:
                    return True
    return False


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
    own += ["instances"] if "center" in outputs else []
    strange = sorted(set(tasks or ()) - set(own))
    if strange or not own:
        raise UsageError(f"tasks={list(tasks or ())}: the student answers {own}, not {strange}.")
    if tasks is not None and not tasks:
        raise UsageError(f"tasks=[]: nothing would be judged; expected some of {own}, or null.")
    return own if tasks is None else [t for t in own if t in tasks]


def read_run(folder: Path, artefact: Path, keys: Sequence[str], io: str | None) -> dict[str, Any]:
    """What ran; refuses answers of another file, of other images, or by another description."""
    path = folder / RUN
    if not path.is_file():
        raise UsageError(f"{path}: no saved answers; run with rerun=true once.")
    try:
        run: dict[str, Any] = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); run with rerun=true.") from error
    facts = run if isinstance(run, dict) else {}
    if wanted := ({"sha256", "keys"} if "error" in facts else RUN_FACTS) - set(facts):
        raise UsageError(
            f"{path}: without {', '.join(sorted(wanted))}: of an earlier version, or changed; run "
            "with rerun=true."
        )
    described = io is not None and artefact.suffix != ".safetensors"
    if run.get("io_sha256", "") != (hash_file(Path(str(io))) if described else ""):
        raise UsageError(
            f"{folder}: these answers were read by another description than io={io}; run with "
            "rerun=true."
        )
    if run["sha256"] != hash_file(artefact) or run["keys"] != list(keys):
        raise UsageError(
            f"{folder}: these answers are of another {artefact.name} or of other images; run with "
            "rerun=true."
        )
    return run


def check_classes(run: Mapping[str, Any], references: Sequence[Reference]) -> None:
    """Refuse labels that call a class id by another name: every score would compare nonsense."""
    if "semantic" not in run["outputs"]:
        return
    for ref in references:
        theirs = {str(k): v for k, v in ref.classes.items()}
        for number in theirs.keys() & run["classes"].keys():
            if theirs[number] != run["classes"][number]:
                raise UsageError(
                    f"{ref.name}={ref.labels.path}: class {number} is {theirs[number]!r} there and "
                    f"{run['classes'][number]!r} in {run['file']}; expected one table of classes."
                )


def promises(source: Path) -> dict[str, dict[str, str]]:
    """File name -> sha256 and precision as `distill export` recorded them; none without it."""
    path = source / EXPORT_JSON
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_bytes())
        rows = told["artefacts"] | {REFERENCE: told["reference"]}
        return {
            name: {"sha256": facts["sha256"]}
            | ({"precision": facts["precision"]} if "precision" in facts else {})
            for name, facts in rows.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: not what `distill export` writes ({error}).") from error


def _headline(scores: Mapping[str, Any]) -> dict[str, Any]:
    """What the demo's table shows of one runtime: per reference the means over images."""
    return {ref: {"mean": s["mean"], "set": s["set"]} for ref, s in scores.items()}
