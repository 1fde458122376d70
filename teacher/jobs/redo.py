"""What earlier runs sealed is hashed before a job goes on; a damaged shard is labelled again."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from teacher.errors import EnvironmentFailure
from teacher.jobs.commit import Lease, discard, is_bad_sector, patiently
from teacher.shards import DamagedLabelSetError, seal_path, shard_name, shard_problem


def set_aside_damaged(
    folder: Path, numbers: Sequence[int], meta: dict[str, Any], *, threads: int
) -> dict[int, str]:
    """Hash the sealed shards ``numbers``; take the seal and the tar of damaged ones away.

    Returns shard number -> what was wrong with it. Only what was judged is deleted, under the
    shard's lease: first the tar, then the seal, so that a damaged tar never stands there unsealed.
    """
    judge = lambda n: _problem(folder, n, meta)  # noqa: E731
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(numbers), desc="verify", unit="shard", mininterval=1, leave=False) as bar,
    ):
        bad = []
        for number, problem in zip(numbers, pool.map(judge, numbers), strict=True):
            if problem:
                bad.append(number)
            bar.update()
    return {n: problem for n in bad if (problem := _set_aside(folder, n, meta))}


def _problem(folder: Path, number: int, meta: dict[str, Any]) -> str:
    """What is wrong with a shard; a bad sector is damage, once it failed five times in a row.

    Any other error (a server that is away, a permission) says nothing of the shard and is raised.
    """
    name = shard_name(number)
    try:
        return patiently(lambda: shard_problem(folder, number, meta), what=f"reading {name}")
    except EnvironmentFailure as failure:
        if not is_bad_sector(failure):
            raise
        return f"{name}: cannot be read: {os.strerror(errno.EIO)}"


def _set_aside(folder: Path, number: int, meta: dict[str, Any]) -> str:
    lease = Lease(folder, shard_name(number))
    if not lease.take():
        return ""  # somebody else mends it
    try:
        seal = seal_path(folder, number)
        paths = [p for p in (seal.with_suffix(".tar"), seal) if p.exists()]
        inodes = [p.stat().st_ino for p in paths]
        problem = _problem(folder, number, meta)
        if problem.endswith("sealed for another plan"):  # whole, and somebody's work
            raise DamagedLabelSetError(f"{folder}: {problem}. Move it to where it belongs.")
        if problem:
            try:
                for path, inode in zip(paths, inodes, strict=True):
                    discard(path, inode=inode)
            except OSError as error:
                raise EnvironmentFailure(
                    f"{folder}: {problem.rstrip('.')}, and it cannot be moved away to be labelled "
                    f"again ({error.strerror}). Repair the disk and start again; or `distill check "
                    f"labels={folder} salvage=NEW` saves what is whole into a new set on another "
                    "disk; or start the same job with another out=."
                ) from error
        return problem
    finally:
        lease.drop()
