"""What is whole of a damaged label set, as a new label set with its own plan hash.

A shard whose seal holds is copied byte for byte. From a damaged shard a sample is taken only if
its own checksums prove it: the tar headers, every PNG chunk's CRC, a JPEG's hash (its key), zero
padding. ``KEY.json`` has no checksum, so it must be in canonical form and agree with the sample,
and the damage must have been found elsewhere in the shard: if all samples look whole although the
shard's hash is wrong, the damage may sit in a camera, and none of the shard is taken. (One error
is thus always caught; a second, hidden one inside a JSON number of the same shard is not.)
Where the seal itself is damaged, the index says what the shard holds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from teacher.errors import UsageError
from teacher.jobs.commit import create_exclusive, publish, temporary_beside
from teacher.label import validate
from teacher.shard_writer import ShardWriter, prove
from teacher.shards import (
    DamagedLabelSetError,
    canonical_json,
    decode_members,
    hash_file,
    hash_ids,
    read_seal,
    seal_bytes,
    seal_path,
    shard_name,
)
from teacher.store import INDEX, open_folder, read_dataset, write_index


def survivors(tar_path: Path, seal: dict[str, Any]) -> tuple[dict[str, list], dict[str, str]]:
    """Of a damaged shard: key -> proven members, and key -> why not, for all labelled rows."""
    whole: dict[str, list] = {}
    lost: dict[str, str] = {}
    rows = [row for row in seal["rows"] if row["state"] == "labelled"]
    if not tar_path.is_file():
        return {}, {row["key"]: "the shard is missing" for row in rows}
    try:
        file = tar_path.open("rb", buffering=0)  # reads not a byte ahead, into a bad sector
    except OSError as error:
        return {}, {row["key"]: f"cannot be read: {error.strerror}" for row in rows}
    with file:
        for row in rows:
            try:
                file.seek(row["offset"])
                block = file.read(row["size"])
                if len(block) != row["size"]:
                    raise ValueError("the shard is cut off before its end")
                whole[row["key"]] = prove(row["key"], block)
                validate(decode_members(row["key"], dict(whole[row["key"]])))
            except (ValueError, KeyError, TypeError, OSError, tarfile.TarError) as error:
                whole.pop(row["key"], None)
                lost[row["key"]] = str(error) or type(error).__name__
        end = max((row["offset"] + row["size"] for row in rows), default=0)
        try:
            file.seek(end)
            tail = file.read()
        except OSError:
            tail = b"unread"
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
    create_exclusive(seal_path(target, number), seal_bytes(seal | {"plan_hash": plan_hash}))
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
        seal = {"rows": indexed_rows(folder, number), "bytes": -1}
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


def indexed_rows(folder: Path, number: int) -> list[dict[str, Any]]:
    """What the index says of a shard; nothing if it cannot be read."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = ["key", "uri", "state", "reason", "offset", "size"]
    try:
        with pq.ParquetFile(folder / INDEX, pre_buffer=False) as index:
            table = index.read(columns=["shard", *names], use_threads=False)
        rows = table.filter(pc.field("shard") == number).select(names).to_pylist()
    except (OSError, pa.ArrowException):
        return []
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


def salvage_into(folder: Path, out: str, problems: dict[int, str]) -> dict[str, Any]:
    """Write what is whole of ``folder`` as the label set ``out``; counts and what was lost.

    ``inputs_unknown``: planned inputs of which no seal and no index tells.
    """
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
    inputs, size = meta.get("inputs", 0), meta.get("shard_size", 0)
    unknown = 0
    for number in range(meta["shards"]):
        if number in problems:
            taken, gone = rescue_shard(folder, target, number, plan_hash=plan_hash)
            lost |= {key: f"{shard_name(number)}: {why}" for key, why in gone.items()}
            planned = min(size, inputs - number * size)
            unknown += max(planned - read_seal(seal_path(target, number))["count"], 0)
        else:
            taken = copy_shard(folder, target, number, plan_hash=plan_hash)
        kept += taken
    write_index(target)
    return {
        "out": out,
        "plan_hash": plan_hash,
        "images": kept,
        "lost": lost,
        "inputs_unknown": unknown,
    }
