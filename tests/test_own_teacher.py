"""The documented teacher of one's own: cut out of docs/own-teacher.md, run by its command."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill import cli
from teacher.errors import UsageError
from teacher.generators import load_teacher
from teacher.label import Task
from teacher.store import LabelSet

PAGE = (Path(__file__).parents[1] / "docs" / "own-teacher.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def test_the_documented_teacher_runs_by_the_documented_command(tmp_path, monkeypatch):
    (code,), (command,) = blocks("python"), blocks("bash")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 20
    (tmp_path / "my_teacher.py").write_text(code)
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "distill" and cli.main(words[1:]) == 0
    (one,) = LabelSet(tmp_path / "labels" / "ground")
    depth_m = one.values[Task.DEPTH]
    # disparity rises linearly from the upper to the lower edge; 2 % of the pixels lie outside
    disparity = 1 / depth_m[:, 0]
    np.testing.assert_allclose(np.diff(disparity), np.diff(disparity).mean(), rtol=0.02)
    near, far = 1 / np.quantile(1 / depth_m, [0.98, 0.02])
    np.testing.assert_allclose([near, far], [1.5, 40], rtol=0.02)
    assert one.provenance["alignment"]["anchor"] == "range"
    without = [w for w in words[1:] if not w.startswith("anchor")]
    assert cli.main([w.replace("labels/ground", "labels/none") for w in without]) == 2
    assert not (tmp_path / "labels" / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "test_own_teacher:Painter", "brsh": 3}, r"Painter\(\*, brush: .*'brsh'"),
        ({"name": "test_own_teacher:Painter"}, r"given are \[\]: missing .*'brush'"),
        ({"name": "test_own_teacher:Painter", "brush": 3}, r"lacks \['tasks', 'answer'\]"),
        ({"name": "test_own_teacher:no_class"}, "has no attribute 'no_class'"),
    ],
)
def test_a_class_that_is_no_teacher_is_the_user_s_to_mend(options, message):
    with pytest.raises(UsageError, match=message):
        load_teacher(**options)


class Painter:
    def __init__(self, *, brush: int) -> None:
        self.brush = brush

    def describe(self):
        return {}
