"""Label jobs on engines that schedule elsewhere: schemas of the examples, submitit, Ray."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import yaml
from test_jobs import run, same_shards, write_photos

from teacher.errors import EnvironmentFailure
from teacher.jobs.plan import make_plan
from teacher.jobs.ray_engine import ShardActor, start_ray
from teacher.jobs.recipe import Job, Recipe
from teacher.store import LabelSet

DOCS = Path(__file__).parents[1] / "docs" / "clusters"


def test_the_kubernetes_example_fits_the_schema():
    import kubernetes_validate

    job = yaml.safe_load((DOCS / "kubernetes.yaml").read_text())
    kubernetes_validate.validate(job, "1.31", strict=True)
    assert job["spec"]["completionMode"] == "Indexed"
    [command] = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"shard.count={job['spec']['completions']}" in command
    job["spec"]["completionMod"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_the_skypilot_example_has_only_documented_fields():
    task = yaml.safe_load((DOCS / "skypilot.yaml").read_text())
    documented = (
        "name workdir num_nodes resources envs secrets volumes file_mounts setup run".split()
    )
    assert set(task) <= set(documented)
    assert {"RANK", "COUNT"} <= set(task["envs"])


@pytest.fixture
def path_with_distill(monkeypatch):
    """`distill` and this folder's teachers are found by child processes."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.slow
@pytest.mark.usefixtures("path_with_distill")
def test_the_slurm_example_runs_on_submitit_s_local_executor(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKS", "2")
    photos = write_photos(tmp_path / "photos")
    options = ["teacher=own", "teacher.name=test_jobs:PlaneTeacher", "max_side=40"]
    options += ["shard_size=2", "batch_size=2", f"images={photos}", f"out={tmp_path / 'set'}"]
    command = [sys.executable, str(DOCS / "slurm.py"), "--local", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run(photos, tmp_path / "one", shard_size=2, batch_size=2)
    same_shards(tmp_path / "one", tmp_path / "set")


def ray_job(photos: Path, out: Path, **teacher) -> list[str]:
    options = {
        "teacher": {"name": "test_jobs:PlaneTeacher", **teacher},
        "images": str(photos),
        "out": str(out),
        "tasks": ["depth", "normals"],
        "max_side": 40,
        "shard_size": 2,
        "batch_size": 2,
        "keep_pictures": True,
        "threads": 1,
        "engine": "ray",
        "workers": 2,
    }
    code = (
        "import ray; ray.init(num_cpus=4, log_to_driver=False, include_dashboard=False,"
        " object_store_memory=100_000_000)\n"
        f"from teacher.jobs.run import label; print(label(**{options!r})['summary'])"
    )
    return [sys.executable, "-W", "ignore", "-c", code]


def cluster_of(out: Path) -> list[psutil.Process]:
    """Ray's processes of this very test: they inherit its mark; other clusters are not ours."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DISTILL_TEST_OUT") == str(out):
                found.append(process)
        except psutil.Error:
            continue
    return found


def actor_pids(out: Path) -> list[int]:
    return [p.pid for p in cluster_of(out) if "ShardActor" in " ".join(p.cmdline())]


def wait_for(condition, *, what: str, job: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, f"the job ended before {what}: {job.communicate()}"
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("path_with_distill")
@pytest.mark.parametrize("victim", ["actor", "driver"])
def test_ray_survives_kill_9_of_an_actor_and_of_the_driver(tmp_path, monkeypatch, victim):
    photos = write_photos(tmp_path / "photos", n=11)
    out = tmp_path / "set"
    command = ray_job(photos, out, pause_s=0.5)
    monkeypatch.setenv("DISTILL_TEST_OUT", str(out))
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        wait_for(lambda: list(out.glob("shard-*.json")), what="first seal", job=job)
        if victim == "actor":
            wait_for(lambda: actor_pids(out), what="actor", job=job)
            os.kill(actor_pids(out)[0], signal.SIGKILL)
            text = job.communicate(timeout=300)[0]
            assert job.returncode == 0, text
        else:
            job.kill()
            job.communicate(timeout=60)
            time.sleep(5)  # Ray's processes notice that their driver is gone
            done = subprocess.run(command, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        for process in cluster_of(out):
            process.kill()
    run(photos, tmp_path / "one", shard_size=2, batch_size=2)
    same_shards(tmp_path / "one", out)
    assert LabelSet(out).verify() == 11


@pytest.mark.slow
@pytest.mark.usefixtures("path_with_distill")
def test_ray_passes_on_what_the_actors_say(tmp_path, monkeypatch):
    """Relative paths are the driver's, errors of the user keep their words and their exit code."""
    write_photos(tmp_path / "photos", n=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_TEST_OUT", "set")
    command = ray_job(Path("photos"), Path("set"), space="affine depth")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    finally:
        for process in cluster_of(Path("set")):
            process.kill()
    last = done.stderr.rstrip().splitlines()[-2:]
    assert "WorkerFailedError: engine=ray: 3 of 3 shards are missing" in last[0], done.stderr
    assert "metric anchor" in last[0] and "goes on where they stopped" in last[1]


def test_an_actor_answers_with_its_errors_and_goes_on(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos", n=3)
    (tmp_path / "elsewhere").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        job = Job(teacher={"name": "test_jobs:PlaneTeacher", "space": "affine depth"},
                  images="photos", video=None, tasks=["depth"], max_side=40, keep_pictures=False,
                  threads=1, batch_size=2, anchor=None, align=None)  # fmt: skip
        source = job.source()
        facts = job.facts(job.load().about)
        plan = make_plan(source, shard_size=2, batch_size=2, facts=facts)
    recipe = Recipe(job=job, plan=plan, folder=tmp_path / "set")
    recipe.folder.mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    told = ShardActor(recipe, str(tmp_path))({"shard": [0, 1]})["outcome"]
    for kind, (code, text) in map(json.loads, told):
        assert (kind, code) == ("failed", 2) and "metric anchor" in text
    gone = dataclasses.replace(recipe, job=dataclasses.replace(job, images="nowhere"))
    [kind, [code, text]] = json.loads(ShardActor(gone, str(tmp_path))({"shard": [0]})["outcome"][0])
    assert (kind, code) == ("failed", 2) and "nowhere" in text


def test_a_ray_that_does_not_start_is_the_environment_s_fault(monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup.")  # its very words

    ray = types.SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(EnvironmentFailure, match=r"no Ray on 10\.0\.0\.1:6379 \(The current node"):
        start_ray()
