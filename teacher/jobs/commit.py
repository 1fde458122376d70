"""The commit protocol: nothing half-written ever stands under a final name.

A file is written under a temporary name in its own directory, synced, and then given its final
name by a hard link, which the file system refuses if that name is taken. Whoever was paused and
wakes up late can therefore overwrite nothing. The directory is synced last.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import TypeVar

from teacher.errors import EnvironmentFailure, UsageError

R = TypeVar("R")
TRANSIENT = {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET, errno.EBUSY}
WAITS_S = (0.1, 0.5, 2.0, 5.0)  # before the second, third ... attempt
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
DATASET, INDEX, RUN = "dataset.json", "index.parquet", "run.json"  # beside the shards of a set
# the names in a label set's folder that are its own, whether they exist yet or not
OWN_NAMES = re.compile(
    rf"{'|'.join(map(re.escape, (DATASET, INDEX, RUN)))}|shard-\d+\.(tar|json)|\..+\.(lease|tmp)"
)
OWNER = re.compile(r"\.(?P<of>.+)\.(?P<host>[^.~]+)~(?P<pid>\d+)~[0-9a-f]+\.tmp")


@functools.cache
def this_host() -> str:
    """What tells processes with equal numbers apart: machine, boot, and process namespace."""
    parts = [re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:64] or "host"]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text()[:8])
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))  # a container's own numbers
    return "-".join(parts)


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same directory that no other worker, on any machine, uses."""
    owner = f"{this_host()}~{os.getpid()}~{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def tidy(folder: Path) -> None:
    """Remove what dead workers left: temporary files and leases, theirs or of sealed shards."""
    for path in folder.glob(".*"):
        found = OWNER.fullmatch(path.name)
        if found:
            sealed = folder.joinpath(found["of"]).with_suffix(".json").exists()
            dead = found["host"] == this_host() and not is_alive(int(found["pid"]))
            litter = dead or (found["of"].startswith("shard-") and sealed)
        else:
            litter = path.suffix == ".lease" and (folder / f"{path.stem[1:]}.json").exists()
        if litter:
            path.unlink(missing_ok=True)


def is_transient(error: OSError) -> bool:
    """Whether it may pass by itself; time-outs of an object store come without a number."""
    return error.errno in TRANSIENT or isinstance(error, (TimeoutError, ConnectionError))


def patiently(work: Callable[[], R], *, what: str) -> R:
    """Run input or output again after a transient error, waiting longer each time.

    Raises `EnvironmentFailure` when it stays; permanent errors (disk full, read-only) come at once.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return work()
        except OSError as error:
            if not is_transient(error):
                raise
            if wait_s is None:
                raise EnvironmentFailure(
                    f"{what}: {error.strerror or error} ({error.filename or type(error).__name__}),"
                    " five times in a row. What was "
                    "committed is intact; the same command goes on when the device is back."
                ) from error
            time.sleep(wait_s)
    raise AssertionError


def is_bad_sector(failure: EnvironmentFailure) -> bool:
    """Whether `patiently` gave up over EIO: the file is damaged. No other error says that."""
    return isinstance(failure.__cause__, OSError) and failure.__cause__.errno == errno.EIO


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system knows no such thing
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk inside the block says which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and bring its bytes to the disk; the name is not yet durable."""
    with naming(path), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(temporary: Path, final: Path) -> bool:
    """Give a synced file its final name, if that name is free; the temporary name stays.

    Returns True if this file has the name now, False if another one has.
    """
    try:
        os.link(temporary, final)
        made = True
    except FileExistsError:  # NFS may have made the name and lost its answer
        made = temporary.exists() and temporary.samefile(final)
    except FileNotFoundError:
        if not final.exists():
            raise
        made = False  # somebody sealed the shard and tidied up behind us
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise EnvironmentFailure(
            f"{final.parent}: this file system has no hard links ({error.strerror}), which the "
            "exclusive commit needs; write the label set to a local or POSIX file system and "
            "copy it when it is complete."
        ) from error
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


def discard(path: Path, *, inode: int) -> None:
    """Delete the file that was judged to be damaged, by its inode; what has its name now stays."""
    temporary = temporary_beside(path)
    try:
        path.rename(temporary)
    except FileNotFoundError:
        return
    with contextlib.suppress(FileNotFoundError):  # somebody tidied up
        if temporary.stat().st_ino != inode:  # replaced since it was judged
            publish(temporary, path)
        temporary.unlink()
    sync_directory(path.parent)


def replace_atomically(path: Path, data: bytes) -> None:
    """Replace a file that can be rebuilt (an index, a report) in one step."""
    temporary = temporary_beside(path)
    try:
        with naming(path):
            temporary.write_bytes(data)
        name_synced(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_own_name(path: Path) -> bool:
    """Whether a path lies in a label set's folder and has a name of its own files (`OWN_NAMES`)."""
    within = (path.parent / DATASET).exists() or any(path.parent.glob("shard-*.json"))
    return within and OWN_NAMES.fullmatch(path.name) is not None


def claim_out(path: Path, *, fields: Set[str], what: str, form: str | None = None) -> None:
    """Refuse an ``out=`` that cannot be written, or that holds anything but an earlier ``what``.

    An earlier one is a JSON table with ``fields`` (and ``format`` ``form``); it may be replaced.
    Names that a label set gives its own files are refused in its folder before they exist.
    """
    if is_own_name(path):
        raise UsageError(
            f"out={path}: that is the name of one of the label set's own files; expected another "
            f"name for a {what}. Choose another out=."
        )
    if path.exists():
        try:
            with path.open("rb") as file:
                found = json.loads(b"{" + file.read()) if file.read(1) == b"{" else None
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or fields - found.keys() or found.get("format") != form:
            raise UsageError(
                f"out={path}: found {'other content' if path.is_file() else 'a folder or device'}, "
                f"expected a new file or an earlier {what}, which is replaced. Choose another out=."
            )
    probe = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"out={path}: cannot be written ({error.strerror}). Choose an out= elsewhere."
        ) from error


def name_synced(temporary: Path, path: Path) -> None:
    """Sync a file and let it take the place of one that can be rebuilt."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    temporary.replace(path)
    sync_directory(path.parent)


class Lease:
    """A note that somebody works on a shard. It only saves work: the seal alone decides.

    The file's modification time is the heartbeat. Age is measured against a file touched just now
    in the same folder, so that neither a wrong clock nor another machine's clock matters; a beat
    from the future means that the clock was set back. A lease of this machine whose process is gone
    is free at once.
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
            beat = self.path.stat().st_mtime
            host, pid, _ = self.path.read_text().split()
            if host == this_host() and not is_alive(int(pid)):
                return True
        except FileNotFoundError:
            return True
        except ValueError:
            pass  # not what we write: it expires like any other
        probe = temporary_beside(self.path)
        probe.touch()
        age_s = probe.stat().st_mtime - beat
        probe.unlink(missing_ok=True)
        return abs(age_s) > self.LIFETIME_S

    def renew(self) -> None:
        """The heartbeat; nothing happens if somebody took the lease over."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.read_text() == self.mine:
                os.utime(self.path)

    def drop(self) -> None:
        """Give the lease back, if it is still ours."""
        with contextlib.suppress(OSError):
            if self.path.read_text() == self.mine:
                self.path.unlink()


def is_alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
