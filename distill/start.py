"""Where a lesson's weights come from when not from chance: another student's checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from distill.run_folder import learnt_from
from student.backbone import resampled_positions
from student.checkpoint import load_student
from student.model import Student
from teacher.errors import UsageError
from teacher.jobs.licences import of_student
from teacher.store import hash_file


def start_from(model: Student, path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Take over every weight of the student at ``path`` that has its place in ``model``.

    The backbone must be the same; input size, tasks, heads and decoder may differ, and what is new
    keeps its fresh start; so does a decoder of another kind or stride. Position embeddings follow
    the input size. Returns what was done (``sha256``, ``taken``: tensors, ``resampled``: position
    embeddings among them, ``fresh``: parts that start anew, a tensor's name where its part was
    taken otherwise, ``unfitted``: constants fitted to truth that were left behind, ``data``: the
    label sets that it learnt from) and the licence ledger of that student.

    Raises:
        UsageError: another backbone, another canonical camera.
        student.checkpoint.CheckpointError: no student.
    """
    other = load_student(Path(path))
    if other.config["backbone"] != model.config["backbone"]:
        raise UsageError(
            f"init={path}: its backbone is {other.config['backbone']}, this student's is "
            f"{model.config['backbone']}; set student.backbone={other.config['backbone']}"
        )
    positions = resampled_positions(other.backbone, model.backbone)
    resampled = {f"backbone.{name}": value for name, value in positions.items()}
    theirs, mine = other.state_dict() | resampled, model.state_dict()
    fits = {k: v for k, v in theirs.items() if k in mine and mine[k].shape == v.shape}
    _take_classes(model, other, fits)
    _take_steps(theirs, fits)
    levels = ("decoder", "decoder_stride")  # its parts are counted from the finest level
    if any(model.config[k] != other.config[k] for k in levels):
        fits = {k: v for k, v in fits.items() if not k.startswith("decoder.")}
    if "heads.depth.maps.out.weight" in fits:
        _need_one_camera(model, other, path)
    model.load_state_dict(fits, strict=False)
    about = {
        "sha256": hash_file(Path(path)),
        "taken": len(fits),
        "resampled": sorted(resampled),
        "fresh": _fresh(list(mine), fits),
        "unfitted": sorted(other.config["calibration"]),
        "data": learnt_from(other.provenance),
    }
    return about, of_student(other.provenance)


def told(about: dict[str, Any], path: str) -> str:
    """One line for the person who starts the lesson, of what `start_from` did."""
    parts = [f"init={path}: {about['taken']} tensors taken"]
    for name, said in (
        ("resampled", "resampled to this input size"),
        ("fresh", "start anew"),
        ("unfitted", "fitted constants left behind (distill calibrate fits them again)"),
    ):
        if about[name]:
            shown = ", ".join(about[name][:8]) + (", ..." if len(about[name]) > 8 else "")
            parts.append(f"{said}: {shown}")
    return "; ".join(parts)


def _fresh(names: list[str], fits: dict[str, torch.Tensor]) -> list[str]:
    """What starts anew: whole parts (two names deep) by their name, else tensor by tensor."""
    part = {name: ".".join(name.split(".")[:2]) for name in names}
    touched = {part[name] for name in names if name in fits}
    return sorted({n if part[n] in touched else part[n] for n in names if n not in fits})


def _need_one_camera(model: Student, other: Student, path: str) -> None:
    """Refuse a depth head whose canonical metres are those of a camera of another view.

    D_canonical = D f_c / f: at one input size another f_c is a factor on every depth. Between input
    sizes the view across the longer side is what a resized picture keeps.
    """
    (mine, here), (theirs, there) = (
        (m.canonical_focal_px, max(m.config["height"], m.config["width"])) for m in (model, other)
    )
    wanted = theirs * here / there
    if not math.isclose(mine, wanted, rel_tol=1e-4):
        raise UsageError(
            f"init={path}: its depth is in the metres of a canonical camera of {theirs:.6g} px for "
            f"pictures of {there} px, this student's of {mine:.6g} px for {here} px: every depth "
            f"would start wrong by a factor of {wanted / mine:.3g}. Set "
            f"student.canonical_focal_px={wanted:.6g}"
        )


def _take_steps(theirs: dict[str, torch.Tensor], fits: dict[str, torch.Tensor]) -> None:
    """A step and the log depth that it is added to are taken together, or both start anew."""
    parts = ("heads.depth.step.", "heads.depth.maps.out.")
    together = [name for name in theirs if name.startswith(parts)]
    if f"{parts[0]}weight" in theirs and any(name not in fits for name in together):
        for name in together:
            fits.pop(name, None)


def _take_classes(model: Student, other: Student, fits: dict[str, torch.Tensor]) -> None:
    """Logits belong to classes: with another class table they start anew."""
    if model.config["classes"] != other.config["classes"]:
        for name in [k for k in fits if k.startswith("heads.semantic.maps.out.")]:
            del fits[name]
