"""Half precision judged without a half-precision device: every node rounds as the graph says.

ONNX Runtime's CPU provider computes float16 graphs in float32 and rounds only where tensors leave
it, so that it proves nothing about them. `emulate` rewrites the graph: every tensor that is float16
or bfloat16 becomes float32 and passes, right after the node that makes it, through a cast to that
type and back (round to nearest even; what is too large for float16 becomes infinite). Inside a node
sums run in float32, as tensor cores do; a device that also accumulates in half precision, or that
fuses nodes and rounds less often, will differ by that. `ranges` tells how near to the limits the
activations come on real images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.artefact import ArtefactError

LOW = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
FP16_MAX = 65504.0
NORMALISATIONS = (
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LpNormalization",
)


def low_precision(model: onnx.ModelProto) -> str:
    """``fp16`` or ``bf16`` if any input, stored tensor or cast has that type, else empty."""
    kinds = [i.type.tensor_type.elem_type for i in model.graph.input]
    kinds += [t.data_type for t in model.graph.initializer]
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                kinds.append(attribute.i)
            elif attribute.HasField("t"):
                kinds.append(attribute.t.data_type)
    return next((LOW[kind] for kind in kinds if kind in LOW), "")


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor name -> element type, by ONNX's own inference; `ArtefactError` for unknown ones."""
    try:
        told = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ArtefactError(f"the graph's types cannot be inferred: {error}") from error
    graph = told.graph
    types = {t.name: t.data_type for t in graph.initializer}
    for item in (*graph.input, *graph.output, *graph.value_info):
        types[item.name] = item.type.tensor_type.elem_type
    unknown = [o for n in graph.node for o in n.output if o and not types.get(o)]
    if unknown:
        raise ArtefactError(
            f"the types of {unknown[:3]} are unknown; rounding needs standard ONNX operators only."
        )
    return types


def _widened(tensor: TensorProto) -> TensorProto:
    values = numpy_helper.to_array(tensor).astype(np.float32)
    return numpy_helper.from_array(values, tensor.name)


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float32 that rounds after every node whose output was half precision.

    Inputs keep their type, outputs become float32. Run it with every optimisation off: an
    optimiser would remove the casts.
    """
    types = types_of(model)
    low = {name: kind for name, kind in types.items() if kind in LOW}
    result = onnx.ModelProto.FromString(model.SerializeToString())
    graph = result.graph
    wide = [_widened(t) if t.data_type in LOW else t for t in graph.initializer]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(wide)
    stored = {t.name for t in wide}  # some files list their weights among the inputs
    fed = [i.name for i in graph.input if i.name not in stored and low.get(i.name)]
    widened = {name: f"{name}/widened" for name in fed}
    for item in (*graph.input, *graph.output):
        if item.type.tensor_type.elem_type in LOW and item.name not in widened:
            item.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [helper.make_node("Cast", [n], [w], to=TensorProto.FLOAT) for n, w in widened.items()]
    for node in graph.node:
        node.input[:] = [widened.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in LOW:
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t") and attribute.t.data_type in LOW:
                attribute.t.CopyFrom(_widened(attribute.t))
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in low:
                raw, narrow = f"{name}/unrounded", f"{name}/rounded"
                node.output[i] = raw
                nodes.append(helper.make_node("Cast", [raw], [narrow], to=low[name]))
                nodes.append(helper.make_node("Cast", [narrow], [name], to=TensorProto.FLOAT))
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return result


Feeds = Sequence[Mapping[str, np.ndarray]]


def run_unoptimised(
    model: onnx.ModelProto, outputs: list[str], feeds: Feeds
) -> list[list[np.ndarray]]:
    """Outputs of the graph for every feed, on one CPU thread, nothing optimised away."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [session.run(outputs, dict(feed)) for feed in feeds]


def ranges(model: onnx.ModelProto, feeds: Feeds) -> list[dict[str, Any]]:
    """The largest magnitude of every float32 tensor over real inputs, largest first.

    Rows: ``tensor``, ``op`` (that makes it), ``max_abs``, and for the input of a normalisation
    ``max_square``, the largest squared deviation from its mean over the normalised (last) axis:
    past 65504 a float16 normalisation overflows even though its input does not.
    """
    types = types_of(model)
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    graph = probed.graph
    made = [(n.op_type, o) for n in graph.node for o in n.output if o]
    asked = [(op, name) for op, name in made if types[name] == TensorProto.FLOAT]
    normal = [n.input[0] for n in graph.node if n.op_type in NORMALISATIONS]
    axis = numpy_helper.from_array(np.array([-1]), "range/axis")
    graph.initializer.append(axis)
    outputs = []

    def probe(steps: list[tuple[str, list[str]]], name: str) -> None:
        for i, (op, inputs) in enumerate(steps):
            keep: dict[str, Any] = {"keepdims": int(i == 0)} if op.startswith("Reduce") else {}
            graph.node.append(helper.make_node(op, inputs, [f"{name}/{i}"], **keep))
        outputs.append(f"{name}/{len(steps) - 1}")
        graph.output.append(helper.make_tensor_value_info(outputs[-1], TensorProto.FLOAT, []))

    for _, name in asked:
        base = f"range/{name}"
        probe([("Abs", [name]), ("ReduceMax", [f"{base}/0"])], base)
    for name in dict.fromkeys(normal):
        base = f"square/{name}"
        steps = [
            ("ReduceMean", [name, axis.name]),
            ("Sub", [name, f"{base}/0"]),
            ("Mul", [f"{base}/1", f"{base}/1"]),
            ("ReduceMax", [f"{base}/2"]),
        ]
        probe(steps, base)
    found = np.array(run_unoptimised(probed, outputs, feeds), np.float64).max(0)
    largest = dict(zip(outputs, found.tolist(), strict=True))
    rows = []
    for op, name in asked:
        row: dict[str, Any] = {"tensor": name, "op": op, "max_abs": largest[f"range/{name}/1"]}
        if name in normal:
            row["max_square"] = largest[f"square/{name}/3"]
        rows.append(row)
    return sorted(rows, key=lambda r: -max(r["max_abs"], r.get("max_square", 0.0)))
