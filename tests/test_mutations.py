"""The campaign's own tools: faults change answers, rewrites do not, and verify tells them apart."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from export_cases import make_student, picture
from mutations import FAULTS, stale
from rewrites import BENIGN, rewritten

from export.onnx_graph import card_of, to_onnx
from student.checkpoint import load_student

TASKS = ("depth", "normals", "semantic")
HEIGHT, WIDTH = 32, 64
OWN_TEST = {"nan_in_the_dark", "wrong_when_two"}  # these need darkness, a batch of two


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("mutations") / "student.safetensors"
    make_student(path, tasks=TASKS, height=HEIGHT, width=WIDTH)
    student = load_student(path)
    return to_onnx(student, card_of(student))


def answers(model, images=3):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {
        "image": np.stack([picture(i, HEIGHT, WIDTH) for i in range(images)]),
        "focal_px": np.linspace(40, 90, images, dtype=np.float32),
    }
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.fixture(scope="module")
def clean(original):
    return answers(original)


def copy(model):
    return onnx.ModelProto.FromString(model.SerializeToString())


def largest_gap(found, expected):
    gaps = [np.abs(found[n].astype(np.float64) - expected[n]) for n in expected]
    return max(np.inf if np.isnan(g).any() else float(g.max()) for g in gaps)


@pytest.mark.parametrize("rewrite", BENIGN, ids=lambda f: f.__name__)
def test_a_benign_rewrite_changes_the_graph_and_not_the_answers(original, clean, rewrite):
    model = copy(original)
    rewrite(model, np.random.default_rng(3))
    assert model.SerializeToString() != original.SerializeToString()
    assert largest_gap(answers(model), clean) < 1e-3


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_a_runnable_artefact_that_answers_otherwise(original, clean, fault):
    gaps = []
    for seed in range(6):  # a line of sky that is 0 stays 0: one of a few places will do
        model = copy(original)
        what = fault(model, np.random.default_rng(seed))
        onnx.checker.check_model(model)
        assert isinstance(what, str) and what
        assert [o.name for o in model.graph.output] == [o.name for o in original.graph.output]
        assert {p.key for p in model.metadata_props} == {p.key for p in original.metadata_props}
        gaps.append(largest_gap(answers(model), clean))
        if gaps[-1] > 1e-6:
            return
    assert fault.__name__ in OWN_TEST, gaps


def test_a_fault_for_two_images_is_right_for_three(original, clean):
    model = copy(original)
    two = {f.__name__: f for f in FAULTS}["wrong_when_two"]
    two(model, np.random.default_rng(0))
    assert largest_gap(answers(model), clean) < 1e-6
    assert largest_gap(answers(model, 2), answers(original, 2)) > 1e-4


def test_a_fault_of_the_dark_is_not_a_number_there(original):
    model = copy(original)
    dark = {f.__name__: f for f in FAULTS}["nan_in_the_dark"]
    dark(model, np.random.default_rng(0))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.stack([np.zeros((HEIGHT, WIDTH, 3), np.uint8), picture(0, HEIGHT, WIDTH)])
    found = session.run(None, {"image": image, "focal_px": np.array([50, 50], np.float32)})
    broken = [np.isnan(a.astype(np.float64)).reshape(2, -1).any(1).tolist() for a in found]
    assert [True, False] in broken and [True, True] not in broken and [False, True] not in broken


def test_the_same_seed_plants_the_same_fault(original):
    for fault in FAULTS[:3]:
        a, b = copy(original), copy(original)
        assert fault(a, np.random.default_rng(5)) == fault(b, np.random.default_rng(5))
        assert largest_gap(answers(a), answers(b)) == 0


def test_stale_is_a_blend(original, tmp_path):
    make_student(tmp_path / "s.safetensors", tasks=TASKS, height=HEIGHT, width=WIDTH, seed=1)
    student = load_student(tmp_path / "s.safetensors")
    other = to_onnx(student, card_of(student))
    seed = next(i for i in range(99) if np.random.default_rng(i).random() < 0.4)
    model = copy(original)
    assert stale(model, other, np.random.default_rng(seed)).startswith("1.000 of")
    assert largest_gap(answers(model), answers(other)) < 1e-5


def test_rewrites_compose(original, clean):
    for seed in range(4):
        model = copy(original)
        names = rewritten(model, np.random.default_rng(seed))
        assert names and largest_gap(answers(model), clean) < 1e-3
