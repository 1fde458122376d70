"""A label job's plan: every input in its shard, pinned by one hash.

The same inputs, teacher, prompts, sizes and batches give the same plan on any machine, under any
path, with any number of workers; anything else gives another hash, and labels never mix.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from teacher.errors import EnvironmentFailure, UsageError
from teacher.jobs.commit import patiently
from teacher.jobs.sources import Source
from teacher.shards import canonical_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One planned input; ``duplicate_of`` is the key that stands for the same content."""

    uri: str
    key: str
    duplicate_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All inputs in order, the shards they fall into, and the hash over everything that counts."""

    entries: list[Entry]
    shard_size: int
    batch_size: int
    facts: dict[str, Any]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.entries) // self.shard_size)

    def shard(self, number: int) -> list[Entry]:
        """The inputs of one shard."""
        return self.entries[number * self.shard_size : (number + 1) * self.shard_size]

    def batches(self, number: int) -> Iterator[list[Entry]]:
        """The shard's inputs in the fixed batches of the plan; batches never cross shards."""
        entries = self.shard(number)
        for start in range(0, len(entries), self.batch_size):
            yield entries[start : start + self.batch_size]

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over inputs, sizes and facts."""
        digest = hashlib.sha256(canonical_json(self.facts))
        digest.update(canonical_json([self.shard_size, self.batch_size]))
        for entry in self.entries:
            digest.update(canonical_json([entry.uri, entry.key]))
        return digest.hexdigest()


class HashCache:
    """Content keys by path, size and time of a file, kept in the user's cache folder.

    A million inputs are hashed once, not once per job or restart. Losing the file costs time only.
    """

    def __init__(self, path: Path | None = None) -> None:
        """``path``: the SQLite file (default ``$XDG_CACHE_HOME/dense-distill/keys.sqlite``)."""
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.path = path or Path(base).expanduser() / "dense-distill" / "keys.sqlite"
        for place in (self.path, self.path, ":memory:"):
            try:
                self._db = self._opened(place)
                return
            except sqlite3.OperationalError:  # locked, read-only: hash without a memory
                continue
            except sqlite3.DatabaseError:  # damaged: begin a new one
                with contextlib.suppress(OSError):
                    self.path.unlink()
            except OSError:  # no home
                continue

    def _opened(self, place: Path | str) -> sqlite3.Connection:
        if place != ":memory:":
            self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(place, timeout=30, isolation_level=None)
        # no write-ahead log: it needs shared memory, which network file systems do not have
        db.execute("PRAGMA journal_mode=TRUNCATE")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("CREATE TABLE IF NOT EXISTS keys (stamp TEXT PRIMARY KEY, key TEXT)")
        return db

    def known(self, stamps: Sequence[str]) -> dict[str, str]:
        """Stamp -> key for those that were seen before."""
        found: dict[str, str] = {}
        for start in range(0, len(stamps), 500):
            part = list(stamps[start : start + 500])
            marks = ",".join("?" * len(part))
            query = f"SELECT stamp, key FROM keys WHERE stamp IN ({marks})"
            with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
                found.update(self._db.execute(query, part).fetchall())
        return found

    def add(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Remember (stamp, key) pairs, in one transaction; without a memory when it is locked."""
        if not pairs:
            return
        with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?)", pairs)

    def forget(self, stamp: str) -> None:
        """Drop a key that turned out not to be that of the content."""
        with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
            self._db.execute("DELETE FROM keys WHERE stamp = ?", (stamp,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def content_keys(source: Source, uris: Sequence[str], *, threads: int) -> list[str]:
    """The key of every input, in parallel, from the cache where the file did not change.

    Resumable: finished keys are remembered every 2000 inputs. An input that cannot be read is an
    error here, the user's if it is gone or not theirs to read, else the environment's: an
    unreadable disk must not become a million rejected images.
    """
    cache = HashCache()
    keys: list[str] = []
    stamp_all = lambda some: [source.stamp(uri) for uri in some]  # noqa: E731
    try:
        with (
            ThreadPoolExecutor(threads) as pool,
            tqdm(total=len(uris), desc="hash", unit="img", mininterval=1, leave=False) as bar,
        ):
            for start in range(0, len(uris), 2000):
                part = uris[start : start + 2000]
                few = [part[k : k + 100] for k in range(0, len(part), 100)]  # threads cost, too
                stamps = [s for some in pool.map(stamp_all, few) for s in some]
                known = cache.known([s for s in stamps if s])
                pairs = list(zip(part, stamps, strict=True))
                todo = [(u, s) for u, s in pairs if s not in known]
                fresh = dict(zip(todo, pool.map(lambda p: _key(source, p[0]), todo), strict=True))
                keys += [known[s] if s in known else fresh[u, s] for u, s in pairs]
                cache.add([(s, key) for (_, s), key in fresh.items() if s])
                bar.update(len(part))
    finally:
        cache.close()
    return keys


def forget_key(source: Source, uri: str) -> None:
    """Hash this input anew next time: its file changed, but neither its size nor its time did."""
    cache = HashCache()
    cache.forget(source.stamp(uri))
    cache.close()


def _key(source: Source, uri: str) -> str:
    try:
        return patiently(lambda: source.key(uri), what=f"reading {uri}")
    except OSError as error:
        theirs = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
        raise (UsageError if theirs else EnvironmentFailure)(
            f"images: {uri!r} cannot be read ({error.strerror or error}). Expected every listed "
            "file to be readable: an unreachable disk must not become a million rejected images. "
            "Mend or remove it."
        ) from error


def make_plan(
    source: Source, *, shard_size: int, batch_size: int, facts: dict[str, Any], threads: int = 4
) -> Plan:
    """Every input in its place: sorted by name, later copies of the same content as duplicates."""
    uris = source.list()
    if twice := [a for a, b in pairwise(sorted(uris)) if a == b]:
        raise UsageError(
            f"images: two inputs have the name {twice[0]!r}; rename the file that is called like a "
            "part of another one."
        )
    first: set[str] = set()
    entries = []
    for uri, key in zip(uris, content_keys(source, uris, threads=threads), strict=True):
        entries.append(Entry(uri=uri, key=key, duplicate_of=key if key in first else None))
        first.add(key)
    return Plan(entries=entries, shard_size=shard_size, batch_size=batch_size, facts=facts)
