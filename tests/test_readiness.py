"""The readiness lint against hand-made graphs whose verdicts follow from the published tables."""

import json

import numpy as np
import onnx
import pytest
from export_cases import hand_made
from onnx import TensorProto, helper, numpy_helper

from export.readiness import TARGETS, lint, markdown, tables, verdicts

F, U8 = TensorProto.FLOAT, TensorProto.UINT8


def graph(nodes, *, inputs=(("x", F, [1, 3, 8, 8]),), constants=None, opset=18, domains=()):
    """A model out of ``nodes`` whose last output is the graph's."""
    made = [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs]
    out = helper.make_tensor_value_info(nodes[-1].output[0], F, None)
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(
        helper.make_graph(nodes, "g", made, [out], stored), opset_imports=imports, ir_version=10
    )


def takes(model):
    return {t: v["takes"] for t, v in verdicts(model).items()}


def only(answer):
    return dict.fromkeys(TARGETS, answer)


def test_a_plain_artefact_is_taken_everywhere(tmp_path):
    model = hand_made(tmp_path / "a.onnx")
    assert takes(model) == only("yes") and lint(model) == []
    assert "All 6 nodes: 10.3: yes, 10.12: yes, 11: yes." in markdown(model)


def relu(**kwargs):
    return graph([helper.make_node("Relu", ["x"], ["y"], name="r")], **kwargs)


@pytest.mark.parametrize(
    "opset, expected",
    [
        (8, ("no", "no", "no")),
        (20, ("yes", "yes", "yes")),
        (22, ("no", "unclear", "yes")),
        (25, ("no", "no", "unclear")),
    ],
)
def test_opsets(opset, expected):
    assert takes(relu(opset=opset)) == dict(zip(TARGETS, expected, strict=True))


def test_an_operator_that_came_later_is_no_no_yes_or_unclear():
    model = graph([helper.make_node("Swish", ["x"], ["y"], name="s")], opset=24)
    assert takes(model) == {"10.3": "no", "10.12": "unclear", "11": "yes"}
    rows = {r["op"]: r for r in lint(model)}
    assert rows["Swish"]["node"] == "s" and rows["Swish"]["what"] == "came after 10.1"


BAD = {
    "no such operator": graph([helper.make_node("Det", ["x"], ["y"])]),
    "mode cubic": graph(
        [helper.make_node("Resize", ["x", "", "s"], ["y"], mode="cubic")],
        constants={"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "antialias": graph(
        [helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=1)],
        constants={"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "takes no double": graph(
        [helper.make_node("Relu", ["x"], ["y"])], inputs=(("x", TensorProto.DOUBLE, [1, 3]),)
    ),
    "uint8 codes": graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        constants={"s": np.float32(0.1), "z": np.uint8(3)},
    ),
    "zero point other than 0": graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        constants={"s": np.float32(0.1), "z": np.int8(3)},
    ),
    "axes that are computed": graph(
        [
            helper.make_node("Cast", ["a"], ["b"], to=TensorProto.INT64),
            helper.make_node("ReduceMean", ["x", "b"], ["y"]),
        ],
        inputs=(("x", F, [1, 3, 8, 8]), ("a", F, [1])),
    ),
    "more outputs than the first": graph(
        [helper.make_node("LayerNormalization", ["x", "w"], ["y", "mean"])],
        constants={"w": np.ones(8, np.float32)},
    ),
    "a free size beside N": relu(inputs=(("x", F, [1, 3, "H", 8]),)),
    "read by Transpose": graph(
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["t"], ["y"], to=F),
        ],
        inputs=(("x", U8, [1, 8, 8, 3]),),
    ),
    "operators of com.example": graph(
        [helper.make_node("Magic", ["x"], ["y"], domain="com.example")], domains=("com.example",)
    ),
}


@pytest.mark.parametrize("why", BAD)
def test_restrictions_of_the_tables(why):
    told = verdicts(BAD[why])
    assert {t: v["takes"] for t, v in told.items()} == only("no"), told
    assert any(why in reason for reason in told["11"]["why"]), told


def test_control_flow_is_named():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])],
        "b",
        [],
        [helper.make_tensor_value_info("b", F, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    model = graph([node], constants={"c": np.array(True)})
    assert "control flow" in verdicts(model)["10.3"]["why"][0]


def test_symmetric_int8_pairs_are_taken():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    model = graph(nodes, constants={"s": np.float32(0.1), "z": np.int8(0)})
    assert takes(model) == only("yes")


def test_the_tables_hold_what_the_published_pages_say():
    found = tables()
    assert set(found["10.1"]) < set(found["11.1"])  # a parser only gained operators
    assert set(found["11.1"]["LayerNormalization"]) == set("fhb")
    assert set(found["10.1"]["Cast"]) == set("fhbiltu") and "Attention" not in found["10.1"]
    assert not {"Det", "QLinearConv", "DynamicQuantizeLinear", "Col2Im"} & set(found["11.1"])
    known = {s.name for s in onnx.defs.get_all_schemas()} | {"ImageScaler", "ParametricSoftplus"}
    known |= {"ScaledTanh"}
    assert set(found["11.1"]) <= known, sorted(set(found["11.1"]) - known)
    assert json.dumps(found)
