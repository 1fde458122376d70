"""Label sets on disk: written once, sealed, verified, read by key. Format: docs/label-format.md.

A folder of WebDataset tar shards. ``shard-000000.json``, the seal, is the only commit point: a
tar without a seal does not exist for any reader. The seal also carries one row per input, so that
``index.parquet`` can always be rebuilt from the seals.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from teacher.codecs.planes import decode_plane, encode_plane
from teacher.errors import UsageError
from teacher.jobs.commit import (
    create_exclusive,
    is_orphan,
    publish,
    replace_atomically,
    temporary_beside,
)
from teacher.label import Camera, Label, Task, coverage, validate

FORMAT, VERSION = "dense-label-set", 1
DATASET, INDEX = "dataset.json", "index.parquet"
MAX_MEMBER_BYTES = 1 << 30  # one file inside a shard; more is taken for an attack
UNITS = {
    "depth": "metres to the camera plane; NaN unknown, +inf sky",
    "normals": "unit vector, camera frame x right, y up, z toward the viewer; NaN unknown",
    "semantic": "class id of the class table; 255 (8-bit) or 65535 (16-bit) unknown",
    "instances": "instance id, 0 none; the table in KEY.json gives class and score",
}


class DamagedLabelSetError(UsageError):
    """A label set that is incomplete, damaged or not ours; the text names the files."""


def content_key(data: bytes) -> str:
    """The key of an input: 96 bits of the SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:24]


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def shard_name(number: int) -> str:
    """``shard-000012``, without suffix."""
    return f"shard-{number:06d}"


def seal_path(folder: Path, number: int) -> Path:
    """Where a shard's seal stands, once it is committed."""
    return folder / f"{shard_name(number)}.json"


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


def decode_members(key: str, members: dict[str, bytes]) -> Label:
    """The inverse of `encode_members`."""
    from teacher.images import decode

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
        for percent in (5, 50, 95):
            value = round(float(np.percentile(finite, percent)), 4) if finite.size else None
            row[f"depth_m_p{percent}"] = value
    if "alignment" in label.provenance:
        row["alignment_residual"] = label.provenance["alignment"].get("residual")
    return row


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
        """Append one labelled image; ``members`` may be encoded beforehand, elsewhere."""
        start = self.tar.offset
        for suffix, data in members if members is not None else encode_members(label):
            info = tarfile.TarInfo(f"{label.key}.{suffix}")
            info.size, info.mode = len(data), 0o644  # time, owner and group stay 0
            self.tar.addfile(info, io.BytesIO(data))
        row = {"key": label.key, "uri": uri, "state": "labelled", "offset": start}
        self.rows.append(row | {"size": self.tar.offset - start} | summarise(label))

    def reject(self, key: str, *, uri: str, reason: str) -> None:
        """Record an input that got no label, and why."""
        self.rows.append({"key": key, "uri": uri, "state": "rejected", "reason": reason})

    def duplicate(self, key: str, *, uri: str, of: str) -> None:
        """Record an input whose content is that of an earlier one."""
        self.rows.append({"key": key, "uri": uri, "state": "duplicate_of", "reason": of})

    def commit(self, run: dict[str, Any]) -> bool:
        """Sync, name, seal. Returns False if another worker sealed this shard first."""
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        seal = seal_of(self.temporary, self.rows, plan_hash=self.plan_hash)
        if not publish(self.temporary, self.final) and hash_file(self.final) != seal["sha256"]:
            # Another worker named its tar first (and may have been killed before sealing it).
            # That tar was whole and synced before it got its name: seal it, never replace it.
            rows = adopt(self.final, self.rows)
            seal = seal_of(self.final, rows, plan_hash=self.plan_hash)
        seal |= {"run": run}
        return create_exclusive(self.final.with_suffix(".json"), canonical_json(seal) + b"\n")

    def abandon(self) -> None:
        """Remove the temporary file; a committed shard is untouched."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def adopt(tar_path: Path, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a tar that somebody else wrote for the same plan: its content decides the states."""
    found: dict[str, tuple[int, int, dict[str, bytes]]] = {}
    try:
        with tarfile.open(tar_path, mode="r:") as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                start, _, members = found.get(key, (info.offset, 0, {}))
                members[suffix] = tar.extractfile(info).read()  # type: ignore[union-attr]
                found[key] = (start, tar.fileobj.tell() - start, members)  # type: ignore[union-attr]
        about = {key: summarise(decode_members(key, m)) for key, (_, _, m) in found.items()}
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DamagedLabelSetError(
            f"{tar_path}: an unsealed, unreadable file stands under the final name ({error}); it "
            "was never committed. Delete it and start again."
        ) from error
    rows = []
    for row in planned:
        start_row = {"key": row["key"], "uri": row["uri"]}
        if row["state"] == "duplicate_of":
            rows.append(row)
        elif row["key"] in found:
            offset, size, _ = found[row["key"]]
            size += -size % tarfile.BLOCKSIZE
            place = {"state": "labelled", "offset": offset, "size": size}
            rows.append(start_row | place | about[row["key"]])
        else:
            reason = row.get("reason", "rejected by the worker that wrote the shard")
            rows.append(start_row | {"state": "rejected", "reason": reason})
    return rows


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_ids(rows: list[dict[str, Any]]) -> str:
    """SHA-256 over the inputs of a shard: key, uri and state, in order."""
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


def open_folder(out: str | os.PathLike[str], dataset: dict[str, Any]) -> Path:
    """Create a label set's folder, or accept the one of the same plan; refuse all else.

    ``dataset`` becomes ``dataset.json`` and needs ``plan_hash``, ``tasks`` and ``shards``.
    """
    folder = Path(out)
    whole = {"format": FORMAT, "version": VERSION, "units": UNITS} | dataset
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder}: found a file, expected a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    about = folder / DATASET
    if not about.exists():
        strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if strangers:
            raise UsageError(
                f"out={folder}: found {strangers[:3]}, expected a new or empty folder, or a label "
                "set of the same job to go on with. Choose another out=."
            )
        create_exclusive(about, json.dumps(whole, indent=1, sort_keys=True).encode() + b"\n")
    found = read_dataset(folder)
    if found["plan_hash"] != dataset["plan_hash"]:
        changed = sorted(
            k for k in {*whole, *found} if whole.get(k) != found.get(k) and k != "plan_hash"
        )
        raise UsageError(
            f"out={folder}: holds another job's label set (plan {found['plan_hash'][:12]}, this "
            f"job {dataset['plan_hash'][:12]}; different: {', '.join(changed) or 'inputs'}). "
            "Labels of different plans never mix: choose another out=, or delete that folder."
        )
    for leftover in folder.glob(".shard-*.tmp"):
        if is_orphan(leftover):
            leftover.unlink(missing_ok=True)
    return folder


def read_dataset(folder: Path) -> dict[str, Any]:
    """``dataset.json``, or a `DamagedLabelSetError` that says what stands there instead."""
    path = folder / DATASET
    if not path.is_file():
        raise DamagedLabelSetError(
            f"{folder}: no {DATASET} in it, so this is not a label set. `distill label` and "
            "`distill scenes` make one."
        )
    try:
        dataset = json.loads(path.read_bytes())
        known = dataset["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise DamagedLabelSetError(f"{path}: not the description of a {FORMAT}.")
    if dataset["version"] > VERSION:
        raise DamagedLabelSetError(
            f"{path}: format version {dataset['version']}, this program reads up to {VERSION}; "
            "update the program."
        )
    return dataset


def sealed_shards(folder: Path) -> dict[int, Path]:
    """Shard number -> seal, for all sealed shards."""
    return {int(p.stem[6:]): p for p in sorted(folder.glob("shard-*.json"))}


def read_seal(path: Path) -> dict[str, Any]:
    """A seal's content; a damaged one is named."""
    try:
        seal = json.loads(path.read_bytes())
        if seal["format"] != FORMAT or seal["count"] != len(seal["rows"]):
            raise ValueError("fields")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedLabelSetError(f"{path}: not a whole seal ({error}).") from error
    return seal


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """One row per input, from the seals, with the shard's number added."""
    rows = []
    for number, seal in sealed_shards(folder).items():
        rows += [row | {"shard": number} for row in read_seal(seal)["rows"]]
    return rows


def write_index(folder: Path) -> int:
    """(Re)build ``index.parquet`` from the seals; returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = read_rows(folder)
    names = ["key", "uri", "state", "reason", "shard", "offset", "size"]
    names += sorted({name for row in rows for name in row} - set(names))
    table = pa.Table.from_pylist([{n: row.get(n) for n in names} for row in rows])
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    replace_atomically(folder / INDEX, buffer.getvalue())
    return len(rows)


def write_label_set(
    out: str | os.PathLike[str],
    *,
    n: int,
    make: Callable[[int], Label],
    dataset: dict[str, Any],
    shard_size: int = 64,
    progress: str | None = None,
) -> dict[str, int]:
    """Write ``make(0) .. make(n - 1)`` as a label set; started again, it does what is missing.

    ``dataset`` needs ``tasks`` and whatever else pins the labels; its hash is the plan.
    Returns counts: inputs, shards, and shards that were already there.
    """
    from tqdm import tqdm

    shards = -(-n // shard_size)
    plan = dataset | {"inputs": n, "shard_size": shard_size, "shards": shards}
    plan_hash = hashlib.sha256(canonical_json(plan)).hexdigest()
    folder = open_folder(out, plan | {"plan_hash": plan_hash})
    done = sealed_shards(folder)
    classes = {int(k): v for k, v in dataset.get("classes", {}).items()} or None
    todo = [k for k in range(shards) if k not in done]
    before = n - sum(min(n, (k + 1) * shard_size) - k * shard_size for k in todo)
    with tqdm(total=n, initial=before, desc=progress, unit="img", disable=progress is None) as bar:
        for number in todo:
            with ShardWriter(folder, number, plan_hash=plan_hash) as writer:
                for i in range(number * shard_size, min(n, (number + 1) * shard_size)):
                    writer.add(validate(make(i), classes=classes), uri=f"{i}")
                    bar.update()
                writer.commit({})
    write_index(folder)
    return {"inputs": n, "shards": shards, "already_done": len(done)}


class LabelSet:
    """A sealed label set, read by key.

    Attributes:
        path: the folder.
        meta: ``dataset.json``.
        classes: class id -> name.
        rows: one dict per input (labelled, rejected or duplicate), from the seals.
        keys: keys of the labelled images, in shard order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the description and the seals; no image is touched yet."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise DamagedLabelSetError(f"{self.path}: no such folder; expected a label set.")
        self.meta = read_dataset(self.path)
        self.classes = {int(k): str(v) for k, v in self.meta.get("classes", {}).items()}
        self.rows = read_rows(self.path)
        self._where = {row["key"]: row for row in self.rows if row["state"] == "labelled"}
        self.keys = list(self._where)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the set was made for."""
        return tuple(Task(t) for t in self.meta["tasks"])

    def __len__(self) -> int:
        """Number of labelled images."""
        return len(self.keys)

    def __iter__(self) -> Iterator[Label]:
        """All labelled images, in shard order."""
        return (self[key] for key in self.keys)

    def __contains__(self, key: object) -> bool:
        """Whether an image of that key was labelled."""
        return key in self._where

    def members(self, key: str) -> dict[str, bytes]:
        """Suffix -> bytes of one sample, read from its sealed shard."""
        if key not in self._where:
            raise KeyError(f"{self.path}: no labelled image with key {key!r}")
        row = self._where[key]
        tar_path = self.path / f"{shard_name(row['shard'])}.tar"
        found: dict[str, bytes] = {}
        try:
            with tar_path.open("rb") as file:
                file.seek(row["offset"])
                block = io.BytesIO(file.read(row["size"]))
            with tarfile.open(fileobj=block, mode="r:") as tar:
                for info in tar:
                    stem, _, suffix = info.name.partition(".")
                    data = tar.extractfile(info) if info.isreg() else None
                    if stem != key or data is None or info.size > MAX_MEMBER_BYTES:
                        raise tarfile.TarError(f"unexpected member {info.name!r}")
                    found[suffix] = data.read()
        except (OSError, tarfile.TarError) as error:
            raise DamagedLabelSetError(f"{tar_path}: sample {key} unreadable ({error}).") from error
        return found

    def camera(self, key: str) -> Camera:
        """The camera of one image, without decoding it."""
        return Camera(**json.loads(self.members(key)["json"])["camera"])

    def __getitem__(self, key: str) -> Label:
        """One label, every array decoded to the units of `teacher.label`."""
        return decode_members(key, self.members(key))

    def problems(self) -> list[str]:
        """Everything that is missing or damaged, one sentence each, by hashing every shard."""
        found = []
        seals = sealed_shards(self.path)
        for number in range(self.meta["shards"]):
            if number not in seals:
                found.append(f"{shard_name(number)}: not sealed, so its inputs are not labelled")
        for number, path in seals.items():
            tar = path.with_suffix(".tar")
            try:
                seal = read_seal(path)
            except DamagedLabelSetError as error:
                found.append(str(error))
                continue
            if seal["plan_hash"] != self.meta["plan_hash"] or number >= self.meta["shards"]:
                found.append(f"{path.name}: sealed for another plan")
            elif hash_ids(seal["rows"]) != seal["ids_sha256"]:
                found.append(f"{path.name}: its rows do not match their hash")
            elif not tar.is_file():
                found.append(f"{tar.name}: missing")
            elif tar.stat().st_size != seal["bytes"]:
                size = tar.stat().st_size
                found.append(f"{tar.name}: {size} bytes, the seal says {seal['bytes']}")
            elif hash_file(tar) != seal["sha256"]:
                found.append(f"{tar.name}: its content does not match the seal's sha256")
        return found

    def verify(self) -> int:
        """Hash everything; the number of labelled images, or `DamagedLabelSetError`."""
        problems = self.problems()
        if problems:
            listed = "\n  ".join(problems[:20])
            raise DamagedLabelSetError(
                f"{self.path}: {len(problems)} problem(s)\n  {listed}\nStart the same job again "
                "to redo missing shards; delete a damaged shard's .tar and .json to redo it."
            )
        return len(self)
