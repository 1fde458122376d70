"""Where a lesson's weights come from when not from chance: another student's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from student.checkpoint import load_student
from student.model import Student
from teacher.errors import UsageError
from teacher.jobs.licences import of_student
from teacher.store import hash_file


def start_from(model: Student, path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Take over every weight of the student at ``path`` that has its place in ``model``.

    The backbone must be the same; tasks, heads and decoder may differ, and what is new keeps its
    fresh start. Returns what was done (``sha256``, ``taken``, ``fresh``: names of parts) and the
    licence ledger of that student.

    Raises:
        UsageError: another backbone; `student.checkpoint.CheckpointError`: no student.
    """
    other = load_student(Path(path))
    if other.config["backbone"] != model.config["backbone"]:
        raise UsageError(
            f"init={path}: its backbone is {other.config['backbone']}, this student's is "
            f"{model.config['backbone']}; set student.backbone={other.config['backbone']}"
        )
    theirs, mine = other.state_dict(), model.state_dict()
    fits = {k: v for k, v in theirs.items() if k in mine and mine[k].shape == v.shape}
    _take_classes(model, other, fits)
    model.load_state_dict(fits, strict=False)
    fresh = sorted({".".join(k.split(".")[:2]) for k in mine if k not in fits})
    about = {"sha256": hash_file(Path(path)), "taken": len(fits), "fresh": fresh}
    return about, of_student(other.provenance)


def _take_classes(model: Student, other: Student, fits: dict[str, torch.Tensor]) -> None:
    """Logits belong to classes: with another class table they start anew."""
    if model.config["classes"] != other.config["classes"]:
        for name in [k for k in fits if k.startswith("heads.semantic.maps.out.")]:
            del fits[name]
