"""``state.safetensors``: what a killed lesson needs to go on; safetensors + JSON, never a pickle.

Layout: tensors ``student.*``, ``average.*``, ``features.*`` (the projection, if features are
learnt), ``optimizer.PARAMETER.NAME``; metadata ``format`` and ``facts`` (JSON, `FACTS`). One file,
replaced atomically, so that its parts always belong together.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from distill.module import Diverged, Lesson
from student.checkpoint import write_atomic
from teacher.errors import UsageError

FORMAT = "dense-distill lesson 2"  # 1 knew the moments by number, not by parameter
FACTS = {  # name in the file -> attribute of the lesson
    "step": "step_number",
    "skipped": "skipped",
    "skipped_in_a_row": "skipped_in_a_row",
    "trained_s": "trained_s",
    "best": "best",
    "best_for": "best_for",
    "validated_at": "validated_at",
    "good_steps": "good_steps",
    "loss_scale": "loss_scale",
}


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the only lesson in a run's folder; half-written files of a killed one are removed.

    The lock is on the folder itself, so it leaves no file and dies with its process. Where the file
    system cannot lock, nothing is refused.

    Raises:
        UsageError: another process trains there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"out={folder}: another process trains there right now. Wait for it, stop it, "
                    "or choose another out=."
                ) from None
            for litter in folder.glob(".*.tmp"):
                litter.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def save_state(lesson: Lesson, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write everything the next step depends on.

    Raises:
        Diverged: a weight is not finite; the state that was there stays.
    """
    tensors: dict[str, Tensor] = {}
    tensors |= {f"student.{k}": v for k, v in lesson.student.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in lesson.average.student.state_dict().items()}
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise Diverged(
            f"weights are not finite after step {lesson.step_number} ({', '.join(bad[:3])}, ...); "
            "the last checkpoint is intact. Try a smaller trainer.lr "
            f"(now {lesson.config.lr:g}) or trainer.precision=fp32."
        )
    names = lesson.names()
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():  # all else follows from the parameters' shapes
            if isinstance(value, Tensor):
                tensors[f"optimizer.{names[parameter]}.{name}"] = value
    if lesson.features is not None:
        tensors |= {f"features.{k}": v for k, v in lesson.features.state_dict().items()}
    facts = {name: getattr(lesson, attribute) for name, attribute in FACTS.items()}
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"format": FORMAT, "facts": json.dumps(facts)}
    write_atomic(path, to_bytes(whole, metadata=metadata))


def load_state(lesson: Lesson, path: Path) -> None:
    """Put ``lesson`` back to where `save_state` left it; the optimiser follows when it is made.

    Raises:
        UsageError: the file is damaged, or of another student.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(metadata["facts"])
        lesson.student.load_state_dict(_part(tensors, "student."))
        lesson.average.student.load_state_dict(_part(tensors, "average."))
        if lesson.features is not None:
            lesson.features.load_state_dict(_part(tensors, "features."))
        moments = _optimizer_state(lesson, _part(tensors, "optimizer."))
        for name, attribute in FACTS.items():
            setattr(lesson, attribute, facts[name])
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"{path}: cannot be resumed ({error}). Delete the run's folder, or train into another "
            "out=."
        ) from error
    lesson.optimizer_state = moments


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _optimizer_state(lesson: Lesson, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`torch.optim.Optimizer.state_dict` again: the groups as configured, the saved moments."""
    fresh = lesson.configure_optimizers()
    taught = [p for group in fresh.param_groups for p in group["params"]]
    names = lesson.names()
    index = {names[p]: i for i, p in enumerate(taught)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        owner, _, entry = name.rpartition(".")
        if owner not in index:
            raise ValueError(f"moments of {owner}, which is not learnt here")
        if value.ndim and value.shape != taught[index[owner]].shape:
            raise ValueError(f"moments of {owner} have the shape {tuple(value.shape)}")
        state.setdefault(index[owner], {})[entry] = value
    return {"state": state, "param_groups": fresh.state_dict()["param_groups"]}
