"""The local engine: decoding, teacher, post-processing and writing overlap, shard after shard."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from teacher.errors import UsageError
from teacher.generators import Query, Teacher
from teacher.images import ImageError, bounded, encode_png, read
from teacher.jobs.plan import Entry, Plan
from teacher.jobs.sources import Source
from teacher.label import Answer, Label, LabelError, Space, Task, coverage, validate
from teacher.store import ShardWriter, encode_members

T = TypeVar("T")
R = TypeVar("R")
STORED = (Space.METRIC, Space.UNIT_NORMALS, Space.CLASS_IDS, Space.INSTANCE_IDS)


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
        picture = read(data)
    except ImageError as error:
        return Prepared(entry=entry, reason=str(error))
    known = source.camera(entry.uri)
    image, camera = picture.image, known if known is not None else picture.camera
    if max_side is not None:
        image, camera = bounded(image, camera, max_side=max_side)
    query = Query(key=entry.key, image=image, camera=camera, uri=entry.uri)
    untouched = picture.plain and image.shape == picture.image.shape
    suffix = "png" if data.startswith(b"\x89PNG") else "jpg" if data.startswith(b"\xff\xd8") else ""
    encoded = (data, suffix) if untouched and suffix else (encode_png(image), "png")
    return Prepared(entry=entry, query=query, encoded=encoded)


def to_label(item: Prepared, answers: dict[Task, Answer], tasks: Sequence[Task]) -> Label:
    """Query + answers -> label; `LabelError` with the reason when the image must be rejected."""
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
        if answer.space not in STORED:
            raise UsageError(
                f"the teacher answers {task} as {answer.space!r}; a label set holds metres, so the "
                "job needs a metric anchor to align it with."
            )
        if coverage(task, answer.values) == 0:
            raise LabelError(f"the teacher's {task} has no known pixel")
        label.values[task] = answer.values
        if answer.uncertainty is not None:
            label.uncertainty[task] = answer.uncertainty
        if answer.extras:
            provenance[str(task)] = answer.extras
        if answer.picture is not None:
            label.pictures[task] = answer.picture
    return label


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
    """What a run did, for its summary and its seals."""

    labelled: int = 0
    rejected: int = 0
    duplicates: int = 0
    teacher_s: float = 0.0
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def wall_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


class LocalEngine:
    """Runs the shards of a plan in this process, one after the other, with overlapping stages."""

    def __init__(
        self,
        *,
        teacher: Teacher,
        source: Source,
        plan: Plan,
        folder: Path,
        tasks: Sequence[Task],
        max_side: int | None,
        keep_pictures: bool,
        threads: int,
    ) -> None:
        """``threads`` decode and encode; the teacher runs in the calling thread."""
        self.teacher, self.source, self.plan, self.folder = teacher, source, plan, folder
        self.tasks, self.max_side, self.keep_pictures = tasks, max_side, keep_pictures
        self.threads = threads
        self.plan_hash = plan.hash()
        self.tally = Tally()

    def run(self, shards: Sequence[int]) -> Tally:
        """Label and commit the given shards, in order."""
        total = sum(len(self.plan.shard(n)) for n in shards)
        window = 2 * self.plan.batch_size + self.threads
        with (
            ThreadPoolExecutor(self.threads) as decoders,
            ThreadPoolExecutor(self.threads) as encoders,
            ThreadPoolExecutor(1) as committer,
            tqdm(total=total, desc="label", unit="img", mininterval=1) as bar,
        ):
            entries = (entry for n in shards for entry in self.plan.shard(n))
            prepared = ahead(
                entries,
                lambda e: prepare(e, self.source, max_side=self.max_side),
                decoders,
                window,
            )
            commits: deque[Future[bool]] = deque()
            for number in shards:
                writer = ShardWriter(self.folder, number, plan_hash=self.plan_hash)
                try:
                    self._fill(writer, prepared, encoders, bar)
                except BaseException:
                    writer.abandon()
                    raise
                commits.append(committer.submit(writer.commit, {"teacher_s": self.tally.teacher_s}))
                while len(commits) > 1:
                    commits.popleft().result()
            for commit in commits:
                commit.result()
        return self.tally

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
                bar.set_postfix_str(f"teacher {self.tally.teacher_s / self.tally.wall_s:.0%}")

        for batch in self.plan.batches(writer.number):
            items = [next(prepared) for _ in batch]
            queries = [item.query for item in items if item.query is not None]
            started = time.monotonic()
            answers = iter(self.teacher.answer(queries, self.tasks) if queries else [])
            self.tally.teacher_s += time.monotonic() - started
            for item in items:
                finished = None
                if item.query is not None:
                    finished = pool.submit(self._finish, item, next(answers))
                waiting.append((item, finished))
            drain(keep=2 * self.plan.batch_size)
        drain(keep=0)

    def _finish(self, item: Prepared, answers: dict[Task, Answer]) -> tuple[Label, list]:
        """Everything between the answer and the tar, in a worker thread."""
        label = to_label(item, answers, self.tasks)
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
