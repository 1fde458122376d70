"""Whose answers everything is scored against: the teacher's, the truth, or both, decoded once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from teacher.errors import UsageError
from teacher.label import Label
from teacher.store import LabelSet, write_label_set

CACHE_BYTES = 1 << 30  # of decoded labels per reference: judging asks for each several times
TEACHER = "teacher"  # folder of the answers of a teacher that was asked now


class Reference:
    """A label set seen under the keys of the held-out images.

    A set that was labelled from another one's images may have other keys; its ``uri`` then names
    the original key. Images that it lacks are left out and counted in ``missing``.
    """

    def __init__(self, name: str, labels: LabelSet, keys: Sequence[str]) -> None:
        """``name`` is "teacher" or "truth"; ``keys`` are those of the held-out images."""
        self.name, self.labels, self.classes = name, labels, labels.classes
        by_uri = {row["uri"]: row["key"] for row in labels.rows if row["state"] == "labelled"}
        self.key_of = {k: k if k in labels else by_uri.get(k, "") for k in keys}
        self.missing = [k for k, own in self.key_of.items() if not own]
        self._decoded: dict[str, Label] = {}
        self._bytes = 0
        if len(self.missing) == len(keys):
            raise UsageError(
                f"{name}={labels.path}: none of the {len(keys)} held-out images is in it; expected "
                "a label set of the same images."
            )

    def __len__(self) -> int:
        """Number of images that it knows."""
        return len(self.key_of) - len(self.missing)

    def __iter__(self) -> Iterator[Label]:
        """Labels under the held-out keys, in their order."""
        return (self[key] for key, own in self.key_of.items() if own)

    def __getitem__(self, key: str) -> Label:
        """One label under its held-out key; not to be written to, others will ask for it again."""
        if key in self._decoded:
            return self._decoded[key]
        label = dataclasses.replace(self.labels[self.key_of[key]], key=key)
        self._bytes += label.image.nbytes + sum(a.nbytes for a in label.values.values())
        if self._bytes <= CACHE_BYTES:
            self._decoded[key] = label
        return label


class Known:
    """The labels of a reference for some of its keys."""

    def __init__(self, reference: Reference, keys: Sequence[str]) -> None:
        """``keys`` that the reference lacks are left out."""
        self.reference = reference
        self.keys = [k for k in keys if reference.key_of.get(k)]

    def __len__(self) -> int:
        """Number of labels."""
        return len(self.keys)

    def __iter__(self) -> Iterator[Label]:
        """The labels."""
        return (self.reference[k] for k in self.keys)


def resampled(label: Label, size: tuple[int, int]) -> dict[Any, np.ndarray]:
    """A label's arrays at another size of the same picture, by the nearest pixel centre."""
    index = [
        np.clip(((np.arange(n) + 0.5) * m / n).astype(np.int64), 0, m - 1)
        for n, m in zip(size, label.image.shape[:2], strict=True)
    ]
    return {t: a[index[0][:, None], index[1][None, :]] for t, a in label.values.items()}


def find_references(
    held_out: LabelSet,
    keys: Sequence[str],
    *,
    teacher: str | dict[str, Any] | None,
    truth: str | None,
    folder: Path,
) -> list[Reference]:
    """Whose answers everything is scored against: teacher, truth, or both."""
    asked = held_out.meta.get("teacher", {}).get("name")
    own = "truth" if asked in ("truth", "folder") else "teacher"
    given: Mapping[str, Any] = {"teacher": teacher, "truth": truth}
    if given[own] is not None and not (own == "truth" and truth == str(held_out.path)):
        raise UsageError(
            f"labels={held_out.path}: already holds the {own}'s answers, and {own}= names "
            "others; give only one of them."
        )
    references = [Reference(own, held_out, keys)]
    if isinstance(teacher, str):
        references.append(Reference("teacher", LabelSet(teacher), keys))
    elif teacher is not None:
        references.append(Reference("teacher", ask(teacher, held_out, keys, folder), keys))
    if truth is not None and own != "truth":
        references.append(Reference("truth", LabelSet(truth), keys))
    for reference in references[1:]:  # the first one, held_out, is verified
        reference.labels.verify()
    return sorted(references, key=lambda ref: ref.name)


def ask(teacher: dict[str, Any], held_out: LabelSet, keys: Sequence[str], folder: Path) -> LabelSet:
    """Let a live teacher label the images ``keys``, as a label set beside the report."""
    from teacher.jobs.run import label

    pinned = ",".join([held_out.meta["plan_hash"], *keys])
    chosen = hashlib.sha256(pinned.encode()).hexdigest()[:12]
    folder, images = folder / TEACHER / chosen, held_out.path
    if len(keys) < len(held_out):  # a copy of the chosen ones: they alone cost the teacher's time
        images = folder.with_name(f"{chosen}-images")
        about: dict[str, Any] = {"keys": list(keys), "tasks": [str(t) for t in held_out.tasks]}
        about |= {k: v for k, v in held_out.meta.items() if k in ("classes", "teacher", "licences")}
        write_label_set(images, n=len(keys), make=lambda i: held_out[keys[i]], dataset=about)
    label(
        teacher=teacher,
        images=str(images),
        out=str(folder),
        tasks=[str(t) for t in held_out.tasks],
        max_side=None,
        shard_size=64,
        batch_size=4,
        keep_pictures=False,
        threads=2,
    )
    return LabelSet(folder)
