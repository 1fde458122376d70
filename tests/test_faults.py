"""Whatever breaks a label job: every input once, all hashes right, the bytes of an unbroken run.

The jobs run in forks of one process without torch (`faults.py`), in memory where there is /dev/shm.
"""

import errno
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import faults
import numpy as np
import pytest
from faults import assert_whole, options

from teacher.store import LabelSet, problems_of

MEMORY = Path("/dev/shm")
LINES = 1500  # more than a job executes in the code that commits


@pytest.fixture(scope="module")
def jobs():
    server = faults.Jobs()
    yield server
    server.close()


@pytest.fixture
def place():
    """A folder that needs no disk, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return faults.write_inputs(tmp_path_factory.mktemp("faults") / "photos")


@pytest.fixture(scope="module")
def reference(jobs, photos, tmp_path_factory):
    """What an undisturbed job makes; and the number of lines that it takes."""
    out = tmp_path_factory.mktemp("reference") / "set"
    done = jobs.run(options(photos, out), {"kind": "count"})
    assert done["code"] == 0, done["text"]
    assert 300 < done["lines"] < LINES
    found = faults.content(out)
    states = [row["state"] for row in found["rows"]]
    assert sorted(states) == ["duplicate_of"] + ["labelled"] * 7 + ["rejected"]
    return found | {"lines": done["lines"]}


def struck(reference, share: float) -> list[int]:
    """Lines to strike at: all of them, or a share spread evenly."""
    count = round(reference["lines"] * share)
    return sorted({round(x) for x in np.linspace(1, reference["lines"], count)})


def kill_at_lines(jobs, photos, place, reference, lines):
    for at in lines:
        out = place / f"kill-{at}"
        struck_once = jobs.run(options(photos, out), {"kind": "kill", "at": at})
        assert struck_once["code"] in (-signal.SIGKILL, 0), struck_once["text"]
        again = jobs.run(options(photos, out))
        assert again["code"] == 0, f"line {at}: {again['text']}"
        assert_whole(out, reference)
        shutil.rmtree(out)


def test_kill_9_between_the_steps_of_the_commit(jobs, photos, place, reference):
    kill_at_lines(jobs, photos, place, reference, struck(reference, 0.026))


@pytest.mark.slow
def test_kill_9_at_every_line_of_the_commit(jobs, photos, place, reference):
    kill_at_lines(jobs, photos, place, reference, struck(reference, 1.0))


def fail_at_lines(jobs, photos, place, reference, lines, number):
    """An I/O error at each line: the job ends with its exit code, or goes on; never half done."""
    codes = set()
    for at in lines:
        out = place / f"fail-{at}"
        first = jobs.run(options(photos, out), {"kind": "raise", "at": at, "errno": number})
        assert first["code"] in (0, 3), f"line {at}: {first['text']}"
        assert "Traceback" not in first["text"], first["text"]
        codes.add(first["code"])
        if first["code"] == 0:
            assert_whole(out, reference, litter=True)
        again = jobs.run(options(photos, out))
        assert again["code"] == 0, f"line {at}: {again['text']}"
        assert_whole(out, reference)
        shutil.rmtree(out)
    return codes


def test_a_full_disk_between_the_steps_ends_with_exit_3(jobs, photos, place, reference):
    lines = struck(reference, 0.009)
    assert 3 in fail_at_lines(jobs, photos, place, reference, lines, errno.ENOSPC)


def test_a_passing_error_between_the_steps_is_borne(jobs, photos, place, reference):
    lines = struck(reference, 0.009)
    assert 0 in fail_at_lines(jobs, photos, place, reference, lines, errno.EIO)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_an_error_at_every_line_of_the_commit(jobs, photos, place, reference, number):
    fail_at_lines(jobs, photos, place, reference, struck(reference, 0.5), number)


def pause_at_lines(jobs, photos, place, reference, lines):
    """A worker stops; another finishes the set; the first one wakes up and changes nothing."""
    paused = 0
    for at in lines:
        out = place / f"pause-{at}"
        sleeper = jobs.start(options(photos, out), {"kind": "stop", "at": at})
        first = jobs.wait(sleeper, stopped=True)
        if first["code"] != "stopped":
            assert first["code"] == 0, first["text"]
            continue
        paused += 1
        done = jobs.run(options(photos, out))
        assert done["code"] == 0, f"line {at}: {done['text']}"
        assert_whole(out, reference, litter=True)
        names = [*out.glob("shard-*")]
        before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in names}
        os.kill(sleeper, signal.SIGCONT)
        woken = jobs.wait(sleeper)
        assert woken["code"] == 0, f"line {at}: {woken['text']}"
        assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in names} == before
        assert_whole(out, reference)
        shutil.rmtree(out)
    return paused


def test_a_paused_worker_that_wakes_up_overwrites_nothing(jobs, photos, place, reference):
    assert pause_at_lines(jobs, photos, place, reference, struck(reference, 0.009)) > 4


@pytest.mark.slow
def test_a_worker_paused_at_every_sixth_line(jobs, photos, place, reference):
    pause_at_lines(jobs, photos, place, reference, struck(reference, 0.17))


def test_kill_9_at_50_random_moments(jobs, place):
    """A job of 40 shards is killed and started again until it is through, twice or more."""
    photos = faults.write_inputs(place / "photos", 40)
    slow = {"name": "faults:Flat", "pause_s": 0.002}
    job = lambda out: options(photos, out, shard_size=1, batch_size=1, teacher=slow)  # noqa: E731
    assert jobs.run(job(place / "warm"))["code"] == 0
    started = time.monotonic()
    assert jobs.run(job(place / "one"))["code"] == 0
    whole_s = time.monotonic() - started
    expected = faults.content(place / "one")
    rng, kills, turn = np.random.default_rng(0), 0, 0
    while kills < 50:
        out, code = place / f"set-{turn}", None
        while code != 0:
            pid = jobs.start(job(out))
            if kills < 50:
                time.sleep(rng.uniform(0, whole_s / 2))
                os.kill(pid, signal.SIGKILL)
            code = jobs.wait(pid)["code"]
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert_whole(out, expected)
        turn += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_signals_abandon_the_shard_and_a_second_one_ends_at_once(
    jobs, photos, place, reference, number, times
):
    slow = {"name": "faults:Flat", "pause_s": 0.25}
    job = options(photos, place / "set", teacher=slow)
    pid = jobs.start(job)
    deadline = time.monotonic() + 60
    while not (place / "set" / "shard-000000.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for _ in range(times):
        os.kill(pid, number)
        time.sleep(0.001)
    ended = jobs.wait(pid)
    assert ended["code"] == 128 + number, ended["text"]
    assert "Traceback" not in ended["text"]
    assert times == 2 or not list((place / "set").glob(".*"))
    assert LabelSet(place / "set").rows
    assert jobs.run(job)["code"] == 0
    found = faults.content(place / "set")
    assert [r["uri"] for r in found["rows"]] == [r["uri"] for r in reference["rows"]]
    assert problems_of(place / "set") == {}


@pytest.mark.parametrize("function", ["commit", "_name"])
def test_a_commit_that_hangs_holds_a_signal_up_for_the_grace_time_only(
    jobs, photos, place, reference, function
):
    sign = place / "hangs"
    fault = {"kind": "hang", "function": function, "call": 2, "sign": str(sign), "grace_s": 0.5}
    job = options(photos, place / "set")
    pid = jobs.start(job, fault)
    deadline = time.monotonic() + 60
    while not sign.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    signalled = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    ended = jobs.wait(pid)
    assert ended["code"] == 128 + signal.SIGTERM, ended["text"]
    assert "0.5 s after the signal" in ended["text"]
    assert time.monotonic() - signalled < 30
    assert jobs.run(job)["code"] == 0
    assert_whole(place / "set", reference)


def test_a_teacher_that_fails_at_any_image_loses_nothing(jobs, photos, place, reference):
    for image in range(1, 8):
        out = place / f"set{image}"
        failed = jobs.run(options(photos, out, teacher={"name": "faults:Fails", "at": image}))
        assert failed["code"] == 4, failed["text"]
        assert "illegal memory access" in failed["text"]
        assert not list(out.glob(".*"))
        assert jobs.run(options(photos, out))["code"] == 0
        assert_whole(out, reference)
