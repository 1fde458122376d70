"""One shard of a label set: its names, its members, its seal. Format: docs/label-format.md.

``shard-000000.tar`` is a WebDataset tar, ``shard-000000.json`` its seal, the only commit point: a
tar without a seal does not exist for any reader. The seal also carries one row per input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from teacher.codecs.planes import decode_plane, encode_plane
from teacher.errors import UsageError
from teacher.label import Camera, Label, Task, coverage

FORMAT, VERSION = "dense-label-set", 1
MAX_MEMBER_BYTES = 1 << 30  # one file inside a shard; more is taken for an attack
BLANK = "0" * 64
ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
# a seal of the first days has these fields and no `seal_sha256`
FIRST_FIELDS = set("format version plan_hash count ids_sha256 sha256 bytes rows run".split())


class DamagedLabelSetError(UsageError):
    """A label set that is incomplete, damaged or not ours; the text names the files."""


def content_key(data: bytes) -> str:
    """The key of an input: 96 bits of the SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:24]


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return ENCODER.encode(value).encode()


def shard_name(number: int) -> str:
    """``shard-000012``, without suffix."""
    return f"shard-{number:06d}"


def seal_path(folder: Path, number: int) -> Path:
    """Where a shard's seal stands, once it is committed."""
    return folder / f"{shard_name(number)}.json"


def sealed_shards(folder: Path) -> dict[int, Path]:
    """Shard number -> seal, for all sealed shards."""
    return {int(p.stem[6:]): p for p in sorted(folder.glob("shard-*.json")) if p.stem[6:].isdigit()}


def encode_members(label: Label) -> list[tuple[str, bytes]]:
    """A label as (suffix, bytes) pairs in the fixed order of the format."""
    from teacher.images import encode_png

    data, suffix = label.encoded or (encode_png(label.image), "png")
    members = [(suffix, data)]
    for task in Task:
        if task in label.values:
            members.append((f"{task}.png", encode_plane(task, label.values[task])))
        for kind, maps in (("uncertainty", label.uncertainty), ("confidence", label.confidence)):
            if task in maps:
                members.append((f"{task}_{kind}.png", encode_plane(f"{task} {kind}", maps[task])))
        if task in label.pictures:
            members.append((f"answer.{task}.png", encode_png(label.pictures[task])))
    about = {"camera": label.camera.to_json(), "provenance": label.provenance}
    members.append(("json", canonical_json(about)))
    return members


def decode_members(
    key: str, members: dict[str, bytes], *, lesson: Collection[str] | None = None
) -> Label:
    """The inverse of `encode_members`.

    ``lesson``: tasks; then only their values and uncertainties are decoded beside the image.
    """
    from teacher.images import decode

    if lesson is not None:
        taught = {f"{t}{part}.png" for t in lesson for part in ("", "_uncertainty")}
        members = {k: v for k, v in members.items() if k in taught or k in ("jpg", "png", "json")}

    suffix = next((s for s in members if s in ("jpg", "png")), None)
    if suffix is None or "json" not in members:
        raise DamagedLabelSetError(f"sample {key}: found {sorted(members)}, expected image + json")
    about = json.loads(members["json"])
    label = Label(
        key=key,
        image=decode(members[suffix]),
        values={},
        camera=Camera(**about["camera"]),
        provenance=about["provenance"],
        encoded=(members[suffix], suffix),
    )
    for task in Task:
        if f"{task}.png" in members:
            label.values[task] = decode_plane(task, members[f"{task}.png"])
        if f"{task}_uncertainty.png" in members:
            plane = decode_plane(f"{task} uncertainty", members[f"{task}_uncertainty.png"])
            label.uncertainty[task] = plane
        if f"{task}_confidence.png" in members:
            plane = decode_plane(f"{task} confidence", members[f"{task}_confidence.png"])
            label.confidence[task] = plane
        if f"answer.{task}.png" in members:
            label.pictures[task] = decode(members[f"answer.{task}.png"])
    return label


def summarise(label: Label) -> dict[str, Any]:
    """What the index says of a labelled image: coverage, spread, depth percentiles."""
    row: dict[str, Any] = {"height": label.image.shape[0], "width": label.image.shape[1]}
    for task, values in label.values.items():
        row[f"{task}_coverage"] = round(coverage(task, values), 6)
        if "mean_residual" in label.provenance.get(str(task), {}):
            row[f"{task}_residual"] = label.provenance[str(task)]["mean_residual"]
    for task, values in label.uncertainty.items():
        known = values[np.isfinite(values)]
        row[f"{task}_uncertainty"] = round(float(known.mean()), 6) if known.size else None
    if Task.DEPTH in label.values:
        depth_m = label.values[Task.DEPTH]
        finite = depth_m[np.isfinite(depth_m)]
        row["sky_share"] = round(float(np.isposinf(depth_m).mean()), 6)
        percents = (5, 50, 95)
        at = np.percentile(finite, percents) if finite.size else [None] * 3
        for percent, value in zip(percents, at, strict=True):
            row[f"depth_m_p{percent}"] = None if value is None else round(float(value), 4)
    if "alignment" in label.provenance:
        row["alignment_residual"] = label.provenance["alignment"].get("residual")
    return row


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_ids(rows: list[dict[str, Any]]) -> str:
    """SHA-256 over the inputs of a shard: key and uri, in order."""
    return hashlib.sha256(canonical_json([[r["key"], r["uri"]] for r in rows])).hexdigest()


def seal_of(tar: Path, rows: list[dict[str, Any]], *, plan_hash: str) -> dict[str, Any]:
    """The facts that a seal promises about a tar."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "plan_hash": plan_hash,
        "count": len(rows),
        "ids_sha256": hash_ids(rows),
        "sha256": hash_file(tar),
        "bytes": tar.stat().st_size,
        "rows": rows,
    }


def seal_bytes(seal: dict[str, Any]) -> bytes:
    """A seal as its file: with the SHA-256 of that very file, its own 64 digits taken as zeros."""
    blank = canonical_json(seal | {"seal_sha256": BLANK}) + b"\n"
    own = hashlib.sha256(blank).hexdigest()
    return blank.replace(f'"seal_sha256":"{BLANK}"'.encode(), f'"seal_sha256":"{own}"'.encode())


def read_seal(path: Path) -> dict[str, Any]:
    """A seal's content; a damaged one is named, whichever of its bits was changed."""
    try:
        data = path.read_bytes()
        seal = json.loads(data)
        if seal["format"] != FORMAT or seal["count"] != len(seal["rows"]):
            raise ValueError("fields")
        own = seal.get("seal_sha256", "")
        blank = data.replace(f'"seal_sha256":"{own}"'.encode(), f'"seal_sha256":"{BLANK}"'.encode())
        if own and hashlib.sha256(blank).hexdigest() != own:
            raise ValueError("it does not match its own hash")
        if not own and set(seal) - FIRST_FIELDS:
            raise ValueError(f"unknown fields {sorted(set(seal) - FIRST_FIELDS)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedLabelSetError(f"{path}: not a whole seal ({error}).") from error
    return seal


def shard_problem(folder: Path, number: int, meta: dict[str, Any]) -> str:
    """What is wrong with one shard, in a sentence, by hashing it; "" when its seal holds."""
    path, tar = seal_path(folder, number), folder / f"{shard_name(number)}.tar"
    if number >= meta["shards"]:
        return f"{shard_name(number)}: sealed, but the set has only {meta['shards']} shards"
    if not path.exists():
        return f"{shard_name(number)}: not sealed, so its inputs are not labelled"
    try:
        seal = read_seal(path)
    except DamagedLabelSetError as error:
        return str(error)
    if seal["plan_hash"] != meta["plan_hash"]:
        return f"{path.name}: sealed for another plan"
    if hash_ids(seal["rows"]) != seal["ids_sha256"]:
        return f"{path.name}: its rows do not match their hash"
    if not tar.is_file():
        return f"{tar.name}: missing"
    if tar.stat().st_size != seal["bytes"]:
        return f"{tar.name}: {tar.stat().st_size} bytes, the seal says {seal['bytes']}"
    if hash_file(tar) != seal["sha256"]:
        return f"{tar.name}: its content does not match the seal's sha256"
    return ""
