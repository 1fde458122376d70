"""Image files below an fsspec URL (``s3://``, ``gs://``, ``hf://``, ``memory://`` ...)."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teacher.errors import EnvironmentFailure, UsageError
from teacher.jobs.containers import File
from teacher.label import Camera
from teacher.shards import content_key


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """An exception of a store's own becomes the one that the system has for it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        refused = getattr(error, "status", None) in (401, 403)
        raise (PermissionError if refused else ConnectionError)(str(error)) from error


class _Opened(io.RawIOBase):
    """A store's file, read by offset."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self.file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        with _answered():
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


class RemoteFiles:
    """Files of an object store by their names relative to the URL."""

    def __init__(self, url: str) -> None:
        """Lists the files below the URL; ``names`` may be narrowed by the caller."""
        import fsspec

        try:
            self.files, root = fsspec.core.url_to_fs(url)
            found = self.files.find(root)
        except Exception as error:  # stores have errors of their own
            theirs = isinstance(error, (ValueError, FileNotFoundError, PermissionError))
            raise (UsageError if theirs else EnvironmentFailure)(
                f"images={url}: cannot be listed ({error})."
            ) from error
        self.root = root.rstrip("/")
        if found == [self.root]:  # the URL is that of one file
            self.root = self.root.rpartition("/")[0]
        self.left_out: Counter[str] = Counter()
        self.names = [path.removeprefix(self.root).lstrip("/") for path in sorted(found)]

    def _path(self, uri: str) -> str:
        return f"{self.root}/{uri}"

    def file(self, uri: str) -> File:
        """A file that holds several images: opened where it lies, read by offset."""
        path = self._path(uri)

        def opened() -> Any:
            with _answered():
                return _Opened(self.files.open(path, "rb"))

        return File(path=Path(uri), open=opened, stamp=lambda: self._mark(path))

    def beside(self, uri: str, name: str) -> bytes:
        """The file ``name`` of the folder that ``uri`` lies in."""
        return self._cat(f"{self._path(uri).rpartition('/')[0]}/{name}")

    def _cat(self, path: str) -> bytes:
        with _answered():
            return self.files.cat_file(path)

    def keyed_by_bytes(self, uri: str) -> bool:
        """Always."""
        return True

    def list(self) -> list[str]:
        """Names relative to the URL, sorted."""
        return self.names

    def read(self, uri: str) -> bytes:
        """The object's bytes."""
        return self._cat(self._path(uri))

    def key(self, uri: str) -> str:
        """Hash of the object."""
        return content_key(self.read(uri))

    def camera(self, uri: str) -> Camera | None:
        """None: only what the image itself says."""
        return None

    def stamp(self, uri: str) -> str:
        """What the store says of the object, if it says anything that changes."""
        return self._mark(self._path(uri))

    def _mark(self, path: str) -> str:
        try:
            about = self.files.info(path)
        except OSError:  # unknown: hashed each time, and what is wrong shows then
            return ""
        version = about.get("ETag") or about.get("etag") or about.get("mtime") or ""
        return f"{self.files.protocol}|{path}|{about.get('size')}|{version}" if version else ""
