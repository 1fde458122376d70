"""``student.safetensors``: weights, plain-JSON config and provenance in one file; never a pickle.

Layout: a safetensors file whose ``__metadata__`` has one entry, ``student``: JSON with ``format`` =
"dense-distill student 1", ``config`` (the arguments of `Student`) and ``provenance`` (what it was
trained on). One entry, because the library writes several in random order: equal students are
equal bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from student.backbone import StudentError
from student.model import Student

FORMAT = "dense-distill student 1"
ORIGIN = ("pretrained", "backbone_weights", "backbone_licence")  # where a training's backbone began


class CheckpointError(ValueError):
    """A file that is not a checkpoint of ours, or not a whole one. Exit 2."""

    exit_code = 2


def write_atomic(path: str | Path, data: bytes) -> None:
    """Put ``data`` at ``path`` so that a reader sees the old file or the new one, never a part.

    The temporary file stands in the same directory (a rename across file systems is a copy), is
    synced before the rename, and the directory after it.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_student(model: Student, path: str | Path, provenance: dict[str, Any]) -> None:
    """Write ``model`` to ``path`` (.safetensors), atomically.

    Raises:
        CheckpointError: a weight is not finite; such a file is never written.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise CheckpointError(f"refusing to write {path}: not finite: {', '.join(bad[:5])}")
    about = {"format": FORMAT, "config": model.config, "provenance": provenance}
    write_atomic(path, to_bytes(state, metadata={"student": json.dumps(about, sort_keys=True)}))


def _not_ours(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a student checkpoint: {found}. Expected a student.safetensors written by "
        "`distill train` (RUN/student.safetensors); pickled files (.pt, .pth, .ckpt) are never "
        "opened."
    )


def _describe_foreign(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it is a pickle or a zip archive, as torch.save writes them"
    if not start:
        return "it is empty"
    size = path.stat().st_size
    return f"it is no readable safetensors file (truncated or another format, {size} bytes)"


def _described(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(metadata.get("student", "{}"))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _wrong(about: dict[str, Any]) -> str:
    """What a description of ours cannot say; "" if it may be ours."""
    for name in ("config", "provenance"):
        if not isinstance(about.get(name), dict):
            return f"its {name} is no table"
    strange = set(about["config"]) & set(ORIGIN)
    if strange:  # loading fetches nothing and opens no other file
        return f"its config has {', '.join(sorted(strange))}, which only a training may say"
    provenance = about["provenance"]
    for name in ("calibration", "init"):
        if not isinstance(provenance.get(name) or {}, dict):
            return f"its provenance's {name} is no table"
    for data in (provenance.get("data", []), (provenance.get("init") or {}).get("data", [])):
        if not isinstance(data, list) or not all(isinstance(part, dict) for part in data):
            return "its provenance's data is no list of tables"
    return ""


def load_student(path: str | Path) -> Student:
    """Rebuild the student from its file, in eval mode, on the CPU, strictly.

    ``.config`` and ``.provenance`` of the result hold what the file says.

    Raises:
        CheckpointError: no such file, or not a whole checkpoint of ours; never unpickles.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"checkpoint {path}: {what}; expected RUN/student.safetensors")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = _described(file.metadata() or {})
            if about.get("format") != FORMAT:
                found = about.get("format", "a safetensors file without our metadata")
                raise _not_ours(path, f"its format is {found!r}, not {FORMAT!r}")
            if wrong := _wrong(about):
                raise _not_ours(path, wrong)
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise _not_ours(path, f"{_describe_foreign(path)}: {error}") from error
    if bad := [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise _not_ours(path, f"not finite: {', '.join(bad[:5])}")
    try:
        model = Student(**about["config"])
        model.provenance = about["provenance"]
        if not len(getattr(model.decoder, "stem", ())):  # older files kept one without any use
            state = {k: v for k, v in state.items() if not k.startswith("decoder.stem.")}
        model.load_state_dict(state, strict=True)
    except (KeyError, TypeError, ValueError, StudentError, RuntimeError) as error:
        raise _not_ours(path, f"its config and its weights do not fit: {error}") from error
    return model.eval()
