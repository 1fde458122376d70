"""The mini teacher: decoding, focal length, sizes, repeatability, refusals."""

import dataclasses

import numpy as np
import pytest
import torch
from mini_rooms import CLASSES, TINY, room

from distill.tune.pairs import instance_colours
from teacher import prompts
from teacher.codecs.depth import DepthCodec
from teacher.codecs.normals import NormalCodec
from teacher.errors import UsageError
from teacher.generators import Query, load_teacher
from teacher.generators.mini import MiniTeacher
from teacher.generators.mini_generator import MiniGenerator
from teacher.generators.mini_net import MiniNet
from teacher.label import Label, Space, Task, validate

H, W = 48, 64
FOCAL_PX = 50.0
ALL = list(Task)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    card = {
        "network": TINY,
        "size": [H, W],
        "focal_px": FOCAL_PX,
        "classes": {str(k): v for k, v in CLASSES.items()},
        "things": ["ball", "globe"],
        "license": "Apache-2.0",
    }
    path = tmp_path_factory.mktemp("mini") / "mini.safetensors"
    return str(MiniGenerator.save(path, MiniNet(**TINY).state_dict(), card))


class Painter:
    """Stands in for the network where decoding is tested: paints a room's exact answers.

    It answers by the wording alone, as the generator does; ``truth`` may be mirrored.
    """

    def __init__(self, teacher, label: Label) -> None:
        self.teacher, self.label = teacher, label

    def __call__(self, features, texts, seeds, *, steps):
        return np.stack([self.paint(t) for t in texts])

    def paint(self, text: str) -> np.ndarray:
        values, teacher = self.label.values, self.teacher
        if text == prompts.depth():
            canonical = values[Task.DEPTH] * np.float32(FOCAL_PX / self.label.camera.fx)
            return DepthCodec().encode(canonical)
        if text == prompts.normals():
            return NormalCodec().encode(values[Task.NORMALS])
        if "semantic" in text:
            return teacher.palette.array[values[Task.SEMANTIC]]
        wanted = next(i for i, n in CLASSES.items() if text == prompts.instances(n))
        picture = np.zeros((*values[Task.DEPTH].shape, 3))
        ids = np.where(values[Task.SEMANTIC] == wanted, values[Task.INSTANCES], 0)
        present = np.unique(ids)[1:]
        if len(present):
            masks = np.stack([ids == i for i in present])
            colours = instance_colours(masks, mean=np.array([1, 0.5, 1]), background=(0, 0, 0))
            for mask, colour in zip(masks, colours, strict=True):
                picture[mask] = colour
        return (picture * 255).round().astype(np.uint8)


def query_of(label: Label) -> Query:
    return Query(key=label.key, image=label.image, camera=label.camera)


def test_true_pictures_decode_to_the_truth(weights, monkeypatch):
    teacher = MiniTeacher(weights=weights, mirror=False, crops=0)
    label = room(28, height=H, width=W)  # four things, no two nearer in colour than 75
    monkeypatch.setattr(teacher.generator, "pictures", Painter(teacher, label))
    answers = teacher.answer([query_of(label)], ALL)[0]
    assert list(answers) == ALL
    truth = label.values
    assert np.abs(answers[Task.DEPTH].values / truth[Task.DEPTH] - 1).max() < 0.01
    cosine = (answers[Task.NORMALS].values * truth[Task.NORMALS]).sum(-1)
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 1.5
    assert (answers[Task.SEMANTIC].values == truth[Task.SEMANTIC]).all()
    table = answers[Task.INSTANCES].extras["instances"]
    assert len(table) == len(np.unique(truth[Task.INSTANCES])) - 1
    for row in table:
        mask = answers[Task.INSTANCES].values == row["id"]
        assert len(np.unique(truth[Task.INSTANCES][mask])) == 1
        assert set(truth[Task.SEMANTIC][mask].tolist()) == {row["class_id"]}
        assert CLASSES[row["class_id"]] == row["class"]


def test_a_longer_focal_length_means_farther(weights, monkeypatch):
    """The same picture through twice the focal length shows everything twice as far."""
    teacher = MiniTeacher(weights=weights, mirror=False, crops=0)
    label = room(5, height=H, width=W)
    monkeypatch.setattr(teacher.generator, "pictures", Painter(teacher, label))
    query = query_of(label)
    camera = dataclasses.replace(label.camera, fx=2 * label.camera.fx, fy=2 * label.camera.fy)
    near, far = teacher.answer([query, dataclasses.replace(query, camera=camera)], [Task.DEPTH])
    ratio = far[Task.DEPTH].values / near[Task.DEPTH].values
    assert ratio == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("size", [(48, 64), (100, 37), (480, 640), (8, 9)])
def test_answers_have_the_images_size_and_keep_the_contract(weights, size):
    teacher = MiniTeacher(weights=weights, seeds=2)
    label = room(1, height=size[0], width=size[1])
    answers = teacher.answer([query_of(label)], ALL)[0]
    values = {t: a.values for t, a in answers.items()}
    validate(dataclasses.replace(label, values=values), classes=CLASSES)
    assert answers[Task.DEPTH].space is Space.METRIC
    assert answers[Task.DEPTH].residual.shape == size
    assert answers[Task.DEPTH].uncertainty.shape == size
    assert len(answers[Task.DEPTH].extras["seeds"]) == 8


def test_answers_are_repeatable_and_do_not_depend_on_company(weights):
    teacher = MiniTeacher(weights=weights, seeds=2)
    queries = [query_of(room(i, height=H, width=W)) for i in range(3)]
    together = teacher.answer(queries, [Task.DEPTH, Task.NORMALS])
    alone = teacher.answer(queries[1:2], [Task.NORMALS])[0]
    assert np.array_equal(
        together[1][Task.NORMALS].values, alone[Task.NORMALS].values, equal_nan=True
    )
    again = MiniTeacher(weights=weights, seeds=2).answer(queries, [Task.DEPTH])
    assert np.array_equal(
        again[2][Task.DEPTH].values, together[2][Task.DEPTH].values, equal_nan=True
    )


def test_description_pins_the_answers(weights):
    teacher = load_teacher(name="mini", weights=weights, seeds=2, mirror=False, crops=0)
    about = teacher.describe()
    assert len(about["weights_sha256"]) == 64
    assert about["prompts"]["depth"] == prompts.depth()
    whole = {"mirror": False, "window": (0.0, 0.0, 1.0, 1.0)}
    assert about["askings"] == [{"seed": 0, **whole}, {"seed": 1, **whole}]
    assert tuple(teacher.tasks) == tuple(Task)


def test_bad_use_is_refused(weights):
    teacher = MiniTeacher(weights=weights)
    label = room(0, height=H, width=W)
    with pytest.raises(UsageError, match="unknown task 'flow'; it answers depth, normals"):
        teacher.answer([query_of(label)], ["flow"])
    with pytest.raises(UsageError, match="is 4x48, expected at least 8x8"):
        teacher.answer([dataclasses.replace(query_of(label), image=label.image[:, :4])], ["depth"])
    with pytest.raises(UsageError, match="steps=0, expected at least 1"):
        MiniTeacher(weights=weights, steps=0)
    with pytest.raises(UsageError, match=r"none.safetensors .*not found"):
        MiniTeacher(weights="none.safetensors")


def test_crops_are_asked_as_windows_and_voted_where_they_see(weights):
    """One whole asking and two corner windows: three members, every pixel of the image answered."""
    teacher = MiniTeacher(weights=weights, mirror=False, crops=2)
    windows = [a["window"] for a in teacher.describe()["askings"]]
    assert windows == [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.9, 0.9), (0.1, 0.1, 1.0, 1.0)]
    label = room(5, height=H, width=W)
    answer = teacher.answer([query_of(label)], [Task.SEMANTIC])[0][Task.SEMANTIC]
    assert answer.extras["members"] == 3 and answer.values.shape == (H, W)
