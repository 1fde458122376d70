"""Where images come from: folders, globs, lists, tars, tables, videos, label sets, fsspec URLs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from teacher.errors import UsageError
from teacher.jobs.containers import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    VIDEO_SUFFIXES,
    TableSource,
    TarSource,
    VideoSource,
    file_stamp,
)
from teacher.label import Camera
from teacher.store import DATASET, LabelSet, content_key

SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES | TABLE_SUFFIXES | {".tar"}
WHAT = (
    "a folder, a glob pattern, a .txt list, an image, a .tar, a .parquet, a video, a label set, or "
    "LAYOUT:FOLDER for a data set (nyu:/data/nyu)"
)


class Source(Protocol):
    """Anything that lists inputs and reads their bytes; must be usable from several threads."""

    keyed_by_bytes: bool  # whether `key` is the hash of what `read` gives

    def list(self) -> list[str]:
        """Names of all inputs, sorted, independent of where the source lies on this machine."""
        ...

    def read(self, uri: str) -> bytes:
        """The encoded image; `ImageError` when this one input is not an image."""
        ...

    def key(self, uri: str) -> str:
        """The content key."""
        ...

    def camera(self, uri: str) -> Camera | None:
        """The known camera of the stored image, if the source has one."""
        ...

    def stamp(self, uri: str) -> str:
        """Changes whenever the content may have changed; "" when keys are cheap or must not age."""
        ...


class FileSource:
    """Image files below a root; names are relative to it, so the root may move between runs."""

    keyed_by_bytes = True

    def __init__(self, root: Path, names: list[str]) -> None:
        """``names`` are paths relative to ``root`` (absolute ones stay as they are)."""
        self.root, self.names = root, sorted(names)

    def list(self) -> list[str]:
        """Relative paths, sorted."""
        return self.names

    def read(self, uri: str) -> bytes:
        """The file's bytes."""
        return (self.root / uri).read_bytes()

    def key(self, uri: str) -> str:
        """Hash of the file."""
        return content_key(self.read(uri))

    def camera(self, uri: str) -> Camera | None:
        """Files carry their camera inside (EXIF), if at all."""
        return None

    def stamp(self, uri: str) -> str:
        """Path, size, time."""
        return file_stamp(self.root / uri)


class RemoteSource:
    """Image files below an fsspec URL (``s3://``, ``gs://``, ``hf://``, ``memory://`` ...)."""

    keyed_by_bytes = True

    def __init__(self, url: str) -> None:
        """Lists the files below the URL."""
        import fsspec

        try:
            self.files, root = fsspec.core.url_to_fs(url)
            found = self.files.find(root)
        except (ValueError, ImportError, OSError) as error:
            raise UsageError(f"images={url}: cannot be listed ({error}).") from error
        self.root = root.rstrip("/")
        self.names = sorted(n for n in found if Path(n).suffix.lower() in IMAGE_SUFFIXES)
        if not self.names:
            raise UsageError(f"images={url}: {len(found)} files, no image among them.")

    def list(self) -> list[str]:
        """Names relative to the URL, sorted."""
        return [name.removeprefix(self.root).lstrip("/") or name for name in self.names]

    def _path(self, uri: str) -> str:
        return uri if uri == self.root else f"{self.root}/{uri}"

    def read(self, uri: str) -> bytes:
        """The object's bytes."""
        return self.files.cat_file(self._path(uri))

    def key(self, uri: str) -> str:
        """Hash of the object."""
        return content_key(self.read(uri))

    def camera(self, uri: str) -> Camera | None:
        """None: only what the image itself says."""
        return None

    def stamp(self, uri: str) -> str:
        """What the store says of the object, if it says anything that changes."""
        about = self.files.info(self._path(uri))
        version = about.get("ETag") or about.get("etag") or about.get("mtime") or ""
        return f"{self.files.protocol}|{uri}|{about.get('size')}|{version}" if version else ""


class LayoutSource(FileSource):
    """The images of a data set on disk (`teacher.generators.layouts`), with their cameras."""

    def __init__(self, name: str, root: Path) -> None:
        """``name``: the layout; ``root``: the folder its patterns start from."""
        from teacher.generators.layouts import layout_of, list_images

        self.layout = layout_of(name)
        super().__init__(root, list_images(root, self.layout))
        if not self.names:
            raise UsageError(
                f"images={name}:{root}: no image in this layout, which looks for "
                f"{list(self.layout.images)} below the folder."
            )

    def camera(self, uri: str) -> Camera | None:
        """The data set's own camera, if it states one."""
        from teacher.generators.layouts import camera_of

        return camera_of(self.layout, self.root / uri)


class LabelSetSource:
    """The images of an existing label set, with their cameras."""

    keyed_by_bytes = False

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

    def key(self, uri: str) -> str:
        """The label's key, so that answers can be joined with it."""
        return uri

    def camera(self, uri: str) -> Camera | None:
        """The camera stored with the label."""
        return self.labels.camera(uri)

    def stamp(self, uri: str) -> str:
        """Empty: keys are known."""
        return ""


class Bundle:
    """Several sources under their names: ``sub/clip.mp4::t=...``, ``part.tar::a.jpg``."""

    keyed_by_bytes = False

    def __init__(self, files: FileSource, parts: dict[str, Source]) -> None:
        """``files`` for plain images, ``parts`` by relative path."""
        self.files, self.parts = files, parts
        self.names = sorted(
            [*files.list(), *(f"{p}::{u}" for p, s in parts.items() for u in s.list())]
        )

    def _pick(self, uri: str) -> tuple[Source, str]:
        part, _, inner = uri.partition("::")
        return (self.parts[part], inner) if inner and part in self.parts else (self.files, uri)

    def list(self) -> list[str]:
        """All names, sorted."""
        return self.names

    def read(self, uri: str) -> bytes:
        """Of the part."""
        source, inner = self._pick(uri)
        return source.read(inner)

    def key(self, uri: str) -> str:
        """Of the part."""
        source, inner = self._pick(uri)
        return source.key(inner)

    def camera(self, uri: str) -> Camera | None:
        """Of the part."""
        source, inner = self._pick(uri)
        return source.camera(inner)

    def stamp(self, uri: str) -> str:
        """Of the part."""
        source, inner = self._pick(uri)
        return source.stamp(inner)


def suffix_of(name: str) -> str:
    """Lower-case suffix with its dot; cheap, for a million names."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def walk(root: Path) -> list[str]:
    """Usable files below ``root`` by suffix, hidden ones left out; refuses when there are none."""
    found, others = [], Counter[str]()
    cut = len(os.path.join(root, ""))  # noqa: PTH118
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            if suffix_of(name) in SUFFIXES:
                found.append(os.path.join(folder, name)[cut:])  # noqa: PTH118
            else:
                others[suffix_of(name) or "no suffix"] += 1
    if not found:
        seen = ", ".join(f"{n} x {s}" for s, n in others.most_common(4)) or "nothing, it is empty"
        raise UsageError(
            f"images={root}: no image in this folder; found {seen}, expected files ending in "
            f"{' '.join(sorted(SUFFIXES))} (subfolders are searched too)."
        )
    return found


def open_files(root: Path, names: list[str], video: dict[str, Any]) -> Source:
    """Plain images as they are; tars, tables and videos opened as the sources they are."""
    openers: dict[str, Callable[[Path], Source]] = {".tar": TarSource}
    openers |= {suffix: TableSource for suffix in TABLE_SUFFIXES}
    openers |= {suffix: lambda path: VideoSource(path, **video) for suffix in VIDEO_SUFFIXES}
    plain = [n for n in names if suffix_of(n) not in openers]
    parts = {n: openers[suffix_of(n)](root / n) for n in names if suffix_of(n) in openers}
    files = FileSource(root, plain)
    return Bundle(files, parts) if parts else files


def open_source(images: str, *, video: dict[str, Any] | None = None) -> Source:
    """A source by what ``images`` is; ``video``: ``fps`` and ``scene_change`` (`VideoSource`)."""
    clip = {"fps": 1.0, "scene_change": None} | (video or {})
    if "://" in images:
        return RemoteSource(images)
    layout, _, root = images.partition(":")
    if root and Path(root).expanduser().is_dir() and not Path(images).exists():
        return LayoutSource(layout, Path(root).expanduser())
    path = Path(images).expanduser()
    if path.is_dir():
        if (path / DATASET).exists():
            return LabelSetSource(path)
        return open_files(path, walk(path), clip)
    if path.is_file() and path.suffix == ".txt":
        return open_files(path.parent, read_list(path), clip)
    if path.is_file():
        return open_files(path.parent, [path.name], clip)
    if any(c in images for c in "*?["):
        anchor = Path(path.anchor or ".")
        names = [str(p) for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file()]
        if not names:
            raise UsageError(f"images={images}: the pattern matches no file.")
        return open_files(Path(), names, clip)
    raise UsageError(f"images={images}: no such file or folder; expected {WHAT}.")


def read_list(path: Path) -> list[str]:
    """The paths of a text list, one a line; relative ones from the list's own folder."""
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    missing = [n for n in names if not (path.parent / n).is_file()]
    if missing or not names:
        found = f"{len(missing)} of its lines name no file ({missing[:3]})" if names else "empty"
        raise UsageError(
            f"images={path}: {found}; expected one image path a line, absolute or relative to "
            "the list's folder."
        )
    if len(set(names)) < len(names):
        twice = next(n for n, count in Counter(names).items() if count > 1)
        raise UsageError(f"images={path}: {twice!r} stands in the list twice; list each file once.")
    return names
