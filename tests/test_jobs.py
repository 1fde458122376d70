"""Label jobs: every input ends in one state, a killed job goes on, bad use is explained."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from conftest import make_label
from PIL import Image

from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators import Query, load_teacher
from teacher.jobs.commit import Lease, patiently, this_host
from teacher.jobs.plan import Entry
from teacher.jobs.run import label
from teacher.jobs.samples import answer_split, prepare
from teacher.jobs.sources import open_source
from teacher.label import Answer, Camera, Space, Task
from teacher.shards import encode_members
from teacher.store import LabelSet, read_rows, write_label_set


class PlaneTeacher:
    """A user's own teacher: says that everything is `depth_m` away, dark images have no answer."""

    tasks = (Task.DEPTH, Task.NORMALS)

    def __init__(
        self, *, depth_m: float = 2.0, space: str = "metric", pause_s: float = 0.0
    ) -> None:
        self.depth_m, self.space, self.pause_s = depth_m, Space(space), pause_s

    def describe(self):
        return {"name": "plane", "depth_m": self.depth_m}

    def answer(self, queries, tasks):
        time.sleep(self.pause_s * len(queries))
        answers = []
        for query in queries:
            size = query.image.shape[:2]
            depth_m = np.full(size, self.depth_m if query.image.mean() > 5 else np.nan, np.float32)
            normals = np.zeros((*size, 3), np.float32)
            normals[..., 2] = 1
            both = {
                Task.DEPTH: Answer(task=Task.DEPTH, space=self.space, values=depth_m),
                Task.NORMALS: Answer(task=Task.NORMALS, space=Space.UNIT_NORMALS, values=normals),
            }
            answers.append({task: both[task] for task in tasks})
        return answers


def write_photos(folder: Path, n: int = 7) -> Path:
    """Folder with n good photos in odd places, a duplicate, a liar, a dark one and a readme."""
    (folder / "sub" / "deep").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for i in range(n):
        size = (20 + 7 * i, 60 - 5 * i)
        photo = Image.fromarray(rng.integers(40, 255, (*size, 3), dtype=np.uint8))
        name = [f"{i}.jpg", f"sub/{i}.PNG", f"sub/deep/{i}.webp"][i % 3]
        photo.save(folder / name)
    shutil.copy(folder / "0.jpg", folder / "zz-copy.jpg")
    (folder / "page.jpg").write_text("<html>not found</html>")
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(folder / "dark.png")
    (folder / "README.md").write_text("notes")
    return folder


def run(folder, out, **changes):
    options = {
        "teacher": {"name": "test_jobs:PlaneTeacher"},
        "images": str(folder),
        "out": str(out),
        "tasks": ["depth", "normals"],
        "max_side": 40,
        "shard_size": 4,
        "batch_size": 3,
        "keep_pictures": True,
        "threads": 2,
        "video": {"fps": 1.0, "scene_change": None},
    }
    return label(**(options | changes))


def test_every_input_ends_in_exactly_one_state(tmp_path):
    photos = write_photos(tmp_path / "photos")
    result = run(photos, tmp_path / "set")
    assert (result["labelled"], result["rejected"], result["duplicates"]) == (7, 2, 1)
    rows = {row["uri"]: row for row in read_rows(tmp_path / "set")}
    assert len(rows) == 10
    assert rows["page.jpg"]["state"] == "rejected"
    assert "HTML" in rows["page.jpg"]["reason"] or "html" in rows["page.jpg"]["reason"]
    assert rows["dark.png"]["reason"] == "the teacher's depth has no known pixel"
    assert rows["zz-copy.jpg"]["state"] == "duplicate_of"
    assert rows["zz-copy.jpg"]["reason"] == rows["0.jpg"]["key"]
    stored = LabelSet(tmp_path / "set")
    assert stored.verify() == 7
    for one in stored:
        assert max(one.image.shape) <= 40
        np.testing.assert_allclose(one.values[Task.DEPTH], 2.0, rtol=1e-4)
        assert one.camera.source == "assumed"
    assert json.loads((tmp_path / "set" / "run.json").read_text())["labelled"] == 7


def test_the_original_file_is_kept_where_a_plain_decoder_sees_the_same(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    small.save(photos / "plain.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    small.save(photos / "turned.jpg", exif=exif)
    run(photos, tmp_path / "set")
    stored = LabelSet(tmp_path / "set")
    by_uri = {row["uri"]: row["key"] for row in stored.rows}
    plain = stored.members(by_uri["plain.jpg"])
    assert plain["jpg"] == (photos / "plain.jpg").read_bytes()
    turned = stored.members(by_uri["turned.jpg"])
    assert "jpg" not in turned
    assert stored[by_uri["turned.jpg"]].image.shape == (32, 24, 3)


def test_the_same_job_again_changes_nothing_and_another_job_is_refused(tmp_path):
    photos = write_photos(tmp_path / "photos")
    run(photos, tmp_path / "set")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("shard*")}
    again = run(photos, tmp_path / "set")
    assert again["shards_done_before"] == 3
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("shard*")} == before
    with pytest.raises(UsageError, match=r"another job's label set .*teacher"):
        run(photos, tmp_path / "set", teacher={"name": "test_jobs:PlaneTeacher", "depth_m": 3.0})
    (photos / "sub" / "new.png").write_bytes((photos / "dark.png").read_bytes())
    with pytest.raises(UsageError, match=r"another job's label set .*inputs"):
        run(photos, tmp_path / "set")


def test_moving_the_photos_keeps_the_plan(tmp_path):
    run(write_photos(tmp_path / "photos"), tmp_path / "a")
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    run(tmp_path / "elsewhere", tmp_path / "b")
    for tar in (tmp_path / "a").glob("*.tar"):
        assert tar.read_bytes() == (tmp_path / "b" / tar.name).read_bytes()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_job_started_again_gives_the_bytes_of_an_uninterrupted_one(tmp_path, sign):
    photos = write_photos(tmp_path / "photos", n=10)
    command = [sys.executable, "-m", "distill.cli", "label", "teacher=own"]
    command += ["teacher.name=test_jobs:PlaneTeacher", "+teacher.pause_s=0.15"]
    command += [f"images={photos}", f"out={tmp_path / 'set'}", "shard_size=2", "batch_size=1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "set" / "shard-000001.json").exists():
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[1]
        time.sleep(0.01)
    job.send_signal(sign)
    errors = job.communicate(timeout=60)[1]
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sign]
    assert job.returncode == expected, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "set" / "index.parquet").exists()
    if sign != signal.SIGKILL:
        assert not list((tmp_path / "set").glob(".*"))
    subprocess.run(command, env=environment, check=True, capture_output=True)
    subprocess.run(
        [*command, f"out={tmp_path / 'whole'}"], env=environment, check=True, capture_output=True
    )
    names = sorted(p.name for p in (tmp_path / "whole").glob("*.tar"))
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert LabelSet(tmp_path / "set").verify() == LabelSet(tmp_path / "whole").verify() == 10


class MortalTeacher(PlaneTeacher):
    """Dies after five images, once."""

    left = 5

    def answer(self, queries, tasks):
        type(self).left -= len(queries)
        if type(self).left < 0:
            type(self).left = 10**9
            raise RuntimeError("CUDA error: an illegal memory access")
        return super().answer(queries, tasks)


def test_a_dying_teacher_leaves_only_whole_shards(tmp_path):
    photos = write_photos(tmp_path / "photos")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(photos, tmp_path / "set", teacher={"name": "test_jobs:MortalTeacher"})
    names = sorted(p.name for p in (tmp_path / "set").iterdir())
    assert names == ["dataset.json", "shard-000000.json", "shard-000000.tar"]
    run(photos, tmp_path / "set", teacher={"name": "test_jobs:MortalTeacher"})
    assert LabelSet(tmp_path / "set").verify() == 7


def test_truth_answers_only_for_images_it_knows(tmp_path, balls):
    result = run(
        balls, tmp_path / "set", teacher={"name": "truth", "labels": str(balls)}, max_side=None
    )
    assert result["labelled"] == 10
    copied, truth = LabelSet(tmp_path / "set"), LabelSet(balls)
    assert set(copied.keys) == set(truth.keys)
    for one in copied:
        np.testing.assert_array_equal(one.values[Task.DEPTH], truth[one.key].values[Task.DEPTH])
        assert one.camera == truth[one.key].camera
    strange = tmp_path / "strange"
    strange.mkdir()
    Image.fromarray(make_label(999).image).save(strange / "a.png")
    result = run(strange, tmp_path / "none", teacher={"name": "truth", "labels": str(balls)})
    assert (result["labelled"], result["rejected"], result["exit"]) == (0, 1, 1)


def test_a_copy_does_not_turn_an_assumed_range_into_measured_metres(tmp_path):
    """Depth of anchor=range is affine still: as truth, or as an anchor, it would become metric."""

    def assumed(seed):
        one = make_label(seed)
        one.provenance = {"alignment": {"anchor": "range", "space": "affine depth"}}
        return one

    about = {"tasks": ["depth", "normals"]}
    write_label_set(tmp_path / "assumed", n=2, make=assumed, dataset=about)
    truth = {"name": "truth", "labels": str(tmp_path / "assumed")}
    with pytest.raises(UsageError, match=r"assumed: its depth .* an assumed range .*anchor=range"):
        run(tmp_path / "assumed", tmp_path / "a", teacher=truth, max_side=None)
    plane = {"name": "test_jobs:PlaneTeacher", "space": "affine disparity"}
    anchor = {"name": "truth", "labels": str(tmp_path / "assumed")}
    with pytest.raises(UsageError, match="an assumed range"):
        run(tmp_path / "assumed", tmp_path / "b", teacher=plane, anchor=anchor, max_side=None)
    result = run(
        tmp_path / "assumed", tmp_path / "c", teacher=truth, tasks=["normals"], max_side=None
    )
    assert result["labelled"] == 2


def test_affine_answers_are_never_stored_as_metres(tmp_path):
    photos = write_photos(tmp_path / "photos", n=1)
    with pytest.raises(UsageError, match=r"affine disparity.*metric anchor"):
        run(
            photos,
            tmp_path / "set",
            teacher={"name": "test_jobs:PlaneTeacher", "space": "affine disparity"},
        )
    assert not list((tmp_path / "set").glob("*shard*"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no such file or folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "nothing, it is empty"),
        (lambda p: write_text(p / "texts" / "a.txt") or p / "texts", r"1 x \.txt"),
        (lambda p: write_text(p / "list.txt"), "1 of its lines name no file"),
        (lambda p: p / "*.jpg", "matches no file"),
    ],
)
def test_sources_that_hold_no_image(tmp_path, make, message):
    with pytest.raises(UsageError, match=message):
        run(make(tmp_path), tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_size": "many"}, "shard_size=many: expected a whole number from 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected a whole number"),
        ({"workers": True}, "workers=True: expected a whole number"),
        ({"threads": 0}, "threads=0: expected a whole number"),
        ({"max_side": -5}, "max_side=-5: expected a whole number"),
        ({"verify": "maybe"}, "verify=maybe: expected true or false"),
        ({"tasks": "depth"}, r"tasks=depth: expected a list, tasks=\[depth\]"),
        ({"licence": {"refuse": "custom"}}, r"expected a list, licence.refuse=\[custom\]"),
        ({"engine": "spark"}, "expected local or ray"),
    ],
)
def test_options_of_the_wrong_kind_are_named_before_anything_is_made(tmp_path, change, message):
    photos = write_photos(tmp_path / "photos", n=1)
    with pytest.raises(UsageError, match=message):
        run(photos, tmp_path / "set", **change)
    assert not (tmp_path / "set").exists()


def test_containers_without_an_image_make_no_label_set(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "texts.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UsageError, match=r"images=.*: there is no image in it"):
        run(tmp_path / "in", tmp_path / "set")
    assert not (tmp_path / "set").exists()


class Careless(PlaneTeacher):
    """Answers in the wrong kind of number."""

    def answer(self, queries, tasks):
        answers = super().answer(queries, tasks)
        for one in answers:
            one[Task.DEPTH].values = one[Task.DEPTH].values.astype(np.float64)
        return answers


def test_a_job_says_why_inputs_were_rejected_and_what_it_left_out(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", n=3)
    (photos / "more.zip").write_bytes(b"PK")
    result = run(photos, tmp_path / "set")
    assert "1 x .md" in (said := capsys.readouterr().err) and "1 x .zip" in said
    assert "nothing labelled" not in said
    assert "2 rejected (1 x " in result["summary"] and "no known pixel" in result["summary"]
    assert sorted(result["reasons"].values()) == [1, 1]
    again = run(photos, tmp_path / "set")["summary"]
    assert "in the whole set 3 labelled, 2 rejected, 1 duplicate_of" in again
    capsys.readouterr()
    teacher = {"name": "test_jobs:Careless"}
    result = run(photos, tmp_path / "none", teacher=teacher, shard_size=2)
    assert (result["exit"], result["rejected"]) == (1, 5)
    assert "3 x label '#': depth dtype is float64, expected float32" in result["summary"]
    said = capsys.readouterr().err
    assert said.count("nothing labelled, label '#': depth dtype") == 1  # at once, and once


def write_text(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("missing.jpg\n")
    return path if path.name == "list.txt" else None


def test_unknown_teacher_and_task(tmp_path, balls):
    with pytest.raises(UsageError, match=r"no such teacher; there are \[.*'mini', 'truth'\]"):
        load_teacher(name="oracle")
    with pytest.raises(UsageError, match=r"cannot be imported"):
        load_teacher(name="no_such_module:Teacher")
    with pytest.raises(UsageError, match=r"tasks=\['flow'\]: this teacher answers"):
        run(balls, tmp_path / "set", tasks=["flow"])


def same_shards(a: Path, b: Path) -> None:
    names = sorted(p.name for p in a.glob("*.tar"))
    assert names == sorted(p.name for p in b.glob("*.tar"))
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.fixture
def importable(monkeypatch):
    """Lets spawned workers import this module's teachers."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.usefixtures("importable")
def test_two_processes_give_the_bytes_of_one(tmp_path):
    photos = write_photos(tmp_path / "photos", n=9)
    run(photos, tmp_path / "one", shard_size=2, batch_size=2)
    result = run(photos, tmp_path / "two", shard_size=2, batch_size=2, workers=2)
    assert (result["labelled"], result["complete"]) == (9, True)
    assert 0 <= result["teacher_share"] <= 1
    same_shards(tmp_path / "one", tmp_path / "two")
    assert not list((tmp_path / "two").glob(".*"))


class SuicidalTeacher(PlaneTeacher):
    """Kills its own process at the first image, in the one process that gets there first."""

    def __init__(self, *, flag: str) -> None:
        super().__init__(pause_s=0.2)
        self.flag = Path(flag)

    def describe(self):
        return {"name": "plane", "depth_m": self.depth_m}

    def answer(self, queries, tasks):
        try:
            self.flag.touch(exist_ok=False)
        except FileExistsError:
            return super().answer(queries, tasks)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.usefixtures("importable")
def test_one_of_two_workers_killed_and_the_other_takes_over(tmp_path):
    photos = write_photos(tmp_path / "photos", n=9)
    run(photos, tmp_path / "one", shard_size=2, batch_size=2)
    teacher = {"name": "test_jobs:SuicidalTeacher", "flag": str(tmp_path / "flag")}
    run(photos, tmp_path / "two", teacher=teacher, shard_size=2, batch_size=2, workers=2)
    same_shards(tmp_path / "one", tmp_path / "two")
    assert LabelSet(tmp_path / "two").verify() == 9


@pytest.mark.usefixtures("importable")
def test_all_workers_failing_is_reported_with_the_first_one_s_words(tmp_path):
    photos = write_photos(tmp_path / "photos")
    teacher = {"name": "test_jobs:PlaneTeacher", "space": "affine depth"}
    with pytest.raises(EnvironmentFailure, match=r"shards are missing .* metric anchor") as caught:
        run(photos, tmp_path / "set", teacher=teacher, workers=2)
    assert caught.value.exit_code == 2


class Moody(PlaneTeacher):
    """Another one in every process, and it says so."""

    def describe(self):
        return {"name": "plane", "revision": os.getpid()}


@pytest.mark.usefixtures("importable")
def test_a_worker_that_loads_another_teacher_than_planned_labels_nothing(tmp_path):
    photos = write_photos(tmp_path / "photos", n=3)
    teacher = {"name": "test_jobs:Moody"}
    with pytest.raises(EnvironmentFailure, match=r"loads teacher\.revision \d+, the job was") as e:
        run(photos, tmp_path / "set", teacher=teacher, shard_size=2, workers=2)
    assert e.value.exit_code == 3
    assert not list((tmp_path / "set").glob("shard-*"))


def test_array_tasks_share_a_plan_in_any_order(tmp_path):
    photos = write_photos(tmp_path / "photos", n=9)
    run(photos, tmp_path / "one", shard_size=2)
    for index in (2, 0, 1):
        assert not (tmp_path / "array" / "index.parquet").exists()
        result = run(photos, tmp_path / "array", shard_size=2, shard={"index": index, "count": 3})
    assert result["complete"]
    same_shards(tmp_path / "one", tmp_path / "array")
    assert (tmp_path / "array" / "index.parquet").exists()
    with pytest.raises(UsageError, match=r"shard.index=3 shard.count=3"):
        run(photos, tmp_path / "array", shard={"index": 3, "count": 3})


def test_a_batch_too_large_for_the_device_is_halved_with_the_same_answers(tmp_path):
    class OutOfMemoryError(RuntimeError):
        pass

    class Small(PlaneTeacher):
        def answer(self, queries, tasks):
            if len(queries) > 1:
                raise OutOfMemoryError("CUDA out of memory")
            return super().answer(queries, tasks)

    queries = [
        Query(key=str(i), image=np.full((4, 5, 3), 9, np.uint8), camera=Camera.assumed(5, 4))
        for i in range(5)
    ]
    answers = answer_split(Small(), queries, [Task.DEPTH])
    assert [a[Task.DEPTH].values.shape for a in answers] == [(4, 5)] * 5
    Small.answer = lambda self, queries, tasks: (_ for _ in ()).throw(OutOfMemoryError("x"))
    with pytest.raises(EnvironmentFailure, match="out of memory on a single 5x4 image"):
        answer_split(Small(), queries, [Task.DEPTH])


def test_transient_errors_are_retried_and_permanent_ones_are_not(monkeypatch):
    waits = []
    monkeypatch.setattr("teacher.jobs.commit.time.sleep", waits.append)
    errors = [OSError(errno.EIO, "I/O error"), OSError(errno.ESTALE, "Stale file handle")]

    def flaky():
        if errors:
            raise errors.pop()
        return "read"

    assert patiently(flaky, what="reading x") == "read"
    assert waits == [0.1, 0.5]

    def broken():
        raise OSError(errno.EIO, "I/O error", "x")

    with pytest.raises(EnvironmentFailure, match=r"reading x: I/O error .* five times"):
        patiently(broken, what="reading x")

    def silent():
        raise TimeoutError("no answer from the store")  # as fsspec's: without an errno

    with pytest.raises(EnvironmentFailure, match=r"reading x: no answer from the store"):
        patiently(silent, what="reading x")

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with pytest.raises(OSError, match="No space left"):
        patiently(full, what="x")


def test_what_others_sealed_does_not_count_as_this_run_s_bytes(tmp_path, monkeypatch):
    photos, set_ = write_photos(tmp_path / "photos", n=9), tmp_path / "set"

    size = lambda: sum(p.with_suffix(".tar").stat().st_size for p in set_.glob("shard*.json"))  # noqa: E731
    theirs: list[int] = []

    class Helped(PlaneTeacher):
        """While it labels the first shard, somebody else labels what it has not leased yet."""

        def answer(self, queries, tasks):
            if not theirs:
                run(photos, set_, shard_size=2, shard={"index": 1, "count": 2})
                theirs.append(size())
            return super().answer(queries, tasks)

    monkeypatch.setitem(globals(), "Helped", Helped)
    result = run(photos, set_, teacher={"name": "test_jobs:Helped"}, shard_size=2, threads=1)
    assert 0 < theirs[0] < size()
    done = result["labelled"] + result["rejected"]
    own = (size() - theirs[0]) / done
    assert result["gb_per_million"] == pytest.approx(own * 1e6 / 1e9, abs=0.01)


def test_a_signal_drops_what_waits_for_an_encoder(tmp_path, monkeypatch):
    photos, calls = tmp_path / "photos", []
    photos.mkdir()
    for i in range(32):
        Image.fromarray(np.full((16, 16, 3), 50 + i, np.uint8)).save(photos / f"{i:02d}.png")
    encoded: list[str] = []

    def slow(label):
        time.sleep(0.05)
        encoded.append(label.key)
        return encode_members(label)

    class Stopped(PlaneTeacher):
        def answer(self, queries, tasks):
            calls.append(len(queries))
            if len(calls) > 1:
                raise KeyboardInterrupt
            return super().answer(queries, tasks)

    monkeypatch.setattr("teacher.jobs.samples.encode_members", slow)
    monkeypatch.setitem(globals(), "Stopped", Stopped)
    with pytest.raises(KeyboardInterrupt):
        run(
            photos,
            tmp_path / "set",
            teacher={"name": "test_jobs:Stopped"},
            shard_size=64,
            batch_size=16,
            threads=1,
        )
    assert len(encoded) < 8


def test_the_teacher_does_not_wait_at_the_border_of_a_shard(tmp_path, monkeypatch):
    """The last sample of the first shard is not encoded before the second shard was asked for."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        Image.fromarray(np.full((16, 16, 3), 50 + i, np.uint8)).save(photos / f"{i}.png")
    asked, next_shard, waited = [], threading.Event(), []

    class Eager(PlaneTeacher):
        def answer(self, queries, tasks):
            asked.append(len(queries))
            if len(asked) > 2:
                next_shard.set()
            return super().answer(queries, tasks)

    def slow(label):
        if label.image.mean() == 51:
            waited.append(next_shard.wait(20))
        return encode_members(label)

    monkeypatch.setattr("teacher.jobs.samples.encode_members", slow)
    monkeypatch.setitem(globals(), "Eager", Eager)
    teacher = {"name": "test_jobs:Eager"}
    run(photos, tmp_path / "set", teacher=teacher, shard_size=2, batch_size=1)
    assert waited == [True] and LabelSet(tmp_path / "set").verify() == 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness for each thread")
def test_encoders_leave_core_and_lock_to_the_teacher(tmp_path, monkeypatch):
    niceness = lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())  # noqa: E731
    before, seen = (sys.getswitchinterval(), niceness()), {}

    class Watched(PlaneTeacher):
        def answer(self, queries, tasks):
            seen["teacher"] = (niceness(), sys.getswitchinterval())
            return super().answer(queries, tasks)

    def watched(label):
        seen["encoder"] = niceness()
        return encode_members(label)

    monkeypatch.setattr("teacher.jobs.samples.encode_members", watched)
    monkeypatch.setitem(globals(), "Watched", Watched)
    photos = write_photos(tmp_path / "photos", n=1)
    run(photos, tmp_path / "set", teacher={"name": "test_jobs:Watched"})
    assert seen == {
        "teacher": (before[1], pytest.approx(5e-4)),
        "encoder": min(before[1] + 10, 19),
    }
    assert (sys.getswitchinterval(), niceness()) == before


def test_a_file_that_changes_or_vanishes_during_the_job_is_named(tmp_path):
    photos = write_photos(tmp_path / "photos", n=3)
    source = open_source(str(photos))
    entry = Entry(uri="0.jpg", key="0" * 24)
    with pytest.raises(UsageError, match=r"0\.jpg: the file changed after it was planned"):
        prepare(entry, source, max_side=None)
    (photos / "0.jpg").unlink()
    with pytest.raises(UsageError, match=r"0\.jpg: the file is gone"):
        prepare(entry, source, max_side=None)


def test_a_photo_that_changes_beside_a_tar_is_named_too(tmp_path):
    photos = write_photos(tmp_path / "photos", n=2)
    with tarfile.open(photos / "part.tar", "w") as tar:
        tar.add(photos / "0.jpg", "inside.jpg")
    source = open_source(str(photos))
    for uri in ("0.jpg", "part.tar::inside.jpg"):
        with pytest.raises(UsageError, match=r"the file changed after it was planned"):
            prepare(Entry(uri=uri, key="0" * 24), source, max_side=None)


def test_a_lease_is_free_when_dropped_expired_or_orphaned(tmp_path, monkeypatch):
    mine, other = Lease(tmp_path, "shard-000000"), Lease(tmp_path, "shard-000000")
    assert mine.take()
    assert not other.take()
    mine.drop()
    assert other.take()
    os.utime(other.path, (1, other.path.stat().st_mtime - 3600))  # no heartbeat for an hour
    assert mine.take()
    other.renew()
    other.drop()  # no longer its own: must not touch ours
    assert not Lease(tmp_path, "shard-000000").take()
    mine.path.write_text(f"{this_host()} 999999999 dead")
    assert other.take()
    other.path.write_text("another-machine 1 alive")
    assert not mine.take()


def test_what_a_large_job_costs_is_said_before_it_starts(tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(102):
        Image.fromarray(np.full((16, 16, 3), 50 + i, np.uint8)).save(photos / f"{i:02d}.png")
    result = run(photos, tmp_path / "set", batch_size=1, shard_size=26)
    said = capsys.readouterr()
    assert "102 images in 4 shards to label" in said.out + said.err
    assert "teacher hours" in said.out + said.err
    assert "a million images would cost" in result["summary"]
    size = sum(p.stat().st_size for p in (tmp_path / "set").glob("*.tar"))
    assert result["gb_per_million"] == pytest.approx(size / 102 * 1e6 / 1e9, abs=0.01)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("teacher.jobs.run.shutil.disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentFailure, match="the labels will need about"):
        run(photos, tmp_path / "full", batch_size=1)
    assert not list((tmp_path / "full").glob("*shard*"))


class Counting(PlaneTeacher):
    """Keeps the keys that it was asked for."""

    asked: ClassVar[list[str]] = []

    def answer(self, queries, tasks):
        self.asked += [query.key for query in queries]
        return super().answer(queries, tasks)


def test_what_the_probe_asked_is_not_asked_again(tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos", n=10)
    run(photos, tmp_path / "plain", batch_size=2)
    Counting.asked.clear()
    monkeypatch.setattr("teacher.jobs.run.PROBE_FROM_BATCHES", 2)
    result = run(photos, tmp_path / "set", batch_size=2, teacher={"name": "test_jobs:Counting"})
    first, *rest = Counting.asked
    assert first == rest[0]  # to warm up
    assert sorted(rest) == sorted(set(rest)) and len(rest) == 11
    assert 0 < result["teacher_share"] <= 1
    for tar in (tmp_path / "plain").glob("*.tar"):
        assert (tmp_path / "set" / tar.name).read_bytes() == tar.read_bytes()


def test_a_refused_licence_stops_the_job_before_it_starts(tmp_path):
    photos = write_photos(tmp_path / "photos", n=1)
    licence = {"images": "CC-BY-NC-4.0", "refuse": ["non-commercial"]}
    with pytest.raises(ValueError, match=r"CC-BY-NC-4\.0") as caught:
        run(photos, tmp_path / "set", licence=licence)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "set").exists()
    run(photos, tmp_path / "set", licence={"images": "CC-BY-4.0", "refuse": ["non-commercial"]})
    assert "CC-BY-4.0" in json.dumps(LabelSet(tmp_path / "set").meta["licences"])


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENODEV, EnvironmentFailure), (errno.EACCES, UsageError)]
)
def test_an_input_whose_disk_fails_is_the_environment_s_fault(tmp_path, monkeypatch, number, kind):
    photos = write_photos(tmp_path / "photos", n=1)
    monkeypatch.setattr("teacher.jobs.commit.WAITS_S", (0.0,) * 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def broken(self, uri):
        raise OSError(number, os.strerror(number), uri)

    monkeypatch.setattr("teacher.jobs.sources.FileSource.key", broken)
    with pytest.raises(kind, match=r"images: '0.jpg' cannot be read"):
        run(photos, tmp_path / "set")
    assert not (tmp_path / "set").exists()
