"""`distill export`: a folder with the checkpoint, its graphs and engines, and what they are.

Every graph is that of `export.onnx_graph`, in the precisions asked for (`export.lowering`); engines
are built beside them where TensorRT is.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from export import readiness, trt_engine
from export.artefact import Card, card_to_metadata
from export.onnx_graph import card_of, to_onnx
from student.checkpoint import load_student
from student.model import Student
from teacher.errors import UsageError
from teacher.jobs.commit import replace_atomically
from teacher.jobs.licences import (
    as_text,
    inherited,
    merged,
    of_label_set,
    of_student,
    read_ledger,
    refuse,
)
from teacher.store import LabelSet, hash_file

PRECISIONS = {
    "fp32": "student.onnx",
    "fp16": "student.fp16.onnx",
    "bf16": "student.bf16.onnx",
    "int8-cpu": "student.int8-cpu.onnx",
    "int8-trt": "student.int8-trt.onnx",
}
EXPORT_JSON, READINESS = "export.json", "readiness.md"
REFERENCE = "student.safetensors"


def export_student(
    *,
    checkpoint: str,
    out: str,
    precision: Sequence[str] = ("fp32",),
    batch: int | None = None,
    focal_input: bool = True,
    focal_px: float | None = None,
    semantic_logits: bool = False,
    calibration: str | None = None,
    calibration_images: int = 32,
    licence: dict[str, Any] | None = None,
    tensorrt: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``student.onnx``, the checkpoint it came from, and ``export.json`` into ``out``.

    ``readiness.md`` says of every graph what each TensorRT would make of it (`export.readiness`).

    Args:
        checkpoint: a ``student.safetensors``.
        out: a new or empty folder, or one that an earlier export wrote.
        precision: names out of `PRECISIONS`.
        batch: a fixed N, or None for a free one.
        focal_input: whether the graph takes ``focal_px``; else ``focal_px`` is baked.
        focal_px: the recorded camera's focal length at H x W; None: 60 degrees across.
        semantic_logits: also deliver the logits of the classes.
        calibration: label set whose images calibrate and judge every other precision than fp32.
        calibration_images: so many calibrate, as many others judge the search, and up to 8 times
            as many what it found (`export.lowering`).
        licence: ``refuse``: terms that no ancestor may have (`teacher.jobs.licences.TERMS`).
        tensorrt: None, or the options of `export.trt_engine.build` with which an engine of every
            precision but int8-cpu is built here, for this GPU and this TensorRT.

    A precision that misses a budget, or is not faster, is declined: its numbers stand in
    ``export.json`` and ``exit`` is 1 if nothing but declined ones was asked for. What was whole
    when something failed is listed there, too.
    """
    wrong = sorted(set(precision) - set(PRECISIONS))
    if wrong or not precision:
        raise UsageError(f"precision={list(precision)}: expected some of {list(PRECISIONS)}.")
    lowered = [name for name in precision if name != "fp32"]
    if lowered and calibration is None:
        raise UsageError(
            f"precision={lowered}: needs calibration=LABELS, a label set of images like those the "
            "student will see (not the ones it is verified on)."
        )
    labels = LabelSet(calibration) if lowered and calibration is not None else None
    if batch is not None and batch < 1:
        raise UsageError(f"batch={batch}: expected null (any number of images) or at least 1.")
    if focal_px is not None and not 0 < focal_px < math.inf:
        raise UsageError(f"focal_px={focal_px}: expected a focal length in pixels, or null.")
    if tensorrt is not None:
        trt_engine.check_options(tensorrt)
        trt_engine.import_tensorrt()
    source = Path(checkpoint)
    student = load_student(source)  # refused before anything is written
    ledger = ancestors(student, labels)
    refuse(ledger, (licence or {}).get("refuse", []), what=f"export {out}")
    folder = _open_folder(Path(out))
    reference = folder / REFERENCE
    if reference.resolve() != source.resolve():
        replace_atomically(reference, source.read_bytes())
    student = load_student(reference)  # a training may meanwhile have replaced the source
    card = card_of(
        student,
        batch=batch,
        focal_input=focal_input,
        focal_px=focal_px,
        semantic_logits=semantic_logits,
        student_sha256=hash_file(reference),
    )
    model = to_onnx(student, card)
    artefacts: dict[str, Any] = {}
    declined: dict[str, Any] = {}
    ready: list[str] = ["# Would TensorRT take the graphs (published operator tables)\n"]

    def write(graph: onnx.ModelProto, name: str, facts: dict[str, Any]) -> None:
        path = folder / PRECISIONS[name]
        replace_atomically(path, graph.SerializeToString(deterministic=True))
        artefacts[path.name] = {
            "precision": name,
            "sha256": hash_file(path),
            "bytes": path.stat().st_size,
            "nodes": len(graph.graph.node),
            "opset": max(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")),
            "tensorrt": readiness.verdicts(graph),
            **facts,
        }
        ready.append(f"## {path.name}\n\n{readiness.markdown(graph)}")

    try:
        if "fp32" in precision:
            write(model, "fp32", {})
        if labels is not None:
            from export.lowering import lower_all

            card = dataclasses.replace(card, licences=as_text(ledger))
            onnx.helper.set_model_props(model, card_to_metadata(card))
            for name, graph, facts in lower_all(
                model,
                lowered,
                card=card,
                reference=reference,
                labels=labels,
                images=calibration_images,
            ):
                if graph is None:
                    declined[name] = facts
                    (folder / PRECISIONS[name]).unlink(missing_ok=True)  # an earlier export's
                else:
                    write(graph, name, facts)
        for name, facts in build_engines(folder, list(artefacts), tensorrt):
            artefacts[name] = facts
    finally:
        replace_atomically(folder / READINESS, "\n".join(ready).encode())
        result = _told(folder, card, artefacts, declined)
    return result


def ancestors(student: Student, labels: LabelSet | None) -> list[dict[str, Any]]:
    """The licence ledger of an export: its student, and the ``labels`` that calibrate and judge."""
    found = [of_student(student.provenance)]
    if labels is not None:
        found.append(inherited(of_label_set(labels.meta), images="calibration images"))
    return read_ledger(merged(*found))


def _told(
    folder: Path, card: Card, artefacts: dict[str, Any], declined: dict[str, Any]
) -> dict[str, Any]:
    """Write ``export.json``; what it says."""
    size = f"{card.height}x{card.width}"
    total_mb = sum(int(a["bytes"]) for a in artefacts.values()) / 1e6
    result = {
        "summary": f"{', '.join(artefacts)} ({size}, {'/'.join(card.outputs)}, {total_mb:.1f} MB) "
        f"in {folder}" + "".join(f"; {n} declined: {d['declined']}" for n, d in declined.items()),
        "exit": 1 if declined and not artefacts else 0,
        "reference": {"file": REFERENCE, "sha256": card.student_sha256},
        "artefacts": artefacts,
        "declined": declined,
        "card": dataclasses.asdict(card),
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__},
    }
    replace_atomically(folder / EXPORT_JSON, json.dumps(result, indent=1).encode() + b"\n")
    return result


def build_engines(
    folder: Path, names: Sequence[str], options: dict[str, Any] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """An engine beside each graph that is for TensorRT; what ``export.json`` says of them."""
    for name in names:
        if options is not None and name != PRECISIONS["int8-cpu"]:
            engine = folder / name.replace(".onnx", ".engine")
            sidecar = trt_engine.build(folder / name, engine, **options)
            yield engine.name, {**sidecar.engine, "precision": sidecar.precision}


def _open_folder(folder: Path) -> Path:
    """Create the folder or accept an earlier export's; refuse a folder with other things in it."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder}: found a file, expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if found and EXPORT_JSON not in found and set(found) != {REFERENCE}:
        raise UsageError(
            f"out={folder}: found {sorted(found)[:3]} and no {EXPORT_JSON}, expected a new or "
            "empty folder or an earlier export. Choose another out=."
        )
    return folder
