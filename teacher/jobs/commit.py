"""The commit protocol: nothing half-written ever stands under a final name.

A file is written under a temporary name in its own directory, synced, and then given its final
name by a hard link, which the file system refuses if that name is taken. Whoever was paused and
wakes up late can therefore overwrite nothing. The directory is synced last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
from pathlib import Path

from teacher.errors import EnvironmentFailure


def this_host() -> str:
    """This machine's name, safe inside a file name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname()) or "host"


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same directory that no other worker, on any machine, uses."""
    owner = f"{this_host()}~{os.getpid()}~{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def is_orphan(temporary: Path) -> bool:
    """Whether a temporary file's writer ran on this machine and is gone."""
    host, _, pid_and_rest = temporary.name.split(".")[-2].partition("~")
    pid = pid_and_rest.partition("~")[0]
    return host == this_host() and pid.isdigit() and not is_alive(int(pid))


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


class Lease:
    """A note that somebody works on a shard. It only saves work: the seal alone decides.

    The file's modification time is the heartbeat. Age is measured against a file touched just now
    in the same folder, so that neither a wrong clock nor another machine's clock matters. A lease
    of this machine whose process is gone is free at once.
    """

    LIFETIME_S = 120.0

    def __init__(self, folder: Path, name: str) -> None:
        """``name`` of the work; nothing happens before `take`."""
        self.path = folder / f".{name}.lease"
        self.mine = f"{this_host()} {os.getpid()} {secrets.token_hex(4)}"

    def take(self) -> bool:
        """Take the lease if it is free, expired or orphaned."""
        for _ in range(2):
            if create_exclusive(self.path, self.mine.encode()):
                return True
            if not self._is_free():
                return False
            self.path.unlink(missing_ok=True)
        return False

    def _is_free(self) -> bool:
        try:
            host, pid, _ = self.path.read_text().split()
            beat = self.path.stat().st_mtime
        except FileNotFoundError:
            return True
        except ValueError:
            host, pid, beat = "", "0", self.path.stat().st_mtime
        if host == this_host() and not is_alive(int(pid)):
            return True
        probe = temporary_beside(self.path)
        probe.touch()
        age_s = probe.stat().st_mtime - beat
        probe.unlink(missing_ok=True)
        return age_s > self.LIFETIME_S

    def renew(self) -> None:
        """The heartbeat; silent if somebody took the lease over."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.read_text() == self.mine:
                os.utime(self.path)

    def drop(self) -> None:
        """Give the lease back, if it is still ours."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.read_text() == self.mine:
                self.path.unlink()


def is_alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
