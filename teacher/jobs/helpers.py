"""Processes that turn answers into the bytes of a shard, so that the teacher has its own to itself.

A thread that encodes takes Python's lock from the teacher's thread after each call of its; another
process does not. What a helper is asked stands in memory that both have mapped (a nameless file:
nothing is left of it, whoever is killed) and is copied there without the lock; a few words and the
members of the tar go through a pipe, pickled: both of its ends are this program, nobody else can
name it, and nothing that was read from a file is ever unpickled. A helper ends when nobody holds
the other end of its pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import pickle
import queue
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from traceback import format_exc
from typing import Any

import numpy as np

from teacher.errors import EnvironmentFailure
from teacher.jobs.samples import Finisher, Prepared
from teacher.label import Answer, Task

WORTH_BYTES = 1 << 20  # of image and answers; with less, the way there takes longer than the work
ALIGNED = 64  # bytes; where an array may start in the shared memory
LOOKS_UP_S = 5.0  # how often an idle helper asks whether its parent lives
START_WAIT_S = 0.0  # how long a sample waits for a helper that has not started yet
START = (  # signals are for the parent, which decides
    "import signal, sys; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; "
    "sys.path[:] = sys.argv[4:]; "
    "from teacher.jobs.helpers import serve; serve(*map(int, sys.argv[1:4]))"
)
Asked = tuple[Prepared, dict[Task, Answer], Answer | None]


class Helpers:
    """As many helpers as there are threads that ask at once; each is started when first needed."""

    def __init__(self, finish: Finisher) -> None:
        """``finish`` is what they are to do."""
        self.finish = finish
        self.idle: queue.SimpleQueue[Helper] = queue.SimpleQueue()
        self.started: list[Helper] = []

    def __call__(
        self, item: Prepared, answers: dict[Task, Answer], scale: Answer | None
    ) -> tuple[list, dict]:
        """What ``finish`` gives or raises: from a helper, or from here while none has started.

        Small samples and answers that cannot travel stay here, too.
        """
        assert item.encoded is not None
        data, suffix = item.encoded  # stays here: it is not looked at
        asked = (dataclasses.replace(item, encoded=(b"", suffix)), answers, scale)
        try:
            buffers: list[pickle.PickleBuffer] = []
            words = pickle.dumps(asked, protocol=5, buffer_callback=buffers.append)
        except Exception:  # a user's own kind of answer
            return self.finish(item, answers, scale)
        if sum(buffer.raw().nbytes for buffer in buffers) < WORTH_BYTES:
            return self.finish(item, answers, scale)
        try:
            helper = self.idle.get_nowait()
        except queue.Empty:
            try:
                helper = Helper(self.finish)
            except OSError:  # no more processes, no nameless files here: it only takes longer
                return self.finish(item, answers, scale)
            self.started.append(helper)
        if not helper.is_ready():
            self.idle.put(helper)
            return self.finish(item, answers, scale)
        kind, value = helper.ask(words, buffers)
        self.idle.put(helper)
        if kind == "unreadable":
            return self.finish(item, answers, scale)
        if kind == "failed":
            raise value
        (_, *planes), summary = value
        return [(suffix, data), *planes], summary

    def close(self) -> None:
        """End them all; they hold nothing that is worth waiting for."""
        for helper in self.started:
            helper.end()
        self.started.clear()
        self.idle = queue.SimpleQueue()


class Helper:
    """One process, asked by one thread at a time; as nice as the thread that starts it."""

    def __init__(self, finish: Finisher) -> None:
        """Start the process, and do not wait for it."""
        self.view, self.ready = np.zeros(0, np.uint8), False
        with contextlib.ExitStack() as undo:
            self.memory = os.memfd_create("dense-distill")
            undo.callback(os.close, self.memory)
            self.pipe, theirs = Pipe()
            undo.callback(self.pipe.close)
            numbers = [str(n) for n in (theirs.fileno(), self.memory, os.getpid())]
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", START, *numbers, *sys.path],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), self.memory),
                    process_group=0,  # Ctrl-C is for the parent, which decides
                )
            undo.pop_all()
        with contextlib.suppress(OSError):  # one that is gone already is found out by `ask`
            self.pipe.send(finish)

    def is_ready(self) -> bool:
        """Whether it has started (or ended before it did, which `ask` will find out)."""
        if not self.ready and self.pipe.poll(START_WAIT_S):
            with contextlib.suppress(EOFError, OSError):
                self.pipe.recv()
            self.ready = True
        return self.ready

    def ask(self, words: bytes, buffers: list[pickle.PickleBuffer]) -> tuple[str, Any]:
        """``("done", value)``, ``("failed", exception)`` or ``("unreadable", None)``."""
        arrays = [np.asarray(buffer.raw()) for buffer in buffers]
        spans, end = [], 0
        for array in arrays:
            spans.append((end, end + array.nbytes))
            end += array.nbytes + -array.nbytes % ALIGNED
        if end > self.view.nbytes:
            os.ftruncate(self.memory, end)
            self.view = np.frombuffer(mmap.mmap(self.memory, end), np.uint8)
        for array, (start, stop) in zip(arrays, spans, strict=True):
            self.view[start:stop] = array  # numpy copies without Python's lock
        try:
            self.pipe.send((words, spans, self.view.nbytes))
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            self.end()
            raise EnvironmentFailure(
                f"a process that encodes labels ended with exit code {self.process.returncode} "
                "(-9: killed, mostly for want of memory). Sealed shards are intact; the same "
                "command goes on, with fewer threads= in less memory."
            ) from error

    def end(self) -> None:
        """Kill it, if it still lives; safe to call again."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.view = np.zeros(0, np.uint8)  # the mapping goes with its last user
        if self.memory >= 0:
            os.close(self.memory)
        self.memory = -1


def serve(pipe_number: int, memory: int, parent: int) -> None:
    """The body of a helper: answer until the other end of the pipe is closed."""
    pipe = Connection(pipe_number)
    mapped = memoryview(b"")
    with contextlib.suppress(EOFError, OSError):
        finish: Finisher = pipe.recv()
        pipe.send("ready")
        while True:
            while not pipe.poll(LOOKS_UP_S):
                if os.getppid() != parent:  # somebody else holds a copy of the other end
                    return
            words, spans, size = pipe.recv()
            if size > mapped.nbytes:
                mapped = memoryview(mmap.mmap(memory, size))
            pipe.send_bytes(answer(finish, words, [mapped[a:b] for a, b in spans]))


def answer(finish: Finisher, words: bytes, buffers: list[memoryview]) -> bytes:
    """What `Helper.ask` returns, pickled."""
    try:
        asked: Asked = pickle.loads(words, buffers=buffers)
    except Exception:  # its class cannot be imported here
        return pickle.dumps(("unreadable", None))
    try:
        return pickle.dumps(("done", finish(*asked)))
    except Exception as error:
        error.add_note(f"in a helper process:\n{format_exc()}")
        try:
            told = pickle.dumps(("failed", error))
            pickle.loads(told)
        except Exception:  # an exception that does not survive the way
            told = pickle.dumps(("failed", RuntimeError(format_exc())))
        return told
