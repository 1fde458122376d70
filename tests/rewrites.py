"""Rewrites of exported graphs that must not matter (no tests here): ``f(model, rng)``, in place."""

import numpy as np
import onnx
from graph_editing import (
    Graph,
    conv_output,
    pick,
    shapes_of,
)
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array, to_array


def other_order(model, rng):
    Graph(model).sort(rng)


def cancelling_transposes(model, rng):
    g, shapes = Graph(model), shapes_of(model)
    makers = [n for n in model.graph.node if n.op_type in ("Conv", "Relu", "Add")]
    names = [o for n in makers for o in n.output if len(shapes.get(o, ())) == 4]
    name, order = pick(rng, names), rng.permutation(4)
    there = g.op("Transpose", g.behind(name), perm=order.tolist())
    g.finish(g.op("Transpose", there, perm=np.argsort(order).tolist()), name)


def new_names(model, rng):
    kept = {i.name for i in (*model.graph.input, *model.graph.output)}
    table = {}
    for node in model.graph.node:
        node.name = f"n{rng.integers(1 << 40)}"
        for o in node.output:
            if o and o not in kept:
                table[o] = f"t{rng.integers(1 << 40)}"
    for tensor in model.graph.initializer:
        table[tensor.name] = f"w{rng.integers(1 << 40)}"
        tensor.name = table[tensor.name]
    for node in model.graph.node:
        node.input[:] = [table.get(i, i) for i in node.input]
        node.output[:] = [table.get(o, o) for o in node.output]
    del model.graph.value_info[:]


def identities(model, rng):
    g, name = Graph(model), conv_output(model, rng)
    g.finish(g.op("Identity", g.behind(name)), name)


def neutral_arithmetic(model, rng):
    g, name = Graph(model), conv_output(model, rng)
    kind, value = pick(rng, [("Add", 0.0), ("Mul", 1.0), ("Sub", 0.0), ("Div", 1.0)])
    g.finish(g.op(kind, g.behind(name), g.const(np.float32(value))), name)


def moved_power_of_two(model, rng):
    """A kernel and its bias x 2^k, and what comes out x 2^-k: exact in floating point."""
    nodes = [n for n in model.graph.node if n.op_type == "Conv"]
    node, power = pick(rng, nodes), float(2.0 ** rng.integers(-3, 4))
    g, name = Graph(model), node.output[0]
    stored = {t.name: t for t in model.graph.initializer}
    for i in range(1, len(node.input)):
        node.input[i] = g.const(to_array(stored[node.input[i]]) * np.float32(power))
    g.finish(g.op("Mul", g.behind(name), g.const(np.float32(1 / power))), name)


def constants_as_nodes(model, rng):
    tensors = list(model.graph.initializer)
    chosen = rng.choice(len(tensors), min(5, len(tensors)), replace=False)
    nodes = []
    for i in sorted(chosen.tolist(), reverse=True):
        tensor = tensors[i]
        value = from_array(to_array(tensor), tensor.name)
        nodes.append(helper.make_node("Constant", [], [tensor.name], value=value))
        del model.graph.initializer[i]
    model.graph.node.extend(nodes)
    Graph(model).sort()


def split_convolution(model, rng):
    """A convolution as two over halves of its channels, and a Concat."""
    nodes = [
        n
        for n in model.graph.node
        if n.op_type == "Conv"
        and len(n.input) == 3
        and next((a.i for a in n.attribute if a.name == "group"), 1) == 1
    ]
    node = pick(rng, nodes)
    g, name, stored = Graph(model), node.output[0], {t.name: t for t in model.graph.initializer}
    kernel, bias = (to_array(stored[i]) for i in node.input[1:])
    cut = len(kernel) // 2
    facts = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    parts = [
        g.op("Conv", node.input[0], g.const(kernel[s].copy()), g.const(bias[s].copy()), **facts)
        for s in (slice(0, cut), slice(cut, None))
    ]
    g.behind(name)
    g.finish(g.op("Concat", *parts, axis=1), name)


def relu_as_maximum(model, rng):
    g = Graph(model)
    node = pick(rng, [n for n in model.graph.node if n.op_type == "Relu"])
    source, name = node.input[0], node.output[0]
    g.behind(name)
    g.finish(g.op("Max", source, g.const(np.float32(0))), name)


def reciprocal_division(model, rng):
    """x / c as x * (1 / c): another rounding, the same meaning."""
    stored = {t.name: t for t in model.graph.initializer}
    g = Graph(model)
    nodes = [n for n in model.graph.node if n.op_type == "Div" and n.input[1] in stored]
    nodes = [n for n in nodes if stored[n.input[1]].data_type == TensorProto.FLOAT]
    if nodes:
        node = pick(rng, nodes)
        node.op_type = "Mul"
        node.input[1] = g.const(np.float32(1) / to_array(stored[node.input[1]]))
        g.sort()


def through_double(model, rng):
    g, name = Graph(model), conv_output(model, rng)
    wide = g.op("Cast", g.behind(name), to=TensorProto.DOUBLE)
    g.finish(g.op("Cast", wide, to=TensorProto.FLOAT), name)


def optimised(model, rng):
    """As ONNX Runtime's basic optimiser writes it: constants folded, convolutions fused."""
    import tempfile
    from pathlib import Path

    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "o.onnx")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 4
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        model.CopyFrom(onnx.load(Path(folder) / "o.onnx"))


def newer_opset(model, rng):
    """The next opsets; the card travels along."""
    props = [(p.key, p.value) for p in model.metadata_props]
    newer = onnx.version_converter.convert_version(model, int(rng.integers(19, 21)))
    helper.set_model_props(newer, dict(props))
    model.CopyFrom(newer)


BENIGN = (
    other_order, cancelling_transposes, new_names, identities, neutral_arithmetic,
    moved_power_of_two, constants_as_nodes, split_convolution, relu_as_maximum,
    reciprocal_division, through_double, optimised, newer_opset,
)  # fmt: skip


def rewritten(model, rng):
    """One to three of `BENIGN`, in place; their names."""
    chosen = [pick(rng, BENIGN) for _ in range(int(rng.integers(1, 4)))]
    for rewrite in chosen:
        rewrite(model, rng)
    return " + ".join(f.__name__ for f in chosen)
