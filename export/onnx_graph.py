"""A student to ONNX, the artefact that `export.artefact` describes.

Current torch exporter (``dynamo``), portable opset 18, fixed H x W, fixed or free N. The network
that is exported is the student itself inside `Delivered`, which adds the two ends: uint8 in,
task units out.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.artefact import MAX_DEPTH_M, MIN_DEPTH_M, OUTPUTS, Card, card_to_metadata
from export.onnx_files import check_rules
from student.model import Student
from teacher.errors import UsageError
from teacher.jobs.licences import as_text, of_student
from teacher.label import Camera

OPSET = 18  # TensorRT 10.3 reads up to 20, 11.x up to 25


class Delivered(nn.Module):
    """A student between a camera's bytes and task units, exactly as `export.artefact` says."""

    def __init__(self, student: Student, card: Card) -> None:
        """``student`` in eval mode; ``card`` says which outputs, and the focal lengths."""
        super().__init__()
        self.student = student
        self.outputs = card.outputs
        self.focal_px = card.focal_px
        self.canonical_focal_px = card.canonical_focal_px
        ids = sorted(card.classes)  # the student's logits are in order of the ids
        self.register_buffer("class_ids", torch.tensor(ids, dtype=torch.int32), persistent=False)
        self.ids_are_indices = ids == list(range(len(ids)))
        self.class_ids: Tensor

    def forward(self, image: Tensor, focal_px: Tensor | None = None) -> tuple[Tensor, ...]:
        """uint8 [N, H, W, 3] and float32 [N] -> the card's outputs, in its order.

        Metres = canonical metres * focal_px / canonical_focal_px (DESIGN section 3).
        """
        x = image.to(torch.float32).permute(0, 3, 1, 2) / 255.0
        raw = self.student(x)
        out: dict[str, Tensor] = {}
        if "depth" in self.outputs:
            canonical = raw["depth"][:, 0]
            if focal_px is None:
                depth_m = canonical * (self.focal_px / self.canonical_focal_px)
            else:
                depth_m = canonical * (focal_px / self.canonical_focal_px)[:, None, None]
            out["depth"] = depth_m.clamp(MIN_DEPTH_M, MAX_DEPTH_M)
        if "sky" in self.outputs:
            out["sky"] = raw["sky"][:, 0].sigmoid()
        if "normals" in self.outputs:
            out["normals"] = raw["normals"]
        if "semantic" in self.outputs:
            logits = raw["semantic"]
            index = logits.argmax(1)
            out["semantic"] = (
                index.to(torch.int32) if self.ids_are_indices else self.class_ids[index]
            )
            out["semantic_logits"] = logits
        for name in self.outputs:
            if name.endswith("_uncertainty"):
                out[name] = raw[name][:, 0]
            elif name in ("center", "offset"):
                out[name] = raw[name]
        return tuple(out[name] for name in self.outputs)


def _carried(provenance: dict[str, Any]) -> dict[str, Any]:
    """What travels in a graph: all but the filters of single images, a byte for each."""
    parts = [{k: v for k, v in p.items() if k != "seen"} for p in provenance.get("data", [])]
    init = {k: v for k, v in (provenance.get("init") or {}).items() if k != "data"}
    return provenance | ({"data": parts} if parts else {}) | ({"init": init} if init else {})


def card_of(
    student: Student,
    *,
    batch: int | None = None,
    focal_input: bool = True,
    focal_px: float | None = None,
    semantic_logits: bool = False,
    student_sha256: str = "",
) -> Card:
    """The card of a student's artefact; ``focal_px`` None records the assumed 60 degree camera."""
    height, width = student.config["height"], student.config["width"]
    with torch.inference_mode():
        produced = student(torch.zeros(1, 3, height, width))
    names = [name for name in OUTPUTS if name in produced]
    if semantic_logits and "semantic" in names:
        names.append("semantic_logits")
    recorded_px = focal_px if focal_px is not None else Camera.assumed(width, height).fx
    return Card(
        height=height,
        width=width,
        batch=batch,
        focal_input=focal_input,
        focal_px=float(recorded_px),
        canonical_focal_px=student.canonical_focal_px,
        outputs=tuple(names),
        classes={int(k): v for k, v in student.config["classes"].items()},
        licences=as_text(of_student(student.provenance)),
        provenance=_carried(student.provenance),
        student_sha256=student_sha256,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress chatter and notices about its own internals off the screen."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _reason(error: BaseException) -> str:
    """What the exporter stumbled over and why: the outermost and the innermost cause."""
    causes = []
    while error.__cause__ is not None:
        error = error.__cause__
        causes.append(str(error).partition("\n")[0].partition(" : ")[0])
    return ": ".join(dict.fromkeys([*causes[:1], *causes[-1:]]))


def to_onnx(student: Student, card: Card) -> onnx.ModelProto:
    """Export, tidy, attach the card, check. Raises `ArtefactError` if the graph breaks a rule.

    And `UsageError` if the exporter cannot translate the student: not every backbone can be.
    """
    module = Delivered(student, card).eval()
    batch = card.batch or 2  # an example of 1 would be baked in as a constant
    args: list[Tensor] = [torch.zeros(batch, card.height, card.width, 3, dtype=torch.uint8)]
    names = ["image"]
    if card.focal_input:
        args.append(torch.full((batch,), card.focal_px))
        names.append("focal_px")
    shapes = None
    if card.batch is None:
        shapes = tuple({0: torch.export.Dim("N", min=1, max=1 << 16)} for _ in args)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                tuple(args),
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=list(card.outputs),
                dynamic_shapes=shapes,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UsageError(
            f"student.backbone={student.config['backbone']}: torch's ONNX exporter cannot translate"
            f" this student ({_reason(error)}), expected only operators that it knows. Train a "
            "student with another student.backbone=."
        ) from error
    model: onnx.ModelProto = program.model_proto  # type: ignore[union-attr]
    tidy(model)
    onnx.helper.set_model_props(model, card_to_metadata(card))
    model.producer_name, model.producer_version = "dense-distill", ""
    onnx.checker.check_model(model, full_check=True)
    check_rules(model, where="export")
    return model


def tidy(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes (they name host paths); let only Cast read the uint8 image.

    A dynamic N makes the exporter ask for Shape(image); the cast image has the same shape, and
    TensorRT takes uint8 into Cast only.
    """
    graph = model.graph
    cast = next(n for n in graph.node if n.op_type == "Cast" and "image" in n.input)
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] == "image":
            node.input[0] = cast.output[0]
    rest = [n for n in graph.node if n is not cast and n.output[0] != cast.output[0]]
    ordered = [onnx.NodeProto.FromString(n.SerializeToString()) for n in (cast, *rest)]
    del graph.node[:]
    graph.node.extend(ordered)
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.metadata_props[:], model.metadata_props[:]
