"""The shipped mini generator: reads new wordings, follows palettes, refuses, is roughly right.

The numbers on held-out scenes are in docs/results.md; these tests hold what must never break.
"""

import numpy as np
import pytest
from mini_rooms import room

from teacher import prompts
from teacher.confidence import Calibration
from teacher.errors import UsageError
from teacher.generators import Query
from teacher.generators.mini import MiniTeacher
from teacher.generators.mini_generator import MiniGenerator, noise_for
from teacher.label import Task


@pytest.fixture(scope="module")
def generator():
    return MiniGenerator.from_pretrained()


def fill(template: str) -> str:
    palette = prompts.palette_text({"wall": (255, 0, 0), "floor": (0, 0, 255)})
    return prompts.fill(
        template, name="box", background="black", palette=palette, map="", caption=""
    )


def known(fault: str, *values):
    """A case that the shipped weights are known to fail (docs/results.md, measured 2026-11-23).

    Strict: weights that mend it make this test fail, so that the mark goes.
    """
    return pytest.param(*values, marks=pytest.mark.xfail(reason=fault, strict=True))


MISREAD = "Please give every single {name} here a distinct colour; everything else is {background}."
ANSWERED = (
    "Compute the motion between these two frames.",
    "Find the key points of each hand.",
    "Replace the sky with a sunset.",
    "Relight the photograph from the left.",
)


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        known("read as semantic", kind, text) if text == MISREAD else (kind, text)
        for kind, texts in prompts.HELD_OUT.items()
        for text in texts
    ],
)
def test_wordings_never_seen_in_training_are_understood(generator, kind, template):
    assert generator.kind_of(fill(template))[0] == kind


@pytest.mark.parametrize(
    "text",
    [known("answered", t) if t in ANSWERED else t for t in prompts.UNKNOWN_HELD_OUT],
)
def test_requests_it_was_not_tuned_for_are_refused(generator, text):
    with pytest.raises(UsageError, match=r"reads as .*it was tuned for depth, normals"):
        generator(None, text)


def test_the_answer_follows_the_palette(generator):
    """The same image with two palettes: the same pixels, in the other's colours."""
    label = room(3, height=96, width=128)
    size = generator.working_size(96, 128)
    features = generator.encode([label.image], size)
    first = {
        "wall": (255, 0, 0),
        "floor": (0, 200, 0),
        "ceiling": (0, 0, 255),
        "ball": (250, 250, 0),
    }
    second = dict(
        zip(first, [(0, 255, 255), (255, 0, 255), (128, 128, 0), (20, 20, 20)], strict=True)
    )
    ids = []
    for palette in (first, second):
        text = prompts.semantic(palette)
        picture = generator.pictures(features, [text], [1], steps=1)[0].astype(int)
        table = np.array(list(palette.values()))
        gaps = np.linalg.norm(picture[:, :, None] - table, axis=-1)
        assert (gaps.min(-1) < 64).mean() > 0.8, "colours that the prompt does not name"
        ids.append(gaps.argmin(-1))
    assert (ids[0] == ids[1]).mean() > 0.8


@pytest.fixture(scope="module")
def of_rooms():
    """Ratios of depth and angles [deg] of normals against the truth of four rooms.

    They are drawn by another renderer, in closed form: the order of magnitude must hold.
    """
    teacher = MiniTeacher()
    ratios, angles = [], []
    for seed in range(4):
        label = room(seed, height=96, width=128)
        query = Query(key=label.key, image=label.image, camera=label.camera)
        answer = teacher.answer([query], [Task.DEPTH, Task.NORMALS])[0]
        ratios.append(np.nan_to_num(answer[Task.DEPTH].values / label.values[Task.DEPTH], nan=99.0))
        cosine = (answer[Task.NORMALS].values * label.values[Task.NORMALS]).sum(-1)
        angles.append(np.degrees(np.arccos(np.clip(np.nan_to_num(cosine, nan=-1.0), -1, 1))))
    return ratios, angles


@pytest.mark.xfail(
    reason="0.58: bare rooms are taken for smaller ones (docs/results.md)", strict=True
)
def test_depth_of_a_room_is_roughly_right(of_rooms):
    assert 0.6 < np.median(of_rooms[0]) < 1.6


def test_normals_of_a_room_are_roughly_right(of_rooms):
    assert np.median(of_rooms[1]) < 25


def test_the_shipped_calibration_is_of_the_shipped_weights_as_they_are_asked_by_default():
    calibration = Calibration.load("shipped")
    calibration.fits(MiniTeacher().describe(), list(calibration.heads))
    assert set(calibration.heads) == {Task.DEPTH, Task.NORMALS, Task.SEMANTIC}


def test_seeds_draw_different_pictures_of_the_same_caption(generator):
    a = generator(None, "a room with a red chair", seed=1, steps=8).astype(int)
    b = generator(None, "a room with a red chair", seed=2, steps=8)
    assert np.abs(a - b).mean() > 5
    assert a.std() > 15
    assert noise_for([1], (8, 8)).shape == (1, 3, 8, 8)
