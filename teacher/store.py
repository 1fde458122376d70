"""Label sets on disk: written once, sealed, verified, read by key. Format: docs/label-format.md.

A folder of sealed shards (`teacher.shards`) and ``dataset.json``, which says what the set is.
``index.parquet`` is a cache of the seals' rows and can always be rebuilt from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from teacher.errors import UsageError
from teacher.jobs.commit import (
    DATASET,
    INDEX,
    create_exclusive,
    name_synced,
    naming,
    temporary_beside,
    tidy,
)
from teacher.label import Camera, Label, Task, validate
from teacher.shard_writer import ShardWriter
from teacher.shards import (
    FORMAT,
    MAX_MEMBER_BYTES,
    VERSION,
    DamagedLabelSetError,
    canonical_json,
    content_key,
    decode_members,
    hash_file,
    read_seal,
    sealed_shards,
    shard_name,
    shard_problem,
)

__all__ = [
    "DATASET",
    "DamagedLabelSetError",
    "LabelSet",
    "canonical_json",
    "content_key",
    "decode_members",
    "hash_file",
    "open_folder",
    "problems_of",
    "read_rows",
    "sealed_shards",
    "write_index",
    "write_label_set",
]
UNITS = {
    "depth": "metres to the camera plane; NaN unknown, +inf sky",
    "normals": "unit vector, camera frame x right, y up, z toward the viewer; NaN unknown",
    "semantic": "class id of the class table; 255 (8-bit) or 65535 (16-bit) unknown",
    "instances": "instance id, 0 none; the table in KEY.json gives class and score",
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
        if strangers and not _has_seal_of(folder, dataset["plan_hash"]):
            raise UsageError(
                f"out={folder}: found {strangers[:3]}, expected a new or empty folder, or a label "
                "set of the same job to go on with. Choose another out=."
            )
        create_exclusive(about, json.dumps(whole, indent=1, sort_keys=True).encode() + b"\n")
    found = read_dataset(folder)
    if found["plan_hash"] != dataset["plan_hash"]:
        changed = sorted(
            k
            for k in {*whole, *found} - {"plan_hash", "software"}  # neither is part of the plan
            if whole.get(k) != found.get(k)
        )
        raise UsageError(
            f"out={folder}: holds another job's label set (plan {found['plan_hash'][:12]}, this "
            f"job {dataset['plan_hash'][:12]}; different: {', '.join(changed) or 'inputs'}). "
            "Labels of different plans never mix: choose another out=, or delete that folder."
        )
    tidy(folder)
    return folder


def _has_seal_of(folder: Path, plan_hash: str) -> bool:
    """Whether the folder is this plan's and has only lost its description."""
    for path in sealed_shards(folder).values():
        with contextlib.suppress(DamagedLabelSetError):
            return read_seal(path)["plan_hash"] == plan_hash
    return False


def read_dataset(folder: Path) -> dict[str, Any]:
    """``dataset.json``, or a `DamagedLabelSetError` that says what stands there instead."""
    if not folder.is_dir():
        raise DamagedLabelSetError(f"{folder}: no such folder; expected a label set.")
    path = folder / DATASET
    if not path.is_file():
        if sealed_shards(folder):
            raise DamagedLabelSetError(
                f"{folder}: a label set that has lost its {DATASET}. Start the same job again: it "
                "is written anew, and the sealed shards are kept."
            )
        raise DamagedLabelSetError(
            f"{folder}: no {DATASET} in it, so this is not a label set. `distill label` and "
            "`distill scenes` make one."
        )
    return parse_dataset(path.read_bytes(), path)


def parse_dataset(data: bytes, path: str | Path) -> dict[str, Any]:
    """The content of a ``dataset.json`` that stands at ``path``, for `DamagedLabelSetError`."""
    try:
        dataset = json.loads(data)
        known = dataset["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise DamagedLabelSetError(
            f"{path}: not the description of a {FORMAT}. If it was damaged, delete it and start "
            "the same job again: it is written anew, and its sealed shards are kept."
        )
    if dataset["version"] > VERSION:
        raise DamagedLabelSetError(
            f"{path}: format version {dataset['version']}, this program reads up to {VERSION}; "
            "update the program."
        )
    return dataset


def problems_of(folder: Path) -> dict[int, str]:
    """Shard number -> what is wrong with it, by hashing every shard; works on damaged seals.

    A shard that the disk cannot read has that problem; the others are judged all the same.
    """
    meta = read_dataset(folder)
    found: dict[int, str] = {}
    for number in sorted({*range(meta["shards"]), *sealed_shards(folder)}):
        try:
            problem = shard_problem(folder, number, meta)
        except OSError as error:
            problem = unread(Path(error.filename or shard_name(number)), error)
        if problem:
            found[number] = problem
    return found


def read_rows(folder: Path, damaged: dict[int, str] | None = None) -> list[dict[str, Any]]:
    """One row per input, from the seals, with the shard's number added.

    With ``damaged``, seals that cannot be read are left out and noted there: number -> why.
    """
    rows = []
    for number, path in sealed_shards(folder).items():
        try:
            seal = read_seal(path)
        except (DamagedLabelSetError, OSError) as error:
            if damaged is None:
                raise
            damaged[number] = unread(path, error)
            continue
        rows += [row | {"shard": number} for row in seal["rows"]]
    return rows


def unread(path: Path, error: Exception) -> str:
    """Why a file of a label set could not be read, in a sentence that names it."""
    if not isinstance(error, OSError):
        return str(error)
    return f"{path.name}: cannot be read: {error.strerror or error}"


def write_index(folder: Path) -> dict[str, int]:
    """(Re)build ``index.parquet`` from the seals; returns how many inputs are in each state.

    Memory does not grow with the set. Of a complete set it also removes what dead workers left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    seals = list(sealed_shards(folder).items())
    names: set[str] = set()
    for _, path in seals:
        names.update(*read_seal(path)["rows"])
    texts, counts = ["key", "uri", "state", "reason"], ["shard", "offset", "size"]
    kinds = dict.fromkeys(texts, pa.string()) | dict.fromkeys(counts, pa.int64())
    kinds |= {name: pa.float64() for name in sorted(names - {*kinds, "height", "width"})}
    kinds |= dict.fromkeys(sorted(names & {"height", "width"}), pa.int64())
    states: Counter[str] = Counter()
    temporary = temporary_beside(folder / INDEX)
    try:
        schema = pa.schema(list(kinds.items()))
        with (
            naming(folder / INDEX),
            pq.ParquetWriter(str(temporary), schema, compression="zstd") as writer,
        ):
            for start in range(0, len(seals), 100):
                rows = []
                for number, path in seals[start : start + 100]:
                    rows += [row | {"shard": number} for row in read_seal(path)["rows"]]
                states.update(row["state"] for row in rows)
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        name_synced(temporary, folder / INDEX)
    finally:
        temporary.unlink(missing_ok=True)
    tidy(folder)
    return {name: states[name] for name in ("labelled", "rejected", "duplicate_of")}


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
        damaged_seals: shard number -> why its seal was skipped, if that was asked for.
    """

    def __init__(self, path: str | os.PathLike[str], *, skip_damaged_seals: bool = False) -> None:
        """Read the description and the seals; no image is touched yet.

        A damaged seal is a `DamagedLabelSetError`, or skipped where only a look is taken.
        """
        self.path = Path(path)
        self.meta = read_dataset(self.path)
        self.classes = {int(k): str(v) for k, v in self.meta.get("classes", {}).items()}
        self.damaged_seals: dict[int, str] = {}
        self.rows = read_rows(self.path, self.damaged_seals if skip_damaged_seals else None)
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

    def lesson(self, key: str, tasks: Collection[str]) -> Label:
        """One label with no more decoded than teaches: the tasks' values and uncertainties."""
        return decode_members(key, self.members(key), lesson=tasks)

    def problems(self) -> list[str]:
        """Everything that is missing or damaged, one sentence each, by hashing every shard."""
        return list(problems_of(self.path).values())

    def verify(self) -> int:
        """Hash everything; the number of labelled images, or `DamagedLabelSetError`."""
        problems = self.problems()
        if problems:
            listed = "\n  ".join(problems[:20])
            raise DamagedLabelSetError(
                f"{self.path}: {len(problems)} problem(s)\n  {listed}\nStart the same job again: "
                "it labels missing and damaged shards anew; or `distill check salvage=`."
            )
        return len(self)
