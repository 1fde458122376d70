"""Where images come from: folders, globs, lists, tars, tables, videos, label sets, fsspec URLs."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, Protocol

from teacher.errors import UsageError
from teacher.images import ImageError
from teacher.jobs.commit import patiently
from teacher.jobs.containers import (
    IMAGE_SUFFIXES,
    MAX_MEMBER_BYTES,
    TABLE_SUFFIXES,
    VIDEO_SUFFIXES,
    File,
    TableSource,
    TarSource,
    file_stamp,
    local,
    readable,
)
from teacher.jobs.remote import RemoteFiles
from teacher.jobs.videos import VideoSource
from teacher.label import Camera
from teacher.shards import DamagedLabelSetError
from teacher.store import DATASET, INDEX, LabelSet, parse_dataset, read_dataset

SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES | TABLE_SUFFIXES | {".tar"}
WHAT = (
    "a folder, a glob pattern, a .txt list, an image, a .tar, a .parquet, a video, a label set, or "
    "LAYOUT:FOLDER for a data set (nyu:/data/nyu)"
)


class Source(Protocol):
    """Anything that lists inputs and reads their bytes; must be usable from several threads."""

    def keyed_by_bytes(self, uri: str) -> bool:
        """Whether `key` is the hash of what `read` gives."""
        ...

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

    def __init__(self, root: Path, names: list[str]) -> None:
        """``names`` are paths relative to ``root`` (absolute ones stay as they are).

        ``left_out``: suffix -> files beside them that are no inputs, to be told to the user.
        """
        self.root = root
        self.left_out: Counter[str] = Counter()
        self._odd = {readable(name): name for name in names if not name.isascii()}
        self.names = sorted(n if n.isascii() else readable(n) for n in names)

    def _path(self, uri: str) -> Path:
        return self.root / self._odd.get(uri, uri)

    def keyed_by_bytes(self, uri: str) -> bool:
        """Always."""
        return True

    def list(self) -> list[str]:
        """Relative paths, sorted."""
        return self.names

    def read(self, uri: str) -> bytes:
        """The file's bytes."""
        path = self._path(uri)
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise ImageError("the file is larger than 1 GiB")
        return path.read_bytes()

    def key(self, uri: str) -> str:
        """Hash of the file."""
        with self._path(uri).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:24]

    def camera(self, uri: str) -> Camera | None:
        """Files carry their camera inside (EXIF), if at all."""
        return None

    def stamp(self, uri: str) -> str:
        """Path, size, time."""
        return readable(file_stamp(os.path.join(self.root, self._odd.get(uri, uri))))  # noqa: PTH118


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

    def __init__(self, path: Path) -> None:
        """Opens and verifies the set."""
        self.left_out: Counter[str] = Counter()
        self.labels = LabelSet(path)
        self.labels.verify()
        self.origins = [self.labels.meta]

    def keyed_by_bytes(self, uri: str) -> bool:
        """Never: keys are those of the originals."""
        return False

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

    def __init__(
        self,
        files: Source,
        parts: dict[str, Source],
        origins: list[dict[str, Any]] | None = None,
    ) -> None:
        """``files`` for plain images, ``parts`` by relative path; ``origins`` as `origins_of`."""
        self.files, self.parts, self.origins = files, parts, origins or [{}]
        self.left_out = Counter[str](getattr(files, "left_out", {}))
        self.names = sorted(
            [*files.list(), *(f"{p}::{u}" for p, s in parts.items() for u in s.list())]
        )

    def _pick(self, uri: str) -> tuple[Source, str]:
        part, _, inner = uri.partition("::")
        return (self.parts[part], inner) if inner and part in self.parts else (self.files, uri)

    def keyed_by_bytes(self, uri: str) -> bool:
        """Of the part."""
        source, inner = self._pick(uri)
        return source.keyed_by_bytes(inner)

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


def walk(root: Path) -> tuple[list[str], Counter[str]]:
    """Usable files below ``root`` by suffix, and how many others; refuses when there are none.

    Hidden files do not count. Links are followed, but not in circles; a link to nothing is listed,
    so that reading it fails.
    """
    found, others, sets = [], Counter[str](), set[str]()
    todo: list[tuple[str, str, tuple[str, ...]]] = [(str(root), "", (os.path.realpath(root),))]
    while todo:
        folder, prefix, trail = todo.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if not entry.is_symlink():
                        todo.append((entry.path, f"{name}/", trail))
                        continue
                    target = os.path.realpath(entry.path)
                    here = os.path.realpath(folder)
                    if target not in trail and not f"{here}/".startswith(f"{target}/"):
                        todo.append((entry.path, f"{name}/", (*trail, target)))
                elif suffix_of(name) not in SUFFIXES:
                    sets |= {prefix} if entry.name == DATASET else set()
                    others[suffix_of(name) or "no suffix"] += 1
                elif entry.is_file() or entry.is_symlink():
                    found.append(name)
                else:
                    others["pipe or device"] += 1
    found = without_indexes(found, sets)
    if not found:
        seen = ", ".join(f"{n} x {s}" for s, n in others.most_common(4)) or "nothing, it is empty"
        raise UsageError(
            f"images={root}: no image in this folder; found {seen}, expected files ending in "
            f"{' '.join(sorted(SUFFIXES))} (subfolders are searched too)."
        )
    return found, others


def without_indexes(names: list[str], sets: Set[str]) -> list[str]:
    """Names without the index of label sets, a table that is none of images.

    ``sets``: what stands before ``dataset.json`` in the folder of each.
    """
    own = {f"{folder}{INDEX}" for folder in sets}
    return [name for name in names if name not in own]


def open_files(
    root: Path, names: list[str], video: dict[str, Any], left_out: Counter[str] | None = None
) -> Source:
    """Plain images as they are; tars, tables and videos opened as the sources they are."""
    files, parts = sorted_out(names, lambda name: local(root / name), video)
    plain = FileSource(root, files)
    plain.left_out += left_out or Counter()
    beside = lambda name: read_dataset((root / name).parent)  # noqa: E731
    return Bundle(plain, parts, origins_of(names, beside)) if parts else plain


def origins_of(names: list[str], beside: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """``dataset.json`` of the label sets whose tars are among the files; {} for the other files.

    ``beside`` reads that of the folder of a tar, or raises.
    """
    tars = {os.path.dirname(n): n for n in names if suffix_of(n) == ".tar"}  # noqa: PTH120
    plain = any(suffix_of(n) != ".tar" for n in names)
    found: list[dict[str, Any]] = []
    for _, name in sorted(tars.items()):
        try:
            found.append(beside(name))
        except (DamagedLabelSetError, FileNotFoundError, PermissionError):  # a tar like any other
            plain = True
    return [*found, {}] if plain else found


def open_remote(url: str, video: dict[str, Any]) -> Source:
    """The same below an fsspec URL."""
    remote = RemoteFiles(url)
    sets = {n.removesuffix(DATASET) for n in remote.names if f"/{n}".endswith(f"/{DATASET}")}
    usable = without_indexes([n for n in remote.names if suffix_of(n) in SUFFIXES], sets)
    if not remote.names:
        raise UsageError(f"images={url}: nothing found; is the address right, and does it answer?")
    if not usable:
        raise UsageError(f"images={url}: {len(remote.names)} files, no image among them.")
    others = (suffix_of(n) or "no suffix" for n in remote.names if suffix_of(n) not in SUFFIXES)
    remote.left_out.update(others)
    remote.names, parts = sorted_out(usable, remote.file, video)

    def beside(name: str) -> dict[str, Any]:
        read = lambda: remote.beside(name, DATASET)  # noqa: E731
        return parse_dataset(patiently(read, what=f"reading {DATASET} beside {name}"), name)

    return Bundle(remote, parts, origins_of(usable, beside)) if parts else remote


def sorted_out(
    names: list[str], file: Callable[[str], File], video: dict[str, Any]
) -> tuple[list[str], dict[str, Source]]:
    """Names of plain images, and a source for each file that holds several."""
    openers: dict[str, Callable[[File], Source]] = {".tar": TarSource}
    openers |= {suffix: TableSource for suffix in TABLE_SUFFIXES}
    openers |= {suffix: lambda one: VideoSource(one, **video) for suffix in VIDEO_SUFFIXES}
    plain: list[str] = []
    parts: dict[str, Source] = {}
    broken: dict[str, None] = {}
    for name in names:
        if suffix_of(name) not in openers:
            plain.append(name)
            continue
        opened = functools.partial(openers[suffix_of(name)], file(name))
        try:
            parts[readable(name)] = patiently(opened, what=f"reading {readable(name)}")
        except UsageError as error:
            broken[str(error)] = None
    if broken:  # all at once: who mends one would else meet the next
        more = [f"... and {len(broken) - 20} more"] if len(broken) > 20 else []
        raise UsageError("\n".join([*sorted(broken)[:20], *more]))
    return plain, parts


def open_source(images: str, *, video: dict[str, Any] | None = None) -> Source:
    """A source by what ``images`` is; ``video``: ``fps`` and ``scene_change`` (`VideoSource`)."""
    clip = {"fps": 1.0, "scene_change": None} | (video or {})
    if "://" in images:
        return open_remote(images, clip)
    layout, _, root = images.partition(":")
    if root and Path(root).expanduser().is_dir() and not Path(images).exists():
        return LayoutSource(layout, Path(root).expanduser())
    path = Path(images).expanduser()
    if path.is_dir():
        if (path / DATASET).exists():
            return LabelSetSource(path)
        names, left_out = walk(path)
        return open_files(path, names, clip, left_out)
    if path.is_file() and suffix_of(path.name) == ".txt":
        return open_files(path.parent, read_list(path), clip)
    if path.is_file():
        return open_files(path.parent, [path.name], clip)
    if any(c in images for c in "*?["):
        fixed = next(i for i, part in enumerate(path.parts) if any(c in part for c in "*?["))
        above, pattern = Path(*path.parts[:fixed]), str(Path(*path.parts[fixed:]))
        if pattern.endswith("**"):  # which Python takes for folders only
            pattern += "/*"
        names = sorted({str(p.relative_to(above)) for p in above.glob(pattern) if p.is_file()})
        if not names:
            raise UsageError(f"images={images}: the pattern matches no file.")
        return open_files(above, names, clip)
    raise UsageError(f"images={images}: no such file or folder; expected {WHAT}.")


def read_list(path: Path) -> list[str]:
    """The paths of a text list, one a line; relative ones from the list's own folder."""
    # a name is what bytes the disk gave it; Windows puts a mark before UTF-8
    text = path.read_text("utf-8-sig", "surrogateescape")
    names = [line.strip() for line in text.splitlines() if line.strip()]
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
