"""The exported graph: its contract, its agreement with torch, and what is refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
import yaml
from export_cases import CLASSES, HEIGHT, WIDTH, hand_made, make_labels, make_student, picture
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from distill import cli
from export import onnx_files
from export.artefact import (
    PREFIX,
    ArtefactError,
    Card,
    card_from_metadata,
    card_to_metadata,
)
from export.delivery import export_student
from export.lowering import recarded
from export.onnx_files import check_rules, check_sizes, read_model
from export.onnx_graph import card_of
from export.parity import gap
from export.runtimes import open_runtime
from student.backbone import Backbone
from student.checkpoint import load_student, save_student
from student.model import Student
from teacher.errors import UsageError
from teacher.jobs.licences import LicenceRefusedError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of a free-N export with focal_px, folder of a fixed one with everything baked)."""
    root = tmp_path_factory.mktemp("export")
    tasks = ("depth", "normals", "semantic")
    checkpoint = make_student(root / "student.safetensors", tasks=tasks)
    export_student(checkpoint=str(checkpoint), out=str(root / "free"))
    small = make_student(root / "depth.safetensors", tasks=("depth",), seed=1)
    export_student(
        checkpoint=str(small), out=str(root / "baked"), batch=2, focal_input=False, focal_px=70.0
    )
    return root / "free", root / "baked"


def images(n):
    return np.stack([picture(i, HEIGHT, WIDTH) for i in range(n)])


def test_inputs_outputs_and_first_node(exported):
    model = onnx.load(exported[0] / "student.onnx")
    found = {
        v.name: (
            v.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in (*model.graph.input, *model.graph.output)
    }
    n = found["image"][1][0]
    assert isinstance(n, str)
    f32, hw = TensorProto.FLOAT, [HEIGHT, WIDTH]
    assert found == {
        "image": (TensorProto.UINT8, [n, *hw, 3]),
        "focal_px": (f32, [n]),
        "depth": (f32, [n, *hw]),
        "sky": (f32, [n, *hw]),
        "normals": (f32, [n, 3, *hw]),
        "semantic": (TensorProto.INT32, [n, *hw]),
        "depth_uncertainty": (f32, [n, *hw]),
        "normals_uncertainty": (f32, [n, *hw]),
        "semantic_uncertainty": (f32, [n, *hw]),
    }
    assert model.graph.node[0].op_type == "Cast"
    assert [o.version for o in model.opset_import if o.domain == ""] == [18]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, height, width, licence",
    [
        ("vit_small_patch14_dinov2", 56, 84, "apache-2.0"),
        ("vit_small_patch16_dinov3", 64, 96, "dinov3-license"),
        ("vit_xsmall_patch16_clip_224", 64, 96, "mit"),
    ],
)
def test_the_preset_base_takes_foundation_weights_to_the_graph(
    tmp_path, name, height, width, licence
):
    """Of each family a file in `timm`'s layout: taken whole, positions baked, exported, equal."""
    torch.manual_seed(5)
    whole = timm.create_model(name, num_classes=0)
    weights = tmp_path / "backbone.safetensors"
    save_file({k: v.contiguous() for k, v in whole.state_dict().items()}, weights)
    preset = yaml.safe_load((Path(__file__).parents[1] / "conf/student/base.yaml").read_text())
    size = {"backbone": name, "height": height, "width": width, "decoder_stride": 4}
    student = Student(**preset | size | {"backbone_weights": str(weights)}).eval()
    assert student.backbone.licence == licence
    mine = dict(student.backbone.net.named_parameters())
    theirs = {f"model.{k}": v for k, v in whole.state_dict().items()}
    assert set(mine) <= set(theirs) and len(mine) > 100
    patch = 14 if "14" in name else 16
    for key, value in mine.items():
        expected = theirs[key]
        if expected.shape != value.shape:
            assert key == "model.pos_embed"
            expected = timm.layers.resample_abs_pos_embed(
                expected, [height // patch, width // patch], num_prefix_tokens=1
            )
        assert torch.equal(value, expected), key
    save_student(student, tmp_path / "student.safetensors", {"backbone_licence": licence})
    export_student(checkpoint=str(tmp_path / "student.safetensors"), out=str(tmp_path / "export"))
    image = picture(0, height, width)
    with open_runtime(tmp_path / "export" / "student.onnx") as runtime:
        said = runtime(image[None])
    with torch.inference_mode():
        own = student(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255)
    assert np.abs(np.log(said["depth"][0] / own["depth"][0, 0].numpy())).max() < 1e-4
    assert np.abs(said["normals"][0] - own["normals"][0].numpy()).max() < 1e-4


def test_metadata_says_units_frame_classes_camera_licences_and_student(exported):
    props = {p.key: p.value for p in onnx.load(exported[0] / "student.onnx").metadata_props}
    card = card_from_metadata(props, where="x")
    assert (card.height, card.width, card.batch, card.precision) == (HEIGHT, WIDTH, None, "fp32")
    assert card.classes == CLASSES
    assert card.licences[0] == "ancestor: ancestor: Apache-2.0" and "advice" in card.licences[-1]
    assert card.provenance["teacher"] == "truth"
    told = json.loads((exported[0] / "export.json").read_text())
    assert card.student_sha256 == told["reference"]["sha256"] and len(card.student_sha256) == 64
    assert json.loads(props[PREFIX + "outputs"])["depth"]["unit"].startswith("metres")
    assert "x right, y up, z toward the viewer" in json.loads(props[PREFIX + "frame"])


def test_the_filter_of_single_images_stays_behind():
    """A byte for each image of the training: for `distill calibrate`, not for a device."""
    student = Student(backbone="test_efficientnet", height=32, width=64, tasks=["depth"])
    data = [{"plan_hash": "x", "seen": "AA=="}]
    student.provenance = {"steps": 3, "data": data, "init": {"taken": 2, "data": data}}
    expected = {"steps": 3, "data": [{"plan_hash": "x"}], "init": {"taken": 2}}
    assert card_of(student).provenance == expected
    assert student.provenance["data"][0]["seen"] == "AA=="


def test_a_refused_licence_stops_the_export_and_names_the_ancestor(tmp_path):
    student = make_student(tmp_path / "s.safetensors", tasks=("depth",))
    lesson = {"data": [{"teacher": {"name": "truth"}, "licences": {"images": "CC-BY-NC-4.0"}}]}
    save_student(load_student(student), student, lesson)
    options = {"checkpoint": str(student), "out": str(tmp_path / "e")}
    with pytest.raises(LicenceRefusedError, match=r"export .*e would.*\n.*images: CC-BY-NC-4\.0"):
        export_student(**options, licence={"refuse": ["non-commercial"]})
    with pytest.raises(UsageError, match=r"expected a list, licence.refuse=\[custom\]"):
        export_student(**options, licence={"refuse": "custom"})
    assert not (tmp_path / "e").exists()
    assert export_student(**options, licence={"refuse": ["copyleft"]})["exit"] == 0


def test_calibration_images_are_ancestors_of_what_they_calibrate(tmp_path, monkeypatch):
    """Of the lowered graphs and of the export as a whole; fp32 does not descend from them."""
    student = make_student(tmp_path / "s.safetensors", tasks=("depth",))
    meta = make_labels(tmp_path / "labels", tasks=("depth",)).path / "dataset.json"
    stated = json.loads(meta.read_text()) | {"licences": {"images": "CC-BY-NC-4.0"}}
    meta.write_text(json.dumps(stated))
    options = {"checkpoint": str(student), "out": str(tmp_path / "e")}
    options |= {"precision": ["fp32", "fp16"], "calibration": str(tmp_path / "labels")}
    with pytest.raises(LicenceRefusedError, match=r"calibration images images: CC-BY-NC-4\.0"):
        export_student(**options, licence={"refuse": ["non-commercial"]})
    assert not (tmp_path / "e").exists()

    def quick(student, card):
        model = hand_made(tmp_path / "quick.onnx")
        helper.set_model_props(model, card_to_metadata(card))
        return model

    lowered = lambda model, names, **_: [("fp16", recarded(model, "fp16"), {})]  # noqa: E731
    monkeypatch.setattr("export.delivery.to_onnx", quick)
    monkeypatch.setattr("export.lowering.lower_all", lowered)
    told = export_student(**options, licence={"refuse": ["copyleft"]})["card"]
    for name, named in (("student.onnx", False), ("student.fp16.onnx", True)):
        props = {p.key: p.value for p in onnx.load(tmp_path / "e" / name).metadata_props}
        card = card_from_metadata(props, where=name)
        assert ("calibration images" in " ".join(card.licences)) == named, name
    assert card.licences == tuple(told["licences"])
    unused = options | {"out": str(tmp_path / "f"), "precision": ["fp32"]}
    export_student(**unused, licence={"refuse": ["non-commercial"]})


def test_the_readiness_table_lies_beside_the_graphs(exported):
    text = (exported[0] / "readiness.md").read_text()
    nodes = len(onnx.load(exported[0] / "student.onnx").graph.node)
    assert "## student.onnx" in text
    assert f"All {nodes} nodes: 10.3: yes, 10.12: yes, 11: yes." in text


def test_no_host_path_travels_in_the_file(exported):
    data = (exported[0] / "student.onnx").read_bytes()
    for trace in (b"/work", b"site-packages", b".py", str(Path.cwd()).encode()):
        assert trace not in data


@pytest.mark.parametrize("n", [1, 3])
def test_onnx_agrees_with_torch(exported, n):
    focal_px = np.linspace(40, 160, n).astype(np.float32)
    with open_runtime(exported[0] / "student.onnx") as onnx_run:
        found = onnx_run(images(n), focal_px)
    with open_runtime(exported[0] / "student.safetensors") as torch_run:
        expected = torch_run(images(n), focal_px)
    assert list(found) == [o for o in expected if o != "semantic_logits"]
    for name, values in found.items():
        assert values.dtype == expected[name].dtype and values.shape == expected[name].shape
        assert np.quantile(gap(name, values, expected[name]), 0.999) < 1e-3, name
    assert set(np.unique(found["semantic"])) <= set(CLASSES) and np.ptp(found["semantic"]) > 0


def test_the_units_are_the_students_own(exported):
    """Independent of `Delivered`: the network called by hand, the units applied by hand."""
    student = load_student(exported[0] / "student.safetensors")
    x = torch.from_numpy(images(2)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        raw = student(x)
    with open_runtime(exported[0] / "student.onnx") as run:
        out = run(images(2), np.array([55.0, 110.0]))
    metres = raw["depth"][:, 0].numpy() * (
        np.array([55.0, 110.0])[:, None, None] / student.canonical_focal_px
    )
    np.testing.assert_allclose(out["depth"], metres, rtol=1e-4)
    np.testing.assert_allclose(out["sky"], 1 / (1 + np.exp(-raw["sky"][:, 0].numpy())), atol=1e-5)
    np.testing.assert_allclose(np.sqrt((out["normals"] ** 2).sum(1)), 1, atol=1e-5)
    ids = np.array(sorted(CLASSES))[raw["semantic"].argmax(1).numpy()]
    assert (ids != out["semantic"]).mean() < 1e-3


def test_without_a_camera_the_recorded_one_is_used(exported):
    with open_runtime(exported[0] / "student.onnx") as run:
        assert run.card.focal_px == pytest.approx(WIDTH / 2 / np.tan(np.radians(30)))
        told = run(images(1), np.array([run.card.focal_px]))
        np.testing.assert_array_equal(run(images(1))["depth"], told["depth"])


def test_baked_camera_and_fixed_batch(exported):
    model = onnx.load(exported[1] / "student.onnx")
    assert [i.name for i in model.graph.input] == ["image"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    with open_runtime(exported[1] / "student.onnx") as run:
        assert run.card.focal_px == 70.0
        baked = run(images(3))  # an odd number of images through a graph of two
        doubled = run(images(3), np.full(3, 140.0))
    assert baked["depth"].shape == (3, HEIGHT, WIDTH)
    np.testing.assert_allclose(doubled["depth"], 2 * baked["depth"], rtol=1e-6)
    with open_runtime(exported[1] / "student.safetensors") as reference:
        expected = reference(images(3), np.full(3, 70.0))
    np.testing.assert_allclose(baked["depth"], expected["depth"], rtol=1e-4)


def test_runtime_facts_and_wrong_inputs(exported):
    with open_runtime(exported[0] / "student.onnx", threads=1) as run:
        assert run.facts["providers"] == ["CPUExecutionProvider"] and run.facts["threads"] == 1
        with pytest.raises(UsageError, match=r"found float32 \[1, 64, 96, 3\], expected uint8"):
            run(images(1).astype(np.float32))
        with pytest.raises(UsageError, match="one positive number of pixels for each of the 2"):
            run(images(2), np.array([50.0]))
        with pytest.raises(UsageError, match="focal_px: found"):
            run(images(1), np.array([np.nan]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_provider_that_cannot_run_is_an_error_and_no_silent_fallback(exported):
    from teacher.errors import EnvironmentFailure

    with pytest.raises(EnvironmentFailure, match="CUDAExecutionProvider was asked for and cannot"):
        open_runtime(exported[0] / "student.onnx", provider="cuda").__enter__()
    with pytest.raises(UsageError, match="provider='gpu': expected one of"):
        open_runtime(exported[0] / "student.onnx", provider="gpu")


@pytest.mark.slow
def test_two_exports_are_the_same_file(exported, tmp_path):
    export_student(checkpoint=str(exported[0] / "student.safetensors"), out=str(tmp_path / "again"))
    again = (tmp_path / "again" / "student.onnx").read_bytes()
    assert again == (exported[0] / "student.onnx").read_bytes()


def test_bad_arguments(exported, tmp_path):
    good = {"checkpoint": str(exported[0] / "student.safetensors"), "out": str(tmp_path / "o")}
    with pytest.raises(UsageError, match=r"precision=\['fp8'\]: expected some of \['fp32', "):
        export_student(**good, precision=["fp8"])
    with pytest.raises(UsageError, match="batch=0"):
        export_student(**good, batch=0)
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"focal_px={wrong}"):
            export_student(**good, focal_px=wrong)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"found \['notes.txt'\] and no export.json"):
        export_student(checkpoint=good["checkpoint"], out=str(tmp_path / "other"))
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a student checkpoint"):
        export_student(checkpoint=str(tmp_path / "x.safetensors"), out=good["out"])


# -- rules and untrusted files -----------------------------------------------------------------


def tiny_model(*nodes, initializers=()):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", [x], [y], initializer=list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"mode": "cubic"}, "mode 'cubic'"),
        ({"mode": "linear", "antialias": 1}, "mode 'linear', antialias 1"),
    ],
)
def test_resizes_that_engines_take_wrongly_are_named(attributes, said):
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], name="up", **attributes)
    with pytest.raises(ArtefactError, match=f"Resize node 'up': {said}"):
        check_rules(tiny_model(node), where="export")
    fine = helper.make_node("Resize", ["x", "", "s"], ["y"], name="up", mode="linear")
    check_rules(tiny_model(fine), where="export")


def test_control_flow_and_uint8_use_are_named():
    inner = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "b", [], [])
    node = helper.make_node("If", ["c"], ["y"], name="maybe", then_branch=inner, else_branch=inner)
    with pytest.raises(ArtefactError, match="If node 'maybe': control flow"):
        check_rules(tiny_model(node), where="export")
    node = helper.make_node("Mul", ["image", "image"], ["y"], name="square")
    with pytest.raises(ArtefactError, match="Mul node 'square': reads the uint8 input"):
        check_rules(tiny_model(node), where="export")


def external(folder, location, *, offset=0, length=16):
    tensor = numpy_helper.from_array(np.zeros((1, 1, 2, 2), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    model = tiny_model(helper.make_node("Add", ["x", "w"], ["y"]), initializers=[tensor])
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_stays_in_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "w.bin").write_bytes(bytes(16))
    read_model(external(folder, "w.bin"))
    absolute = str(tmp_path / "secret")
    for location in ("../secret", absolute, "..", "a/../../secret", "C:x", "a\\x", ""):
        with pytest.raises(ArtefactError, match="tensor 'w' points to external data"):
            read_model(external(folder, location))
    with pytest.raises(ArtefactError, match="which is missing"):
        read_model(external(folder, "gone.bin"))
    for offset, length in ((0, 17), (1, 16), (-1, 16), (16, -16), ("x", 16)):
        with pytest.raises(ArtefactError, match="a range inside its 16 bytes"):
            read_model(external(folder, "w.bin", offset=offset, length=length))
    (tmp_path / "single").write_bytes(bytes(16))  # refused as a link, not for its number of names
    (folder / "soft").symlink_to(tmp_path / "single")
    (folder / "hard").hardlink_to(tmp_path / "secret")
    for name in ("soft", "hard"):
        with pytest.raises(ArtefactError, match="without symbolic or hard links"):
            read_model(external(folder, name))
    monkeypatch.setattr(onnx_files, "MAX_EXTERNAL_BYTES", 15)
    with pytest.raises(ArtefactError, match="external data of 16 bytes is too large"):
        read_model(external(folder, "w.bin"))


@pytest.mark.parametrize("where", ["constant", "tensors", "sparse", "graphs", "function"])
def test_external_data_is_seen_wherever_tensors_may_be(tmp_path, where):
    tensor = onnx.load(external(tmp_path, "../secret"), load_external_data=False).graph.initializer
    node, local = helper.make_node("Identity", ["x"], ["y"]), helper.make_node("F", ["x"], ["y"])
    model = tiny_model(local if where == "function" else node)
    if where == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor[0])
    elif where == "graphs":
        inner = helper.make_graph([], "g", [], [], list(tensor))
        model.graph.node[0].attribute.append(helper.make_attribute("a", [inner]))
    elif where == "tensors":
        model.graph.node[0].attribute.append(helper.make_attribute("a", list(tensor)))
    else:
        constant = helper.make_node("Constant", [], ["w"], value=tensor[0])
        imports = [helper.make_opsetid("", 18)]
        if where == "function":
            model.functions.append(
                helper.make_function("local", "F", ["x"], ["y"], [constant, node], imports)
            )
        else:
            model.graph.node.insert(0, constant)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtefactError, match="tensor 'w' points to external data"):
        read_model(tmp_path / "m.onnx")


def test_external_data_in_a_functions_branch_is_seen(tmp_path):
    tensor = onnx.load(external(tmp_path, "../secret"), load_external_data=False)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["t"])],
        "branch",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
        list(tensor.graph.initializer),
    )
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    imports = [helper.make_opsetid("", 18)]
    model = tiny_model(helper.make_node("F", ["x"], ["y"], domain="local"))
    model.functions.append(helper.make_function("local", "F", ["x"], ["y"], [node], imports))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtefactError, match="tensor 'w' points to external data"):
        read_model(tmp_path / "m.onnx")


def test_shapes_that_ask_for_terabytes_are_refused_before_anything_runs():
    big = numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "big")
    nodes = [
        helper.make_node("ConstantOfShape", ["big"], ["blown"]),
        helper.make_node("ReduceMax", ["blown"], ["top"], keepdims=0),
        helper.make_node("Add", ["x", "top"], ["y"]),
    ]
    with pytest.raises(ArtefactError, match=r"m: 'blown' claims shape \[1048576, 1048576\]"):
        check_sizes(tiny_model(*nodes, initializers=[big]), where="m")
    small = numpy_helper.from_array(np.array([4, 4]), "big")
    check_sizes(tiny_model(*nodes, initializers=[small]), where="m")
    side = numpy_helper.from_array(np.array([1 << 20]), "side")
    computed = [helper.make_node("Concat", ["side", "side"], ["big"], axis=0), *nodes]
    with pytest.raises(ArtefactError, match=r"m: 'blown' claims shape"):
        check_sizes(tiny_model(*computed, initializers=[side]), where="m")
    fine = tiny_model(helper.make_node("Neg", ["x"], ["y"]))
    for dims in ([1 << 20, 1 << 20], [-1]):
        claims = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT)
        with pytest.raises(ArtefactError, match="m: tensor 'w' claims shape"):
            check_sizes(tiny_model(*fine.graph.node, initializers=[claims]), where="m")
    fine.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 1 << 31
    with pytest.raises(ArtefactError, match="m: 'x' claims shape"):
        check_sizes(fine, where="m")
    nodes = [helper.make_node("Neg", ["x"], ["y"])] * (onnx_files.MAX_NODES + 1)
    with pytest.raises(ArtefactError, match="m: 100001 nodes, more than 100000"):
        check_sizes(tiny_model(*nodes), where="m")


def test_files_that_are_not_ours(exported, tmp_path, monkeypatch):
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(tiny_model(helper.make_node("Neg", ["x"], ["y"])).SerializeToString())
    with pytest.raises(ArtefactError, match="not an artefact made by `distill export`"):
        open_runtime(foreign)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes((exported[0] / "student.onnx").read_bytes()[:5000])
    with pytest.raises(ArtefactError, match=r"cut.onnx: not a readable ONNX model"):
        open_runtime(cut)
    with pytest.raises(ArtefactError, match="no such file"):
        open_runtime(tmp_path / "none.onnx")
    (tmp_path / "a.pt").write_bytes(b"PK")
    with pytest.raises(ArtefactError, match=r"ends in \.onnx, \.engine or \.safetensors"):
        open_runtime(tmp_path / "a.pt")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ArtefactError, match="its graph has no outputs"):
        open_runtime(tmp_path / "empty.onnx")
    (tmp_path / "link.onnx").symlink_to(foreign)
    with pytest.raises(ArtefactError, match=r"link\.onnx: found no regular file"):
        read_model(tmp_path / "link.onnx")
    monkeypatch.setattr(onnx_files, "MAX_MODEL_BYTES", 10)
    with pytest.raises(ArtefactError, match="bytes, more than the 10 of any ONNX"):
        read_model(foreign)


def test_a_card_that_lies_is_refused(exported, tmp_path):
    model = onnx.load(exported[0] / "student.onnx")
    props = {p.key: p.value for p in model.metadata_props}
    card = card_from_metadata(props, where="x")
    assert card_from_metadata(card_to_metadata(card), where="x") == card
    with pytest.raises(ArtefactError, match="format version 99; this program reads up to 1"):
        card_from_metadata(props | {PREFIX + "version": "99"}, where="x")
    with pytest.raises(ArtefactError, match="metadata is damaged: image size 99999999x96"):
        card_from_metadata(props | {PREFIX + "height": "99999999"}, where="x")
    with pytest.raises(ArtefactError, match="damaged: batches of 1000000000 images of 64x96"):
        card_from_metadata(props | {PREFIX + "batch": "1000000000"}, where="x")
    with pytest.raises(ArtefactError, match="damaged: maximum recursion depth"):
        card_from_metadata(props | {PREFIX + "provenance": "[" * 200_000}, where="x")
    with pytest.raises(ArtefactError, match="damaged: output 'secret': unknown"):
        card_from_metadata(props | {PREFIX + "outputs": '["secret"]'}, where="x")
    less = Card(**{**card.__dict__, "outputs": ("depth",)})
    onnx.helper.set_model_props(model, card_to_metadata(less))
    onnx.save(model, tmp_path / "less.onnx")
    with pytest.raises(ArtefactError, match=r"its card promises .*\['depth'\]"):
        open_runtime(tmp_path / "less.onnx")


def test_a_backbone_that_the_exporter_cannot_translate_is_named(tmp_path, monkeypatch, capsys):
    checkpoint = make_student(tmp_path / "s.safetensors", tasks=("depth",))
    name = load_student(checkpoint).config["backbone"]
    forward = Backbone.forward

    def five_axes(self, image):  # torch answers, its exporter knows four axes only; as in Hiera
        x = image[None, ..., :8, :8]
        attention = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return [f + attention.mean() for f in forward(self, image)]

    monkeypatch.setattr(Backbone, "forward", five_axes)
    assert cli.main(["export", f"checkpoint={checkpoint}", f"out={tmp_path / 'e'}"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"student.backbone={name}: torch's ONNX exporter cannot translate" in told
    assert "only 4D query" in told and "with another student.backbone=." in told
    assert not (tmp_path / "e" / "student.onnx").exists() and "Traceback" not in told
