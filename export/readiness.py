"""Will TensorRT take this graph? Said in one table before anyone waits for a builder.

From the published operator tables of the ONNX parser (onnx-tensorrt ``docs/operators.md``), kept in
``trt_operators.json`` as types -> operators (f h b: float32, float16, bfloat16; i l: int32, int64;
c u t: int8, uint8, bool; 8, 4: fp8, int4). Two were at hand: that of release 10.1 (June 2024) and
that of 11.1 (June 2026, parser commit 7c51a63). A parser only ever gained operators between them,
so:

* ``10.3`` (JetPack 6): yes if 10.1's table says so; else no.
* ``10.12``: yes if 10.1's table says so; unclear if only 11.1's does.
* ``11``: yes if 11.1's table says so.

Opsets: 10.1's page names 9 to 20; 10.15's and 11.1's pages 9 to 24. "Unclear" is never "yes".
Restrictions checked here are those of the tables that a dense-vision student can run into.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.onnx_files import graphs

TARGETS = ("10.3", "10.12", "11")
YES, NO, UNCLEAR = "yes", "no", "unclear"
OPSETS = {"10.3": (9, 20, 20), "10.12": (9, 20, 24), "11": (9, 24, 25)}  # first, sure, at most
LETTERS: dict[int, str] = {
    TensorProto.FLOAT: "f",
    TensorProto.FLOAT16: "h",
    TensorProto.BFLOAT16: "b",
    TensorProto.INT32: "i",
    TensorProto.INT64: "l",
    TensorProto.INT8: "c",
    TensorProto.UINT8: "u",
    TensorProto.BOOL: "t",
    TensorProto.FLOAT8E4M3FN: "8",
    TensorProto.INT4: "4",
}
SHAPE_INPUTS = {  # operator -> inputs that are shapes, axes or indices, whose type is their own
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Gather": (1,), "Squeeze": (1,),
    "Unsqueeze": (1,), "Resize": (1, 2, 3), "Tile": (1,), "Pad": (1, 3), "ConstantOfShape": (0,),
    "TopK": (1,), "Split": (1,), "Where": (0,), "QuantizeLinear": (2,), "DequantizeLinear": (1,),
    "CumSum": (1,), "OneHot": (0, 1), "GatherND": (1,), "GatherElements": (1,), "Range": (),
}  # fmt: skip
Verdict = tuple[str, str]  # yes, no or unclear, and why


def tables() -> dict[str, dict[str, str]]:
    """Release -> operator -> letters of its types; ``11.1`` holds 10.1's as well."""
    told = json.loads((files("export") / "trt_operators.json").read_text())
    found = {
        release: {op: types for types, ops in rows.items() for op in ops.split()}
        for release, rows in told.items()
    }
    return {"10.1": found["10.1"], "11.1": found["10.1"] | found["added by 11.1"]}


def lint(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """One row per question that not every target answers with yes, the opset's row first.

    Rows: ``node`` (its name), ``op``, ``what``, and per target of `TARGETS` yes, no or unclear.
    """
    rows = [_opset_row(model)]
    model = _inferred(model)
    known = tables()
    types = _types(model)
    for graph in graphs(model):
        constants = _constants(graph)
        for node in graph.node:
            rows.extend(_node_rows(node, known, types, constants))
    rows.extend(_input_rows(model))
    return [r for r in rows if any(r[t] != YES for t in TARGETS)]


def verdicts(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """Target -> ``takes`` (yes, no, unclear) and ``why``, at most three reasons."""
    rows = lint(model)
    result = {}
    for target in TARGETS:
        bad = [r for r in rows if r[target] != YES]
        worst = NO if any(r[target] == NO for r in bad) else UNCLEAR if bad else YES
        reasons = list(dict.fromkeys(f"{r['op']}: {r['what']}" for r in bad if r[target] == worst))
        result[target] = {"takes": worst, "why": reasons[:3]}
    return result


def _row(node: onnx.NodeProto | None, what: str, **answers: str) -> dict[str, Any]:
    name, op = (node.name, node.op_type) if node is not None else ("", "graph")
    told = {t: answers.get("t" + t.replace(".", "_"), YES) for t in TARGETS}
    return {"node": name, "op": op, "what": what, **told}


def _everywhere(node: onnx.NodeProto | None, what: str) -> dict[str, Any]:
    return _row(node, what, t10_3=NO, t10_12=NO, t11=NO)


def _opset_row(model: onnx.ModelProto) -> dict[str, Any]:
    own = [o for o in model.opset_import if o.domain in ("", "ai.onnx")]
    opset = max((o.version for o in own), default=0)
    row = _row(None, f"opset {opset}")
    for target, (first, sure, most) in OPSETS.items():
        row[target] = YES if first <= opset <= sure else UNCLEAR if opset <= most else NO
    if opset < 9:
        row |= dict.fromkeys(TARGETS, NO)
    foreign = sorted({o.domain for o in model.opset_import} - {"", "ai.onnx"})
    used = {n.domain for g in graphs(model) for n in g.node} & set(foreign)
    if used:
        row["what"] += f", operators of {', '.join(sorted(used))}"
        row |= dict.fromkeys(TARGETS, NO)
    return row


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError:
        return model


def _types(model: onnx.ModelProto) -> dict[str, int]:
    found: dict[str, int] = {}
    for graph in graphs(model):
        for item in (*graph.input, *graph.output, *graph.value_info):
            found[item.name] = item.type.tensor_type.elem_type
        found |= {t.name: t.data_type for t in graph.initializer}
    return found


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    found = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = node.attribute[0].t
    return found


def _node_rows(
    node: onnx.NodeProto,
    known: Mapping[str, Mapping[str, str]],
    types: Mapping[str, int],
    constants: Mapping[str, onnx.TensorProto],
) -> Iterator[dict[str, Any]]:
    if node.domain not in ("", "ai.onnx"):
        return  # the opset's row says so
    old, new = known["10.1"].get(node.op_type), known["11.1"].get(node.op_type)
    if new is None:
        yield _everywhere(node, "no such operator in the parser")
        return
    if old is None:
        yield _row(node, "came after 10.1", t10_3=NO, t10_12=UNCLEAR)
    allowed = new
    skip = SHAPE_INPUTS.get(node.op_type, ())
    seen = {types.get(x, 0) for i, x in enumerate(node.input) if x and i not in skip}
    if node.op_type == "Cast":
        seen |= {types.get(x, 0) for x in node.output}
    for kind in sorted(seen - {0}):
        if LETTERS.get(kind, "?") not in allowed:
            yield _everywhere(node, f"takes no {TensorProto.DataType.Name(kind).lower()}")
    if why := RESTRICTIONS.get(node.op_type, _free)(node, constants, types):
        yield _everywhere(node, why)


def _input_rows(model: onnx.ModelProto) -> Iterator[dict[str, Any]]:
    """uint8 only into Cast; every size but the first fixed; at most eight dimensions."""
    graph = model.graph
    stored = {t.name for t in graph.initializer}
    for item in graph.input:
        if item.name in stored:
            continue
        dims = item.type.tensor_type.shape.dim
        if any(not d.HasField("dim_value") or d.dim_value < 1 for d in dims[1:]):
            yield _everywhere(None, f"input {item.name}: a free size beside N")
        if item.type.tensor_type.elem_type == TensorProto.UINT8:
            readers = {n.op_type for n in graph.node if item.name in n.input}
            if readers - {"Cast"}:
                what = f"uint8 input {item.name} read by {', '.join(sorted(readers - {'Cast'}))}"
                yield _everywhere(None, what)
    for item in graph.value_info:
        if len(item.type.tensor_type.shape.dim) > 8:
            yield _everywhere(None, f"{item.name}: more than 8 dimensions")


# -- restrictions of single operators ----------------------------------------------------------

Types = Mapping[str, int]
Constants = Mapping[str, onnx.TensorProto]


def _free(node: onnx.NodeProto, constants: Constants, types: Types) -> str:
    return ""


def _facts(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _resize(node: onnx.NodeProto, constants: Constants, types: Types) -> str:
    facts = _facts(node)
    mode = facts.get("mode", b"nearest").decode()
    if mode not in ("nearest", "linear"):
        return f"mode {mode}; only nearest and linear"
    if facts.get("antialias", 0):
        return "antialias"
    how = facts.get("coordinate_transformation_mode", b"half_pixel").decode()
    ways = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric")
    return "" if how in (*ways, "align_corners") else f"coordinates by {how}"


def _constant_axes(node: onnx.NodeProto, constants: Constants, types: Types) -> str:
    late = len(node.input) > 1 and node.input[1] and node.input[1] not in constants
    return "axes that are computed; they must be constant" if late else ""


def _first_output(node: onnx.NodeProto, constants: Constants, types: Types) -> str:
    return "more outputs than the first" if any(node.output[1:]) else ""


def _pool(node: onnx.NodeProto, constants: Constants, types: Types) -> str:
    facts = _facts(node)
    if any(d != 1 for d in facts.get("dilations", [])):
        return "dilations"
    if len(facts.get("kernel_shape", [0, 0])) not in (2, 3):
        return "other than 2 or 3 dimensions"
    return _first_output(node, constants, types)


def _symmetric(node: onnx.NodeProto, constants: Constants, types: Types) -> str:
    if len(node.input) < 3 or not node.input[2]:
        return ""
    zero = constants.get(node.input[2])
    if zero is None:
        return "a zero point that is computed"
    if zero.data_type == TensorProto.UINT8:
        return "uint8 codes; only signed ones"
    return "a zero point other than 0" if np.any(numpy_helper.to_array(zero)) else ""


def _top_k(node: onnx.NodeProto, constants: Constants, types: Types) -> str:
    k = constants.get(node.input[1])
    return "K of 3840 or more" if k is not None and int(numpy_helper.to_array(k)) >= 3840 else ""


def _control_flow(node: onnx.NodeProto, constants: Constants, types: Types) -> str:
    return "control flow; TensorRT takes it with limits, our export never needs it"


RESTRICTIONS: dict[str, Callable[[onnx.NodeProto, Constants, Types], str]] = {
    "Resize": _resize,
    "LayerNormalization": _first_output,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "Squeeze": _constant_axes,
    "Unsqueeze": _constant_axes,
    "CumSum": _constant_axes,
    "QuantizeLinear": _symmetric,
    "DequantizeLinear": _symmetric,
    "TopK": _top_k,
    "If": _control_flow,
    "Loop": _control_flow,
    "Scan": _control_flow,
}
for _kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"):
    RESTRICTIONS[f"Reduce{_kind}"] = _constant_axes


def markdown(model: onnx.ModelProto) -> str:
    """The table that a person reads: what each target says, and every row that is not all yes."""
    lines = ["| node | operator | what | TensorRT " + " | ".join(TARGETS) + " |", "|---" * 6 + "|"]
    for row in lint(model):
        told = " | ".join(row[t] for t in TARGETS)
        lines.append(f"| {row['node']} | {row['op']} | {row['what']} | {told} |")
    whole = ", ".join(f"{t}: {v['takes']}" for t, v in verdicts(model).items())
    nodes = sum(len(g.node) for g in graphs(model))
    return f"All {nodes} nodes: {whole}.\n\n" + ("\n".join(lines) + "\n" if len(lines) > 2 else "")
