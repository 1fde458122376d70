"""Foreign teachers inside a label job: normals are stored, affine depth asks for an anchor."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from teacher_cases import options
from tiny_checkpoints import write_marigold

from teacher.errors import UsageError
from teacher.jobs.run import label
from teacher.label import Task
from teacher.store import LabelSet, read_rows

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    write_marigold(root / "depth", kind="depth")
    write_marigold(root / "normals", kind="normals")
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 56), (56, 40), (40, 56), (90, 120)]):
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{i}.png")
    return root


def plain(**given):
    """The keys of conf/label.yaml, with changes."""
    values = yaml.safe_load((Path(__file__).parents[1] / "conf" / "label.yaml").read_text())
    del values["defaults"]
    return values | given


def run(folder, out, *, tasks, **changes):
    named = {t: str(folder / t) for t in ("depth", "normals")}
    teacher = options("marigold", **(named | changes))
    given = {"images": str(folder / "photos"), "out": str(out), "tasks": tasks}
    given |= {"teacher": teacher, "batch_size": 3, "shard_size": 4}
    return label(**plain(**given))


def test_normals_become_a_label_set_that_pins_its_teacher(folder, tmp_path):
    done = run(folder, tmp_path / "set", tasks=["normals"])
    assert done["labelled"] == 4 and done["rejected"] == 0, done
    for one in LabelSet(tmp_path / "set"):
        normals = one.values[Task.NORMALS]
        assert normals.shape == one.image.shape and max(normals.shape) <= 64
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-3)
    with pytest.raises(UsageError):  # another seed is another teacher: never mixed
        run(folder, tmp_path / "set", tasks=["normals"], seeds=[1])


def test_affine_depth_is_not_stored_as_metres(folder, tmp_path):
    with pytest.raises(UsageError, match=r"affine depth.*anchor"):
        run(folder, tmp_path / "set", tasks=["depth"])


@pytest.mark.parametrize("name", ["marigold", "lotus", "lotus2"])
def test_affine_depth_without_an_anchor_is_refused_before_a_checkpoint_is_looked_for(
    folder, tmp_path, name, monkeypatch
):
    for module in ("diffusion", "lotus2", "specialist"):  # looking for one: TypeError
        monkeypatch.setattr(f"teacher.generators.{module}.open_checkpoint", None)
    listed = r"anchor=folder.*anchor=truth.*anchor=range.*anchor=depth_pro.*anchor=depth_anything"
    images, out = str(folder / "photos"), str(tmp_path / "set")
    for tasks in (["depth"], ["depth", "normals"]):
        with pytest.raises(UsageError, match=rf"'affine (depth|disparity)'.*{listed}"):
            label(**plain(teacher=options(name), images=images, out=out, tasks=tasks))
    with pytest.raises(UsageError, match=r"range: this teacher answers depth in metres already"):
        anchor = {"name": "range", "near_m": 1, "far_m": 9}
        teacher = options("depth_pro")
        label(**plain(teacher=teacher, images=images, out=out, tasks=["depth"], anchor=anchor))
    with pytest.raises(TypeError, match="not callable"):  # normals need no anchor
        label(**plain(teacher=options(name), images=images, out=out, tasks=["normals"]))


def test_a_loaded_teacher_knows_its_space_by_its_checkpoint(folder):
    from teacher.generators import load_teacher
    from teacher.label import Space

    named = {"depth": str(folder / "depth"), "normals": str(folder / "normals")}
    for space in (Space.AFFINE_DEPTH, Space.AFFINE_DISPARITY):
        kind = space.removeprefix("affine ")
        teacher = load_teacher(**options("marigold", **named, depth_space=kind))
        assert teacher.spaces == {Task.DEPTH: space, Task.NORMALS: Space.UNIT_NORMALS}


def test_every_teacher_stands_in_the_readme_with_a_command_that_is_understood():
    from hydra import compose, initialize_config_module

    from teacher.generators import TEACHERS, teacher_class

    page = (Path(__file__).parents[1] / "README.md").read_text()
    asked = [words.split() for words in re.findall(r"\| `(teacher=[^`]*)` \|\n", page)]
    assert {words[0].removeprefix("teacher=") for words in asked} == set(TEACHERS)
    with initialize_config_module("conf", version_base="1.3"):
        for words in asked:
            given = compose("label", ["images=photos/", "out=labels/x", *words])
            cls = teacher_class(given.teacher.name)
            can = getattr(cls, "tasks", None) or getattr(cls, "spaces", (Task.DEPTH,))
            assert set(given.tasks) <= set(can), words


def test_images_without_an_answer_are_rejected_and_the_job_goes_on(folder, tmp_path, monkeypatch):
    from teacher.generators.marigold import MarigoldTeacher

    real = MarigoldTeacher.answer

    def overflow(self, queries, tasks):
        tall = [q.image.shape[0] > q.image.shape[1] for q in queries]
        model = self.models[Task.NORMALS].latent
        answers = []
        for query, broken in zip(queries, tall, strict=True):
            with torch.no_grad():
                model.unet.conv_out.bias[0] = torch.inf if broken else 0.0
            answers += real(self, [query], tasks)
        return answers

    monkeypatch.setattr(MarigoldTeacher, "answer", overflow)
    done = run(folder, tmp_path / "set", tasks=["normals"])
    assert (done["labelled"], done["rejected"]) == (3, 1)
    reasons = [row["reason"] for row in read_rows(tmp_path / "set") if row.get("reason")]
    assert reasons and "no known pixel" in reasons[0]
