"""The command: exit codes, one paragraph for each kind of bad use, no traceback for users."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from distill import cli
from teacher.errors import EnvironmentFailure, UsageError


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_help_lists_every_verb_and_its_keys(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in cli.VERBS)
    for verb in cli.VERBS:
        assert cli.main([verb, "--help"]) == 0
        assert verb in capsys.readouterr().out


def test_an_unknown_verb_is_answered_with_the_near_one(capsys):
    assert cli.main(["lable"]) == 2
    assert "Did you mean `label`?" in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["label", "images=x", "out=y", "bach_size=3"], "bach_size"),
        (["label", "images=x", "out=y", "teacher.nmae=3"], "nmae"),
        (["label", "images=x", "out=y", "teacher=oracle"], "oracle"),
        (["label", "images=x"], "out= must be given"),
        (["label", "images=x", "out="], "out= must be given"),
        (["label", "images=null", "out=y"], "images= must be given"),
        (["label", "images=nowhere", "out=y", "teacher=own", "teacher.name=nobody"], "nowhere"),
        (
            ["verify", "export=x", "labels=y", "batch=many"],
            "batch='many' (str): expected a whole number.",
        ),
        (["predict", "model=x", "images=y", "out=z", "batch=2.5"], "batch=2.5 (float): expected a"),
        (["bench", "export=x", "batches=4"], "batches=4 (int): expected a list, as in batches=["),
        (["verify", "export=x", "labels=y", "tasks=depth"], "tasks='depth' (str): expected a list"),
        (["export", "checkpoint=x", "out=y", "precision=[1]"], "precision=[1] (list): expected a"),
        (["verify", "export=x", "labels=y", "rerun=0"], "rerun=0 (int): expected true or false."),
        (["inspect", "labels=x", "out=2026"], "out=2026 (int): expected text or null."),
    ],
)
def test_bad_use_is_exit_2_with_one_paragraph(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    text = said(capsys)
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verbs_defaults_are_of_its_own_kinds(verb):
    chosen = {"label": ["teacher=truth"], "calibrate": ["teacher=truth"]}.get(verb, [])
    given = [f"{key}=x" for key in cli.required_keys(verb)]
    values = cli.configure(verb, [*chosen, *given, *(["teacher.labels=x"] if chosen else [])])
    cli.raise_for_wrong_kind(cli.verb_function(verb), values)


def test_a_folder_may_be_named_like_a_number():
    values = cli.configure("label", ["images=2026", "out=1e3", "shard_size=7"])
    assert (values["images"], values["out"], values["shard_size"]) == ("2026", "1e3", 7)


def test_an_unknown_group_choice_lists_the_choices(capsys, tmp_path):
    cli.main(["label", "images=x", f"out={tmp_path}/y", "teacher=oracle"])
    text = said(capsys)
    assert "mini" in text and "truth" in text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("images=x: none"), 2, "images=x: none"),
        (EnvironmentFailure("no device"), 3, "no device"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), 3, "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/d/x"), 3, "Read-only file system"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/d/x"), 2, "/d/x"),
        (ModuleNotFoundError("x", name="mitsuba"), 3, "pip install 'dense-distill[scenes]'"),
        (KeyboardInterrupt(), 130, "goes on where it stopped"),
        (cli.Interrupted("terminated"), 143, "terminated"),
        (ZeroDivisionError("x / 0"), 4, "this is our bug"),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, message):
    def fails(verb, overrides):
        raise error

    monkeypatch.setattr(cli, "run_verb", fails)
    assert cli.main(["label"]) == code
    captured = capsys.readouterr().err
    assert message in " ".join(captured.split())
    assert ("Traceback" in captured) == (code == 4)


def test_a_verdict_below_budget_is_exit_1(capsys, monkeypatch):
    monkeypatch.setattr(cli, "run_verb", lambda *_: {"summary": "refused", "exit": 1})
    assert cli.main(["verify"]) == 1
    assert capsys.readouterr().out == "refused\n"


def test_the_installed_command_finds_its_configuration(tmp_path):
    """From another folder, as a user would: Hydra's conf travels with the package."""
    command = [sys.executable, "-m", "distill.cli", "label", "out=x", "images=nowhere"]
    command += ["teacher=own", "teacher.name=x:Y"]
    seen = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert seen.returncode == 2
    assert "images=nowhere" in seen.stderr
    assert not list(tmp_path.iterdir())


DEAF = """
import os, signal, threading, time
from distill import cli

listening = threading.Event()
with cli.handled_signals(0.5):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def hears():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        listening.set()
        time.sleep(60)

    threading.Thread(target=hears, daemon=True).start()
    listening.wait()
    os.system("echo ready; exec sleep 10 > /dev/null 2>&1")  # says so when it is in its wait
"""


def test_a_signal_that_the_main_thread_never_hears_of_ends_the_job_after_the_grace_time():
    """It hangs in a wait, and another thread got the signal: no Python handler can run."""
    job = subprocess.Popen([sys.executable, "-c", DEAF], stdout=-1, stderr=-1, text=True)
    try:
        assert job.stdout.readline() == "ready\n"
        job.terminate()
        _, said = job.communicate(timeout=20)
    finally:
        job.kill()
    assert job.returncode == 143
    assert "not done 0.5 s after the signal, so it ended at once" in said


def test_the_grace_time_leaves_nothing_behind():
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with cli.handled_signals(0.05), pytest.raises(cli.Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    time.sleep(0.1)  # the grace time is over, and so is the job: nothing ends it
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before  # noqa: PTH208
    assert signal.set_wakeup_fd(-1) == -1


STAND_IN = """
import sys
from distill import cli
from teacher.errors import EnvironmentFailure, UsageError

def verify(*, labels: str, limit: int, **_):
    error = {7: UsageError("limit=7: odd"), 8: EnvironmentFailure("no device")}.get(limit)
    if error:
        raise error
    return {"summary": f"{labels}: limit {limit}", "exit": limit}

cli.verb_function = lambda verb: verify
sys.exit(cli.main(["verify", "--multirun", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "messages"),
    [
        (["labels=2026", "limit=0,0"], 0, ["2026: limit 0"]),
        (["labels=y", "limit=1,0"], 1, ["y: limit 1", "y: limit 0"]),
        (["labels=y", "limit=7,1"], 2, ["limit=7: odd", "y: limit 1"]),
        (["labels=y", "limit=7,8"], 3, ["limit=7: odd", "no device"]),
        (["limit=0,1"], 2, ["labels= must be given"]),
        (["labels=y", "limit=0,many"], 2, ["limit='many' (str): expected a whole number."]),
        (["labels=y", "limmit=0,1"], 2, ["limmit=: there is no such key; did you mean limit=?"]),
    ],
)
def test_a_sweep_ends_with_the_largest_exit_of_its_jobs(tmp_path, arguments, code, messages):
    command = [sys.executable, "-c", STAND_IN, "export=x", *arguments]
    seen = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    told = " ".join((seen.stdout + seen.stderr).split())
    assert seen.returncode == code, told
    assert all(message in told for message in messages), told
    assert "Traceback" not in told
