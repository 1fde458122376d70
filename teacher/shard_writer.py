"""Writing a shard: members into a temporary tar, then sync, name, seal. Docs: label-format.md."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

from teacher.errors import EnvironmentFailure
from teacher.jobs.commit import (
    create_exclusive,
    discard,
    is_bad_sector,
    patiently,
    publish,
    temporary_beside,
)
from teacher.label import Label
from teacher.shards import (
    DamagedLabelSetError,
    canonical_json,
    content_key,
    decode_members,
    encode_members,
    hash_file,
    seal_bytes,
    seal_of,
    shard_name,
    summarise,
)

PNG = b"\x89PNG\r\n\x1a\n"


class ShardWriter:
    """One shard in the making. As a context manager it abandons the shard on any exception."""

    def __init__(self, folder: Path, number: int, *, plan_hash: str) -> None:
        """Open the temporary file; nothing is visible to readers before `commit`."""
        self.folder, self.number, self.plan_hash = folder, number, plan_hash
        self.final = folder / f"{shard_name(number)}.tar"
        self.temporary = temporary_beside(self.final)
        self.file = self.temporary.open("xb")
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        """Nothing to do: the file is open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop whatever was not committed."""
        self.abandon()

    def add(self, label: Label, *, uri: str = "", members: list | None = None) -> None:
        """Append one labelled image; ``members``, if they exist already."""
        members = members if members is not None else encode_members(label)
        self.append(label.key, uri=uri, members=members, summary=summarise(label))

    def append(self, key: str, *, uri: str, members: list, summary: dict[str, Any]) -> None:
        """Append one labelled image that was encoded and summarised elsewhere."""
        start = self.tar.offset
        for suffix, data in members:
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size, info.mode = len(data), 0o644  # time, owner and group stay 0
            self.tar.addfile(info, io.BytesIO(data))
        row = {"key": key, "uri": uri, "state": "labelled", "offset": start}
        self.rows.append(row | {"size": self.tar.offset - start} | summary)

    def reject(self, key: str, *, uri: str, reason: str) -> None:
        """Record an input that got no label, and why."""
        self.rows.append({"key": key, "uri": uri, "state": "rejected", "reason": reason})

    def duplicate(self, key: str, *, uri: str, of: str) -> None:
        """Record an input whose content is that of an earlier one."""
        self.rows.append({"key": key, "uri": uri, "state": "duplicate_of", "reason": of})

    def commit(self, run: dict[str, Any]) -> bool:
        """Sync, name, seal. Returns False if another worker sealed this shard first."""
        try:
            self.tar.close()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            seal = seal_of(self.temporary, self.rows, plan_hash=self.plan_hash)
            seal = self._name(seal) | {"run": run}
        except FileNotFoundError:
            if self.final.with_suffix(".json").exists():
                return False  # we slept; others sealed the shard and removed our file
            raise
        except OSError as error:
            error.filename = error.filename or str(self.temporary)
            raise
        finally:
            self.abandon()
        path = self.final.with_suffix(".json")
        seal_it = lambda: create_exclusive(path, seal_bytes(seal))  # noqa: E731
        return patiently(seal_it, what=f"sealing {path}")

    def _name(self, seal: dict[str, Any]) -> dict[str, Any]:
        """Give the tar its name; the seal of the tar that has the name afterwards.

        Another worker may have named its tar first (and may have been killed before sealing it).
        That tar was whole and synced before it got its name: it is sealed, never replaced, unless
        the disk has damaged it since or cannot read it any more.
        """
        link = lambda: publish(self.temporary, self.final)  # noqa: E731
        look = lambda: self._seal_of_named(seal)  # noqa: E731
        for _ in range(2):
            if patiently(link, what=f"naming {self.final}"):
                return seal
            inode = self.final.stat().st_ino
            try:
                return patiently(look, what=f"reading {self.final}")
            except DamagedLabelSetError:
                pass
            except EnvironmentFailure as failure:
                if not is_bad_sector(failure):
                    raise
            if self.final.with_suffix(".json").exists():
                return seal  # sealed by now: not ours to touch, `distill check` judges it
            discard(self.final, inode=inode)
        raise DamagedLabelSetError(
            f"{self.final}: an unsealed, unreadable file stands under the final name and came back "
            "after it was deleted. Look at the disk, then start again."
        )

    def _seal_of_named(self, seal: dict[str, Any]) -> dict[str, Any]:
        """The seal of the tar that has the name, which may be somebody else's."""
        if hash_file(self.final) == seal["sha256"]:
            return seal
        return seal_of(self.final, adopt(self.final, self.rows), plan_hash=self.plan_hash)

    def abandon(self) -> None:
        """Remove the temporary file; a committed shard is untouched."""
        with contextlib.suppress(
            OSError
        ):  # a full disk refuses the last bytes; they are not wanted
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def adopt(tar_path: Path, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a tar that somebody else wrote for the same plan: its content decides the states.

    `DamagedLabelSetError` unless every sample's own checksums prove it (see `prove`); an error of
    the disk is raised as it is.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(tar_path, mode="r:") as tar:
            for info in tar:
                key = info.name.partition(".")[0]
                end = info.offset_data + info.size + -info.size % tarfile.BLOCKSIZE
                found[key] = (found.get(key, (info.offset, 0))[0], end)
        about = {}
        with tar_path.open("rb") as file:
            for key, (start, end) in found.items():
                file.seek(start)
                about[key] = summarise(
                    decode_members(key, dict(prove(key, file.read(end - start))))
                )
            if any(file.read()):
                raise ValueError("bytes after the last sample")
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise DamagedLabelSetError(f"{tar_path}: not a whole, unsealed shard ({error}).") from error
    if strange := set(found) - {row["key"] for row in planned}:
        raise DamagedLabelSetError(f"{tar_path}: holds {sorted(strange)[:3]}, not of this plan.")
    rows = []
    for row in planned:
        start_row = {"key": row["key"], "uri": row["uri"]}
        if row["state"] == "duplicate_of":
            rows.append(row)
        elif row["key"] in found:
            start, end = found[row["key"]]
            place = {"state": "labelled", "offset": start, "size": end - start}
            rows.append(start_row | place | about[row["key"]])
        else:
            reason = row.get("reason", "rejected by the worker that wrote the shard")
            rows.append(start_row | {"state": "rejected", "reason": reason})
    return rows


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
