"""The commit protocol: nothing half-written ever stands under a final name.

A file is written under a temporary name in its own directory, synced, and then given its final
name by a hard link, which the file system refuses if that name is taken. Whoever was paused and
wakes up late can therefore overwrite nothing. The directory is synced last.
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from teacher.errors import EnvironmentFailure


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same directory that no other worker uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and bring its bytes to the disk; the name is not yet durable."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(temporary: Path, final: Path) -> bool:
    """Give a synced file its final name, if that name is free.

    Returns True if this call made the name, False if somebody else had. The temporary name is
    gone either way.
    """
    try:
        os.link(temporary, final)
        made = True
    except FileExistsError:
        made = False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        raise EnvironmentFailure(
            f"{final.parent}: this file system has no hard links ({error.strerror}), which the "
            "exclusive commit needs; write the label set to a local or POSIX file system and "
            "copy it when it is complete."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(final.parent)
    return made


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create ``path`` with ``data``, whole or not at all; False if it already exists."""
    temporary = temporary_beside(path)
    try:
        write_synced(temporary, data)
        return publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_atomically(path: Path, data: bytes) -> None:
    """Replace a file that can be rebuilt (an index, a report) in one step."""
    temporary = temporary_beside(path)
    try:
        write_synced(temporary, data)
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
