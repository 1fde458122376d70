"""The local engine: decoding, teacher, post-processing and writing overlap, shard after shard."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from teacher.align import AFFINE
from teacher.anchors import Anchor, needless, needs_anchor
from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators import Query, Teacher
from teacher.images import ImageError, bounded, encode_png, read
from teacher.jobs.commit import Lease, this_host
from teacher.jobs.plan import Entry, Plan
from teacher.jobs.sources import Source
from teacher.label import Answer, Camera, Label, LabelError, Task, coverage, validate
from teacher.store import ShardWriter, content_key, encode_members, seal_path, shard_name

T = TypeVar("T")
R = TypeVar("R")
TRANSIENT = {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET, errno.EBUSY}


@dataclasses.dataclass(kw_only=True)
class Prepared:
    """A decoded input, or the reason why there is none."""

    entry: Entry
    query: Query | None = None
    encoded: tuple[bytes, str] | None = None
    reason: str = ""


def prepare(entry: Entry, source: Source, *, max_side: int | None) -> Prepared:
    """Bytes -> query: upright sRGB, bounded, with its camera and the file that shows just that."""
    if entry.duplicate_of:
        return Prepared(entry=entry)
    try:
        data = source.read(entry.uri)
        if source.keyed_by_bytes and content_key(data) != entry.key:
            raise UsageError(
                f"{entry.uri}: the file changed after it was planned. Start again: it is planned "
                "anew, into another out= if shards were already sealed."
            )
        picture = read(data)
    except ImageError as error:
        return Prepared(entry=entry, reason=str(error))
    except FileNotFoundError as error:
        raise UsageError(
            f"{entry.uri}: the file is gone since it was planned. Bring it back to go on, or start "
            "with another out=."
        ) from error
    known = source.camera(entry.uri)
    image, camera = picture.image, known if known is not None else picture.camera
    if max_side is not None:
        image, camera = bounded(image, camera, max_side=max_side)
    query = Query(key=entry.key, image=image, camera=camera, uri=entry.uri)
    untouched = picture.plain and image.shape == picture.image.shape
    suffix = "png" if data.startswith(b"\x89PNG") else "jpg" if data.startswith(b"\xff\xd8") else ""
    encoded = (data, suffix) if untouched and suffix else (encode_png(image), "png")
    return Prepared(entry=entry, query=query, encoded=encoded)


def to_label(
    item: Prepared,
    answers: dict[Task, Answer],
    tasks: Sequence[Task],
    *,
    anchor: Anchor | None = None,
    scale: Answer | None = None,
) -> Label:
    """Query + answers -> label; `LabelError` with the reason when the image must be rejected.

    ``scale`` is the ``anchor``'s depth of the image, with which affine depth becomes metric.
    """
    assert item.query is not None and item.encoded is not None
    query = item.query
    provenance: dict[str, Any] = {"source_sha256_96": query.key}
    label = Label(
        key=query.key,
        image=query.image,
        values={},
        camera=query.camera,
        provenance=provenance,
        encoded=item.encoded,
    )
    for task in tasks:
        answer = answers.get(task)
        if answer is None:
            raise LabelError(f"the teacher gave no {task}")
        if coverage(task, answer.values) == 0:
            why = f": {answer.extras['reason']}" if "reason" in answer.extras else ""
            raise LabelError(f"the teacher's {task} has no known pixel{why}")
        if answer.space in AFFINE:
            if anchor is None:
                raise UsageError(needs_anchor(answer.space))
            answer, provenance["alignment"] = anchor.metric(answer, scale)
            if coverage(task, answer.values) == 0:
                raise LabelError(f"the teacher's {task} has no known pixel after its alignment")
        elif task is Task.DEPTH and anchor is not None:
            raise UsageError(needless(anchor))
        label.values[task] = answer.values
        if answer.uncertainty is not None:
            label.uncertainty[task] = answer.uncertainty
        extras = dict(answer.extras)
        if answer.residual is not None and np.isfinite(answer.residual).any():
            extras["mean_residual"] = round(float(np.nanmean(answer.residual)), 4)
        if extras:
            provenance[str(task)] = extras
        if answer.picture is not None:
            label.pictures[task] = answer.picture
        label.camera = estimated(label.camera, answer)
    if scale is not None:
        label.camera = estimated(label.camera, scale)
    return label


def estimated(camera: Camera, answer: Answer) -> Camera:
    """The camera with the focal length a model estimated, where it would else be assumed.

    Depth in metres and the focal length it was computed with belong together.
    """
    focal_px = answer.extras.get("focal_px")
    by_model = answer.extras.get("focal_source") == "model"
    if camera.source != "assumed" or focal_px is None or not by_model:
        return camera
    return dataclasses.replace(camera, fx=focal_px, fy=focal_px, source="estimated")


def ahead(
    items: Iterable[T], work: Callable[[T], R], pool: ThreadPoolExecutor, n: int
) -> Iterator[R]:
    """``map`` in order with at most ``n`` results under way, so that memory stays flat."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= n:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclasses.dataclass
class Tally:
    """What a worker did, for its summary and its seals."""

    labelled: int = 0
    rejected: int = 0
    duplicates: int = 0
    shards: int = 0
    teacher_s: float = 0.0
    wall_s: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        """Counts and teacher seconds add up; of the wall times the longer counts."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        total = {name: mine[name] + theirs[name] for name in mine}
        return Tally(**total | {"wall_s": max(self.wall_s, other.wall_s)})


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


def patiently(work: Callable[[], R], *, what: str) -> R:
    """Run input or output again after a transient error, waiting longer each time.

    Raises `EnvironmentFailure` when it stays; permanent errors (disk full, read-only) come at once.
    """
    for wait_s in (0.1, 0.5, 2.0, 5.0, None):
        try:
            return work()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            if wait_s is None:
                raise EnvironmentFailure(
                    f"{what}: {error.strerror} ({error.filename}), five times in a row. What was "
                    "committed is intact; the same command goes on when the device is back."
                ) from error
            time.sleep(wait_s)
    raise AssertionError


def answer_split(teacher: Teacher, queries: Sequence[Query], tasks: Sequence[Task]) -> list:
    """The teacher's answers; a batch too large for the device is halved, answers stay the same.

    (A teacher's answer depends on its own image, key and seeds only, never on its neighbours.)
    """
    try:
        return teacher.answer(queries, tasks)
    except Exception as error:
        if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):
            raise
        if len(queries) == 1:
            height, width = queries[0].image.shape[:2]
            raise EnvironmentFailure(
                f"the teacher ran out of memory on a single {width}x{height} image ({error}); "
                "lower max_side, use a smaller dtype or a larger device."
            ) from error
    half = len(queries) // 2
    first = answer_split(teacher, queries[:half], tasks)
    return first + answer_split(teacher, queries[half:], tasks)


@dataclasses.dataclass(kw_only=True)
class Worker:
    """Labels shards of a plan in this process; decoding, teacher, encoding and commits overlap.

    ``threads`` decode and encode; the teacher runs in the calling thread.
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
    quiet: bool = False

    def __post_init__(self) -> None:
        """Hash the plan once."""
        self.plan_hash = self.plan.hash()

    def run(self, numbers: Sequence[int], *, wait: bool) -> Tally:
        """Label and commit those of the given shards that nobody else does.

        With ``wait`` it stays until all are sealed, to take over from workers that die.
        """
        self.tally, self.started = Tally(), time.monotonic()
        total = sum(len(self.plan.shard(n)) for n in numbers)
        left = list(numbers)
        with tqdm(total=total, desc="label", unit="img", mininterval=1, disable=self.quiet) as bar:
            while left:
                self._pass(left, bar)
                left = [n for n in left if not seal_path(self.folder, n).exists()]
                if not wait:
                    break
                time.sleep(0.3 if left else 0)
        self.tally.wall_s = time.monotonic() - self.started
        return self.tally

    def probe(self, number: int) -> tuple[float, float]:
        """Seconds inside the teacher and bytes per image, from one batch whose answers are dropped.

        The batch is asked twice; the first time warms up kernels and caches.
        """
        items = [self._prepare(entry) for entry in next(self.plan.batches(number))]
        asked = [item for item in items if item.query is not None]
        queries = [item.query for item in asked if item.query is not None]
        if not queries:
            return 0.0, 0.0
        self._ask(queries)
        before = time.monotonic()
        answers = self._ask(queries)
        teacher_s = time.monotonic() - before
        size = 0
        for item, answer in zip(asked, answers, strict=True):
            with contextlib.suppress(LabelError):
                size += sum(len(data) + 1024 for _, data in self._finish(item, *answer)[1])
        return teacher_s / len(items), size / len(items)

    def _pass(self, numbers: Sequence[int], bar: tqdm) -> None:
        """Once over the shards; those leased by others are left alone."""
        with (
            Claims(self.folder, numbers) as claims,
            ThreadPoolExecutor(self.threads) as decoders,
            ThreadPoolExecutor(self.threads) as encoders,
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
                writer = ShardWriter(self.folder, number, plan_hash=self.plan_hash)
                try:
                    self._fill(writer, prepared, encoders, bar)
                except BaseException:
                    writer.abandon()
                    raise
                commits.append(committer.submit(self._commit, writer, claims))
                while len(commits) > 1:
                    commits.popleft().result()
            for commit in commits:
                commit.result()

    def _prepare(self, entry: Entry) -> Prepared:
        work = lambda: prepare(entry, self.source, max_side=self.max_side)  # noqa: E731
        return patiently(work, what=f"reading {entry.uri}")

    def _commit(self, writer: ShardWriter, claims: Claims) -> None:
        writer.commit({"host": this_host(), "teacher_s": round(self.tally.teacher_s, 3)})
        self.tally.shards += 1
        claims.finished(writer.number)

    def _fill(
        self, writer: ShardWriter, prepared: Iterator[Prepared], pool: ThreadPoolExecutor, bar: tqdm
    ) -> None:
        """One shard: batches to the teacher, finished samples to the tar, in plan order."""
        waiting: deque[tuple[Prepared, Future | None]] = deque()

        def drain(keep: int) -> None:
            while len(waiting) > keep:
                item, future = waiting.popleft()
                self._write(writer, item, future)
                bar.update()
                share = self.tally.teacher_s / (time.monotonic() - self.started)
                bar.set_postfix_str(f"teacher {share:.0%}", refresh=False)

        for batch in self.plan.batches(writer.number):
            items = [next(prepared) for _ in batch]
            queries = [item.query for item in items if item.query is not None]
            before = time.monotonic()
            answers = iter(self._ask(queries) if queries else [])
            self.tally.teacher_s += time.monotonic() - before
            for item in items:
                finished = None
                if item.query is not None:
                    finished = pool.submit(self._finish, item, *next(answers))
                waiting.append((item, finished))
            drain(keep=2 * self.plan.batch_size)
        drain(keep=0)

    def _ask(self, queries: Sequence[Query]) -> list[tuple[dict[Task, Answer], Answer | None]]:
        """The teacher's answers and the anchor's depth, per query."""
        answers = answer_split(self.teacher, queries, self.tasks)
        if self.anchor is None or Task.DEPTH not in self.tasks:
            return [(answer, None) for answer in answers]
        return list(zip(answers, self.anchor.ask(queries, answer_split), strict=True))

    def _finish(
        self, item: Prepared, answers: dict[Task, Answer], scale: Answer | None
    ) -> tuple[Label, list]:
        """Everything between the answer and the tar, in a worker thread."""
        label = to_label(item, answers, self.tasks, anchor=self.anchor, scale=scale)
        if not self.keep_pictures:
            label.pictures.clear()
        return validate(label), encode_members(label)

    def _write(self, writer: ShardWriter, item: Prepared, finished: Future | None) -> None:
        entry = item.entry
        if entry.duplicate_of:
            writer.duplicate(entry.key, uri=entry.uri, of=entry.duplicate_of)
            self.tally.duplicates += 1
            return
        reason = item.reason
        if finished is not None:
            try:
                label, members = finished.result()
            except LabelError as error:
                reason = str(error)
            else:
                writer.add(label, uri=entry.uri, members=members)
                self.tally.labelled += 1
                return
        writer.reject(entry.key, uri=entry.uri, reason=reason)
        self.tally.rejected += 1
