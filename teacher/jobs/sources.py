"""Where images come from: a folder, a glob, a text list, or the images of a label set."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Protocol

from teacher.errors import UsageError
from teacher.label import Camera
from teacher.store import DATASET, LabelSet

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .heic .heif .avif .ppm .pgm .mpo".split()
)


class Source(Protocol):
    """Anything that lists inputs and reads their bytes; must be usable from several threads."""

    def list(self) -> list[str]:
        """Names of all inputs, sorted, independent of where the source lies on this machine."""
        ...

    def read(self, uri: str) -> bytes:
        """The encoded image."""
        ...

    def camera(self, uri: str) -> Camera | None:
        """The known camera of the stored image, if the source has one."""
        ...


class FileSource:
    """Files below a root; names are relative to it, so the root may move between runs."""

    def __init__(self, root: Path, names: list[str]) -> None:
        """``names`` are paths relative to ``root`` (absolute ones stay as they are)."""
        self.root, self.names = root, sorted(names)

    def list(self) -> list[str]:
        """Relative paths, sorted."""
        return self.names

    def read(self, uri: str) -> bytes:
        """The file's bytes."""
        return (self.root / uri).read_bytes()

    def camera(self, uri: str) -> Camera | None:
        """Files carry their camera inside (EXIF), if at all."""
        return None


class LabelSetSource:
    """The images of an existing label set, with their cameras."""

    def __init__(self, path: Path) -> None:
        """Opens and verifies the set."""
        self.labels = LabelSet(path)
        self.labels.verify()

    def list(self) -> list[str]:
        """The keys, sorted."""
        return sorted(self.labels.keys)

    def read(self, uri: str) -> bytes:
        """The stored image file."""
        members = self.labels.members(uri)
        return members["jpg"] if "jpg" in members else members["png"]

    def camera(self, uri: str) -> Camera | None:
        """The camera stored with the label."""
        return self.labels[uri].camera


def walk(root: Path) -> list[str]:
    """Image files below ``root`` by suffix, hidden ones left out; refuses when there are none."""
    found, others = [], Counter[str]()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a million names
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                found.append(os.path.relpath(os.path.join(folder, name), root))  # noqa: PTH118
            else:
                others[suffix or "no suffix"] += 1
    if not found:
        seen = ", ".join(f"{n} x {s}" for s, n in others.most_common(4)) or "nothing, it is empty"
        raise UsageError(
            f"images={root}: no image in this folder; found {seen}, expected files ending in "
            f"{' '.join(sorted(SUFFIXES))} (subfolders are searched too)."
        )
    return found


def open_source(images: str) -> Source:
    """A source by what ``images`` is: folder, label set, glob pattern, ``.txt`` list, one file."""
    path = Path(images).expanduser()
    if path.is_dir():
        return LabelSetSource(path) if (path / DATASET).exists() else FileSource(path, walk(path))
    if path.is_file() and path.suffix == ".txt":
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        missing = [n for n in names if not (path.parent / n).is_file()]
        if missing or not names:
            found = (
                f"{len(missing)} of its lines name no file ({missing[:3]})" if names else "empty"
            )
            raise UsageError(
                f"images={path}: {found}; expected one image path a line, absolute or relative to "
                "the list's folder."
            )
        return FileSource(path.parent, names)
    if path.is_file():
        return FileSource(path.parent, [path.name])
    if any(c in images for c in "*?["):
        anchor = Path(path.anchor or ".")
        names = [str(p) for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file()]
        if not names:
            raise UsageError(f"images={images}: the pattern matches no file.")
        return FileSource(Path(), names)
    raise UsageError(
        f"images={images}: no such file or folder; expected a folder, a glob pattern, a .txt list, "
        "an image, or a label set."
    )
