"""A run's folder: what makes a run the run it is, and whether a folder may be gone on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.conductor import STUDENT
from distill.trainer import TrainerConfig
from student.checkpoint import write_atomic
from student.model import Student
from teacher.errors import UsageError
from teacher.store import LabelSet

RUN = "train.json"
FORMAT = "dense-distill run 1"


def identity_of(
    config: TrainerConfig, model: Student, student: dict[str, Any], sets: Sequence[LabelSet]
) -> dict[str, Any]:
    """What makes a run the run it is, as plain JSON."""
    origin = ("pretrained", "backbone_weights", "backbone_licence")
    free = ("threads", "devices")  # they change nothing that is learnt
    return {
        "student": model.config | {k: v for k, v in student.items() if k in origin},
        "trainer": {k: v for k, v in dataclasses.asdict(config).items() if k not in free},
        "data": [set_identity(labels) for labels in sets],
    }


def ancestors(identity: dict[str, Any], model: Student) -> dict[str, Any]:
    """What the licence ledger of a student is made from (`teacher.jobs.licences.of_student`)."""
    return {
        "data": identity["data"],
        "licences": identity["licences"],
        "backbone": model.config["backbone"],
        "backbone_licence": model.backbone.licence,
    }


def set_identity(labels: LabelSet) -> dict[str, Any]:
    """What pins a label set, wherever it lies: its plan and the images that got a label."""
    keys = hashlib.sha256("\n".join(labels.keys).encode()).hexdigest()
    kept: dict[str, Any] = {
        k: labels.meta[k] for k in ("teacher", "licences", "licence") if k in labels.meta
    }
    return {"plan_hash": labels.meta["plan_hash"], "images": len(labels), "keys": keys, **kept}


def open_run(out: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Create the run's folder or take up the one of the same run; its result if it is finished."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder}: found a file, expected a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN
    if not path.exists():
        strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if strangers:
            raise UsageError(
                f"out={folder}: found {', '.join(strangers[:3])}, expected a new or empty folder, "
                "or a run of the same command to go on with. Choose another out=."
            )
        document = {"format": FORMAT, **identity}
        write_atomic(path, json.dumps(document, indent=1, sort_keys=True).encode())
        return None
    try:
        found = json.loads(path.read_bytes())
        ours = found["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UsageError(f"{path}: not the description of a run. Choose another out=.")
    changed = sorted(differences(json.loads(json.dumps(identity)), found))
    if changed:
        raise UsageError(
            f"out={folder}: holds another run; different: {', '.join(changed[:6])}. Choose another "
            "out=, or delete that folder."
        )
    return found.get("result")


def already(folder: Path, finished: dict[str, Any]) -> dict[str, Any]:
    """The result of a run that was finished before."""
    if not (folder / STUDENT).is_file():
        raise UsageError(
            f"{folder}: {RUN} says that this run is finished, but {STUDENT} is gone. Put it "
            "back, or delete that folder to train anew."
        )
    done = f"{folder}: already trained ({finished['summary']}); choose another out= to train anew"
    return {**finished, "summary": done}


def differences(now: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Dotted names of what differs, with both values where they are short."""
    names = []
    for group in ("student", "trainer"):
        old = found.get(group, {})
        for key in {**now[group], **old}:
            if now[group].get(key) != old.get(key):
                names.append(f"{group}.{key} (was {old.get(key)}, now {now[group].get(key)})")
    names += [key for key in ("data", "weights", "features", "init") if now[key] != found.get(key)]
    return names
