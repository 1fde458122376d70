"""The local engine: decoding, teacher, post-processing and writing overlap, shard after shard."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from teacher.anchors import Anchor
from teacher.confidence import Calibration
from teacher.errors import EnvironmentFailure
from teacher.generators import Query, Teacher
from teacher.jobs.commit import WAITS_S, Lease, is_transient, patiently, this_host
from teacher.jobs.helpers import Helpers
from teacher.jobs.plan import Entry, Plan
from teacher.jobs.samples import Finisher, Prepared, answer_split, prepare
from teacher.jobs.sources import Source
from teacher.jobs.threads import ahead, impatient_pool, swift_handover
from teacher.label import Answer, LabelError, Task
from teacher.shard_writer import ShardWriter
from teacher.shards import seal_path, shard_name

BATCHES_AHEAD = 2  # that the teacher may be ahead of the tar, beside the two that are encoded
HELPED_FROM = 100  # inputs; a smaller job would be over before a helper process has started
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def alike(reason: str) -> str:
    """A reason without its keys and numbers, so that equal mishaps count together."""
    return re.sub(r"[0-9a-f]{12,}|\b\d+(\.\d+)?\b", "#", reason)[:120]


@dataclasses.dataclass
class Tally:
    """What a worker did, for its summary and its seals."""

    labelled: int = 0
    rejected: int = 0
    duplicates: int = 0
    shards: int = 0
    bytes: int = 0
    teacher_s: float = 0.0
    wall_s: float = 0.0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)  # of the rejected inputs

    def __add__(self, other: Tally) -> Tally:
        """Counts, bytes and teacher seconds add up; of the wall times the longer counts."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        del mine["reasons"], theirs["reasons"]
        total = {name: mine[name] + theirs[name] for name in mine}
        total["reasons"] = dict(Counter(self.reasons) + Counter(other.reasons))
        return Tally(**total | {"wall_s": max(self.wall_s, other.wall_s)})


@dataclasses.dataclass
class Filling:
    """A shard on its way: its tar, the samples that wait for it in plan order, and who writes them.

    ``drains`` are what the drainer was told to write; the last two batches are left to the commit.
    """

    writer: ShardWriter
    waiting: deque[tuple[Prepared, Future | None]] = dataclasses.field(default_factory=deque)
    drains: list[Future[None]] = dataclasses.field(default_factory=list)
    teacher_s: float = 0.0


class Claims:
    """The shards this worker takes, in order: unsealed ones whose lease it could get."""

    def __init__(self, folder: Path, numbers: Sequence[int]) -> None:
        """``numbers``: the shards this worker may take."""
        self.folder, self.numbers = folder, numbers
        self.leases: dict[int, Lease] = {}
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claims:
        """Start the heartbeat."""
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the heartbeat, give everything back."""
        self._over.set()
        self._heart.join()
        for lease in self.leases.values():
            lease.drop()

    def _beat(self) -> None:
        while not self._over.wait(Lease.LIFETIME_S / 6):
            for lease in list(self.leases.values()):
                with contextlib.suppress(OSError):  # the disk does not answer: the next beat may
                    lease.renew()

    def __iter__(self) -> Iterator[int]:
        """Shard numbers; each is leased when it is given out. Never waits for anybody."""
        for number in self.numbers:
            lease = Lease(self.folder, shard_name(number))
            if seal_path(self.folder, number).exists() or not lease.take():
                continue
            if seal_path(self.folder, number).exists():  # sealed while we took the lease
                lease.drop()
                continue
            self.leases[number] = lease
            yield number

    def finished(self, number: int) -> None:
        """The shard is sealed: its lease is of no more use."""
        self.leases.pop(number).drop()


@dataclasses.dataclass(kw_only=True)
class Worker:
    """Labels shards of a plan in this process; decoding, teacher, encoding and commits overlap.

    ``threads`` decode and encode; the teacher runs in the calling thread. In a larger plan each
    encoding thread hands its work to a process of its own (`teacher.jobs.helpers`); `close` ends
    those.
    """

    teacher: Teacher
    source: Source
    plan: Plan
    folder: Path
    tasks: Sequence[Task]
    max_side: int | None
    keep_pictures: bool
    threads: int
    anchor: Anchor | None = None
    calibration: Calibration | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """Hash the plan once."""
        self.plan_hash = self.plan.hash
        self.showing = threading.Lock()  # two threads move the progress bar
        self.warned = False
        self.finish = Finisher(
            tasks=self.tasks,
            anchor=self.anchor and dataclasses.replace(self.anchor, teacher=None),
            calibration=self.calibration,
            keep_pictures=self.keep_pictures,
        )
        helped = sys.platform == "linux" and len(self.plan.entries) >= HELPED_FROM
        self.helpers = Helpers(self.finish) if helped else None
        self.probed: dict[str, tuple] = {}  # answers to `probe`, by key
        self.probe_s = 0.0  # of the teacher, for these

    def close(self) -> None:
        """End the helper processes; a later `run` starts new ones."""
        if self.helpers is not None:
            self.helpers.close()

    def run(self, numbers: Sequence[int], *, wait: bool) -> Tally:
        """Label and commit those of the given shards that nobody else does.

        With ``wait`` it stays until all are sealed, to take over from workers that die.
        """
        with swift_handover():
            return self._run(numbers, wait=wait)

    def _run(self, numbers: Sequence[int], *, wait: bool) -> Tally:
        self.tally, self.started = Tally(), time.monotonic() - self.probe_s
        sizes = {n: len(self.plan.shard(n)) for n in numbers}
        total, left, failures = sum(sizes.values()), list(numbers), 0
        with tqdm(total=total, desc="label", unit="img", mininterval=1, disable=self.quiet) as bar:
            while left:
                try:
                    self._pass(left, bar)
                except OSError as error:
                    self._bear(error, failures)
                    failures += 1
                still = [n for n in left if not seal_path(self.folder, n).exists()]
                failures = failures if len(still) == len(left) else 0
                left = still
                bar.n = total - sum(sizes[n] for n in left)
                if not (wait or failures):
                    break
                time.sleep(0.3 if left else 0)
        self.tally.wall_s = time.monotonic() - self.started
        return self.tally

    def _bear(self, error: OSError, failures: int) -> None:
        """Wait after a transient error of the disk (the shard is then labelled anew), or give up.

        After a failed sync nothing that was written to a file can be trusted, so no step of a
        shard is repeated, but the shard.
        """
        if not (is_transient(error) or error.errno in FULL):
            raise error
        place = error.filename or "while writing a shard"
        where = f"{self.folder}: {error.strerror or error} ({place})"
        if error.errno in FULL:
            raise EnvironmentFailure(
                f"{where}. Sealed shards are intact; make room (a new out= on another disk would "
                "start anew) and give the same command again."
            ) from error
        if failures == len(WAITS_S):
            raise EnvironmentFailure(
                f"{where}, {failures + 1} times in a row. Sealed shards are intact; the same "
                "command goes on when the device is back."
            ) from error
        time.sleep(WAITS_S[failures])

    def probe(self, number: int) -> tuple[float, float]:
        """Seconds inside the teacher and bytes per image, from the first batch of a shard.

        One image is asked before the clock starts, to warm up kernels and caches; one label is
        made for its size. The batch's answers are kept: `run` does not ask for them again.
        """
        items = [self._prepare(entry) for entry in next(self.plan.batches(number))]
        asked = [item for item in items if item.query is not None]
        queries = [item.query for item in asked if item.query is not None]
        if not queries:
            return 0.0, 0.0
        self._ask(queries[:1])
        before = time.monotonic()
        answers = self._ask(queries)
        teacher_s = time.monotonic() - before
        self.probed = dict(zip((query.key for query in queries), answers, strict=True))
        self.probe_s = teacher_s
        for item, answer in zip(asked, answers, strict=True):
            with contextlib.suppress(LabelError):
                size = sum(len(data) + 1024 for _, data in self.finish(item, *answer)[0])
                return teacher_s / len(items), size * len(asked) / len(items)
        return teacher_s / len(items), 0.0

    def _pass(self, numbers: Sequence[int], bar: tqdm) -> None:
        """Once over the shards; those leased by others are left alone."""
        with (
            Claims(self.folder, numbers) as claims,
            impatient_pool(self.threads) as decoders,
            impatient_pool(1) as drainer,
            impatient_pool(self.threads) as encoders,  # ends before the one that waits for it
            ThreadPoolExecutor(1) as committer,
        ):
            shards, entries = itertools.tee(iter(claims))
            # the decoders run ahead of the teacher, across the borders of shards
            prepared = ahead(
                (entry for number in entries for entry in self.plan.shard(number)),
                self._prepare,
                decoders,
                2 * self.plan.batch_size + self.threads,
            )
            commits: deque[Future[None]] = deque()
            for number in shards:
                shard = Filling(ShardWriter(self.folder, number, plan_hash=self.plan_hash))
                try:
                    self._fill(shard, prepared, encoders, drainer, bar)
                except BaseException:
                    shard.writer.abandon()
                    raise
                # the last samples are awaited there, while the teacher has the next shard
                commits.append(committer.submit(self._commit, shard, claims, bar))
                while len(commits) > 1:
                    commits.popleft().result()
            for commit in commits:
                commit.result()

    def _prepare(self, entry: Entry) -> Prepared:
        work = lambda: prepare(entry, self.source, max_side=self.max_side)  # noqa: E731
        return patiently(work, what=f"reading {entry.uri}")

    def _commit(self, shard: Filling, claims: Claims, bar: tqdm) -> None:
        writer = shard.writer
        try:
            for drain in shard.drains:
                drain.result()
            self._drain(shard, bar, keep=0)
        except BaseException:
            writer.abandon()
            raise
        if writer.commit({"host": this_host(), "teacher_s": round(shard.teacher_s, 3)}):
            states = Counter(row["state"] for row in writer.rows)
            self.tally.labelled += states["labelled"]
            self.tally.rejected += states["rejected"]
            self.tally.duplicates += states["duplicate_of"]
            self.tally.shards += 1
            self.tally.bytes += writer.final.stat().st_size
            why = Counter(alike(r["reason"]) for r in writer.rows if r["state"] == "rejected")
            self.tally.reasons = dict(Counter(self.tally.reasons) + why)
            if why and not states["labelled"]:
                self._say_once(f"{writer.final.stem}: nothing labelled, {why.most_common(1)[0][0]}")
        claims.finished(writer.number)

    def _say_once(self, text: str) -> None:
        """A whole shard without a label: rather a wrong teacher or folder than bad images."""
        if not self.warned:
            tqdm.write(text, file=sys.stderr)
        self.warned = True

    def _fill(
        self,
        shard: Filling,
        prepared: Iterator[Prepared],
        encoders: ThreadPoolExecutor,
        drainer: ThreadPoolExecutor,
        bar: tqdm,
    ) -> None:
        """One shard: batches to the teacher, answers to the encoders, all in plan order."""
        finish: Callable[..., tuple[list, dict]] = self.helpers or self.finish
        for batch in self.plan.batches(shard.writer.number):
            items = [next(prepared) for _ in batch]
            queries = [item.query for item in items if item.query is not None]
            if all(query.key in self.probed for query in queries):
                answers = iter([self.probed.pop(query.key) for query in queries])
                asked_s, self.probe_s = (self.probe_s, 0.0) if queries else (0.0, self.probe_s)
            else:
                before = time.monotonic()
                answers = iter(self._ask(queries))
                asked_s = time.monotonic() - before
            shard.teacher_s += asked_s
            self.tally.teacher_s += asked_s
            for item in items:
                finished = None
                if item.query is not None:
                    finished = encoders.submit(finish, item, *next(answers))
                shard.waiting.append((item, finished))
            shard.drains.append(
                drainer.submit(self._drain, shard, bar, keep=2 * self.plan.batch_size)
            )
            if len(shard.drains) > BATCHES_AHEAD:
                shard.drains[-1 - BATCHES_AHEAD].result()

    def _drain(self, shard: Filling, bar: tqdm, *, keep: int) -> None:
        """Write finished samples, all but the last ``keep``."""
        while len(shard.waiting) > keep:
            self._write(shard.writer, *shard.waiting.popleft())
            share = self.tally.teacher_s / (time.monotonic() - self.started)
            with self.showing:
                bar.set_postfix_str(f"teacher {share:.0%}", refresh=False)
                bar.update()

    def _ask(self, queries: Sequence[Query]) -> list[tuple[dict[Task, Answer], Answer | None]]:
        """The teacher's answers and the anchor's depth, per query."""
        answers = answer_split(self.teacher, queries, self.tasks)
        if self.anchor is None or Task.DEPTH not in self.tasks:
            return [(answer, None) for answer in answers]
        return list(zip(answers, self.anchor.ask(queries, answer_split), strict=True))

    def _write(self, writer: ShardWriter, item: Prepared, finished: Future | None) -> None:
        entry, reason = item.entry, item.reason
        if entry.duplicate_of:
            writer.duplicate(entry.key, uri=entry.uri, of=entry.duplicate_of)
            return
        if finished is not None:
            try:
                members, summary = finished.result()
            except LabelError as error:
                reason = str(error)
            else:
                writer.append(entry.key, uri=entry.uri, members=members, summary=summary)
                return
        writer.reject(entry.key, uri=entry.uri, reason=reason)
