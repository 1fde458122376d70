import dataclasses
from collections.abc import Collection

import numpy as np
import pytest
import torch
from analytic_scenes import CLASSES, analytic_label, write_analytic_set

from distill.augment import GREY
from distill.data import DataModule, in_validation, merged_classes, schedule, split_keys
from distill.features import FeatureLoss
from distill.instances import center_offset
from distill.samples import Frame, compact, make_sample
from distill.train import train
from distill.trainer import trainer_config
from student.backbone import StudentError
from student.model import Student
from teacher.errors import UsageError
from teacher.label import Label, Task

TASKS = ("depth", "normals", "semantic")
FRAME = Frame(
    height=48, width=64, canonical_focal_px=50.0, tasks=TASKS, class_ids=tuple(sorted(CLASSES))
)


class InMemory:
    """A label set that is a dict."""

    def __init__(self, labels: list[Label], classes: dict[int, str] | None = None) -> None:
        self.labels = {label.key: label for label in labels}
        self.keys = list(self.labels)
        self.classes = CLASSES if classes is None else classes

    def lesson(self, key: str, tasks: Collection[str]) -> Label:
        return self.labels[key]


@pytest.fixture(scope="module")
def scenes() -> InMemory:
    return InMemory([analytic_label(seed) for seed in range(20)])


def test_whole_sample_is_the_label_in_the_canonical_camera():
    label = analytic_label(1)
    label.uncertainty[Task.DEPTH] = np.full((48, 64), 0.25, np.float32)
    sample = make_sample(compact(label, FRAME), FRAME, rng=None, mode="none")
    focal_px = label.camera.fx
    assert sample["focal_px"] == pytest.approx(focal_px)
    want = label.values[Task.DEPTH] * 50 / focal_px  # D f_c / f
    np.testing.assert_allclose(sample["depth"][0], want, rtol=1e-3)
    assert (np.isposinf(sample["depth"][0]) == np.isposinf(want)).all()
    truth = label.values[Task.NORMALS].transpose(2, 0, 1)
    np.testing.assert_allclose(sample["normals"], truth, atol=1e-3)
    np.testing.assert_allclose(sample["image"] * 255, label.image.transpose(2, 0, 1), atol=1e-3)
    ids = label.values[Task.SEMANTIC].astype(int)
    assert (sample["semantic"] == np.where(ids == 255, -1, ids)).all()
    assert (sample["depth_uncertainty"] == 0.25).all()
    assert np.isnan(sample["normals_uncertainty"]).all()


def test_zooming_a_picture_moves_its_canonical_depth():
    label = analytic_label(4, height=96, width=128)
    sample = make_sample(compact(label, FRAME), FRAME, rng=None, mode="none")
    assert sample["focal_px"] == pytest.approx(label.camera.fx / 2)
    want = label.values[Task.DEPTH][1::2, 1::2] * 50 / (label.camera.fx / 2)
    np.testing.assert_allclose(sample["depth"][0], want, rtol=1e-3)


def test_what_a_label_lacks_is_unknown_everywhere():
    label = dataclasses.replace(analytic_label(1), values={})
    sample = make_sample(compact(label, FRAME), FRAME, rng=np.random.default_rng(0), mode="strong")
    assert np.isnan(sample["depth"]).all() and np.isnan(sample["normals"]).all()
    assert (sample["semantic"] == -1).all()


def test_classes_without_a_channel_are_unknown_and_ids_map_in_order():
    label = analytic_label(1)
    label.values[Task.SEMANTIC] = np.full((48, 64), 9, np.uint16)
    label.values[Task.SEMANTIC][:10] = 300
    label.values[Task.SEMANTIC][40:] = 65535
    frame = dataclasses.replace(FRAME, class_ids=(2, 300))
    sample = make_sample(compact(label, frame), frame, rng=None, mode="none")
    assert (sample["semantic"][:10] == 1).all() and (sample["semantic"][10:] == -1).all()


def test_split_by_hash_never_moves_and_never_shares():
    keys = [f"key{i}" for i in range(4000)]
    train, held = split_keys(keys + keys[:50], 0.1)
    assert not set(train) & set(held) and len(train) + len(held) == 4000
    assert 330 < len(held) < 470
    _, held_of_fewer = split_keys(keys[:2000], 0.1)
    assert set(held_of_fewer) <= set(held)
    assert split_keys(keys, 0.0)[1] == []
    none_below = [k for k in keys if not in_validation(k, 0.001)][:5]
    assert len(split_keys(none_below, 0.001)[1]) == 1
    assert split_keys(keys[:1], 0.5)[0] or split_keys(keys[:1], 0.5)[1]


def test_schedule_sees_everything_once_per_visit_and_keeps_its_beginning():
    plan = schedule([7, 5], [1, 3], count=4000, seed=3)
    assert (plan[:500] == schedule([7, 5], [1, 3], count=500, seed=3)).all()
    assert (plan[:, 0] == 1).mean() == pytest.approx(0.75, abs=0.03)
    for s, size in ((0, 7), (1, 5)):
        rows = plan[plan[:, 0] == s]
        for visit in range(20):
            seen = rows[rows[:, 2] == visit][:, 1]
            assert sorted(seen.tolist()) == list(range(size))
    assert (schedule([7, 5], [1, 3], count=500, seed=4) != plan[:500]).any()
    assert set(schedule([7, 5], [0, 2], count=100, seed=0)[:, 0].tolist()) == {1}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(
        torch.equal(a[k].nan_to_num(-7), b[k].nan_to_num(-7)) for k in a
    )


def test_batches_do_not_depend_on_threads_or_on_where_one_starts(scenes):
    def batches(threads: int, start: int) -> list[dict[str, torch.Tensor]]:
        data = DataModule([scenes], frame=FRAME, batch_size=4, threads=threads, seed=5)
        return list(data.train_batches(steps=12, start=start))

    whole = batches(1, 0)
    assert len(whole) == 12 and whole[0]["image"].shape == (4, 3, 48, 64)
    assert all(equal(a, b) for a, b in zip(whole, batches(4, 0), strict=True))
    assert all(equal(a, b) for a, b in zip(whole[7:], batches(2, 7), strict=True))
    assert not equal(whole[0], whole[1])


def test_a_second_visit_looks_different(scenes):
    data = DataModule([scenes], frame=FRAME, batch_size=4, val_share=0.0)
    a, b = data._train_sample(0, 3, 0), data._train_sample(0, 3, 1)
    assert (a["image"] != b["image"]).mean() > 0.5


def test_the_same_image_in_two_sets_stays_on_one_side(scenes):
    other = InMemory([analytic_label(seed) for seed in range(10, 30)])
    data = DataModule([scenes, other], frame=FRAME, val_share=0.3)
    trained = set(data.train[0]) | set(data.train[1])
    held = {key for _, key in data.val}
    assert held and not trained & held and len(trained | held) == 30
    images = sum(batch["image"].shape[0] for batch in data.val_batches())
    assert images == len(held)


def test_a_bounded_validation_still_sees_every_set(scenes):
    other = InMemory([analytic_label(seed) for seed in range(100, 120)])
    data = DataModule([scenes, other], frame=FRAME, val_share=0.5, val_max=8)
    assert len(data.val) == 8 and {index for index, _ in data.val} == {0, 1}


def test_borders_stay_grey_whatever_the_light():
    label = analytic_label(1)
    found = 0
    for seed in range(40):
        sample = make_sample(
            compact(label, dataclasses.replace(FRAME, tasks=("depth",))),
            dataclasses.replace(FRAME, tasks=("depth",)),
            rng=np.random.default_rng(seed),
            mode="strong",
        )
        grey = np.abs(sample["image"] * 255 - np.array(GREY)[:, None, None]).max(0) < 0.01
        sides = [grey[:, 0].all() and grey[:, -1].all(), grey[0].all() and grey[-1].all()]
        found += any(sides)
    assert 3 < found < 20


def test_an_unreadable_sample_is_raised_in_its_turn(scenes):
    class Broken(InMemory):
        def lesson(self, key: str, tasks: Collection[str]) -> Label:
            raise UsageError(f"shard-000000.tar: sample {key} unreadable")

    data = DataModule([Broken(list(scenes.labels.values()))], frame=FRAME, threads=2)
    with pytest.raises(UsageError, match="unreadable"):
        next(iter(data.train_batches(steps=3)))


def test_the_cache_is_bounded_and_changes_nothing(scenes, monkeypatch):
    cached = DataModule([scenes], frame=FRAME, batch_size=4)
    want = list(cached.train_batches(steps=6))
    monkeypatch.setattr("distill.data.CACHE_BYTES", 100_000)
    small = DataModule([scenes], frame=FRAME, batch_size=4)
    assert all(equal(a, b) for a, b in zip(want, small.train_batches(steps=6), strict=True))
    assert len(cached._cache) == len(cached.train[0])
    assert 0 < len(small._cache) * small.record(0, scenes.keys[0]).nbytes <= 100_000


def test_bad_uses_are_explained(scenes):
    with pytest.raises(UsageError, match=r"expected 1 number\(s\) >= 0"):
        DataModule([scenes], frame=FRAME, weights=[1, 2])
    with pytest.raises(UsageError, match="expected one of strong, geometry, none"):
        DataModule([scenes], frame=FRAME, augment="wild")
    with pytest.raises(UsageError, match=r"0 labelled image.* none left for training"):
        DataModule([InMemory([])], frame=FRAME)
    with pytest.raises(UsageError, match="class 1 is 'wall' in one label set and 'door'"):
        merged_classes([scenes, InMemory([], {1: "door"})])


@pytest.mark.parametrize(
    "weights, text",
    [
        ([], r"weights=\[\]: expected 2 number\(s\) >= 0"),
        ([float("inf"), 1], r"weights=\[inf, 1\]: expected 2 number\(s\) >= 0, finite"),
        ([float("nan"), 1], r"weights=\[nan, 1\]: expected 2 number\(s\) >= 0, finite"),
        ([1e308, 1e308], r"expected 2 number\(s\) >= 0, finite"),
        ([0, 0], r"weights=\[0, 0\]: expected .* not all 0"),
        ([-1, 2], r"weights=\[-1, 2\]: expected 2 number\(s\) >= 0"),
    ],
)
def test_weights_that_no_set_can_be_drawn_by_are_refused(scenes, weights, text):
    with pytest.raises(UsageError, match=text):
        DataModule([scenes, scenes], frame=FRAME, weights=weights)


def test_all_the_weight_on_a_set_without_a_training_image_names_that_set(scenes):
    empty = InMemory([])
    with pytest.raises(UsageError, match=r"weights=\[1, 0\]: .* set 1 of data has no image left"):
        DataModule([empty, scenes], frame=FRAME, weights=[1, 0])
    empty.path = "labels/empty"
    with pytest.raises(UsageError, match=r"weights=\[1, 0\]: .*labels/empty has no image left"):
        DataModule([empty, scenes], frame=FRAME, weights=[1, 0])
    data = DataModule([empty, scenes], frame=FRAME, weights=[1, 1], batch_size=4)
    assert data.weights == [0, 1] and len(list(data.train_batches(steps=2))) == 2


@pytest.mark.parametrize(
    "change, text",
    [
        ({"steps": True}, r"trainer\.steps=True \(bool\): expected a whole number"),
        ({"lr": True}, r"trainer\.lr=True \(bool\): expected a number"),
        ({"minutes": True}, r"trainer\.minutes=True \(bool\): expected a number or null"),
        ({"minutes": float("inf")}, r"trainer\.minutes=inf: expected a finite number"),
        ({"patience": True}, r"trainer\.patience=True \(bool\): expected a whole number or null"),
        ({"seed": 2**32}, r"trainer\.seed=4294967296: expected 0 to 4294967295"),
        ({"seed": -1}, r"trainer\.seed=-1: expected 0 to"),
        (
            {"steps": 10**9},
            r"for at most 268435456 images\. If trainer\.minutes .* steps=16777216 ",
        ),
        ({"threads": -4}, r"trainer\.threads=-4: expected at least 1"),
        ({"lr": float("inf")}, r"trainer\.lr=inf: expected a finite number"),
        ({"lr": float("nan")}, r"trainer\.lr=nan: expected more than 0"),
        ({"weight_decay": float("inf")}, r"trainer\.weight_decay=inf: expected a finite number"),
    ],
)
def test_trainer_values_that_would_be_taken_for_something_else_are_refused(change, text):
    with pytest.raises(UsageError, match=text) as caught:
        trainer_config(change)
    assert caught.value.exit_code == 2


def test_a_trainer_may_leave_limits_out_or_the_gradient_unclipped():
    values = {"minutes": None, "patience": None, "grad_clip": float("inf"), "lr": 1}
    assert trainer_config(values).grad_clip == float("inf")
    assert trainer_config({"minutes": 3, "patience": 2}).minutes == 3


@pytest.mark.parametrize(
    "change, text",
    [
        ({"weight": "abc"}, r"features\.weight='abc' \(str\): expected a number"),
        ({"weight": True}, r"features\.weight=True \(bool\): expected a number"),
        ({"weight": -1}, r"features\.weight=-1: expected a finite number of at least 0"),
        ({"weight": float("inf")}, r"features\.weight=inf: expected a finite number"),
        ({"weight": None}, r"features\.weight=None \(NoneType\): expected a number"),
        ({"pretrained": "no"}, r"features\.pretrained='no' \(str\): expected true or false"),
        ({"weights": 3}, r"features\.weights=3 \(int\): expected text"),
        ({"name": 3}, r"features\.name=3 \(int\): expected text"),
    ],
)
def test_feature_values_of_the_wrong_kind_are_refused(change, text):
    student = Student(backbone="test_efficientnet", height=32, width=64)
    with pytest.raises(UsageError, match=text) as caught:
        FeatureLoss({"name": "mini", **change}, student)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("change", [{"tasks": None}, {"tasks": "depth"}, {"height": "abc"}])
def test_a_lesson_refuses_student_values_of_the_wrong_kind(tmp_path, change):
    write_analytic_set(tmp_path / "set", n=2)
    values = {"backbone": "test_resnet", "height": 32, "width": 64, **change}
    (key,) = change
    with pytest.raises(StudentError, match=rf"student\.{key}=.* expected") as caught:
        train(data=str(tmp_path / "set"), out=str(tmp_path / "run"), student=values, trainer={})
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_a_lesson_refuses_an_empty_list_of_weights(tmp_path):
    write_analytic_set(tmp_path / "set", n=2)
    values = {"backbone": "test_resnet", "height": 32, "width": 64}
    with pytest.raises(UsageError, match=r"weights=\[\]: expected 1 number"):
        train(
            data=str(tmp_path / "set"),
            out=str(tmp_path / "run"),
            student=values,
            trainer={"device": "cpu", "steps": 1},
            weights=[],
        )


def test_centres_and_offsets_by_hand():
    ids = np.zeros((6, 9), np.int32)
    ids[1:4, 1:4] = 7
    ids[5, 8] = 9
    ids[0, 8] = -1
    heat, dx, dy = center_offset(ids)
    assert heat[2, 2] == heat[5, 8] == 1
    assert heat[2, 3] == pytest.approx(np.exp(-0.5)) and heat[4, 2] == pytest.approx(np.exp(-2))
    assert dx[1:4, 1:4].tolist() == [[1, 0, -1]] * 3
    assert dy[1:4, 1:4].tolist() == [[1] * 3, [0] * 3, [-1] * 3]
    assert dx[0, 0] == dy[0, 0] == dx[5, 8] == 0
    assert np.isnan([heat[0, 8], dx[0, 8], dy[0, 8]]).all()
    assert (center_offset(np.zeros((3, 4), np.int32)) == 0).all()


def test_a_sample_knows_its_camera_and_its_instances():
    label = analytic_label(1)
    label.values[Task.INSTANCES] = np.zeros((48, 64), np.uint16)
    label.values[Task.INSTANCES][10:20, 5:9] = 300
    frame = dataclasses.replace(FRAME, tasks=("depth", "instances"), height=96, width=160)
    sample = make_sample(compact(label, frame), frame, rng=None, mode="none")
    # whole picture twice as large, 16 unknown columns left and right
    assert sample["centre_px"].tolist() == [2 * (label.camera.cx + 0.5) - 0.5 + 16, 47.5]
    assert not sample["camera_known"]  # an assumed camera
    ids = sample["instances"]
    assert (ids[20:40, 26:34] == 300).all() and (ids == 300).sum() == 160
    assert (ids[:, :16] == -1).all() and (ids[:, 144:] == -1).all() and ids[0, 20] == 0
    known = dataclasses.replace(label, camera=dataclasses.replace(label.camera, source="exif"))
    assert make_sample(compact(known, frame), frame, rng=None, mode="none")["camera_known"]


def test_what_depth_claims_follows_from_its_anchor():
    label = analytic_label(1)
    assert compact(label, FRAME).space == 0
    label.provenance = {"alignment": {"anchor": "depth_pro", "space": "affine disparity"}}
    assert compact(label, FRAME).space == 0
    label.provenance = {"alignment": {"anchor": "range", "space": "affine disparity"}}
    record = compact(label, FRAME)
    assert record.space == 2
    assert make_sample(record, FRAME, rng=None, mode="none")["depth_space"] == 2


def test_impossible_label_pixels_are_masked_and_counted(scenes):
    label = analytic_label(1)
    depth, normals = label.values[Task.DEPTH].copy(), label.values[Task.NORMALS].copy()
    ids = label.values[Task.SEMANTIC].copy()
    depth[:2], depth[2, :3] = 0, -1
    normals[30, :5], normals[31, 0, 0] = 0.1, np.nan
    ids[20, :7] = 77
    bad = dataclasses.replace(
        label, values={Task.DEPTH: depth, Task.NORMALS: normals, Task.SEMANTIC: ids}
    )
    data = DataModule([InMemory([bad])], frame=FRAME, val_share=0.0, augment="none", batch_size=2)
    batch = next(iter(data.train_batches(steps=1)))
    assert data.bad_pixels() == {"depth": 2 * 64 + 3, "normals": 6, "semantic": 7}
    assert torch.isnan(batch["depth"][:, :, :2]).all()
    assert torch.isnan(batch["normals"][:, :, 30, :5]).all()
    assert (batch["semantic"][:, 20, :7] == -1).all()
    clean = DataModule([scenes], frame=FRAME, batch_size=4)
    list(clean.train_batches(steps=2))
    assert clean.bad_pixels() == {}


def test_of_two_teachers_that_disagree_one_is_heard_at_a_time():
    near, far = (
        [dataclasses.replace(analytic_label(s), values={}) for s in range(6)] for _ in range(2)
    )
    for labels, depth_m in ((near, 2.0), (far, 8.0)):
        for label in labels:
            label.values[Task.DEPTH] = np.full((48, 64), depth_m, np.float32)
    frame = dataclasses.replace(FRAME, tasks=("depth",))
    data = DataModule(
        [InMemory(near), InMemory(far)],
        frame=frame,
        weights=[3, 1],
        val_share=0.0,
        augment="none",
        batch_size=8,
    )
    heard = []
    for batch in data.train_batches(steps=100):
        metres = batch["depth"].flatten(1) * (batch["focal_px"] / 50)[:, None]
        assert (metres.amax(1) - metres.amin(1) < 0.01).all()
        heard += metres[:, 0].tolist()
    assert {round(m) for m in heard} == {2, 8}
    assert np.mean(np.array(heard) < 5) == pytest.approx(0.75, abs=0.05)


def test_processes_share_every_batch_and_miss_nothing(scenes):
    data = DataModule([scenes], frame=FRAME, batch_size=4, augment="strong")
    whole = list(data.train_batches(steps=3))
    parts = [list(data.train_batches(steps=3, rank=r, world=2)) for r in (0, 1)]
    for step in range(3):
        for r in (0, 1):
            mine = {k: v[r::2] for k, v in whole[step].items()}
            assert equal(mine, parts[r][step])
    later = list(data.train_batches(steps=3, start=2, rank=1, world=2))
    assert len(later) == 1 and equal(later[0], parts[1][2])


def test_cutmix_and_clean_pictures_come_with_strong_augmentation_only(scenes, monkeypatch):
    monkeypatch.setattr("distill.data.CUTMIX_SHARE", 1.0)
    frame = dataclasses.replace(FRAME, clean=True)
    data = DataModule([scenes], frame=frame, batch_size=4, val_share=0.0)
    sample = data._train_sample(0, 0, 0)
    assert sample["clean"].shape == sample["image"].shape and not sample["camera_known"]
    assert (sample["clean"] != sample["image"]).mean() > 0.5
    plain = DataModule([scenes], frame=frame, batch_size=4, val_share=0.0, augment="geometry")
    sample = plain._train_sample(0, 0, 0)
    assert (sample["clean"] == sample["image"]).all()
