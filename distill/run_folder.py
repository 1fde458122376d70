"""A run's folder: what makes a run the run it is, and whether a folder may be gone on with."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.conductor import STUDENT
from distill.trainer import TrainerConfig
from student.checkpoint import ORIGIN, write_atomic
from student.model import Student
from teacher.errors import UsageError
from teacher.store import LabelSet

RUN = "train.json"
PROBES = 5
BITS = 32  # a key; a student that began as another one carries the filters of dozens of sets
FORMAT = "dense-distill run 1"


def identity_of(
    config: TrainerConfig, model: Student, student: dict[str, Any], sets: Sequence[LabelSet]
) -> dict[str, Any]:
    """What makes a run the run it is, as plain JSON."""
    free = ("threads", "devices")  # they change nothing that is learnt
    return {
        "student": model.config | {k: v for k, v in student.items() if k in ORIGIN},
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
    """What pins a label set, wherever it lies: its plan and the images that got a label.

    ``seen`` answers for single images (`may_hold`), four bytes each.
    """
    keys = hashlib.sha256("\n".join(labels.keys).encode()).hexdigest()
    kept: dict[str, Any] = {
        k: labels.meta[k] for k in ("teacher", "licences", "licence") if k in labels.meta
    }
    about = {"plan_hash": labels.meta["plan_hash"], "images": len(labels), "keys": keys}
    return {**about, "seen": seen_filter(labels.keys), **kept}


def learnt_from(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The label sets (`set_identity`) of a student and of those that it began as (``init=``), each
    once."""
    every = [*provenance.get("data", []), *((provenance.get("init") or {}).get("data") or [])]
    parts = [{k: part[k] for k in ("plan_hash", "keys", "seen") if k in part} for part in every]
    return [part for i, part in enumerate(parts) if part not in parts[:i]]


def seen_filter(keys: Sequence[str]) -> str:
    """A Bloom filter (Bloom 1970) of keys in base64: `BITS` bits and `PROBES` probes a key."""
    bits = np.zeros(BITS * max(1, len(keys)), bool)
    for key in keys:
        bits[_places(key, bits.size)] = True
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def may_hold(seen: str, keys: Sequence[str]) -> list[bool]:
    """Whether `seen_filter` saw each of ``keys``: never wrongly False, in 1 of 15 000 wrongly True.

    Filters of before 2026-11-30 have 8 bits a key and are wrong in 2 %.

    Raises:
        ValueError: ``seen`` is no such filter.
    """
    bits = np.unpackbits(np.frombuffer(base64.b64decode(seen, validate=True), np.uint8))
    if not bits.size:
        raise ValueError("an empty filter")
    return [bool(bits[_places(key, bits.size)].all()) for key in keys]


def _places(key: str, size: int) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(key.encode()).digest(), "<u4")[:PROBES] % size


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
    for key in ("data", "weights", "features", "init"):
        if _pinned(now[key]) != _pinned(found.get(key)):
            names.append(key)
    return names


def _pinned(value: Any) -> Any:
    """``value`` without what follows from the rest: ``seen`` from ``keys``, an ancestor's data."""
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k != "data"}
    if isinstance(value, list):
        return [
            {k: v for k, v in part.items() if k != "seen"} if isinstance(part, dict) else part
            for part in value
        ]
    return value
