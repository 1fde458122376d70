"""A server that forks label jobs and breaks them: a process start per trial would take a second.

As a program it reads one JSON order a line: ``start`` forks a job with a fault armed and answers
its pid, ``wait`` answers how it ended. Faults strike at the k-th line that the job executes in the
code that commits (`CODE`), in whichever thread: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``raise``
(an OSError), ``hang`` (it waits for ever); ``limit`` makes the kernel refuse files beyond some
bytes from the n-th call of a function on. The pytest side is `Jobs`, the invariant is
`assert_whole`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from teacher import shard_writer, store
from teacher.jobs import commit, engines, redo, run
from teacher.label import Answer, Space, Task

CODE = {m.__file__ for m in (commit, shard_writer, store, redo)}
LEASE_S = 0.4


class Flat:
    """A teacher without torch: depth follows from the mean grey, after a pause."""

    tasks = (Task.DEPTH,)

    def __init__(self, *, pause_s: float = 0.0, prompt: str = "", scale: float = 1.0) -> None:
        self.pause_s, self.prompt, self.scale = pause_s, prompt, scale

    def describe(self):
        return {"name": "flat", "prompt": self.prompt, "codec": {"scale": self.scale}}

    def answer(self, queries, tasks):
        time.sleep(self.pause_s * len(queries))
        return [
            {
                Task.DEPTH: Answer(
                    task=Task.DEPTH,
                    space=Space.METRIC,
                    values=np.full(q.image.shape[:2], self.scale + q.image.mean(), np.float32),
                )
            }
            for q in queries
        ]


class Fails(Flat):
    """The same teacher; it raises when it comes to its ``at``-th image, and says it is `Flat`."""

    def __init__(self, *, at: int) -> None:
        super().__init__()
        self.left = at

    def answer(self, queries, tasks):
        self.left -= len(queries)
        if self.left <= 0:
            raise RuntimeError(f"illegal memory access, {-self.left} images after the bad one")
        return super().answer(queries, tasks)


class Logged(Flat):
    """The same teacher; every process that loads it leaves a line."""

    def __init__(self, *, log: str, pause_s: float = 0.0) -> None:
        super().__init__(pause_s=pause_s)
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")


def write_inputs(folder: Path, n: int = 7) -> Path:
    """n tiny photos, a copy of the first and a page that calls itself a photo."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "page.jpg").write_text("<html>gone</html>")
    return folder


def options(photos: Path, out: Path, **changes) -> dict:
    """A label job of three images a shard."""
    plain = {
        "teacher": {"name": "faults:Flat"},
        "images": str(photos),
        "out": str(out),
        "tasks": ["depth"],
        "max_side": None,
        "shard_size": 3,
        "batch_size": 2,
        "keep_pictures": False,
        "threads": 1,
    }
    return plain | changes


def content(out: Path) -> dict:
    """Everything of a label set that must not depend on how it came about."""
    rows = store.read_rows(out)
    tars = {p.name: p.read_bytes() for p in out.glob("*.tar")}
    return {"rows": rows, "tars": tars, "index": (out / "index.parquet").read_bytes()}


def assert_whole(out: Path, reference: dict, *, litter: bool = False) -> None:
    """The one invariant: every input exactly once, all hashes match, the same bytes."""
    store.LabelSet(out).verify()
    found = content(out)
    uris = [row["uri"] for row in found["rows"]]
    assert sorted(uris) == sorted({row["uri"] for row in reference["rows"]})
    assert found["rows"] == reference["rows"]
    assert found["tars"] == reference["tars"]
    assert found["index"] == reference["index"]
    assert litter or not [p.name for p in out.glob(".*")]


class Jobs:
    """The pytest side of the server."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def _ask(self, **order):
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, job: dict, fault: dict | None = None) -> int:
        """Fork a job; its pid."""
        return self._ask(do="start", job=job, fault=fault)["pid"]

    def wait(self, pid: int, *, stopped: bool = False) -> dict:
        """``code`` (negative: a signal; "stopped"), ``text`` on stderr, ``lines`` counted."""
        return self._ask(do="wait", pid=pid, stopped=stopped)

    def run(self, job: dict, fault: dict | None = None) -> dict:
        """Start and wait."""
        return self.wait(self.start(job, fault))

    def close(self) -> None:
        """End the server."""
        self.server.communicate("")


def arm(fault: dict) -> itertools.count:
    """Install the fault in this process; the counter of lines."""
    counter, calls = itertools.count(1), itertools.count(1)

    def strike() -> None:
        if fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault["kind"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault["kind"] == "hang":
            Path(fault["sign"]).touch()
            threading.Event().wait()
        elif fault["kind"] == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
        elif fault["kind"] == "raise":
            raise OSError(fault["errno"], os.strerror(fault["errno"]))

    def each_line(frame, event, argument):
        if event == "line" and next(counter) == fault.get("at"):
            strike()
        return each_line

    def each_call(frame, event, argument):
        if frame.f_code.co_filename not in CODE:
            return None
        if frame.f_code.co_name == fault.get("function") and next(calls) == fault["call"]:
            strike()
        return each_line

    threading.settrace(each_call)
    sys.settrace(each_call)
    return counter


def child(job: dict, fault: dict | None, errors: int) -> None:
    """The forked job: as `distill label` would run it, but for Hydra."""
    from distill import cli

    # tqdm's own lock is a semaphore shared with the server: a job killed while it holds it would
    # stop all later ones. Real jobs are processes of their own, or spawned.
    tqdm.set_lock(threading.RLock())
    os.dup2(errors, 2)
    sys.stderr = os.fdopen(2, "w")
    commit.Lease.LIFETIME_S = LEASE_S
    counter, code = None, 0
    with cli.handled_signals((fault or {}).get("grace_s")):
        try:
            if fault is not None:
                commit.WAITS_S = engines.WAITS_S = (0.0, 0.0, 0.0, 0.0)
                counter = arm(fault)
            run.label(**job)
        except BaseException as error:
            sys.settrace(None)
            code = cli.complain("label", error)
        sys.settrace(None)
        if counter is not None:
            print(f"LINES {next(counter)}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Read orders until the end of the input."""
    tqdm.monitor_interval = 0  # no thread of its own: forks must come from a single one
    with tempfile.TemporaryDirectory() as folder:  # imports everything, once for all forks
        photos = write_inputs(Path(folder) / "photos", 1)
        with contextlib.redirect_stderr(io.StringIO()):
            run.label(**options(photos, Path(folder) / "set"))
    assert threading.active_count() == 1
    pipes = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                child(order["job"], order["fault"], writing)
            os.close(writing)
            pipes[pid] = reading
            answer = {"pid": pid}
        else:
            _, status = os.waitpid(order["pid"], os.WUNTRACED if order["stopped"] else 0)
            answer = {"code": "stopped"}
            if not os.WIFSTOPPED(status):
                with os.fdopen(pipes.pop(order["pid"]), errors="replace") as pipe:
                    text = pipe.read()
                lines = text.rpartition("LINES ")[2]
                answer = {"code": os.waitstatus_to_exitcode(status), "text": text}
                answer["lines"] = int(lines) if lines.strip().isdigit() else 0
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
