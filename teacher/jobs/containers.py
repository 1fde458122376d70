"""Images inside other files: WebDataset tars, Parquet or Arrow tables; videos are in `videos`.

Nothing is ever unpacked to disk: members are found once by their headers and read by offset, so a
member's name (``../x``, ``/etc/x``) is only a name, and links or devices are never followed.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from teacher.errors import UsageError
from teacher.images import ImageError
from teacher.jobs.commit import is_transient
from teacher.label import Camera
from teacher.shards import content_key

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .heic .heif .avif .ppm .pgm .mpo".split()
)
VIDEO_SUFFIXES = frozenset(".mp4 .mov .m4v .mkv .avi .webm .mpg .mpeg".split())
TABLE_SUFFIXES = frozenset((".parquet", ".arrow"))
ARROW_FILE = b"ARROW1"  # how Arrow's file format begins; its stream format does not
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "bytes", "content")
MAX_MEMBER_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class File:
    """A file that holds images, on this machine or behind a URL; see `local`."""

    path: Path  # its name, for messages and by its suffix
    open: Callable[[], IO[bytes]]
    stamp: Callable[[], str]


def local(path: Path) -> File:
    """A file on this machine."""
    return File(path=path, open=lambda: path.open("rb"), stamp=lambda: file_stamp(path))


def stamp_inside(file: File, uri: str) -> str:
    """The stamp of something inside a file; "" when that of the file is unknown."""
    whole = file.stamp()
    return f"{whole}::{uri}" if whole else ""


def readable(name: str) -> str:
    """A name that any text file, table or database takes: bytes that are no UTF-8 are escaped."""
    if name.isascii():
        return name
    raw = name.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace")


class TarSource:
    """The images of one tar file, by offset; other members (json, txt) are not inputs.

    Nor are the other planes of a WebDataset sample: ``KEY.depth.png`` beside ``KEY.png``.
    """

    def __init__(self, path: Path | File) -> None:
        """Scan the headers; a million members take about 150 bytes each."""
        self.file = path if isinstance(path, File) else local(path)
        self._where: dict[str, tuple[int, int, str]] = {}
        copies: Counter[str] = Counter()
        try:
            with self.file.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    suffix = os.path.splitext(info.name)[1].lower()  # noqa: PTH122 - many names
                    if suffix not in IMAGE_SUFFIXES:
                        continue
                    first = name = readable(info.name)
                    while name in self._where:
                        copies[first] += 1
                        name = f"{first}#{copies[first] + 1}"
                    self._where[name] = (info.offset_data, info.size, _why_not(info))
                check_end(file, tar.offset)
            self.left_out = self._without_planes()
        except (tarfile.TarError, EOFError) as error:
            raise UsageError(
                f"images={self.file.path}: not a whole tar file ({error}); found "
                f"{len(self._where)} images before the damage. Repair or remove it."
            ) from error

    def _without_planes(self) -> Counter[str]:
        """Drop what WebDataset would call another field of a sample that has an image."""
        planes, left_out = {}, Counter[str]()
        for name in self._where:  # few or none, of perhaps a million
            sample, field = _sample_and_field(name)
            if field not in IMAGE_SUFFIXES:
                planes[name] = sample, field
        samples = {sample for sample, _ in planes.values()}
        with_image = samples.intersection(
            _sample_and_field(name)[0] for name in self._where if name not in planes
        )
        for name, (sample, field) in planes.items():
            if sample in with_image:
                del self._where[name]
                left_out[field] += 1
        return left_out

    def keyed_by_bytes(self, uri: str) -> bool:
        """Always: what is no file is never read."""
        return True

    def list(self) -> list[str]:
        """Member names, sorted."""
        return sorted(self._where)

    def read(self, uri: str) -> bytes:
        """The member's bytes."""
        offset, size, why_not = self._where[uri]
        if why_not:
            raise ImageError(f"tar member {uri!r} is {why_not}, not a regular file")
        with self.file.open() as file:
            file.seek(offset)
            return file.read(size)

    def key(self, uri: str) -> str:
        """Hash of the bytes; of the name, for what is not a file."""
        return content_key(uri.encode() if self._where[uri][2] else self.read(uri))

    def camera(self, uri: str) -> Camera | None:
        """None: only what the image itself says."""
        return None

    def stamp(self, uri: str) -> str:
        """Name, size and time of the tar, and the member."""
        return stamp_inside(self.file, uri)


def _sample_and_field(name: str) -> tuple[str, str]:
    """Split at the first dot of the last part of the path, as WebDataset does; a copy's number off.

    ``a/b.depth.PNG#2`` -> ``a/b``, ``.depth.png``
    """
    folder, slash, base = name.rpartition("/")
    sample, dot, field = base.partition(".")
    return folder + slash + sample, dot + field.partition("#")[0].lower()


def check_end(file: IO[bytes], offset: int) -> None:
    """`tarfile.ReadError` unless the listing ended where a tar ends: at zeros, and only zeros.

    Python's tarfile takes a damaged header, a cut between two members and the border to a second
    tar for the end, and says nothing of the members behind it.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(
            f"it ends at byte {offset + len(block)} without the closing zeros, so it may be cut "
            "off; if it is whole, append 1024 zero bytes"
        )
    if any(block):
        raise tarfile.ReadError(f"a damaged header at byte {offset}")
    while rest := file.read(1 << 20):
        if rest.count(0) < len(rest):
            raise tarfile.ReadError("data after its end, perhaps a second tar; split them")


def _why_not(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"a link to {info.linkname!r}"
    if not info.isreg() or info.issparse():
        return "a device, folder or sparse file"
    return "larger than 1 GiB" if info.size > MAX_MEMBER_BYTES else ""


def file_stamp(path: Path | str) -> str:
    """Path, size and modification time; changes whenever a file was touched.

    Empty when unknown, and within two seconds of the last change: a clock's tick may hide a second
    change of the same size.
    """
    try:
        facts = os.stat(path)  # noqa: PTH116 - a million of them
    except OSError:
        return ""
    if abs(time.time_ns() - facts.st_mtime_ns) < 2_000_000_000:
        return ""
    return f"{os.path.abspath(path)}|{facts.st_size}|{facts.st_mtime_ns}"  # noqa: PTH100


class TableSource:
    """The image column of a Parquet or Arrow file (Hugging Face layout or plain bytes)."""

    def __init__(self, path: Path | File) -> None:
        """Reads the schema and row counts only."""
        import pyarrow as pa

        self.file = path if isinstance(path, File) else local(path)
        try:
            self._groups = list(_row_groups(self.file))
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"images={self.file.path}: not a readable table ({error}).") from error
        self._cache = threading.local()
        self.rows = sum(count for count, _ in self._groups)

    def keyed_by_bytes(self, uri: str) -> bool:
        """Always: a row without bytes is never read."""
        return True

    def list(self) -> list[str]:
        """Row numbers, padded so that they sort."""
        return [f"{row:09d}" for row in range(self.rows)]

    def read(self, uri: str) -> bytes:
        """The row's encoded image."""
        row, group = int(uri), 0
        while row >= self._groups[group][0]:
            row, group = row - self._groups[group][0], group + 1
        if getattr(self._cache, "group", None) != group:
            self._cache.column = self._column(uri, group)
            self._cache.group = group
        value = self._cache.column[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ImageError(f"row {uri} of {self.file.path.name} holds no image bytes")
        return data

    def _column(self, uri: str, group: int) -> Any:
        """A row group's images; `ImageError` where arrow cannot decode it, which has no number."""
        import pyarrow as pa

        try:
            return self._groups[group][1]()
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and (error.errno is not None or is_transient(error)):
                raise
            raise ImageError(f"row {uri} of {self.file.path.name} is damaged ({error})") from error

    def key(self, uri: str) -> str:
        """Hash of the bytes; of the row's number where there are none."""
        try:
            return content_key(self.read(uri))
        except ImageError:
            return content_key(f"{self.file.path.name}::{uri}".encode())

    def camera(self, uri: str) -> Camera | None:
        """None: only what the image itself says."""
        return None

    def stamp(self, uri: str) -> str:
        """Name, size and time of the table, and the row."""
        return stamp_inside(self.file, uri)


def _image_column(path: Path, names: list[str]) -> str:
    found = [name for name in IMAGE_COLUMNS if name in names]
    if not found:
        raise UsageError(
            f"images={path}: no image column; found {names}, expected one of "
            f"{list(IMAGE_COLUMNS)} holding encoded bytes or Hugging Face images."
        )
    return found[0]


def _row_groups(file: File) -> Iterator[tuple[int, Callable[[], Any]]]:
    """(rows, loader of the image column) for each row group or record batch."""
    if file.path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        # closed at once and read in this thread: arrow's own threads lock up at exit over a file
        # object of Python's
        with file.open() as data, pq.ParquetFile(data, pre_buffer=False) as table:
            column = _image_column(file.path, table.schema_arrow.names)
            rows = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]

        def load(group: int) -> Any:
            with file.open() as data, pq.ParquetFile(data, pre_buffer=False) as table:
                return table.read_row_group(group, columns=[column], use_threads=False)[column]

        yield from ((n, functools.partial(load, group)) for group, n in enumerate(rows))
        return
    import pyarrow as pa

    with file.open() as opened:
        mapped = isinstance(opened, io.BufferedReader)  # a file of this machine
        data = pa.memory_map(str(file.path)) if mapped else opened
        as_file = data.read(len(ARROW_FILE)) == ARROW_FILE
        data.seek(0)
        whole = (pa.ipc.open_file if as_file else pa.ipc.open_stream)(data).read_all()
    column = _image_column(file.path, whole.schema.names)
    yield whole.num_rows, lambda: whole[column]
