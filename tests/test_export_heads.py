"""Every head and kind of backbone leaves torch: one graph, our names, what TensorRT 10.3 takes."""

import numpy as np
import onnx
import pytest
import torch
from export_cases import CLASSES, picture
from torch import nn

from export.artefact import broken_promise, expected_shape
from export.onnx_files import check_sizes
from export.onnx_graph import card_of, to_onnx
from export.parity import measures
from export.readiness import verdicts
from export.runtimes import TorchRuntime, open_runtime
from student.checkpoint import save_student
from student.model import Student

ALL = ["depth", "normals", "semantic", "instances"]
STUDENTS = {
    "transformer, bins": {"backbone": "test_vit", "depth_head": "bins", "decoder": "dpt"},
    "convnext, mixture": {"backbone": "test_convnext", "depth_head": "mixture"},
    "convnext, step": {"backbone": "test_convnext", "depth_head": "step"},
}


@pytest.fixture(scope="module", params=STUDENTS)
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    student = Student(tasks=ALL, height=64, width=64, classes=CLASSES, **STUDENTS[request.param])
    student.eval()
    if request.param == "convnext, step":
        nn.init.normal_(student.heads["depth"].step.weight, std=0.3)  # it begins without steps
    folder = tmp_path_factory.mktemp("heads")
    save_student(student, folder / "student.safetensors", {"teacher": "truth", "licences": []})
    model = to_onnx(student, card_of(student, semantic_logits=True))
    onnx.save(model, folder / "student.onnx")
    return student, model, folder


def test_every_output_of_the_student_agrees_with_torch(exported):
    _, _, folder = exported
    images = np.stack([picture(i, 64, 64) for i in range(3)])
    focal_px = np.array([40, 60, 80], np.float32)
    with open_runtime(folder / "student.onnx", threads=1) as r:
        found, card = r(images, focal_px), r.card
    with TorchRuntime(folder / "student.safetensors", threads=1) as r:
        expected = r(images, focal_px)
    assert {"center", "offset", "sky", "semantic_logits"} < set(found) == set(expected)
    for name, array in found.items():
        assert array.shape == expected_shape(name, card, 3), name
        for one, other in zip(array, expected[name], strict=True):
            assert broken_promise(name, one, card) == "", name
            if name == "semantic":
                assert np.array_equal(one, other)
            else:
                assert measures(name, one, other)["max"] < 1e-3, name


def test_layer_normalisation_is_one_operator(exported):
    student, model, _ = exported
    norms = [m for m in student.modules() if isinstance(m, nn.LayerNorm)]
    made = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
    assert len(made) == len(norms) > 0


def test_the_graph_is_portable(exported):
    _, model, _ = exported
    assert model.opset_import[0].version == 18
    assert not {"If", "Loop", "Scan"} & {n.op_type for n in model.graph.node}
    told = verdicts(model)
    assert {v["takes"] for v in told.values()} == {"yes"}, told


def test_claims_of_impossible_size_are_refused(exported):
    from export.artefact import ArtefactError

    _, model, _ = exported
    for spoil, message in (
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 40), "claims shape"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -5), "claims shape"),
        (
            lambda m: setattr(
                m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 1 << 50
            ),
            r"claims shape .*It is not run",
        ),
    ):
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        spoil(copy)
        with pytest.raises(ArtefactError, match=message):
            check_sizes(copy, where="x.onnx")
