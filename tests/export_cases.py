"""Small real students, label sets and exports that the tests of `export` share (no tests here)."""

from pathlib import Path

import numpy as np
import torch

from student.checkpoint import save_student
from student.model import Student
from teacher.label import Camera, Label, Task
from teacher.store import LabelSet, write_label_set

HEIGHT, WIDTH = 64, 96
CLASSES = {1: "floor", 3: "wall", 7: "thing"}


def make_student(path: Path, *, tasks=("depth", "normals"), seed=0, height=HEIGHT, width=WIDTH):
    """A student whose weights were never trained but whose answers vary over the image."""
    torch.manual_seed(seed)
    classes = CLASSES if "semantic" in tasks else None
    model = Student(height=height, width=width, tasks=list(tasks), classes=classes)
    model.train()
    with torch.no_grad():
        for _ in range(6):  # statistics for the normalisation layers
            model(torch.rand(4, 3, height, width) * torch.rand(4, 3, 1, 1))
        model.eval()  # untrained heads answer nearly a constant: let every map vary by about 0.6
        image = np.stack([picture(i, height, width) for i in range(2)])
        x = (torch.from_numpy(image).permute(0, 3, 1, 2) / 255 - model.mean) / model.std
        features = model.decoder(x, model.backbone(x))
        for head in model.heads.values():
            spread = head.maps(features).std((0, 2, 3)).repeat_interleave(4)
            head.maps.out.weight.mul_(0.6 / spread[:, None, None, None])
    save_student(model, path, {"teacher": "truth", "licences": ["Apache-2.0"]})
    return path


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth scene with edges and a bright and a dark side; uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    image = np.zeros((height, width, 3))
    for _ in range(6):
        fx, fy, phase = [*rng.normal(0, 6, 2).tolist(), rng.uniform(0, 6)]
        image += np.sin(fx * x + fy * y + phase)[..., None] * rng.uniform(0, 40, 3)
    for _ in range(4):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        image[top : top + 14, left : left + 18] = rng.uniform(-100, 100, 3)
    return np.clip(image * (0.4 + x[..., None]) + 110, 0, 255).astype(np.uint8)


def make_label(i: int, *, height=60, width=90, tasks=("depth", "normals")) -> Label:
    """A slanted ground under sky, its exact normals, and stripes of classes."""
    camera = Camera.assumed(width, height)
    v = (np.arange(height) - camera.cy) / camera.fy
    depth = np.where(v > 0.02, 1.4 / np.maximum(v, 0.02), np.inf)  # a floor 1.4 m below the eye
    depth = np.repeat(depth[:, None], width, 1).astype(np.float32)
    depth[: height // 6, : width // 6] = np.nan
    normals = np.zeros((height, width, 3), np.float32)
    normals[..., 1] = 1
    normals[np.isposinf(depth)] = np.nan
    ids = np.array(sorted(CLASSES), np.uint8)[(np.arange(width) * 3 // width)]
    values = {
        Task.DEPTH: depth,
        Task.NORMALS: normals,
        Task.SEMANTIC: np.repeat(ids[None], height, 0),
    }
    return Label(
        key=f"scene{i:02d}",
        image=picture(i, height, width),
        values={t: values[t] for t in map(Task, tasks)},
        camera=camera,
    )


def make_labels(out: Path, *, n=4, tasks=("depth", "normals"), teacher="truth", change=None):
    """A label set of `make_label`; ``change(label)`` may make a poorer teacher of it."""

    def make(i: int) -> Label:
        label = make_label(i, tasks=tasks)
        return change(label) if change else label

    classes = {str(k): v for k, v in CLASSES.items()} if "semantic" in tasks else {}
    dataset = {"tasks": list(tasks), "teacher": {"name": teacher}, "classes": classes}
    write_label_set(out, n=n, make=make, dataset=dataset)
    return LabelSet(out)


def hand_made(path: Path, *, size=(16, 24), batch=None, precision="fp32", student_sha256=""):
    """A three-node artefact with our card: depth is 1 m + 4 m * brightness * focal_px / 100."""
    from onnx import TensorProto, checker, helper, numpy_helper

    from export.artefact import Card, card_to_metadata

    height, width = size
    card = Card(
        height=height,
        width=width,
        batch=batch,
        focal_input=True,
        focal_px=100.0,
        canonical_focal_px=100.0,
        outputs=("depth",),
        precision=precision,
        student_sha256=student_sha256,
    )
    n = batch or "N"
    constants = {
        "axis": np.array([3]),
        "scale": np.float32(4 / 255 / 100),
        "one": np.float32(1),
        "wide": np.array([1, 2]),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axis"], ["grey"], keepdims=0),
        helper.make_node("Mul", ["grey", "scale"], ["bright"]),
        helper.make_node("Unsqueeze", ["focal_px", "wide"], ["focal"]),
        helper.make_node("Mul", ["bright", "focal"], ["metres"]),
        helper.make_node("Add", ["metres", "one"], ["depth"]),
    ]
    graph = helper.make_graph(
        nodes,
        "hand-made",
        [
            helper.make_tensor_value_info("image", TensorProto.UINT8, [n, height, width, 3]),
            helper.make_tensor_value_info("focal_px", TensorProto.FLOAT, [n]),
        ],
        [helper.make_tensor_value_info("depth", TensorProto.FLOAT, [n, height, width])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, card_to_metadata(card))
    checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return model
