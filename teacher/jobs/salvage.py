"""What is whole of a damaged label set, as a new label set with its own plan hash.

A shard whose seal holds is copied byte for byte. From a damaged shard a sample is taken only if
its own checksums prove it: the tar headers, every PNG chunk's CRC, a JPEG's hash (its key), zero
padding. ``KEY.json`` has no checksum, so it must be in canonical form and agree with the sample,
and the damage must have been found elsewhere in the shard: if all samples look whole although the
shard's hash is wrong, the damage may sit in a camera, and none of the shard is taken. (One error
is thus always caught; a second, hidden one inside a JSON number of the same shard is not.)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

from teacher.errors import UsageError
from teacher.jobs.commit import create_exclusive, publish, temporary_beside
from teacher.label import validate
from teacher.store import (
    DamagedLabelSetError,
    ShardWriter,
    canonical_json,
    content_key,
    decode_members,
    hash_file,
    hash_ids,
    open_folder,
    read_dataset,
    read_seal,
    seal_path,
    sealed_shards,
    shard_name,
    write_index,
)

PNG = b"\x89PNG\r\n\x1a\n"


def shard_problem(folder: Path, number: int, meta: dict[str, Any]) -> str:
    """What is wrong with one shard, in a sentence; "" when its seal holds."""
    path, tar = seal_path(folder, number), folder / f"{shard_name(number)}.tar"
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


def problems_of(folder: Path) -> dict[int, str]:
    """Shard number -> what is wrong with it, by hashing every shard; works on damaged seals."""
    meta = read_dataset(folder)
    numbers = sorted({*range(meta["shards"]), *sealed_shards(folder)})
    found = {n: shard_problem(folder, n, meta) for n in numbers}
    for n in numbers:
        if n >= meta["shards"]:
            found[n] = f"{shard_name(n)}: the set has only {meta['shards']} shards"
    return {n: text for n, text in found.items() if text}


def check_png(data: bytes) -> None:
    """Every chunk's CRC and the end mark; `ValueError` where it fails."""
    if data[:8] != PNG:
        raise ValueError("no PNG signature")
    at, kind = 8, b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise ValueError("the PNG ends early")
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 4 : at + 8 + length]
        if data[at + 8 + length : at + 12 + length] != struct.pack(">I", zlib.crc32(body)):
            raise ValueError(f"the CRC of PNG chunk {kind!r} is wrong")
        at += 12 + length
    if at != len(data):
        raise ValueError("bytes after the end of the PNG")


def prove(key: str, block: bytes) -> list[tuple[str, bytes]]:
    """The members of one sample's bytes in a tar, or `ValueError` with what is not proven."""
    members: list[tuple[str, bytes]] = []
    covered = 0
    with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
        for info in tar:
            stem, _, suffix = info.name.partition(".")
            file = tar.extractfile(info) if info.isreg() else None
            if stem != key or file is None:
                raise ValueError(f"unexpected member {info.name!r}")
            data = file.read()
            covered = info.offset_data + info.size
            padding = block[covered : covered + (-info.size % tarfile.BLOCKSIZE)]
            if len(data) != info.size or any(padding):
                raise ValueError(f"{info.name}: cut off, or its padding is not zero")
            covered += len(padding)
            members.append((suffix, data))
    if covered != len(block):
        raise ValueError(f"{len(block) - covered} bytes are not readable as tar members")
    for suffix, data in members:
        if suffix == "jpg":
            if content_key(data) != key:
                raise ValueError("the JPEG does not match its key")
        elif suffix.endswith("png"):
            check_png(data)
        elif suffix != "json" or canonical_json(json.loads(data)) != data:
            raise ValueError(f"{key}.{suffix} is not in canonical form")
    return members


def survivors(tar_path: Path, seal: dict[str, Any]) -> tuple[dict[str, list], dict[str, str]]:
    """Of a damaged shard: key -> proven members, and key -> why not, for all labelled rows."""
    whole: dict[str, list] = {}
    lost: dict[str, str] = {}
    rows = [row for row in seal["rows"] if row["state"] == "labelled"]
    if not tar_path.is_file():
        return {}, {row["key"]: "the shard is missing" for row in rows}
    with tar_path.open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            block = file.read(row["size"])
            try:
                if len(block) != row["size"]:
                    raise ValueError("the shard is cut off before its end")
                whole[row["key"]] = prove(row["key"], block)
                validate(decode_members(row["key"], dict(whole[row["key"]])))
            except (ValueError, KeyError, TypeError, OSError, tarfile.TarError) as error:
                whole.pop(row["key"], None)
                lost[row["key"]] = str(error) or type(error).__name__
        end = max((row["offset"] + row["size"] for row in rows), default=0)
        file.seek(end)
        tail = file.read()
    located = bool(lost) or any(tail) or tar_path.stat().st_size != seal["bytes"]
    if not located:
        reason = "the shard is damaged in a place that no checksum of a sample covers"
        return {}, dict.fromkeys(whole, reason)
    return whole, lost


def copy_shard(folder: Path, target: Path, number: int, *, plan_hash: str) -> int:
    """A whole shard, byte for byte, sealed for the new plan; the number of labelled images."""
    seal = read_seal(seal_path(folder, number))
    final = target / f"{shard_name(number)}.tar"
    temporary = temporary_beside(final)
    try:
        shutil.copyfile(folder / final.name, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        publish(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    if hash_file(final) != seal["sha256"]:
        raise DamagedLabelSetError(f"{final}: not what was copied; delete it and start again.")
    create_exclusive(
        seal_path(target, number), canonical_json(seal | {"plan_hash": plan_hash}) + b"\n"
    )
    return sum(row["state"] == "labelled" for row in seal["rows"])


def rescue_shard(
    folder: Path, target: Path, number: int, *, plan_hash: str
) -> tuple[int, dict[str, str]]:
    """A damaged shard's proven samples as a new shard; how many, and key -> why the rest is not."""
    try:
        seal = read_seal(seal_path(folder, number))
        if hash_ids(seal["rows"]) != seal["ids_sha256"]:
            raise DamagedLabelSetError("rows")
    except (DamagedLabelSetError, OSError):
        seal = {"rows": [], "bytes": -1}  # nothing says what the shard should hold
    whole, lost = survivors(folder / f"{shard_name(number)}.tar", seal)
    with ShardWriter(target, number, plan_hash=plan_hash) as writer:
        for row in seal["rows"]:
            key, uri = row["key"], row["uri"]
            if row["state"] == "duplicate_of":
                writer.duplicate(key, uri=uri, of=row["reason"])
            elif row["state"] == "rejected":
                writer.reject(key, uri=uri, reason=row["reason"])
            elif key in whole:
                label = decode_members(key, dict(whole[key]))
                writer.add(label, uri=uri, members=whole[key])
            else:
                writer.reject(key, uri=uri, reason=f"lost from a damaged shard: {lost[key]}")
        writer.commit({})
    return len(whole), lost


def salvage_into(folder: Path, out: str, problems: dict[int, str]) -> dict[str, Any]:
    """Write what is whole of ``folder`` as the label set ``out``; counts and what was lost."""
    if not problems:
        raise UsageError(f"salvage={out}: {folder} is whole, there is nothing to salvage.")
    if Path(out).resolve() == folder.resolve():
        raise UsageError(f"salvage={out}: that is the damaged set itself; choose a new folder.")
    meta = read_dataset(folder)
    damage = {shard_name(n): text for n, text in sorted(problems.items())}
    origin = {"plan_hash": meta["plan_hash"], "damage": damage}
    old = {k: v for k, v in meta.items() if k not in ("plan_hash", "format", "version", "units")}
    dataset = old | {"salvaged_from": origin}
    plan_hash = hashlib.sha256(canonical_json(dataset)).hexdigest()
    target = open_folder(out, dataset | {"plan_hash": plan_hash})
    kept = 0
    lost: dict[str, str] = {}
    for number in range(meta["shards"]):
        if number in problems:
            taken, gone = rescue_shard(folder, target, number, plan_hash=plan_hash)
            lost |= {key: f"{shard_name(number)}: {why}" for key, why in gone.items()}
        else:
            taken = copy_shard(folder, target, number, plan_hash=plan_hash)
        kept += taken
    write_index(target)
    return {"out": out, "plan_hash": plan_hash, "images": kept, "lost": lost}
