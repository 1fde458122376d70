"""A bad step, kept whole: ``python -m distill.capture FILE`` runs it again.

When loss or gradient is not finite, the batch, the weights and the norms' statistics as they were
before the step are written to ``bad-step-NUMBER.safetensors`` (the first few per run). Layout:
tensors ``student.*`` and ``batch.*``; metadata ``format`` and ``facts`` (JSON: the student's
configuration, step, torch seed, precision, passes, which losses were not finite). Not kept: a
feature teacher.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from distill.data import in_passes
from distill.losses import all_losses
from distill.precision import DepthwiseInFloat32, autocast
from student.checkpoint import write_atomic
from student.model import Student
from teacher.errors import UsageError

FORMAT = "dense-distill bad step 1"
KEPT = 3  # steps per run, each with the shares of all processes: any may be at fault


def save_capture(
    folder: Path,
    student: Student,
    batch: dict[str, Tensor],
    statistics: dict[str, Tensor],
    facts: dict[str, Any],
    *,
    suffix: str = "",
) -> Path | None:
    """Write a bad step, unless the run's folder holds enough others; returns the file.

    ``statistics``: the student's buffers by name before the step; ``facts``: step, seed, precision,
    accumulate, not_finite.
    """
    name = f"bad-step-{facts['step']:07d}"
    others = {p.name[: len(name)] for p in folder.glob("bad-step-*.safetensors")} - {name}
    if len(others) >= KEPT:
        return None
    state = dict(student.state_dict())
    state |= {k: v for k, v in statistics.items() if k in state}
    tensors = {f"student.{k}": v for k, v in state.items()}
    tensors |= {f"batch.{k}": v for k, v in batch.items()}
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    about = facts | {"config": student.config}
    path = folder / f"{name}{suffix}.safetensors"
    write_atomic(path, to_bytes(whole, metadata={"format": FORMAT, "facts": json.dumps(about)}))
    return path


def replay(path: str | Path) -> dict[str, Any]:
    """Run a captured step again, on the CPU.

    Returns:
        ``step``; ``then``: losses that were not finite in the lesson; ``losses``: every term, mean
        of the passes; ``not_finite``: names of the losses, answers, inputs and gradients that are
        not finite (unknown labels are NaN and do not count).

    Raises:
        UsageError: no such file, or none of ours.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(metadata["facts"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: no captured step ({error})") from error
    student = Student(**facts["config"])
    student.load_state_dict(_part(tensors, "student."))
    batch = _part(tensors, "batch.")
    torch.manual_seed(facts["seed"])
    DepthwiseInFloat32.within(student, facts["precision"], "cpu")
    student.train()
    passes = facts.get("accumulate", 1)
    sums: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for number, piece in enumerate(in_passes(batch, passes), 1):
        with autocast(facts["precision"], "cpu"):
            answer = student(piece["image"])
        losses = all_losses({k: v.float() for k, v in answer.items()}, piece)
        (losses["total"] / passes).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach() / passes
        where = f", pass {number}" if passes > 1 else ""
        seen |= {f"loss {k}{where}": v for k, v in losses.items()}
        seen |= {f"answer {k}{where}": v for k, v in answer.items()}
    seen |= {f"batch {k}": v for k, v in batch.items() if k in ("image", "focal_px", "centre_px")}
    for name, parameter in student.named_parameters():
        seen[f"weight {name}"] = parameter
        if parameter.grad is not None:
            seen[f"gradient {name}"] = parameter.grad
    return {
        "step": facts["step"],
        "then": facts.get("not_finite", []),
        "losses": {k: float(v) for k, v in sums.items()},
        "not_finite": [k for k, v in seen.items() if not torch.isfinite(v).all()],
    }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


if __name__ == "__main__":
    try:
        print(json.dumps(replay(sys.argv[1]), indent=1))
    except UsageError as error:
        sys.exit(f"{error}")
