"""Half precision rounded at every node, activation ranges, Q/DQ, and the search for islands."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from export_cases import make_labels, make_student
from onnx import TensorProto, helper, numpy_helper

from export.budgets import Finding
from export.delivery import export_student
from export.lowering import make_precision, split_keys
from export.precision import activation_ranges, group_of, groups_of, lower, named, quantised_share
from export.rounding import emulate, low_precision, ranges, run_unoptimised
from export.search import smallest_islands
from export.verify import verify
from teacher.errors import EnvironmentFailure, UsageError

HALVES = {
    "fp16": (TensorProto.FLOAT16, torch.float16),
    "bf16": (TensorProto.BFLOAT16, torch.bfloat16),
}


def chain(kind):
    """y = float((half(x) * half(w) + half(b)) * half(w)): three half-precision nodes."""
    w = np.array([1.3, -0.7, 3.1], np.float32)
    stored = [
        helper.make_tensor(n, kind, [3], v.tolist()) for n, v in (("w", w), ("b", w[::-1].copy()))
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=kind),
        helper.make_node("Mul", ["h", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Mul", ["a", "w"], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", info[:1], info[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model, torch.tensor(w)


@pytest.mark.parametrize("precision", HALVES)
def test_emulation_rounds_like_torch_after_every_node(precision):
    kind, dtype = HALVES[precision]
    model, w = chain(kind)
    x = np.random.default_rng(0).normal(0, 100, (2000, 3)).astype(np.float32)
    found = run_unoptimised(emulate(model), ["y"], [{"x": x}])[0][0]
    h, w16, b16 = torch.tensor(x).to(dtype), w.to(dtype), w.flip(0).to(dtype)
    expected = ((h * w16 + b16) * w16).float().numpy()  # torch rounds after every operation
    assert low_precision(model) == precision
    assert np.array_equal(found, expected)


def test_what_float16_cannot_hold_becomes_infinite():
    model, _ = chain(TensorProto.FLOAT16)
    x = np.array([[60000.0, 1.0, 30000.0]], np.float32)
    found = run_unoptimised(emulate(model), ["y"], [{"x": x}])[0][0][0]
    assert np.isposinf(found[0]) and np.isfinite(found[1]) and np.isposinf(found[2])


def test_half_precision_inputs_stay_so_that_they_can_be_fed():
    """A graph whose only half tensors are its input and constants, as other tools write them."""
    low = TensorProto.FLOAT16
    tenth = numpy_helper.from_array(np.array(0.1, np.float16), "tenth")
    nodes = [
        helper.make_node("Constant", [], ["k"], value=tenth),
        helper.make_node("Mul", ["x", "k"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(n, low, ["N"]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "half", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    assert low_precision(model) == "fp16"
    x = np.array([1, 3, 60000], np.float16)
    found = run_unoptimised(emulate(model), ["y"], [{"x": x}])[0][0]
    assert found.tolist() == (x * np.float16(0.1)).tolist()


def test_the_card_of_an_emulated_graph_and_its_float_parts_stay():
    model, _ = chain(TensorProto.FLOAT16)
    out = emulate(model)
    casts = [n for n in out.graph.node if n.op_type == "Cast"]
    assert len(casts) == 1 + 2 * 4 + 1  # each of four half tensors: down and up again
    assert {t.data_type for t in out.graph.initializer} == {TensorProto.FLOAT}


def conv_graph(weights, *, scale=1.0, norm=False):
    """x [N,2,4,4] -> Conv 1x1 -> Relu -> (LayerNormalization) -> Conv 1x1 -> y, named as ours."""
    first, second = weights
    stored = {
        "student.backbone.net.blocks.0.conv.weight": first[:, :, None, None],
        "student.heads.depth.maps.out.weight": second[:, :, None, None],
        "scale": np.float32(scale),
        "gamma": np.ones(4, np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["s"]),
        helper.make_node("Conv", ["s", "student.backbone.net.blocks.0.conv.weight"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("LayerNormalization", ["r", "gamma"], ["n"])
        if norm
        else helper.make_node("Identity", ["r"], ["n"]),
        helper.make_node("Conv", ["n", "student.heads.depth.maps.out.weight"], ["y"]),
    ]
    info = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 4, 4]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", len(second), 4, 4]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in stored.items()]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


WEIGHTS = (np.array([[1.0, 0.5], [-1.0, 2.0], [0.25, 0.25]]), np.array([[1.0, -2.0, 3.0]]))


def test_ranges_by_hand():
    x = np.zeros((1, 2, 4, 4), np.float32)
    x[0, :, 0, 0] = (3, 4)
    rows = {r["tensor"]: r for r in ranges(conv_graph(WEIGHTS, scale=100, norm=True), [{"x": x}])}
    # the largest of (300 + 200, -300 + 800, 75 + 100) and, in its row of four, (500 - 125)^2
    assert rows["c"]["max_abs"] == 500 and rows["s"]["max_abs"] == 400
    assert rows["r"]["max_square"] == pytest.approx(375**2)  # past 65504: float16 overflows here
    assert "max_square" not in rows["c"]


def test_groups_follow_the_weights_names():
    assert group_of("student.backbone.net.blocks.3.4.pw_exp.conv.weight") == "backbone.blocks.3"
    assert group_of("student.backbone.net.conv_stem.weight") == "backbone.conv_stem"
    assert group_of("student.heads.normals.maps.out.bias") == "heads.normals.out"
    assert group_of("student.heads.depth.step.weight") == "heads.depth.step"
    assert group_of("student.decoder.fuse.1.0.weight") == "decoder.fuse"
    groups = groups_of(named(conv_graph(WEIGHTS)))
    assert [len(groups[g]) for g in ("input", "backbone.blocks.0", "heads.depth.out")] == [1, 3, 1]


def feeds(seed=0, many=4):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(0, 1, (1, 2, 4, 4)).astype(np.float32)} for _ in range(many)]


def test_activation_ranges_are_means_of_extremes():
    told = activation_ranges(conv_graph(WEIGHTS), feeds())
    expected = np.mean([[f["x"].min(), f["x"].max()] for f in feeds()], 0)
    assert told["s"] == pytest.approx(tuple(expected), rel=1e-6)
    assert told["r"][0] == 0


def test_int8_for_tensorrt_is_the_symmetric_formula():
    model = conv_graph(WEIGHTS)
    low = lower(model, "int8-trt", feeds())
    x = feeds(seed=9, many=1)[0]["x"]
    found = run_unoptimised(low, ["y"], [{"x": x}])[0][0]

    def pair(values, scale):  # quantise and back, half to even, -128..127
        return np.clip(np.round(values / scale), -128, 127) * scale

    told = activation_ranges(model, feeds())
    step = {n: np.float32(max(-a, b) / 127) for n, (a, b) in told.items()}  # symmetric
    first, second = (
        pair(w, np.abs(w).max(1, keepdims=True) / 127).astype(np.float32) for w in WEIGHTS
    )
    hidden = np.maximum(np.einsum("oi,nihw->nohw", first, pair(x, step["s"])), 0)
    expected = np.einsum("oi,nihw->nohw", second, pair(hidden, step["n"]))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    zeros = [t for t in low.graph.initializer if "zero_point" in t.name]
    assert zeros and all(not numpy_helper.to_array(z).any() for z in zeros)
    assert {z.data_type for z in zeros} == {TensorProto.INT8}
    assert quantised_share(low) == 1


def test_int8_for_the_cpu_uses_unsigned_activations_and_fences_its_nodes():
    low = lower(conv_graph(WEIGHTS), "int8-cpu", feeds())
    zeros = {t.data_type for t in low.graph.initializer if "zero_point" in t.name}
    assert TensorProto.UINT8 in zeros and quantised_share(low) == 1
    options = ort.SessionOptions()
    ort.InferenceSession(low.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_islands_stay_in_fp32_and_the_interface_stays_as_it_was():
    model = conv_graph(WEIGHTS)
    helper.set_model_props(model, {"dense_distill.note": '"kept"'})
    low = lower(model, "int8-trt", feeds(), islands=["heads.depth.out"])
    share = WEIGHTS[0].size / (WEIGHTS[0].size + WEIGHTS[1].size)
    assert quantised_share(low) == pytest.approx(share)
    assert [str(v.type) for v in low.graph.input] == [str(v.type) for v in model.graph.input]
    assert {p.key: p.value for p in low.metadata_props} == {"dense_distill.note": '"kept"'}


@pytest.mark.parametrize("precision, opset", [("fp16", 18), ("bf16", 22)])
def test_autocast_lowers_products_and_keeps_norms(precision, opset):
    pytest.importorskip("modelopt.onnx", reason="NVIDIA Model-Optimizer is not installed")
    low = lower(conv_graph(WEIGHTS, norm=True), precision, feeds())
    kind, _ = HALVES[precision]
    stored = {t.name: t.data_type for t in low.graph.initializer}
    convs = [n for n in low.graph.node if n.op_type == "Conv"]
    assert [stored[n.input[1]] for n in convs] == [kind, kind]
    norm = next(n for n in low.graph.node if n.op_type == "LayerNormalization")
    assert stored[norm.input[1]] == TensorProto.FLOAT
    assert low.opset_import[0].version == opset and quantised_share(low) == 1
    assert low.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    x = feeds(seed=5, many=1)[0]["x"].repeat(3, 0)
    exact, rounded = (
        run_unoptimised(m, ["y"], [{"x": x}])[0][0]
        for m in (conv_graph(WEIGHTS, norm=True), emulate(low))
    )
    step = 2.0**-10 if precision == "fp16" else 2.0**-7
    assert 0 < np.abs(exact - rounded).max() < 20 * step * np.abs(exact).max()


def test_with_every_group_in_fp32_a_half_graph_is_the_fp32_graph():
    """Also what has no weights is a group: a picture is scaled before the first convolution."""
    pytest.importorskip("modelopt.onnx", reason="NVIDIA Model-Optimizer is not installed")
    model = conv_graph(WEIGHTS, scale=100)
    x = feeds(seed=5, many=1)
    exact = run_unoptimised(model, ["y"], x)[0][0]

    def same(low):
        return np.array_equal(run_unoptimised(emulate(low), ["y"], x)[0][0], exact)

    trial = judging({"image": same})
    asked = {"feeds": feeds(), "threads": 1, "trial": trial, "whole": lambda: trial}
    graph, facts = make_precision(model, "fp16", **asked)
    assert graph is not None and "declined" not in facts
    assert "input" in facts["islands"]


def judging(images, on_all=lambda low: True):
    """A trial whose images, and all of them together, ask something of the graph."""

    def trial(low):
        bad = [key for key, passes in images.items() if not passes(low)]
        bad += [] if on_all(low) else [""]
        about = {"artefact": "x", "task": "depth", "measure": "p999", "budget": 0.1}
        found = [Finding(**about, found=0.2, check="parity", image=key) for key in bad]
        return (2.0 if bad else 0.5), found

    return trial


@pytest.mark.parametrize("which", ["an image", "all together"])
def test_where_many_images_are_not_content_the_search_goes_on_under_them(which):
    shares = {w.size / sum(v.size for v in WEIGHTS) for w in WEIGHTS}
    assert min(shares) < 0.5 < max(shares)  # the larger one is to stay in fp32
    strict = lambda low: quantised_share(low) < 0.5  # noqa: E731
    few = judging({"easy": lambda low: True})
    many = judging({"hard": strict}) if which == "an image" else judging({}, strict)
    asked = {"feeds": feeds(), "threads": 1, "precision": "int8-trt", "trial": few}
    graph, facts = make_precision(conv_graph(WEIGHTS), whole=lambda: many, **asked)
    assert quantised_share(graph) == pytest.approx(min(shares)) and len(facts["islands"]) == 1
    assert [t["islands"] for t in facts["trials"][:2]] == [[], []]
    assert [t.get("confirms", False) for t in facts["trials"][:2]] == [False, True]
    graph, facts = make_precision(conv_graph(WEIGHTS), whole=lambda: few, **asked)
    assert facts["islands"] == [] and quantised_share(graph) == 1


def test_what_many_images_never_accept_is_declined_in_their_words():
    few, many = judging({"easy": lambda low: True}), judging({"b": lambda low: False})
    asked = {"feeds": feeds(), "threads": 1, "precision": "int8-trt"}
    graph, facts = make_precision(conv_graph(WEIGHTS), trial=few, whole=lambda: many, **asked)
    assert graph is None and "islands" not in facts and "lowered_share" not in facts
    told = "misses a budget even with every group in fp32: x: depth: p999 is 0.2"
    assert facts["declined"].startswith(told) and "worst image b" in facts["declined"]

    def unasked():
        raise AssertionError("many images were asked of what few had refused")

    _, facts = make_precision(conv_graph(WEIGHTS), trial=many, whole=unasked, **asked)
    assert "worst image b" in facts["declined"]


def test_the_dearer_judge_is_asked_seldom_and_no_island_can_be_spared_under_it():
    costs = dict(zip("abcdef", (0.5, 0.4, 0.3, 0.2, 0.1, 0.05), strict=True))
    asked = []

    def excess(islands):
        return sum(c for g, c in costs.items() if g not in islands)

    def confirm(islands):
        asked.append(islands)
        return 1.6 * excess(islands)

    found = smallest_islands(list(costs), excess, confirm)
    assert found.excess == confirm(frozenset(found.islands)) <= 1
    assert all(confirm(frozenset(found.islands) - {g}) > 1 for g in found.islands)
    assert len(asked) - 1 - len(found.islands) <= 6  # of 26 trials; each set once
    confirmed = [t for t in found.trail if t.get("confirms")]
    assert len(confirmed) == len(set(asked[: len(confirmed)]))


def test_what_judges_at_last_is_more_than_what_judges_each_trial():
    labels = SimpleNamespace(path="p", keys=[f"k{i:04}" for i in range(1000)])
    calibrating, judging, whole = split_keys(labels, 8)
    assert len(calibrating) == len(judging) == 8 and len(whole) == len(set(whole)) == 64
    assert set(judging) < set(whole) and not set(calibrating) & set(whole)
    labels.keys = labels.keys[:20]
    calibrating, judging, whole = split_keys(labels, 32)
    assert len(calibrating) == len(judging) == len(whole) == 10
    labels.keys = labels.keys[:17]
    calibrating, judging, whole = split_keys(labels, 4)
    assert set(whole) | set(calibrating) == set(labels.keys) and len(whole) == 13
    labels.keys = labels.keys[:3]
    with pytest.raises(UsageError, match="found 3 images, expected at least 4"):
        split_keys(labels, 4)


def test_without_model_optimizer_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt.onnx.autocast", None)
    with pytest.raises(EnvironmentFailure, match=r"needs NVIDIA Model-Optimizer.*pip install"):
        lower(conv_graph(WEIGHTS), "fp16", feeds())


# -- the search --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_search_finds_as_few_islands_as_trying_all_sets(seed):
    rng = np.random.default_rng(seed)
    costs = dict(zip("abcdef", rng.exponential(0.5, 6), strict=True))

    def excess(islands):  # what is lowered costs, and costs add up
        return sum(c for g, c in costs.items() if g not in islands)

    fewest = next(
        k
        for k in range(7)
        if any(excess(frozenset(s)) <= 1 for s in itertools.combinations(costs, k))
    )
    found = smallest_islands(list(costs), excess)
    assert found.islands is not None and len(found.islands) == fewest
    assert found.excess == excess(frozenset(found.islands)) <= 1


def test_no_island_can_be_spared_even_where_costs_do_not_add():
    def excess(islands):  # a needs b as well; c alone is cheap
        return 0.5 if {"a", "b"} <= islands else 2.0 - 0.1 * len(islands)

    found = smallest_islands(["a", "b", "c"], excess)
    assert found.islands == ("a", "b")
    told = [str(t.get("islands", ("all but", t.get("all_but")))) for t in found.trail]
    assert len(set(told)) == len(told) and found.trail[0]["islands"] == []  # none is tried twice


def test_nothing_suffices_and_nothing_is_needed():
    assert smallest_islands(["a"], lambda islands: 0.3).islands == ()
    assert smallest_islands(["a"], lambda islands: 3.0).islands is None


def test_other_precisions_ask_for_a_calibration_set(tmp_path):
    with pytest.raises(UsageError, match=r"precision=\['fp16'\]: needs calibration=LABELS"):
        export_student(checkpoint="x", out=str(tmp_path / "o"), precision=["fp32", "fp16"])
    assert not (tmp_path / "o").exists()


def test_a_lowered_student_holds_its_budgets_on_every_image_that_judged(tmp_path):
    """The whole way: lowered, searched, judged by all images that did not calibrate, written."""
    student = make_student(tmp_path / "s.safetensors", tasks=("depth",))
    labels = make_labels(tmp_path / "labels", n=12, tasks=("depth",))
    asked = {"checkpoint": str(student), "out": str(tmp_path / "e"), "calibration_images": 2}
    told = export_student(**asked, precision=["int8-trt"], calibration=str(labels.path))
    facts = told["artefacts"]["student.int8-trt.onnx"]
    about = facts["calibration"]
    assert len(about["calibrating"]) == len(about["judging"]) == 2
    assert len(about["confirming"]) == 10
    assert not set(about["confirming"]) & set(about["calibrating"])
    assert 0 < facts["lowered_share"] <= 1 and facts["excess"] <= 1
    verdict = verify(export=str(tmp_path / "e"), labels=str(labels.path))
    assert verdict["exit"] == 0, verdict["summary"]
