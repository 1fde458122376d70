"""One plan, several worker processes on this machine, one device each.

Workers share nothing but the folder: leases spread the work, seals commit it. A worker that dies is
replaced by nobody; the others take its shards over.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from teacher.anchors import Anchor, load_anchor
from teacher.errors import EnvironmentFailure
from teacher.generators import load_teacher
from teacher.jobs.engines import Tally, Worker
from teacher.jobs.plan import Plan
from teacher.jobs.sources import open_source
from teacher.label import Task
from teacher.store import seal_path

GRACE_S = 20.0  # how long workers may take to abandon their shards after SIGTERM


class WorkerFailedError(EnvironmentFailure):
    """All workers are gone and shards are missing; carries what the first of them said."""

    def __init__(self, message: str, exit_code: int) -> None:
        """``exit_code``: that of the worker's own error."""
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a worker needs to build itself in its own process; plain values and the plan."""

    teacher: dict[str, Any]
    images: str
    video: dict[str, Any] | None
    plan: Plan
    folder: Path
    tasks: Sequence[Task]
    max_side: int | None
    keep_pictures: bool
    threads: int
    anchor: dict[str, Any] | None = None
    align: dict[str, Any] | None = None

    def build(
        self,
        *,
        teacher: Any = None,
        source: Any = None,
        anchor: Anchor | None = None,
        quiet: bool = False,
    ) -> Worker:
        """A worker; what was loaded already may be handed over."""
        return Worker(
            teacher=teacher if teacher is not None else load_teacher(**self.teacher),
            source=source if source is not None else open_source(self.images, video=self.video),
            plan=self.plan,
            folder=self.folder,
            tasks=self.tasks,
            max_side=self.max_side,
            keep_pictures=self.keep_pictures,
            threads=self.threads,
            anchor=anchor if anchor is not None else load_anchor(self.anchor, self.align),
            quiet=quiet,
        )


def devices() -> list[str]:
    """The CUDA devices of this machine, as ``CUDA_VISIBLE_DEVICES`` names them; no torch needed."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [d for d in chosen.split(",") if d]
    found = [
        m[1] for p in Path("/dev").glob("nvidia*") if (m := re.fullmatch(r"nvidia(\d+)", p.name))
    ]
    return sorted(found, key=int)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _work(recipe: Recipe, numbers: list[int], index: int, results: Connection) -> None:
    """The body of a worker process: its own device, its own start in the list of shards."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    gpus = devices()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    try:
        tally = recipe.build(quiet=True).run(numbers, wait=True)
        results.send(("done", dataclasses.asdict(tally)))
    except KeyboardInterrupt:
        results.send(("stopped", None))
    except Exception as error:
        code = getattr(error, "exit_code", 3 if isinstance(error, OSError) else 4)
        text = str(error) if code != 4 else "".join(traceback.format_exception(error))
        results.send(("failed", (code, text)))


def run_processes(recipe: Recipe, numbers: Sequence[int], *, workers: int) -> Tally:
    """Label the given shards with ``workers`` processes; returns the sum of their tallies.

    Raises `WorkerFailedError` when shards are missing after every worker is gone.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share CUDA and thread locks
    pool, pipes = [], []
    for index in range(workers):
        mine, theirs = context.Pipe(duplex=False)
        turn = index * len(numbers) // workers
        order = [*numbers[turn:], *numbers[:turn]]
        process = context.Process(target=_work, args=(recipe, order, index, theirs), daemon=True)
        process.start()
        theirs.close()
        pool.append(process)
        pipes.append(mine)
    started = time.monotonic()
    try:
        _watch(recipe, numbers, pool)
    except BaseException:
        for process in pool:
            process.terminate()
        for process in pool:
            process.join(GRACE_S)
            process.kill()
        raise
    tally, errors = Tally(), []
    for process, pipe in zip(pool, pipes, strict=True):
        process.join()
        try:
            kind, value = pipe.recv()
        except EOFError:
            kind, value = "failed", (3, f"worker died with exit code {process.exitcode}")
        if kind == "done":
            tally += Tally(**value)
        elif kind == "failed":
            errors.append(value)
    left = [n for n in numbers if not seal_path(recipe.folder, n).exists()]
    if left:
        code, text = errors[0] if errors else (3, "the workers were stopped")
        raise WorkerFailedError(
            f"{len(left)} of {len(numbers)} shards are missing after all {workers} workers ended; "
            f"the first of them said: {text}\nThe same command goes on where they stopped.",
            code,
        )
    for _, text in errors:
        tqdm.write(f"a worker was lost, the others took over: {text}")
    tally.wall_s = time.monotonic() - started
    return tally


def _watch(recipe: Recipe, numbers: Sequence[int], pool: list) -> None:
    """Progress over all workers, until all of them ended."""
    sizes = {n: len(recipe.plan.shard(n)) for n in numbers}
    with tqdm(total=sum(sizes.values()), desc=f"label x{len(pool)}", unit="img") as bar:
        while sizes:
            for number in [n for n in sizes if seal_path(recipe.folder, n).exists()]:
                bar.update(sizes.pop(number))
            if not any(p.is_alive() for p in pool):
                return
            time.sleep(0.2)
    for process in pool:
        process.join()
