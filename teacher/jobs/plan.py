"""A label job's plan: every input in its shard, pinned by one hash.

The same inputs, teacher, prompts, sizes and batches give the same plan on any machine, under any
path, with any number of workers; anything else gives another hash, and labels never mix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from teacher.jobs.sources import Source
from teacher.store import canonical_json, content_key


@dataclass(frozen=True, kw_only=True)
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

    def hash(self) -> str:
        """SHA-256 over inputs, sizes and facts."""
        digest = hashlib.sha256(canonical_json(self.facts))
        digest.update(canonical_json([self.shard_size, self.batch_size]))
        for entry in self.entries:
            digest.update(canonical_json([entry.uri, entry.key]))
        return digest.hexdigest()


def make_plan(
    source: Source, *, shard_size: int, batch_size: int, facts: dict[str, Any], threads: int = 4
) -> Plan:
    """Hash every input (in parallel, with progress) and lay them out in shards.

    An input that cannot be read is an error here: an unreadable disk must not become a million
    rejected images.
    """
    uris = source.list()
    with ThreadPoolExecutor(threads) as pool:
        hashed = pool.map(lambda uri: content_key(source.read(uri)), uris)
        keys = list(tqdm(hashed, total=len(uris), desc="hash", unit="img", mininterval=1))
    first: set[str] = set()
    entries = []
    for uri, key in zip(uris, keys, strict=True):
        entries.append(Entry(uri=uri, key=key, duplicate_of=key if key in first else None))
        first.add(key)
    return Plan(entries=entries, shard_size=shard_size, batch_size=batch_size, facts=facts)
