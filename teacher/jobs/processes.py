"""One plan, several worker processes on this machine, one device each.

Workers share nothing but the folder: leases spread the work, seals commit it. A worker that dies is
replaced by nobody; the others take its shards over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import format_exception
from typing import Any

from tqdm import tqdm

from teacher.errors import EnvironmentFailure
from teacher.jobs.engines import Tally
from teacher.jobs.recipe import About, Job, Recipe, survey
from teacher.shards import DamagedLabelSetError, read_seal, seal_path

GRACE_S = 20.0  # how long workers may take to abandon their shards after SIGTERM


class WorkerFailedError(EnvironmentFailure):
    """All workers are gone and shards are missing; carries what the first of them said."""

    def __init__(self, message: str, exit_code: int) -> None:
        """``exit_code``: that of the worker's own error."""
        super().__init__(message)
        self.exit_code = exit_code


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


def _settle(index: int) -> None:
    """In a new process: its own device, SIGTERM stops it, and it ends when its parent is gone."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    gpus = devices()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def outcome(work: Callable[[], Any]) -> tuple[str, Any]:
    """``("done", value)``, ``("stopped", None)`` or ``("failed", (exit code, text))``."""
    try:
        return "done", work()
    except KeyboardInterrupt:
        return "stopped", None
    except Exception as error:
        code = getattr(error, "exit_code", 3 if isinstance(error, OSError) else 4)
        return "failed", (code, "".join(format_exception(error)) if code == 4 else str(error))


def value_of(result: tuple[str, Any]) -> Any:
    """The value of an `outcome`, or `WorkerFailedError` with the text of what happened there."""
    kind, value = result
    if kind != "done":
        code, text = value or (3, "the process was stopped")
        raise WorkerFailedError(text, code)
    return value


def _work(recipe: Recipe, numbers: list[int], index: int, results: Connection) -> None:
    """The body of a worker process."""
    _settle(index)
    work = lambda: dataclasses.asdict(recipe.build(quiet=True).run(numbers, wait=True))  # noqa: E731
    _send(results, outcome(work))


def _survey(job: Job, results: Connection) -> None:
    _settle(0)
    _send(results, outcome(lambda: survey(job)))


def _send(results: Connection, result: tuple[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        results.send(result)


def survey_in_process(job: Job) -> About:
    """`survey` in a process that ends afterwards: this one never loads the models."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_survey, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        result = mine.recv()
        process.join(GRACE_S)
        return value_of(result)
    except EOFError:
        process.join()
        raise WorkerFailedError(
            f"the process that loads the teacher died with exit code {process.exitcode}", 3
        ) from None
    finally:
        if process.is_alive():
            process.terminate()
            process.join(GRACE_S)
            process.kill()


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
        given_up = time.monotonic() + GRACE_S  # for all of them together
        for process in pool:
            process.join(max(given_up - time.monotonic(), 0))
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
        raise missing(f"{len(left)} of {len(numbers)} shards", f"all {workers} workers", errors)
    for _, text in errors:
        tqdm.write(f"a worker was lost, the others took over: {text}")
    tally.wall_s = time.monotonic() - started
    return tally


def missing(shards: str, workers: str, errors: Sequence[tuple[int, str]]) -> WorkerFailedError:
    """What to raise when nobody is left; with the words and the exit code of the first error."""
    code, text = errors[0] if errors else (3, "the workers were stopped")
    return WorkerFailedError(
        f"{shards} are missing after {workers} ended; the first of them said: {text}\nThe same "
        "command goes on where they stopped.",
        code,
    )


def _watch(recipe: Recipe, numbers: Sequence[int], pool: list) -> None:
    """Progress over all workers, until all of them ended."""
    sizes = {n: len(recipe.plan.shard(n)) for n in numbers}
    started, teacher_s = time.monotonic(), 0.0
    with tqdm(total=sum(sizes.values()), desc=f"label x{len(pool)}", unit="img") as bar:
        while sizes:
            for number in [n for n in sizes if seal_path(recipe.folder, n).exists()]:
                bar.update(sizes.pop(number))
                with contextlib.suppress(DamagedLabelSetError, OSError):
                    run = read_seal(seal_path(recipe.folder, number))["run"]
                    teacher_s += run.get("teacher_s", 0.0)
                share = teacher_s / len(pool) / (time.monotonic() - started)
                bar.set_postfix_str(f"teacher {share:.0%}", refresh=False)
            if not any(p.is_alive() for p in pool):
                return
            time.sleep(max(0.2, len(sizes) / 5000))  # 15 000 seals are looked for every 3 s
    for process in pool:
        process.join()
