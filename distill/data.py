"""Label sets -> batches: split by key, mixed by weight, in an order that nothing can disturb.

Which image comes at which step follows from the seed alone, and what happens to it from (seed, key,
visit), so the lesson is the same for any number of threads and after any interruption. Threads, not
processes: decoding, NumPy and Pillow release the interpreter, and the cache exists once.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.augment import CUTMIX_SHARE, MODES, cutmix, sample_rng
from distill.instances import center_offset
from distill.samples import Frame, Record, compact, make_sample
from teacher.errors import UsageError
from teacher.label import Label

CACHE_BYTES = 1 << 30  # decoded samples kept in memory; beyond, they are decoded every time
BATCHES_AHEAD = 3


class Labels(Protocol):
    """What the lesson needs of a label set; `teacher.store.LabelSet` is one."""

    keys: list[str]
    classes: dict[int, str]

    def lesson(self, key: str, tasks: Collection[str]) -> Label:
        """The label of one image; all but these tasks' values and uncertainties may be absent."""
        ...


def in_validation(key: str, share: float) -> bool:
    """Whether a key belongs to the validation side; the same for every set that contains it."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return number < share * 2**64


def split_keys(keys: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Distinct keys -> (training, validation), by hash: growing a set moves nobody across.

    When the share is positive and no hash falls below it, the lowest one is taken.
    """
    distinct = list(dict.fromkeys(keys))
    held = {key for key in distinct if in_validation(key, share)}
    if share > 0 and not held and len(distinct) > 1:
        held = {min(distinct, key=lambda k: hashlib.sha256(k.encode()).digest())}
    return [k for k in distinct if k not in held], [k for k in distinct if k in held]


def spread_keys(held: Sequence[str], most: int) -> list[str]:
    """At most so many of the keys, evenly over all sets: those with the lowest hashes."""
    lowest = sorted(held, key=lambda k: hashlib.sha256(k.encode()).digest())[:most]
    kept = set(lowest)
    return [k for k in held if k in kept]


def merged_classes(sets: Sequence[Labels]) -> dict[int, str]:
    """The union of the class tables; one id with two names is refused."""
    table: dict[int, str] = {}
    for labels in sets:
        for number, name in labels.classes.items():
            if table.setdefault(number, name) != name:
                raise UsageError(
                    f"data: class {number} is {table[number]!r} in one label set and {name!r} in "
                    "another; label sets that are trained together need one class table."
                )
    return table


def schedule(
    sizes: Sequence[int], weights: Sequence[float], *, count: int, seed: int
) -> np.ndarray:
    """The lesson's order: [count, 3] of set, index in the set, how often it was seen before.

    Every set is gone through in fresh random orders; at each position a set is drawn with its
    weight. A longer lesson begins with the shorter one's order.
    """
    share = np.asarray(weights, np.float64)
    draws = sample_rng("sets", seed).random(count)
    edges = np.cumsum(share / share.sum())
    chosen = np.searchsorted(edges, draws, side="right").clip(max=len(sizes) - 1)
    plan = np.zeros((count, 3), np.int32)
    plan[:, 0] = chosen
    for s, size in enumerate(sizes):
        places = np.flatnonzero(chosen == s)
        visits = -(-len(places) // size) if size else 0
        orders = [sample_rng("order", seed, s, v).permutation(size) for v in range(visits)]
        if orders:
            plan[places, 1] = np.concatenate(orders)[: len(places)]
            plan[places, 2] = np.arange(len(places)) // size
    return plan


class DataModule:
    """Training and validation batches of one or several label sets.

    Args:
        sets: the label sets, already verified.
        frame: what the student sees.
        weights: how often each set is drawn, relative; None: by its number of images.
        val_share: share of the keys held out by their hash.
        val_max: at most so many held-out images are used.
        batch_size: images per step.
        seed: of order and augmentation.
        augment: ``strong``, ``geometry`` or ``none``.
        threads: loading threads.

    Raises:
        UsageError: no training image, weights that do not fit, a task that no set has.
    """

    def __init__(
        self,
        sets: Sequence[Labels],
        *,
        frame: Frame,
        weights: Sequence[float] | None = None,
        val_share: float = 0.05,
        val_max: int = 64,
        batch_size: int = 16,
        seed: int = 0,
        augment: str = "strong",
        threads: int = 2,
    ) -> None:
        """Split and plan; nothing is decoded yet."""
        if augment not in MODES:
            raise UsageError(f"trainer.augment={augment!r}: expected one of {', '.join(MODES)}")
        self.sets, self.frame, self.seed, self.augment = list(sets), frame, seed, augment
        self.batch_size, self.threads = batch_size, max(1, threads)
        train, held = split_keys([k for s in sets for k in s.keys], val_share)
        train_keys, held_keys = set(train), spread_keys(held, val_max)
        self.train = [[k for k in s.keys if k in train_keys] for s in sets]
        owner = {k: i for i, s in reversed(list(enumerate(sets))) for k in s.keys}
        self.val = [(owner[k], k) for k in held_keys]
        if not any(self.train):
            total = sum(len(s.keys) for s in sets)
            raise UsageError(
                f"data: {total} labelled image(s), none left for training after val_share="
                f"{val_share}; label more images."
            )
        sizes = [len(keys) for keys in self.train]
        asked = [float(w) for w in (sizes if weights is None else weights)]
        fits = len(asked) == len(sizes) and min(asked) >= 0 and 0 < sum(asked) < math.inf
        if not fits:
            raise UsageError(
                f"weights={list(weights or [])}: expected {len(sizes)} number(s) >= 0, finite in "
                "sum, one per label set in data, not all 0"
            )
        self.weights = [w if n else 0.0 for w, n in zip(asked, sizes, strict=True)]
        if not any(self.weights):
            empty = [
                str(getattr(s, "path", f"set {i} of data"))
                for i, (s, w) in enumerate(zip(sets, asked, strict=True), 1)
                if w
            ]
            raise UsageError(
                f"weights={list(weights or [])}: nothing to draw, {', '.join(empty)} has no image "
                f"left for training after val_share={val_share}; give another set a weight above 0 "
                "or label more images"
            )
        self._cache: dict[tuple[int, str], Record] = {}
        self.bad: dict[tuple[int, str], dict[str, int]] = {}
        self._bytes, self._lock = 0, threading.Lock()

    def record(self, set_index: int, key: str) -> Record:
        """A decoded label, from memory when it still fits there."""
        place = (set_index, key)
        found = self._cache.get(place)
        if found is None:
            found = compact(self.sets[set_index].lesson(key, self.frame.tasks), self.frame)
            with self._lock:
                self.bad[place] = found.bad
                if place not in self._cache and self._bytes + found.nbytes <= CACHE_BYTES:
                    self._cache[place] = found
                    self._bytes += found.nbytes
        return found

    def bad_pixels(self) -> dict[str, int]:
        """Per task: pixels of the labels read so far whose value was masked as impossible."""
        total: dict[str, int] = {}
        for counts in list(self.bad.values()):
            for task, count in counts.items():
                total[task] = total.get(task, 0) + count
        return total

    def _train_sample(self, set_index: int, index: int, visit: int) -> dict[str, np.ndarray]:
        keys = self.train[set_index]
        rng = sample_rng("sample", self.seed, set_index, keys[index], visit)

        def one(key: str) -> dict[str, np.ndarray]:
            record = self.record(set_index, key)
            return make_sample(record, self.frame, rng=rng, mode=self.augment)

        sample = one(keys[index])
        if self.augment == "strong" and rng.uniform() < CUTMIX_SHARE:
            sample = cutmix(rng, sample, one(keys[int(rng.integers(len(keys)))]))
        return _finished(sample)

    def _val_sample(self, set_index: int, key: str) -> dict[str, np.ndarray]:
        sample = make_sample(self.record(set_index, key), self.frame, rng=None, mode="none")
        ids = {"instance_ids": sample["instances"]} if "instances" in sample else {}
        return _finished(sample) | ids

    def train_batches(
        self, *, steps: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Batches:
        """Batches of the steps ``start`` to ``steps``; the same whatever came before.

        Of ``world`` processes each takes every so many-th image of a batch, from its ``rank``;
        `TrainerConfig` sees to it that they are equally many.
        """
        sizes = [len(keys) for keys in self.train]
        plan = schedule(sizes, self.weights, count=steps * self.batch_size, seed=self.seed)
        jobs = plan[start * self.batch_size :][rank::world]
        return Batches(self._train_sample, jobs, self.batch_size // world, self.threads)

    def val_batches(self) -> Batches:
        """All validation images in order, letterboxed; the last batch may be short."""
        return Batches(self._val_sample, list(self.val), self.batch_size, self.threads)


class Batches:
    """An iterable of collated batches, made ahead of time by threads, always in order."""

    def __init__(
        self, make: Any, jobs: Sequence[tuple] | np.ndarray, batch_size: int, threads: int
    ) -> None:
        """``make(*job)`` gives one sample; an exception in it is raised in its turn.

        An array of whole numbers, a row a job, is taken as it is: a long lesson has millions.
        """
        self.make, self.jobs = make, jobs
        self.batch_size, self.threads = batch_size, threads

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.jobs) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield dicts of tensors [B, ...]."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="lesson")
        waiting: deque[list[Future]] = deque()
        starts = iter(range(0, len(self.jobs), self.batch_size))
        try:
            while True:
                while len(waiting) < BATCHES_AHEAD:
                    at = next(starts, None)
                    if at is None:
                        break
                    chunk = self.jobs[at : at + self.batch_size]
                    chunk = chunk.tolist() if isinstance(chunk, np.ndarray) else chunk
                    waiting.append([pool.submit(self.make, *job) for job in chunk])
                if not waiting:
                    return
                yield collate([future.result() for future in waiting.popleft()])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Instance ids become what is learnt of them."""
    if "instances" in sample:
        sample["instances"] = center_offset(sample["instances"])
    return sample


def in_passes(batch: Mapping[str, Tensor], passes: int) -> Iterator[dict[str, Tensor]]:
    """A batch in as many equal stretches, so that those of all processes are one's of one."""
    share = len(batch["image"]) // passes
    for part in range(passes):
        yield {k: v[part * share : (part + 1) * share] for k, v in batch.items()}


def collate(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack samples to tensors."""
    return {k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0]}
