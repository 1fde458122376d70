"""Helper processes encode beside the teacher: same bytes, same errors, and nothing left behind."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from test_jobs import PlaneTeacher, run, same_shards, write_photos

from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators import Query
from teacher.jobs.helpers import Helpers
from teacher.jobs.plan import Entry
from teacher.jobs.samples import Finisher, Prepared
from teacher.label import Answer, Camera, LabelError, Space, Task
from teacher.store import LabelSet, read_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads do this work")


@pytest.fixture
def helped(monkeypatch, small):
    """Even the smallest plan gets helper processes."""
    monkeypatch.setattr("teacher.jobs.engines.HELPED_FROM", 1)


@pytest.fixture
def small(monkeypatch):
    """Even the smallest sample is worth sending, and waits for a helper."""
    monkeypatch.setattr("teacher.jobs.helpers.WORTH_BYTES", 0)
    monkeypatch.setattr("teacher.jobs.helpers.START_WAIT_S", 60.0)


def larger_photos(folder: Path, n: int) -> Path:
    """n photos that are worth a helper, in a plan that gets some."""
    folder.mkdir()
    for i in range(n):
        Image.fromarray(np.full((240, 300, 3), 50 + i, np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def helpers_of(pid: int | None = None) -> list[psutil.Process]:
    """The helper processes of a job."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends just now
            found += [child] if any("jobs.helpers" in word for word in child.cmdline()) else []
    return found


class Doubtful(PlaneTeacher):
    """Affine depth that differs from pixel to pixel, pictures, residuals; says who encodes."""

    seen: set[int] = set()  # noqa: RUF012 - one for all instances

    def answer(self, queries, tasks):
        answers = super().answer(queries, tasks)
        for query, one in zip(queries, answers, strict=True):
            depth = one[Task.DEPTH]
            depth.values = depth.values * (1 + query.image[..., 0] / np.float32(100))
            depth.picture, depth.residual = query.image, query.image[..., 1].astype("f4")
        self.seen.update(p.pid for p in helpers_of())
        return answers


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("anchor", [None, {"name": "range", "near_m": 1.0, "far_m": 9.0}])
def test_helpers_give_the_bytes_of_threads(tmp_path, monkeypatch, anchor):
    photos = write_photos(tmp_path / "photos")
    space = "metric" if anchor is None else "affine depth"
    job = {"teacher": {"name": "test_helpers:Doubtful", "space": space}, "anchor": anchor}
    Doubtful.seen.clear()
    run(photos, tmp_path / "threads", **job)
    assert not Doubtful.seen  # a small plan
    monkeypatch.setattr("teacher.jobs.engines.HELPED_FROM", 10)  # inputs of this plan
    done = run(photos, tmp_path / "helpers", **job)
    assert (done["labelled"], done["rejected"], done["duplicates"]) == (7, 2, 1)
    assert 1 <= len(Doubtful.seen) <= 2  # not more than threads
    same_shards(tmp_path / "threads", tmp_path / "helpers")
    assert read_rows(tmp_path / "threads") == read_rows(tmp_path / "helpers")
    assert not helpers_of()


def test_two_workers_have_helpers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    photos = larger_photos(tmp_path / "photos", 102)
    found, over = set(), threading.Event()

    def watch():
        while not over.wait(0.05):
            with contextlib.suppress(psutil.Error):
                found.update((p.ppid(), p.pid) for p in helpers_of())

    watching = threading.Thread(target=watch)
    watching.start()
    teacher = {"name": "test_jobs:PlaneTeacher", "pause_s": 0.02}
    sizes = {"shard_size": 10, "max_side": None, "threads": 1}
    run(photos, tmp_path / "two", teacher=teacher, workers=2, **sizes)
    over.set()
    watching.join()
    parents = {parent for parent, _ in found} - {1}  # of a helper whose worker has just ended
    assert len(parents) == 2 and os.getpid() not in parents
    run(photos, tmp_path / "one", **sizes)
    same_shards(tmp_path / "one", tmp_path / "two")


class Murderer(PlaneTeacher):
    """Kills one helper when the third batch is asked for, as a system without memory would."""

    armed = True

    def answer(self, queries, tasks):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3 and Murderer.armed:
            Murderer.armed = False
            deadline = time.monotonic() + 60
            while not (helpers := helpers_of()):  # an encoder starts one, in its own time
                assert time.monotonic() < deadline
                time.sleep(0.01)
            for helper in helpers:
                helper.kill()
        return super().answer(queries, tasks)


@pytest.mark.usefixtures("helped")
def test_a_killed_helper_ends_the_job_with_exit_3_and_the_next_run_goes_on(tmp_path):
    photos = write_photos(tmp_path / "photos")
    job = {"teacher": {"name": "test_helpers:Murderer"}, "batch_size": 1, "shard_size": 2}
    with pytest.raises(EnvironmentFailure, match=r"process that encodes labels .*-9: killed") as e:
        run(photos, tmp_path / "set", **job)
    assert e.value.exit_code == 3
    names = {p.name for p in (tmp_path / "set").iterdir()}
    assert "index.parquet" not in names and not [n for n in names if n.startswith(".")]
    assert not helpers_of()
    assert not Murderer.armed
    run(photos, tmp_path / "set", **job)
    run(photos, tmp_path / "whole", **job)
    same_shards(tmp_path / "set", tmp_path / "whole")
    assert LabelSet(tmp_path / "set").verify() == 7


@pytest.fixture
def job_process(tmp_path):
    """A job of its own with helpers, in the middle of its work."""
    photos = larger_photos(tmp_path / "photos", 120)
    command = [sys.executable, "-m", "distill.cli", "label", "teacher=own", "shard_size=4"]
    command += ["teacher.name=test_jobs:PlaneTeacher", "+teacher.pause_s=0.1", "batch_size=1"]
    command += [f"images={photos}", f"out={tmp_path / 'set'}"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    job = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "set" / "shard-000001.json").exists():
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[1]
        time.sleep(0.02)
    yield job
    job.kill()
    job.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_helper_outlives_its_job(job_process, tmp_path, number):
    helpers = helpers_of(job_process.pid)
    assert helpers
    assert {h.nice() for h in helpers} == {min(psutil.Process(job_process.pid).nice() + 10, 19)}
    for helper in helpers:  # Ctrl-C and `scancel` reach all of a job: its parent decides
        helper.send_signal(signal.SIGINT)
        helper.send_signal(signal.SIGTERM)
        assert os.getpgid(helper.pid) != os.getpgid(job_process.pid)
    sealed = len(list((tmp_path / "set").glob("shard-*.json")))
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "set").glob("shard-*.json"))) < sealed + 2:
        assert time.monotonic() < deadline and job_process.poll() is None
        time.sleep(0.02)
    job_process.send_signal(number)
    job_process.wait(timeout=60)
    assert not psutil.wait_procs(helpers, timeout=20)[1]
    said = job_process.communicate(timeout=60)[1]
    code = -9 if number == signal.SIGKILL else 128 + number
    assert job_process.returncode == code, said
    assert "Traceback" not in said


def asked(value=2.0, size=(4, 5), **extras):
    """A sample with its answer."""
    camera = Camera.assumed(size[1], size[0])
    query = Query(key="0" * 24, image=np.zeros((*size, 3), np.uint8), camera=camera)
    item = Prepared(entry=Entry(uri="a", key=query.key), query=query, encoded=(b"file", "jpg"))
    depth_m = np.full(size, value, np.float32)
    depth = Answer(task=Task.DEPTH, space=Space.METRIC, values=depth_m, extras=extras)
    return item, {Task.DEPTH: depth}, None


class Raises(Finisher):
    """Fails as it is told."""

    def __call__(self, item, answers, scale):
        how = answers[Task.DEPTH].extras.get("raise")
        if how == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there")
        if how == "use":
            raise UsageError("give another anchor")
        if how == "bug":
            raise ZeroDivisionError("by zero")
        if how == "own":
            raise OwnError("what", 7)
        return super().__call__(item, answers, scale)


class OwnError(Exception):
    """Cannot be unpickled: its constructor wants more than its text."""

    def __init__(self, text, number):
        super().__init__(text)


@pytest.fixture
def finish(small):
    helpers = Helpers(Raises(tasks=[Task.DEPTH]))
    yield helpers
    helpers.close()


def test_errors_cross_the_border_as_they_are(finish):
    with pytest.raises(LabelError, match="no known pixel"):
        finish(*asked(np.nan))
    with pytest.raises(UsageError, match="another anchor") as use:
        finish(*asked(**{"raise": "use"}))
    assert use.value.exit_code == 2
    with pytest.raises(OSError, match="No space left") as disk:
        finish(*asked(**{"raise": "disk"}))
    assert (disk.value.errno, disk.value.filename) == (errno.ENOSPC, "/there")
    with pytest.raises(ZeroDivisionError, match="by zero") as bug:
        finish(*asked(**{"raise": "bug"}))
    assert "raise ZeroDivisionError" in "".join(bug.value.__notes__)  # where it happened
    with pytest.raises(RuntimeError, match="OwnError: what"):
        finish(*asked(**{"raise": "own"}))
    assert len(finish.started) == 1  # and it lives on
    assert finish(*asked())[0][0] == ("jpg", b"file")


def test_where_no_process_can_be_started_threads_do_the_work(finish, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr("teacher.jobs.helpers.subprocess.Popen", refuse)
    assert finish(*asked()) == Finisher(tasks=[Task.DEPTH])(*asked())
    assert not finish.started and len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_helper_that_cannot_even_start_is_named(finish, monkeypatch):
    monkeypatch.setattr("teacher.jobs.helpers.START", "raise SystemExit(7)")
    with pytest.raises(EnvironmentFailure, match="ended with exit code 7"):
        finish(*asked())


def test_small_samples_stay_here():
    helpers = Helpers(Finisher(tasks=[Task.DEPTH]))
    helpers(*asked(2.0, (300, 400)))
    assert not helpers.started
    helpers(*asked(2.0, (400, 400)))  # 7 bytes a pixel
    assert len(helpers.started) == 1
    helpers.close()


def test_nobody_waits_for_a_helper_to_start(monkeypatch):
    monkeypatch.setattr("teacher.jobs.helpers.START", "import time; time.sleep(60)")
    helpers, sample = Helpers(Finisher(tasks=[Task.DEPTH])), asked(2.0, (400, 400))
    for _ in range(2):
        assert helpers(*sample) == helpers.finish(*sample)
    assert len(helpers.started) == 1
    helpers.close()


class HomeOnly:
    """Travels, but opens only where it was made."""

    def __reduce__(self):
        return at_home, (os.getpid(),)


def at_home(pid):
    if pid != os.getpid():
        raise ImportError("not importable there")
    return HomeOnly()


def test_what_cannot_travel_is_finished_here(finish):
    plain = Finisher(tasks=[Task.DEPTH])
    for strange in (HomeOnly(), lambda: None):
        item, answers, scale = asked()
        answers[Task.NORMALS] = strange  # not asked for, so nobody stores it
        assert finish(item, answers, scale) == plain(item, answers, scale)
    assert len(finish.started) == 1  # the second was never sent


def test_the_shared_memory_grows_with_the_images_and_goes_with_the_helpers(finish):
    before = len(list(Path("/proc/self/fd").iterdir()))
    plain = Finisher(tasks=[Task.DEPTH])
    for size in ((4, 5), (300, 200), (30, 7), (301, 203)):
        assert finish(*asked(3.0, size)) == plain(*asked(3.0, size))
        finish.finish = None  # from now on nothing is done here
    finish.finish = plain
    (helper,) = finish.started
    assert helper.view.nbytes < 2 * 301 * 203 * 7
    finish.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert finish(*asked())[0] == plain(*asked())[0]  # a new one starts
