"""The JSON beside an engine: what it is, for which machine, and the hash that lets it be loaded.

An engine is executable code: it is deserialised only if its bytes have the hash that our own build
wrote, and only by the TensorRT and on the GPU it was built for. The engine file itself holds
nothing of ours, so that other tools load it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from export.artefact import ArtefactError, Card, card_from_metadata, plain
from teacher.jobs.commit import replace_atomically
from teacher.store import hash_file

FORMAT, VERSION = "dense-distill/engine", 1
MAX_SIDECAR_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Batch sizes: the smallest, the one to be fast at, the largest."""

    smallest: int
    best: int
    largest: int

    def __post_init__(self) -> None:
        """Refuse an order that TensorRT would refuse later."""
        if not 1 <= self.smallest <= self.best <= self.largest:
            raise ArtefactError(
                f"profile {[self.smallest, self.best, self.largest]}: expected 1 <= smallest <= "
                "best <= largest."
            )


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Facts of one engine; ``card`` is the ONNX file's string table (`export.artefact`)."""

    engine: dict[str, Any]
    onnx: dict[str, Any]
    tensorrt: str
    gpu: str
    compute: str
    profile: Profile
    precision: str
    version_compatible: bool
    hardware: str
    card: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    known_bad: list[str] = field(default_factory=list)
    acceptance: dict[str, Any] | None = None

    def write(self, engine: Path) -> None:
        """Beside the engine, atomically."""
        table = {"format": FORMAT, "version": VERSION} | asdict(self)
        replace_atomically(path_of(engine), json.dumps(plain(table), indent=1).encode() + b"\n")

    def card_of(self) -> Card:
        """The card, checked."""
        return card_from_metadata(self.card, where=self.engine["file"])


def release_of(version: str) -> tuple[int, int]:
    """(major, minor) of TensorRT "10.3.0.26"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def path_of(engine: Path) -> Path:
    """``student.fp16.engine`` -> ``student.fp16.engine.json``."""
    return engine.with_name(engine.name + ".json")


def read_sidecar(engine: Path) -> Sidecar:
    """The sidecar of an engine; `ArtefactError` if it is missing, damaged or too new."""
    path = path_of(engine)
    if not path.is_file() or path.stat().st_size > MAX_SIDECAR_BYTES:
        raise ArtefactError(
            f"{engine}: found no {path.name} beside it. Only engines that `distill export` built "
            "are loaded: an engine is executable code. Build it here from its .onnx."
        )
    try:
        table = json.loads(path.read_bytes())
        if table.pop("format") != FORMAT or (version := int(table.pop("version"))) < 1:
            raise ValueError("another format")
        if version > VERSION:
            raise ArtefactError(f"{path}: version {version}; this program reads up to {VERSION}.")
        return Sidecar(**table | {"profile": Profile(**table["profile"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{path}: not a sidecar of `distill export` ({error}).") from error


def checked_bytes(engine: Path, promised: Mapping[str, Any], *, who: str = "its sidecar") -> bytes:
    """The engine's bytes, after size and sha256 as ``promised``; nothing else is deserialised."""
    facts = engine.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise ArtefactError(f"{engine}: found no regular file; links are not followed.")
    if facts.st_size != promised["bytes"]:
        raise ArtefactError(
            f"{engine}: {facts.st_size} bytes, {who} says {promised['bytes']}. It was "
            "cut or changed and is not loaded; build it again."
        )
    data = engine.read_bytes()
    import hashlib

    found = hashlib.sha256(data).hexdigest()
    if found != promised["sha256"]:
        raise ArtefactError(
            f"{engine}: sha256 {found[:16]}…, {who} says {str(promised['sha256'])[:16]}…. "
            "It was changed after it was built and is not loaded; build it again."
        )
    return data


def check_machine(sidecar: Sidecar, *, version: str, gpu: str, compute: str, where: str) -> None:
    """Refuse another TensorRT or GPU with a sentence, before the deserialiser crashes or lies."""
    built, here = release_of(sidecar.tensorrt), release_of(version)
    same = sidecar.tensorrt == version
    if not same and not (sidecar.version_compatible and built <= here <= (built[0] + 1, 99)):
        hint = (
            "" if sidecar.version_compatible else "; it was not built with version_compatible=true"
        )
        raise ArtefactError(
            f"{where}: built by TensorRT {sidecar.tensorrt}, here is {version}{hint}. Build it "
            "here from its .onnx: engines do not travel between versions."
        )
    fits = {
        "none": sidecar.gpu == gpu and sidecar.compute == compute,
        "same compute": sidecar.compute == compute,
        "ampere+": float(compute) >= 8.0,
    }[sidecar.hardware]
    if not fits:
        raise ArtefactError(
            f"{where}: built for {sidecar.gpu} (compute {sidecar.compute}, hardware "
            f"compatibility: {sidecar.hardware}), here is {gpu} (compute {compute}). Build it "
            "here from its .onnx: engines do not travel between GPUs."
        )


def record_acceptance(engine: Path, verdict: Mapping[str, Any]) -> None:
    """Write what `distill verify` found into the sidecar."""
    import dataclasses

    dataclasses.replace(read_sidecar(engine), acceptance=dict(verdict)).write(engine)


def facts_of(path: Path) -> dict[str, Any]:
    """Name, hash and size of a file."""
    return {"file": path.name, "sha256": hash_file(path), "bytes": path.stat().st_size}
