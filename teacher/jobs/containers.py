"""Images inside other files: WebDataset tars, Parquet or Arrow tables, videos.

Nothing is ever unpacked to disk: members are found once by their headers and read by offset, so a
member's name (``../x``, ``/etc/x``) is only a name, and links or devices are never followed.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from teacher.errors import EnvironmentFailure, UsageError
from teacher.images import ImageError, encode_png
from teacher.label import Camera
from teacher.store import content_key

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .heic .heif .avif .ppm .pgm .mpo".split()
)
VIDEO_SUFFIXES = frozenset(".mp4 .mov .m4v .mkv .avi .webm .mpg .mpeg".split())
TABLE_SUFFIXES = frozenset((".parquet", ".arrow"))
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "bytes", "content")
MAX_MEMBER_BYTES = 1 << 30


class TarSource:
    """The images of one tar file, by offset; other members (json, txt) are not inputs."""

    keyed_by_bytes = True

    def __init__(self, path: Path, *, opener: Callable[[], IO[bytes]] | None = None) -> None:
        """Scan the headers. ``opener`` gives a fresh file object (default: the local file)."""
        self.path = path
        self._open = opener or (lambda: path.open("rb"))
        self._where: dict[str, tuple[int, int, str]] = {}
        try:
            with self._open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    suffix = os.path.splitext(info.name)[1].lower()  # noqa: PTH122 - many names
                    if suffix not in IMAGE_SUFFIXES:
                        continue
                    name, copy = info.name, 1
                    while name in self._where:
                        name, copy = f"{info.name}#{copy + 1}", copy + 1
                    self._where[name] = (info.offset_data, info.size, _why_not(info))
        except (tarfile.TarError, EOFError) as error:
            raise UsageError(
                f"images={path}: not a whole tar file ({error}); found "
                f"{len(self._where)} images before the damage. Repair or remove it."
            ) from error

    def list(self) -> list[str]:
        """Member names, sorted."""
        return sorted(self._where)

    def read(self, uri: str) -> bytes:
        """The member's bytes."""
        offset, size, why_not = self._where[uri]
        if why_not:
            raise ImageError(f"tar member {uri!r} is {why_not}, not a regular file")
        with self._open() as file:
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
        return f"{file_stamp(self.path)}::{uri}"


def _why_not(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"a link to {info.linkname!r}"
    if not info.isreg() or info.issparse():
        return "a device, folder or sparse file"
    return "larger than 1 GiB" if info.size > MAX_MEMBER_BYTES else ""


def file_stamp(path: Path) -> str:
    """Path, size and modification time; changes whenever a file was touched.

    Empty when unknown, and within two seconds of the last change: a clock's tick may hide a second
    change of the same size.
    """
    try:
        facts = path.stat()
    except OSError:
        return ""
    if abs(time.time_ns() - facts.st_mtime_ns) < 2_000_000_000:
        return ""
    return f"{path.absolute()}|{facts.st_size}|{facts.st_mtime_ns}"


class TableSource:
    """The image column of a Parquet or Arrow file (Hugging Face layout or plain bytes)."""

    keyed_by_bytes = True

    def __init__(self, path: Path) -> None:
        """Reads the schema and row counts only."""
        import pyarrow as pa

        self.path = path
        try:
            self._groups = list(_row_groups(path))
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"images={path}: not a readable table ({error}).") from error
        self._cache = threading.local()
        self.rows = sum(count for count, _ in self._groups)

    def list(self) -> list[str]:
        """Row numbers, padded so that they sort."""
        return [f"{row:09d}" for row in range(self.rows)]

    def read(self, uri: str) -> bytes:
        """The row's encoded image."""
        row, group = int(uri), 0
        while row >= self._groups[group][0]:
            row, group = row - self._groups[group][0], group + 1
        if getattr(self._cache, "group", None) != group:
            self._cache.group, self._cache.column = group, self._groups[group][1]()
        value = self._cache.column[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ImageError(f"row {uri} of {self.path.name} holds no image bytes")
        return data

    def key(self, uri: str) -> str:
        """Hash of the bytes; of the row's number where there are none."""
        try:
            return content_key(self.read(uri))
        except ImageError:
            return content_key(f"{self.path.name}::{uri}".encode())

    def camera(self, uri: str) -> Camera | None:
        """None: only what the image itself says."""
        return None

    def stamp(self, uri: str) -> str:
        """Name, size and time of the table, and the row."""
        return f"{file_stamp(self.path)}::{uri}"


def _image_column(path: Path, names: list[str]) -> str:
    found = [name for name in IMAGE_COLUMNS if name in names]
    if not found:
        raise UsageError(
            f"images={path}: no image column; found {names}, expected one of "
            f"{list(IMAGE_COLUMNS)} holding encoded bytes or Hugging Face images."
        )
    return found[0]


def _row_groups(path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """(rows, loader of the image column) for each row group or record batch."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.ParquetFile(path)
        column = _image_column(path, table.schema_arrow.names)
        for group in range(table.metadata.num_row_groups):

            def load(group: int = group) -> Any:
                return pq.ParquetFile(path).read_row_group(group, columns=[column])[column]

            yield table.metadata.row_group(group).num_rows, load
        return
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped:
        whole = pa.ipc.open_stream(mapped).read_all()
    column = _image_column(path, whole.schema.names)
    yield whole.num_rows, lambda: whole[column]


class VideoSource:
    """Frames of one video, by rate or by scene change; timestamps are kept in the names.

    A frame's key is made of the video's content and the frame's time, so that the same clip gives
    the same keys wherever it lies.
    """

    keyed_by_bytes = False

    def __init__(self, path: Path, *, fps: float, scene_change: float | None) -> None:
        """Pick the frames: ``fps`` per second, or, with ``scene_change``, the first of each scene.

        ``scene_change`` is the mean absolute grey difference (0..1) between two frames, reduced to
        32 x 32, above which a new scene starts (0.1 finds hard cuts).
        """
        if fps <= 0:
            raise UsageError(f"video.fps={fps}: expected more than 0 frames per second.")
        self.path, self.fps, self.scene_change = path, fps, scene_change
        self._local = threading.local()
        with path.open("rb") as file:
            self._hash = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            self._times = {f"t={t:012.6f}": pts for t, pts in self._pick()}
        except _av().FFmpegError as error:
            raise UsageError(f"images={path}: not a readable video ({error}).") from error

    def _pick(self) -> Iterator[tuple[float, int]]:
        import numpy as np

        with _av().open(str(self.path)) as clip:
            stream = clip.streams.video[0]
            due, before = 0.0, None
            for frame in clip.decode(stream):
                if frame.pts is None:
                    continue
                seconds = float(frame.pts * stream.time_base)
                if self.scene_change is not None:
                    grey = frame.reformat(width=32, height=32, format="gray").to_ndarray()
                    now = grey.astype(np.float32) / 255
                    if before is None or np.abs(now - before).mean() > self.scene_change:
                        yield seconds, frame.pts
                    before = now
                elif seconds >= due - 1e-6:
                    yield seconds, frame.pts
                    due = max(due + 1 / self.fps, seconds + 0.5 / self.fps)

    def list(self) -> list[str]:
        """``t=SECONDS`` of the picked frames, in time order."""
        return sorted(self._times)

    def read(self, uri: str) -> bytes:
        """The frame as PNG; decoding goes on from the last frame while times ascend."""
        wanted = self._times[uri]
        frames, at = getattr(self._local, "state", (None, None))
        if frames is None or at is None or at >= wanted:
            frames = self._frames(wanted)
        for pts, frame in frames:
            if pts == wanted:
                self._local.state = (frames, pts)
                return encode_png(frame.to_ndarray(format="rgb24"))
        self._local.state = (None, None)
        raise ImageError(f"{self.path.name}: no frame at {uri}")

    def _frames(self, start: int) -> Iterator[tuple[int, Any]]:
        with _av().open(str(self.path)) as clip:
            stream = clip.streams.video[0]
            clip.seek(start, stream=stream, backward=True)
            for frame in clip.decode(stream):
                if frame.pts is not None and frame.pts >= start:
                    yield frame.pts, frame

    def key(self, uri: str) -> str:
        """Video content and timestamp."""
        return content_key(f"{self._hash} {uri}".encode())

    def camera(self, uri: str) -> Camera | None:
        """None: containers carry no intrinsics."""
        return None

    def stamp(self, uri: str) -> str:
        """Empty: the key is cheap."""
        return ""


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise EnvironmentFailure("videos need PyAV: pip install 'dense-distill[video]'") from error
    return av
