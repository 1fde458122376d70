"""Threads beside a teacher: they work ahead of it, and never at its cost."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def impatient_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose waiting work is dropped at the end: nobody wants it after a signal."""
    pool = ThreadPoolExecutor(threads, initializer=step_back)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def step_back() -> None:
    """Where cores are scarce, the teacher's thread comes first: the others only fill its pauses.

    Linux has a niceness for each thread; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + 10)


@contextlib.contextmanager
def swift_handover() -> Iterator[None]:
    """Threads hand Python's lock over after 0.5 ms instead of 5: the teacher's thread wants it
    after every call into its library, and encoders would keep it waiting.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


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
