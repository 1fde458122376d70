"""distill check: drift by hand, planted drift of a real rerun, and salvage that never lies."""

import errno
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_label
from PIL import Image

from teacher.errors import UsageError
from teacher.generators.folder import TruthTeacher
from teacher.jobs.check import (
    check,
    depth_drift,
    differences,
    instances_drift,
    missed,
    normals_drift,
    pick,
    semantic_drift,
)
from teacher.jobs.run import label
from teacher.label import Answer, Task
from teacher.shard_writer import ShardWriter, check_png
from teacher.shards import encode_members, read_seal
from teacher.store import DamagedLabelSetError, LabelSet, open_folder, problems_of

BUDGETS = {"depth": {"rel_mean": 0.01}, "normals": {"mean_deg": 1.0}, "semantic": {"flips": 0.01}}


class Drifting(TruthTeacher):
    """The truth, but farther, tilted about x, with some classes flipped, or silent."""

    def __init__(self, *, labels, factor=1.0, tilt_deg=0.0, flipped_rows=0, silent=False):
        super().__init__(labels=labels)
        self.factor, self.tilt, self.rows = factor, math.radians(tilt_deg), flipped_rows
        self.silent = silent

    def answer(self, queries, tasks):
        answers = super().answer(queries, tasks)
        c, s = math.cos(self.tilt), math.sin(self.tilt)
        turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32)
        for found in answers:
            if Task.DEPTH in found:
                found[Task.DEPTH].values = found[Task.DEPTH].values * np.float32(self.factor)
            if Task.NORMALS in found:
                found[Task.NORMALS].values = found[Task.NORMALS].values @ turn.T
            if self.rows:
                found[Task.SEMANTIC].values = found[Task.SEMANTIC].values.copy()
                found[Task.SEMANTIC].values[: self.rows] = 1
        return [{} for _ in answers] if self.silent else answers


def run(balls, tmp_path, **changes):
    teacher = {"name": "test_check:Drifting", "labels": str(balls)} | changes.pop("teacher", {})
    options = {"n": 4, "budgets": BUDGETS, "out": str(tmp_path / "check.json")} | changes
    return check(labels=str(balls), teacher=teacher, **options)


def test_depth_drift_by_hand():
    nan, inf = np.nan, np.inf
    then = np.array([[1, 2, 4, nan, inf, 3]], np.float32)
    now = np.array([[1.1, 1, 6, 5, inf, inf]], np.float32)
    found = depth_drift(now, then)
    assert found["rel_mean"] == pytest.approx((0.1 + 0.5 + 0.5) / 3, rel=1e-6)
    assert found["delta1"] == pytest.approx(1 / 3)
    assert found["validity"] == pytest.approx(2 / 6)  # nan -> 5 m, 3 m -> sky


def test_normals_semantic_and_instances_drift_by_hand():
    tilt = math.radians(30)
    then = np.array([[[0, 0, 1], [0, 0, 1], [np.nan] * 3]], np.float32)
    now = np.array([[[0, math.sin(tilt), math.cos(tilt)], [0, 0, 1], [0, 1, 0]]], np.float32)
    found = normals_drift(now, then)
    assert found["mean_deg"] == pytest.approx(15, abs=1e-3)
    assert found["validity"] == pytest.approx(1 / 3)
    old = np.array([[0, 1, 255, 2]], np.uint8)
    new = np.array([[0, 2, 65535, 65535]], np.uint16)
    assert semantic_drift(new, old)["flips"] == 0.5  # unknown is unknown in either width
    then_ids = np.array([[0, 1, 1, 1, 2, 2]], np.uint16)
    now_ids = np.array([[0, 7, 7, 9, 1, 1]], np.uint16)  # renamed, one pixel went elsewhere
    assert instances_drift(now_ids, then_ids)["flips"] == pytest.approx(1 / 6)


def test_the_same_teacher_has_no_drift_and_the_sample_is_seeded(balls, tmp_path):
    result = run(balls, tmp_path)
    assert result["exit"] == 0, result["summary"]
    for task in ("depth", "semantic", "instances"):
        assert result["drift"][task]["identical"] == 1.0
        assert result["drift"][task]["images"] == 4
    # stored normals, stored a second time, move by less than the coding's own error
    assert result["drift"]["normals"]["p95_deg"] < 0.39
    assert result["drift"]["depth"]["rel_mean"] == 0
    assert json.loads((tmp_path / "check.json").read_text()) == result
    keys = LabelSet(balls).keys
    assert pick(keys, 4, seed=0) == pick(keys[::-1], 4, seed=0) != pick(keys, 4, seed=1)


class Painter:
    """A deterministic teacher: depth and normals follow from the pixels."""

    tasks = (Task.DEPTH, Task.NORMALS)

    def describe(self):
        return {"name": "painter"}

    def answer(self, queries, tasks):
        answers = []
        for query in queries:
            rgb = query.image.astype(np.float32)
            normals = rgb - 127.3
            normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
            depth_m = 0.7 + rgb.mean(-1) / 31
            answers.append(
                {
                    Task.DEPTH: Answer(task="depth", space="metric", values=depth_m),
                    Task.NORMALS: Answer(task="normals", space="unit normals", values=normals),
                }
            )
        return answers


def test_a_real_job_asked_again_is_identical_to_the_last_bit(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(make_label(i).image).save(tmp_path / "photos" / f"{i}.png")
    label(
        teacher={"name": "test_check:Painter"},
        images=str(tmp_path / "photos"),
        out=str(tmp_path / "set"),
        tasks=["depth", "normals"],
        max_side=40,
        shard_size=2,
        batch_size=2,
        keep_pictures=False,
        threads=1,
    )
    teacher = {"name": "test_check:Painter"}
    result = check(
        labels=str(tmp_path / "set"),
        teacher=teacher,
        n=9,
        budgets={"depth": {"identical": 1.0}, "normals": {"identical": 1.0}},
    )
    assert (result["exit"], result["images"], result["missed"]) == (0, 3, [])
    assert result["teacher_changed"] == []
    assert (tmp_path / "set" / "check.json").exists()
    assert LabelSet(tmp_path / "set").verify() == 3


@pytest.mark.parametrize(
    ("teacher", "name", "value"),
    [
        ({"factor": 1.03}, "depth.rel_mean", 0.03),
        ({"tilt_deg": 4.0}, "normals.mean_deg", 4.0),
        ({"flipped_rows": 12}, "semantic.flips", 12 / 48),
    ],
)
def test_planted_drift_is_measured_and_is_exit_1(balls, tmp_path, teacher, name, value):
    result = run(balls, tmp_path, teacher=teacher)
    task, measure = name.split(".")
    tolerance = 0.3 if task == "normals" else 2e-4  # 8-bit normals round
    assert result["drift"][task][measure] == pytest.approx(value, abs=tolerance)
    assert result["exit"] == 1
    assert result["missed"][0].startswith(name)
    assert name in result["summary"]


def test_a_teacher_that_no_longer_answers_is_named(balls, tmp_path):
    result = run(balls, tmp_path, teacher={"silent": True})
    assert result["exit"] == 1
    assert len(result["unanswered"]) == 4
    assert "4 no longer answered" in result["summary"]


def test_null_takes_a_budget_away(balls, tmp_path):
    budgets = {"depth": {"rel_mean": None, "rel_p95": 0.1}, "normals": None}
    result = run(balls, tmp_path, teacher={"factor": 1.03}, budgets=budgets)
    assert (result["exit"], result["missed"]) == (0, [])


def test_a_budget_without_a_value_is_missed_unless_its_task_was_not_asked(balls, tmp_path):
    drift = {"depth": {"images": 1, "validity": 1.0, "rel_p95": math.nan}}
    budgets = {"depth": {"rel_mean": 0.1, "rel_p95": 0.1}, "normals": {"mean_deg": 1.0}}
    found = ["depth.rel_mean could not be measured", "depth.rel_p95 nan > 0.1"]
    assert missed(drift, budgets) == found
    about = {"tasks": ["depth", "normals", "semantic"], "inputs": 1, "shards": 1, "plan_hash": "x"}
    folder = open_folder(tmp_path / "none", about)
    with ShardWriter(folder, 0, plan_hash="x") as writer:
        writer.reject("k", uri="a.jpg", reason="HTML")
        writer.commit({})
    teacher = {"name": "test_check:Drifting", "labels": str(balls)}
    result = check(labels=str(folder), teacher=teacher, budgets=BUDGETS)
    assert (result["exit"], result["images"]) == (1, 0)
    assert "within every budget" not in result["summary"]
    assert "depth.rel_mean could not be measured" in result["summary"]


def test_of_a_damaged_set_the_whole_shards_are_asked_again(balls, tmp_path):
    folder = damaged_copy(balls, tmp_path / "set")
    flip(folder, 0, 600)
    (folder / "shard-000001.json").write_bytes(b"{")
    teacher = {"name": "test_check:Drifting", "labels": str(balls), "factor": 1.03}
    result = check(labels=str(folder), teacher=teacher, n=9, budgets=BUDGETS)
    assert (result["exit"], result["images"]) == (1, 2)
    assert result["left_out"] == ["shard-000000", "shard-000001"]
    assert result["drift"]["depth"]["rel_mean"] == pytest.approx(0.03, abs=2e-4)
    assert "2 images of the shards without a problem asked again" in result["summary"]


class Focal:
    """Depth that goes with the focal length: a given one, or the one it estimates, with noise."""

    tasks = (Task.DEPTH,)
    estimate_px = 77.0

    def describe(self):
        return {"name": "focal"}

    def answer(self, queries, tasks):
        def one(query):
            known = query.camera.source != "assumed"
            focal_px = query.camera.fx if known else self.estimate_px
            depth_m = np.full(query.image.shape[:2], focal_px / 20, np.float32)
            about = {"focal_px": focal_px, "focal_source": "camera" if known else "model"}
            return Answer(task=Task.DEPTH, space="metric", values=depth_m, extras=about)

        return [{Task.DEPTH: one(query)} for query in queries]


def label_photos(tmp_path, teacher, **changes):
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.fromarray(make_label(i).image).save(tmp_path / "photos" / f"{i}.png")
    options = {"tasks": ["depth"], "max_side": 40, "shard_size": 2, "batch_size": 2, "threads": 1}
    options |= {"images": str(tmp_path / "photos"), "out": str(tmp_path / "set")}
    label(teacher=teacher, keep_pictures=False, **options | changes)
    return str(tmp_path / "set")


def test_a_focal_length_that_the_model_estimated_is_asked_for_again(tmp_path, monkeypatch):
    teacher = {"name": "test_check:Focal"}
    folder = label_photos(tmp_path, teacher)
    assert {LabelSet(folder).camera(k).source for k in LabelSet(folder).keys} == {"estimated"}
    budgets = {"depth": {"identical": 1.0}}
    assert check(labels=folder, teacher=teacher, budgets=budgets)["exit"] == 0
    monkeypatch.setattr(Focal, "estimate_px", 88.0)
    result = check(labels=folder, teacher=teacher, budgets={"depth": {"rel_mean": 0.1}})
    assert result["drift"]["depth"]["rel_mean"] == pytest.approx(1 / 7, rel=1e-3)
    assert result["exit"] == 1


class Affine(Painter):
    """The painter without metres."""

    tasks = (Task.DEPTH,)

    def answer(self, queries, tasks):
        answers = super().answer(queries, tasks)
        for found in answers:
            found.pop(Task.NORMALS)
            found[Task.DEPTH].space = "affine depth"
        return answers


def test_another_anchor_than_the_label_jobs_is_named(tmp_path):
    anchor, teacher = {"name": "range", "near_m": 1, "far_m": 9}, {"name": "test_check:Affine"}
    folder = label_photos(tmp_path, teacher, anchor=anchor)
    assert check(labels=folder, teacher=teacher, anchor=anchor)["teacher_changed"] == []
    result = check(labels=folder, teacher=teacher, anchor=anchor | {"far_m": 12})
    assert result["teacher_changed"] == ["anchor.far_m: was 9.0, now 12.0"]


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_hashed(
    balls, tmp_path, monkeypatch
):
    monkeypatch.setattr("teacher.jobs.check.problems_of", lambda _: 1 / 0)
    folder, touch = damaged_copy(balls, tmp_path / "set"), Path.touch

    def read_only(path, *args, **kwargs):
        if path.parent == folder:
            raise OSError(errno.EROFS, "Read-only file system")
        touch(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(UsageError, match=r"check\.json: cannot be written \(Read-only .*out="):
        check(labels=str(folder))


def test_what_the_teacher_says_of_itself_is_compared():
    then = {"weights": {"sha": "a"}, "steps": 4}
    now = {"weights": {"sha": "b"}, "steps": 4, "torch": "3"}
    assert differences(now, then) == ['torch: was null, now "3"', 'weights.sha: was "a", now "b"']


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": {"depth": {"rel": 1}}}, r"budgets\.depth: \['rel'\]; there are .*rel_mean"),
        ({"budgets": {"flow": {}}}, r"budgets\.flow: no such task"),
        ({"tasks": ["flow"]}, r"tasks=\['flow'\]: the set has"),
        ({"n": 0}, "n=0"),
        ({"budgets": {"depth": 0.01}}, r"budgets\.depth=0\.01: expected a table"),
        ({"budgets": {"depth": {"rel_mean": "abc"}}}, r"rel_mean=abc: expected a number, or null"),
        ({"budgets": {"depth": {"rel_mean": True}}}, "rel_mean=True: expected a number"),
        ({"budgets": {"depth": {"rel_mean": math.nan}}}, "rel_mean=nan: expected a number"),
    ],
)
def test_bad_use(balls, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        run(balls, tmp_path, **change)


def damaged_copy(balls, folder):
    shutil.copytree(balls, folder)
    return folder


def member_place(folder, shard, place, suffix):
    """Offset of a member's first byte and its bytes, found by searching for them."""
    labels = LabelSet(folder)
    row = [r for r in labels.rows if r["shard"] == shard][place]
    data = labels.members(row["key"])[suffix]
    tar = (folder / f"shard-{shard:06d}.tar").read_bytes()
    return row["key"], tar.index(data, row["offset"]), data


def flip(folder, shard, at, mask=1):
    path = folder / f"shard-{shard:06d}.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def salvage(folder, out):
    return check(labels=str(folder), salvage=str(out), out=str(out) + ".json")


def test_a_flipped_bit_costs_one_image_and_the_rest_is_the_same(tmp_path, balls):
    folder = damaged_copy(balls, tmp_path / "set")
    key, at, _ = member_place(folder, 1, 2, "depth.png")
    flip(folder, 1, at + 200)
    result = salvage(folder, tmp_path / "saved")
    assert result["exit"] == 1 and "shard-000001.tar" in result["problems"][0]
    saved, old = LabelSet(tmp_path / "saved"), LabelSet(balls)
    assert saved.verify() == 9
    assert set(saved.keys) == set(old.keys) - {key}
    assert saved.meta["plan_hash"] != old.meta["plan_hash"]
    assert saved.meta["salvaged_from"]["plan_hash"] == old.meta["plan_hash"]
    for kept in saved.keys:
        assert saved.members(kept) == old.members(kept)
    lost = next(r for r in saved.rows if r["key"] == key)
    assert lost["state"] == "rejected" and "CRC" in lost["reason"]
    assert len(saved.rows) == len(old.rows)
    again = salvage(folder, tmp_path / "saved")
    assert again["salvaged"] == result["salvaged"]


def test_a_changed_number_in_a_camera_has_no_checksum_so_the_whole_shard_is_left(tmp_path, balls):
    folder = damaged_copy(balls, tmp_path / "set")
    _, at, data = member_place(folder, 0, 0, "json")
    assert b'"cx":31.5' in data
    flip(folder, 0, at + data.index(b'"cx":') + 5)  # now 21.5: still canonical JSON
    result = salvage(folder, tmp_path / "saved")
    assert result["salvaged"]["images"] == 6
    assert all("no checksum" in why for why in result["salvaged"]["lost"].values())


def test_a_flipped_bit_in_the_padding_of_a_tar_costs_one_image(tmp_path, balls):
    folder = damaged_copy(balls, tmp_path / "set")
    key, at, data = member_place(folder, 1, 0, "json")
    flip(folder, 1, at + len(data) + 3)
    result = salvage(folder, tmp_path / "saved")
    assert list(result["salvaged"]["lost"]) == [key]
    assert "padding is not zero" in result["salvaged"]["lost"][key]


def test_a_cut_shard_gives_what_stood_before_the_cut(tmp_path, balls):
    folder = damaged_copy(balls, tmp_path / "set")
    _, at, _ = member_place(folder, 0, 2, "png")
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: at + 10])
    assert salvage(folder, tmp_path / "saved")["salvaged"]["images"] == 8
    assert LabelSet(tmp_path / "saved").verify() == 8


@pytest.mark.parametrize("seed", range(24))
def test_whatever_bit_is_flipped_what_is_salvaged_is_what_was_stored(tmp_path, balls, seed):
    folder = damaged_copy(balls, tmp_path / "set")
    rng = np.random.default_rng(seed)
    size = (folder / "shard-000002.tar").stat().st_size
    flip(folder, 2, int(rng.integers(size)), 1 << int(rng.integers(8)))
    salvage(folder, tmp_path / "saved")
    saved, old = LabelSet(tmp_path / "saved"), LabelSet(balls)
    assert saved.verify() >= 8
    for key in saved.keys:
        assert saved.members(key) == old.members(key)


def test_a_damaged_seal_or_a_missing_shard_loses_that_shard_only(tmp_path, balls):
    folder = damaged_copy(balls, tmp_path / "set")
    seal = folder / "shard-000000.json"
    seal.write_bytes(seal.read_bytes()[:-30])
    (folder / "shard-000001.tar").unlink()
    assert sorted(problems_of(folder)) == [0, 1]
    result = salvage(folder, tmp_path / "saved")  # the index says what shard 0 holds
    assert (result["salvaged"]["images"], result["salvaged"]["inputs_unknown"]) == (6, 0)
    saved, old = LabelSet(tmp_path / "saved"), LabelSet(balls)
    assert saved.verify() == 6 and saved.keys == [*old.keys[:4], *old.keys[8:]]
    assert all(saved.members(key) == old.members(key) for key in saved.keys)
    assert [row["uri"] for row in saved.rows] == [row["uri"] for row in old.rows]
    (folder / "index.parquet").write_bytes(b"PAR1")
    result = salvage(folder, tmp_path / "less")
    assert (result["salvaged"]["images"], result["salvaged"]["inputs_unknown"]) == (2, 4)
    assert "4 inputs of shards without a seal are not in it" in result["summary"]
    assert LabelSet(tmp_path / "less").verify() == 2
    with pytest.raises(DamagedLabelSetError, match="not a whole seal"):
        LabelSet(folder)


def bad_sector(monkeypatch, at, span=512):
    """Every read of a tar that touches the bytes from ``at`` on fails as a bad sector does."""
    real = Path.open

    class Disk:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def _try(self, size):
            start = self.file.tell()
            if start < at + span and (size < 0 or start + size > at):
                raise OSError(errno.EIO, "Input/output error")

        def read(self, size=-1):
            self._try(size)
            return self.file.read(size)

        def readinto(self, buffer):
            self._try(len(buffer))
            return self.file.readinto(buffer)

    def opened(path, *args, **kwargs):
        file = real(path, *args, **kwargs)
        return Disk(file) if path.name == "shard-000001.tar" else file

    monkeypatch.setattr(Path, "open", opened)


def test_a_bad_sector_is_a_problem_of_its_shard_and_costs_one_image(tmp_path, balls, monkeypatch):
    folder = damaged_copy(balls, tmp_path / "set")
    key, at, _ = member_place(folder, 1, 2, "depth.png")
    flip(folder, 0, 600)
    bad_sector(monkeypatch, at)
    problems = problems_of(folder)
    assert list(problems) == [0, 1]
    assert problems[1] == "shard-000001: cannot be read: Input/output error"
    with pytest.raises(DamagedLabelSetError, match=r"2 problem\(s\)"):
        LabelSet(folder).verify()
    salvaged = salvage(folder, tmp_path / "saved")["salvaged"]
    assert list(salvaged["lost"])[-1] == key and "Input/output" in salvaged["lost"][key]
    assert salvaged["images"] == 10 - len(salvaged["lost"]) >= 8


def test_nothing_to_salvage_and_nowhere_to_put_it(tmp_path, balls):
    with pytest.raises(UsageError, match="nothing to salvage"):
        check(labels=str(balls), salvage=str(tmp_path / "s"), out=str(tmp_path / "c.json"))
    folder = damaged_copy(balls, tmp_path / "set")
    flip(folder, 0, 600)
    with pytest.raises(UsageError, match="the damaged set itself"):
        salvage(folder, folder)


def test_a_set_without_teacher_is_only_verified(balls, tmp_path):
    result = check(labels=str(balls), out=str(tmp_path / "new" / "c.json"))
    assert (result["exit"], result["problems"]) == (0, [])
    assert (tmp_path / "new" / "c.json").is_file()
    assert "every seal holds" in result["summary"]
    assert read_seal(balls / "shard-000000.json")["count"] == 4


def test_every_png_of_a_label_passes_and_no_flipped_one_does():
    rng = np.random.default_rng(0)
    for suffix, data in encode_members(make_label(3)):
        if suffix.endswith("png"):
            check_png(data)
            bad = bytearray(data)
            bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
            with pytest.raises(ValueError, match="PNG"):
                check_png(bytes(bad))
