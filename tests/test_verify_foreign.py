"""Models that we did not make: described in a short YAML, fed, read and judged."""

import numpy as np
import onnx
import pytest
import yaml
from export_cases import make_labels
from onnx import TensorProto, helper, numpy_helper

from export.artefact import ArtefactError
from export.foreign import Adapter, read_description
from export.runtimes import open_runtime
from export.verify import verify
from teacher.errors import UsageError

SIZE = (16, 24)


def describe(path, **changes):
    table = {
        "image": {"name": "pixels", "size": list(SIZE), "mean": [0.5] * 3, "std": [0.25] * 3},
        "outputs": {"depth": {"name": "d", "layout": "N1HW", "is": "log metres"}},
    } | changes
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    return path


def foreign_model(path, *, bias=0.7, wrong_for_two=0.0):
    """log depth = (mean over channels of the normalised picture) * 0.1 + bias, [N, 1, H, W]."""
    constants = {"tenth": np.float32(0.1), "bias": np.float32(bias), "axis": np.array([1])}
    constants |= {"two": np.array([2]), "first": np.array([0]), "end": np.array([1])}
    constants |= {"wrong": np.float32(wrong_for_two)}
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axis"], ["m"], keepdims=1),
        helper.make_node("Mul", ["m", "tenth"], ["s"]),
        helper.make_node("Add", ["s", "bias"], ["e"]),
        helper.make_node("Shape", ["pixels"], ["shape"]),
        helper.make_node("Slice", ["shape", "first", "end"], ["n"]),
        helper.make_node("Equal", ["n", "two"], ["is_two"]),
        helper.make_node("Cast", ["is_two"], ["is_two_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["is_two_f", "wrong"], ["extra"]),
        helper.make_node("Add", ["e", "extra"], ["d"]),
    ]
    shape = ["N", 3, *SIZE]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("d", TensorProto.FLOAT, ["N", 1, *SIZE])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def test_bytes_become_the_described_feed(tmp_path):
    about = read_description(describe(tmp_path / "io.yaml"))
    image = np.zeros((1, *SIZE, 3), np.uint8)
    image[0, 2, 5] = (255, 51, 0)
    feed = Adapter(about).feed(image, np.array([100], np.float32))
    assert set(feed) == {"pixels"} and feed["pixels"].shape == (1, 3, *SIZE)
    # (x / 255 - 0.5) / 0.25
    assert feed["pixels"][0, :, 2, 5].tolist() == pytest.approx([2, -1.2, -2])
    other = {"name": "pixels", "size": list(SIZE), "layout": "NHWC", "channels": "BGR"}
    about = read_description(describe(tmp_path / "b.yaml", image=other | {"dtype": "uint8"}))
    assert Adapter(about).feed(image, np.array([1.0]))["pixels"][0, 2, 5].tolist() == [0, 51, 255]
    other |= {"dtype": "float16", "scale": 0.5, "mean": [1, 2, 3], "std": [1, 2, 4]}
    about = read_description(describe(tmp_path / "c.yaml", image=other, focal_px={"name": "f"}))
    feed = Adapter(about).feed(image, np.array([70], np.float32))
    assert feed["pixels"].dtype == np.float16 and feed["f"].tolist() == [70]
    # mean and std are in the order of the channels as the graph sees them
    assert feed["pixels"][0, 2, 5].tolist() == pytest.approx([-1, 11.75, 31.125])


OUTPUTS = [
    ("depth", {"layout": "NHW", "is": "metres"}, [[[2.0]]], [[[2.0]]]),
    ("depth", {"layout": "N1HW", "is": "log metres"}, [[[[np.log(3.0)]]]], [[[3.0]]]),
    ("depth", {"layout": "NHW1", "is": "1/metres"}, [[[[0.25]]]], [[[4.0]]]),
    ("depth", {"layout": "NHW", "is": "1/metres"}, [[[-1.0]]], [[[1e5]]]),  # beyond the horizon
    ("sky", {"layout": "NHW", "is": "logit"}, [[[np.log(3.0)]]], [[[0.75]]]),
    ("normals", {"layout": "NHWC", "axes": "opencv"}, [[[[0.0, 3.0, -4.0]]]], [0, -0.6, 0.8]),
    ("normals", {"layout": "NCHW", "axes": "lotus"}, [[[[1.0]], [[0.0]], [[0.0]]]], [-1, 0, 0]),
    ("semantic", {"layout": "NCHW", "is": "logits"}, [[[[0.1]], [[0.9]], [[0.3]]]], [[[3]]]),
    ("semantic", {"layout": "NHW", "is": "ids"}, [[[7]]], [[[7]]]),
    ("semantic", {"layout": "NHWC", "is": "logits"}, [[[[0.1, 0.9, 0.3]]]], [[[3]]]),
    ("sky", {"layout": "NHW", "is": "probability"}, [[[0.75]]], [[[0.75]]]),
    ("depth", {"layout": "N1HW", "is": "metres"}, [[[[2.0, 3.0]]]], [[[2.0, 3.0]]]),
    ("depth", {"layout": "NHW1", "is": "metres"}, [[[[2.0], [3.0]]]], [[[2.0, 3.0]]]),
    ("normals", {"layout": "NHWC", "axes": "opencv"}, [[[[0, 3, -4.0], [1, 0, 0]]]],
     [[[[0, 1]], [[-0.6, 0]], [[0.8, 0]]]]),
]  # fmt: skip


@pytest.mark.parametrize("name, options, found, expected", OUTPUTS)
def test_outputs_become_the_contracts(tmp_path, name, options, found, expected):
    path = describe(
        tmp_path / "io.yaml",
        outputs={name: {"name": "o"} | options},
        classes={7: "thing", 1: "floor", 3: "wall"},
    )
    answers = Adapter(read_description(path)).answers([np.array(found, np.float32)])
    one = np.asarray(expected, np.float64)
    assert answers[name].reshape(-1).tolist() == pytest.approx(one.reshape(-1).tolist(), abs=1e-6)
    assert answers[name].dtype == (np.int32 if name == "semantic" else np.float32)
    if one.ndim > 1:
        assert answers[name].shape == one.shape


@pytest.mark.parametrize("unit", ["metres", "log metres", "1/metres"])
def test_depth_that_is_not_finite_never_becomes_a_distance(tmp_path, unit):
    outputs = {"depth": {"name": "o", "layout": "NHW", "is": unit}}
    adapter = Adapter(read_description(describe(tmp_path / "io.yaml", outputs=outputs)))
    found = adapter.answers([np.array([[[np.nan, np.inf, -np.inf, 1.0]]], np.float32)])["depth"]
    assert np.isnan(found[0, 0, :3]).all() and np.isfinite(found[0, 0, 3])
    beyond = adapter.answers([np.full((1, 1, 1), 1e4, np.float32)])["depth"].item()
    assert np.isnan(beyond) == (unit == "log metres")  # exp(1e4) is no float32


def test_as_many_logits_as_classes(tmp_path):
    outputs = {"semantic": {"name": "o", "layout": "NCHW", "is": "logits"}}
    path = describe(tmp_path / "io.yaml", outputs=outputs, classes={1: "floor", 3: "wall"})
    for n in (1, 3):
        with pytest.raises(ArtefactError, match=f"semantic: found {n} logits, expected one for ea"):
            Adapter(read_description(path)).answers([np.zeros((1, n, 4, 4), np.float32)])


WRONG = {
    "image is missing": {"image": None},
    r"unknown \['sclae'\] under image": {"image": {"name": "x", "size": [4, 4], "sclae": 1}},
    "image.size is": {"image": {"name": "x", "size": [4]}},
    "image.layout is 'CHW'": {"image": {"name": "x", "size": [4, 4], "layout": "CHW"}},
    r"outputs\.flow: expected some of": {"outputs": {"flow": {"name": "x"}}},
    r"depth\.is is 'feet'": {"outputs": {"depth": {"name": "x", "layout": "NHW", "is": "feet"}}},
    "axes 'up' unknown": {"outputs": {"normals": {"name": "x", "layout": "NCHW", "axes": "up"}}},
    "semantic: logits need classes": {
        "outputs": {"semantic": {"name": "x", "layout": "NCHW", "is": "logits"}}
    },
    r"image.size is \[-4, -4\]": {"image": {"name": "x", "size": [-4, -4]}},
    "batch is -2, expected at least 1": {"batch": -2},
    "batch is 0, expected at least 1": {"batch": 0},
    r"batch is 1000000000, too many images of \[16, 24\]": {"batch": 10**9},
    "focal_px is -5.0, expected": {"focal_px": -5.0},
    "focal_px is nan, expected": {"focal_px": float("nan")},
    "image.scale is 'x', expected": {"image": {"name": "x", "size": [4, 4], "scale": "x"}},
    r"image.mean is \['a', 0, 0\], expected three": {
        "image": {"name": "x", "size": [4, 4], "mean": ["a", 0, 0]}
    },
    r"image.std is \[1, 0, 1\], expected three": {
        "image": {"name": "x", "size": [4, 4], "std": [1, 0, 1]}
    },
    r"unknown \['_target_'\] at the top": {"_target_": "os.system"},
    "image.dtype is 'float64'": {"image": {"name": "x", "size": [4, 4], "dtype": "float64"}},
    "image.channels is 'GRB'": {"image": {"name": "x", "size": [4, 4], "channels": "GRB"}},
    r"image.size is \[16384, 8192\]": {"image": {"name": "x", "size": [16384, 8192]}},
    r"unknown \['unit'\] under outputs\.depth": {
        "outputs": {"depth": {"name": "x", "layout": "NHW", "is": "metres", "unit": "m"}}
    },
    "outputs is empty": {"outputs": {}},
    "focal_px is inf, expected": {"focal_px": float("inf")},
    "image.scale is nan, expected": {"image": {"name": "x", "size": [4, 4], "scale": float("nan")}},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_descriptions_name_the_key(tmp_path, message):
    path = describe(tmp_path / "io.yaml", **WRONG[message])
    if WRONG[message] == {"image": None}:
        path.write_text(yaml.safe_dump({"outputs": {}}))
    with pytest.raises(ArtefactError, match=message):
        read_description(path)


def test_a_description_is_data_and_never_an_object(tmp_path):
    path = tmp_path / "io.yaml"
    path.write_text(f"image: !!python/object/apply:os.system ['touch {tmp_path}/hacked']\n")
    with pytest.raises(ArtefactError, match="not readable YAML"):
        read_description(path)
    assert not (tmp_path / "hacked").exists()


def test_a_description_that_unfolds_without_end_is_refused(tmp_path):
    path = tmp_path / "io.yaml"
    path.write_text("image: &a [1, 1]\noutputs: &b [*a, *a]\nclasses: {0: [*b, *b]}\n")
    with pytest.raises(ArtefactError, match=r"has aliases \(\*name\)"):
        read_description(path)
    path.write_text("image: " + "[" * 100_000)
    with pytest.raises(ArtefactError, match="has more than 8 levels; write plain tables"):
        read_description(path)  # at once: PyYAML takes minutes for it
    path.write_text("image: " + "[" * 8 + "]" * 8)  # and the table itself is one more
    with pytest.raises(ArtefactError, match="has more than 8 levels; write plain tables"):
        read_description(path)
    outputs = {n: {"name": n, "layout": "NHW", "is": "metres"} for n in ("depth",)}
    outputs["sky"] = {"name": "s", "layout": "NHW", "is": "logit"}
    outputs["semantic"] = {"name": "i", "layout": "NHW", "is": "ids"}
    whole = {"outputs": outputs, "classes": {1: "floor"}, "focal_px": {"name": "f"}}
    read_description(describe(path, **whole, sha256=["0" * 64]))  # many tables, and none is deep


def test_another_file_or_other_names_are_refused(tmp_path):
    model = foreign_model(tmp_path / "m.onnx")
    with pytest.raises(ArtefactError, match=r"not the file that .* describes"):
        open_runtime(model, io=describe(tmp_path / "a.yaml", sha256="0" * 64))
    image = {"name": "x", "size": list(SIZE)}
    with pytest.raises(ArtefactError, match=r"inputs \['pixels'\].*describes \['x'\]"):
        open_runtime(model, io=describe(tmp_path / "b.yaml", image=image))
    outputs = {"depth": {"name": "z", "layout": "N1HW", "is": "log metres"}}
    with pytest.raises(ArtefactError, match=r"outputs \['d'\].*describes .* and \['z'\]"):
        open_runtime(model, io=describe(tmp_path / "c.yaml", outputs=outputs))
    more = onnx.load(model)
    more.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["N"]))
    onnx.save(more, model)
    with pytest.raises(ArtefactError, match=r"inputs \['pixels', 'more'\]"):
        open_runtime(model, io=describe(tmp_path / "d.yaml"))


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return make_labels(tmp_path_factory.mktemp("foreign") / "labels", n=3, tasks=("depth",))


def judge(tmp_path, labels, **kwargs):
    io = describe(tmp_path / "io.yaml")
    out = str(tmp_path / "out")
    return verify(
        export=str(tmp_path / "m.onnx"), labels=str(labels.path), io=str(io), out=out, **kwargs
    )


def test_a_foreign_model_is_judged_without_any_reference(tmp_path, labels):
    foreign_model(tmp_path / "m.onnx")
    result = judge(tmp_path, labels)
    assert result["exit"] == 0 and "m.onnx" in result["summary"]
    assert "accuracy was measured and not judged: give reference=" in result["summary"]
    assert 0 <= result["scores"]["m.onnx"]["truth"]["mean"]["depth"]["delta1"] <= 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "m.onnx" in page and "data:image/" in page


def test_answers_read_by_another_description_are_not_judged_again(tmp_path, labels):
    foreign_model(tmp_path / "m.onnx")
    judge(tmp_path, labels)
    assert judge(tmp_path, labels, rerun=False)["exit"] == 0
    outputs = {"depth": {"name": "d", "layout": "N1HW", "is": "1/metres"}}
    other = str(describe(tmp_path / "other.yaml", outputs=outputs))
    model, out = str(tmp_path / "m.onnx"), str(tmp_path / "out")
    with pytest.raises(UsageError, match="were read by another description than io="):
        verify(export=model, labels=str(labels.path), io=other, out=out, rerun=False)


def test_a_foreign_model_must_agree_with_itself(tmp_path, labels):
    foreign_model(tmp_path / "m.onnx", wrong_for_two=0.2)
    result = judge(tmp_path, labels, batch=2)
    assert result["exit"] == 1
    assert {f["check"] for f in result["findings"]} == {"consistency"}
    assert "m.onnx: depth: depth other_batch is 0.2" in result["summary"]


def test_a_foreign_model_may_be_held_to_another_one_and_to_a_score(tmp_path, labels):
    from export.budgets import default_budgets

    foreign_model(tmp_path / "m.onnx", bias=0.72)
    reference = foreign_model(tmp_path / "fp32.onnx", bias=0.7)
    result = judge(tmp_path, labels, reference=str(reference))
    assert result["exit"] == 1  # 2 % farther everywhere
    assert "depth: depth p999 is 0.0202 relative, budget 0.001" in result["summary"]
    budgets = default_budgets()
    budgets["depth"]["fp32"]["score"] = {"depth.delta1": 0.999}
    result = judge(tmp_path, labels, budgets=budgets)
    assert "depth.delta1 against the truth is" in result["summary"]
    assert "budget at least 0.999" in result["summary"]
    assert {f["check"] for f in result["findings"]} == {"score"}
    assert "not judged" not in result["summary"]


def test_a_reference_belongs_to_a_single_model(tmp_path, labels):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="reference=x: only for a single model"):
        verify(export=str(tmp_path / "folder"), labels=str(labels.path), reference="x")
