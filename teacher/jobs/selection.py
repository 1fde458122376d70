"""`distill select`: which labels are worth learning from, written to a file; nothing is deleted.

A selection file is JSON: ``format``, ``version``, ``labels`` (which label set it speaks of:
``plan_hash``, ``images``, ``keys_sha256``), ``keep`` (keys), ``dropped`` (key -> reasons),
``criteria`` and ``made_by``. `distill inspect` saves marks in the same format. A selection of
another label set is refused, never applied by chance.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from teacher.errors import UsageError
from teacher.jobs.commit import claim_out, replace_atomically
from teacher.store import LabelSet

FORMAT, VERSION = "dense-selection", 1
BITS = 64


class Selectable(Protocol):
    """What a selection needs of a label set; `teacher.store.LabelSet` is one."""

    keys: list[str]
    meta: dict[str, Any]


def identity(labels: Selectable) -> dict[str, Any]:
    """What pins a label set, wherever it lies: its plan and the images that got a label."""
    keys = hashlib.sha256("\n".join(labels.keys).encode()).hexdigest()
    return {
        "plan_hash": labels.meta["plan_hash"],
        "images": len(labels.keys),
        "keys_sha256": keys,
    }


def write_selection(
    path: Path,
    *,
    labels: Selectable,
    keep: Sequence[str],
    dropped: Mapping[str, Sequence[str]],
    criteria: Mapping[str, Any],
) -> None:
    """Write a selection file, replacing an older one at once."""
    about = {
        "format": FORMAT,
        "version": VERSION,
        "labels": identity(labels),
        "made_by": "distill select",
        "criteria": criteria,
        "keep": list(keep),
        "dropped": dropped,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, json.dumps(about, indent=1).encode() + b"\n")


def load_selection(path: str | Path) -> dict[str, Any]:
    """The content of a selection file, checked; `UsageError` says what stands there instead."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"selection {path}: no such file; `distill select` and inspect write one.")
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        if found["version"] > VERSION:
            raise UsageError(
                f"selection {path}: format version {found['version']}, this program reads up to "
                f"{VERSION}; update the program."
            )
        keep, labels = found["keep"], found["labels"]
        whole = all(isinstance(k, str) for k in keep) and isinstance(labels["plan_hash"], str)
        if not whole or not isinstance(keep, list) or not isinstance(labels["keys_sha256"], str):
            raise ValueError("fields")
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"selection {path}: not a selection file ({type(error).__name__}: {error}); expected "
            "one that `distill select` or `distill inspect` wrote."
        ) from error
    return found


def read_selection(path: str | Path, labels: Selectable) -> set[str]:
    """The keys to keep of ``labels``; `UsageError` if the file speaks of another label set."""
    found = load_selection(path)
    mine, theirs = identity(labels), found["labels"]
    if mine["keys_sha256"] != theirs["keys_sha256"] or mine["plan_hash"] != theirs["plan_hash"]:
        raise UsageError(
            f"selection {path}: it was made for another label set (plan "
            f"{theirs['plan_hash'][:12]}, {theirs.get('images')} images; this one: "
            f"{mine['plan_hash'][:12]}, {mine['images']} images). Select anew."
        )
    strange = set(found["keep"]) - set(labels.keys)
    if strange:
        raise UsageError(
            f"selection {path}: it keeps {len(strange)} image(s) that the label set does not have "
            f"({sorted(strange)[:3]}); the file was changed by hand. Select anew."
        )
    return set(found["keep"])


def apply_selections(paths: Sequence[str], sets: Sequence[Selectable]) -> list[list[str]]:
    """Per label set the keys to learn from, in the set's order; a set without a file keeps all.

    Each file finds its set by itself. Raises `UsageError` for a file that fits none, for two
    files of one set, and when nothing is left of a set.
    """
    kept = [list(labels.keys) for labels in sets]
    taken: dict[int, str] = {}
    for path in paths:
        theirs = load_selection(path)["labels"]
        fits = [
            i
            for i, labels in enumerate(sets)
            if identity(labels)["keys_sha256"] == theirs["keys_sha256"]
            and labels.meta["plan_hash"] == theirs["plan_hash"]
        ]
        if not fits:
            plans = ", ".join(labels.meta["plan_hash"][:12] for labels in sets)
            raise UsageError(
                f"selection {path}: it was made for plan {theirs['plan_hash'][:12]}, which is none "
                f"of the label sets given (plans {plans}). Select anew, or take it out."
            )
        for i in fits:
            if i in taken:
                raise UsageError(
                    f"selection {path}: {taken[i]} speaks of the same label set; give one of them."
                )
            taken[i] = path
            chosen = read_selection(path, sets[i])
            kept[i] = [key for key in kept[i] if key in chosen]
            if not kept[i]:
                raise UsageError(f"selection {path}: keeps no image.")
    return kept


def picture_hash(data: bytes) -> int:
    """64 bits that hardly change under scaling, recompression and light (difference hash).

    Grey, shrunk to 9 x 8 by area; each bit says whether a cell is darker than its right
    neighbour by more than 2 of 255 levels, so that noise in flat places decides nothing.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", (64, 64))  # a JPEG is decoded small
        grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (grey[:, 1:] - grey[:, :-1] > 2).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_duplicates(
    keys: Sequence[str], hashes: Sequence[int], *, distance: int, rank: Sequence[float]
) -> dict[str, str]:
    """Key -> the kept key it resembles: hashes that differ in at most ``distance`` bits.

    Lowest rank is kept first, then the first in order. What resembles only a dropped image stays:
    similarity is not carried along a chain. Exact by the pigeonhole principle: of ``distance + 1``
    bands of bits at least one is equal, so only hashes that share a band are compared.
    """
    edges = [i * BITS // (distance + 1) for i in range(distance + 2)]
    bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
    kept: dict[tuple[int, int], list[int]] = {}
    dropped: dict[int, int] = {}
    for i in sorted(range(len(keys)), key=lambda k: (rank[k], k)):
        places = [(low, hashes[i] >> low & mask) for low, mask in bands]
        near = {j for place in places for j in kept.get(place, ())}
        twin = min((j for j in near if (hashes[i] ^ hashes[j]).bit_count() <= distance), default=-1)
        if twin >= 0:
            dropped[i] = twin
            continue
        for place in places:
            kept.setdefault(place, []).append(i)
    return {keys[i]: keys[j] for i, j in sorted(dropped.items())}


def number_of(row: Mapping[str, Any], name: str) -> float | None:
    """A row's number, or None when it has none."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def judge(
    rows: Sequence[Mapping[str, Any]],
    *,
    at_least: Mapping[str, float],
    at_most: Mapping[str, float],
    drop_worst: Mapping[str, float],
) -> dict[str, list[str]]:
    """Key -> reasons for those rows that miss a limit; a missing number misses none.

    ``drop_worst``: column -> share (0..1) of the labelled images with the highest numbers.
    """
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, limit in at_least.items():
            value = number_of(row, name)
            if value is not None and value < limit:
                reasons.setdefault(row["key"], []).append(f"{name} {value:g} < {limit:g}")
        for name, limit in at_most.items():
            value = number_of(row, name)
            if value is not None and value > limit:
                reasons.setdefault(row["key"], []).append(f"{name} {value:g} > {limit:g}")
    for name, share in drop_worst.items():
        have = [(v, row["key"]) for row in rows if (v := number_of(row, name)) is not None]
        for value, key in sorted(have, reverse=True)[: int(share * len(have))]:
            text = f"{name} {value:g} is among the worst {share:.3g} of all"
            reasons.setdefault(key, []).append(text)
    return reasons


def _check_columns(rows: Sequence[Mapping[str, Any]], **groups: Mapping[str, float]) -> None:
    """Refuse a column that no row has, naming those there are, and shares beyond 0..1."""
    known = sorted({n for r in rows for n in r if number_of(r, n) is not None} - {"offset", "size"})
    for group, limits in groups.items():
        for name, limit in limits.items():
            if name not in known:
                raise UsageError(f"{group}.{name}: no such column in the index; it has {known}.")
            if not isinstance(limit, int | float) or isinstance(limit, bool):
                raise UsageError(f"{group}.{name}={limit}: expected a number.")
            if group == "drop_worst" and not 0 <= limit <= 1:
                raise UsageError(f"drop_worst.{name}={limit}: expected a share from 0 to 1.")


def hash_pictures(labels: LabelSet, keys: Sequence[str], *, threads: int) -> list[int]:
    """`picture_hash` of every stored image."""

    def one(key: str) -> int:
        members = labels.members(key)
        return picture_hash(members["jpg"] if "jpg" in members else members["png"])

    with ThreadPoolExecutor(threads) as pool:
        found = tqdm(pool.map(one, keys), total=len(keys), desc="select", unit="img", mininterval=1)
        return list(found)


def select(
    *,
    labels: str,
    out: str | None = None,
    at_least: dict[str, float] | None = None,
    at_most: dict[str, float] | None = None,
    drop_worst: dict[str, float] | None = None,
    near_duplicate_bits: int | None = None,
    threads: int = 2,
) -> dict[str, Any]:
    """Write a selection file: what of a label set is worth learning from, and why the rest is not.

    Args:
        labels: the label set; it is not changed.
        out: the selection file, new or an earlier one; None: ``LABELS/selection.json``.
        at_least: column of the index -> smallest number that is kept (coverage, confidence).
        at_most: column -> largest number that is kept (uncertainty, residuals, sky share).
        drop_worst: column -> share of the labelled images, highest numbers first, to drop.
        near_duplicate_bits: images whose 64-bit difference hashes differ in at most so many bits
            are near-duplicates; of each the one with the lowest depth uncertainty stays. None: off.
        threads: for reading pictures.

    Returns:
        ``summary``, ``exit`` (1 when nothing is left), ``selection``, ``kept``, ``dropped`` and
        ``reasons`` (how many images each criterion dropped).
    """
    stored = LabelSet(labels)
    rows = [row for row in stored.rows if row["state"] == "labelled"]
    limits = {"at_least": at_least or {}, "at_most": at_most or {}, "drop_worst": drop_worst or {}}
    _check_columns(rows, **limits)
    if near_duplicate_bits is not None and not 0 <= near_duplicate_bits <= 16:
        raise UsageError(f"near_duplicate_bits={near_duplicate_bits}: expected 0 to 16, or null.")
    if threads < 1:
        raise UsageError(f"threads={threads}: expected at least 1.")
    path = Path(out) if out else stored.path / "selection.json"
    claim_out(path, fields={"keep", "labels"}, what="selection file", form=FORMAT)
    reasons = judge(rows, **limits)
    counts: dict[str, int] = {}
    for name in (text.split(" ")[0] for texts in reasons.values() for text in texts):
        counts[name] = counts.get(name, 0) + 1
    if near_duplicate_bits is not None:
        left = [row for row in rows if row["key"] not in reasons]
        keys = [row["key"] for row in left]
        hashes = hash_pictures(stored, keys, threads=threads)
        rank = [number_of(row, "depth_uncertainty") or 0.0 for row in left]
        twins = near_duplicates(keys, hashes, distance=near_duplicate_bits, rank=rank)
        reasons |= {key: [f"near-duplicate of {twin}"] for key, twin in twins.items()}
        counts["near-duplicate"] = len(twins)
    keep = [key for key in stored.keys if key not in reasons]
    criteria = limits | {"near_duplicate_bits": near_duplicate_bits}
    write_selection(path, labels=stored, keep=keep, dropped=reasons, criteria=criteria)
    why = ", ".join(f"{n} {name}" for name, n in counts.items()) or "no criterion was missed"
    return {
        "summary": f"{path}: {len(keep)} of {len(rows)} kept ({why}); nothing was deleted",
        "exit": 0 if keep else 1,
        "selection": str(path),
        "kept": len(keep),
        "dropped": len(reasons),
        "reasons": counts,
    }
