"""Words for editing ONNX graphs in tests: unique names, constants, nodes behind a tensor."""

import itertools

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

FLOAT_MAPS = ("depth", "sky", "normals", "depth_uncertainty", "normals_uncertainty")


COUNT = itertools.count()


class Graph:
    """A few words for editing: unique names, constants, nodes, and a node put behind a tensor."""

    def __init__(self, model):
        self.model, self.graph = model, model.graph

    def name(self):
        return f"planted/{next(COUNT)}"

    def const(self, values):
        tensor = from_array(np.asarray(values), self.name())
        self.graph.initializer.append(tensor)
        return tensor.name

    def op(self, kind, *inputs, **attributes):
        node = helper.make_node(kind, list(inputs), [self.name()], **attributes)
        self.graph.node.append(node)
        return node.output[0]

    def behind(self, name):
        """Rename tensor ``name`` where it is made; who read it reads what `finish` makes."""
        old = self.name()
        for node in self.graph.node:
            node.output[:] = [old if o == name else o for o in node.output]
        return old

    def finish(self, new, name):
        """Call the tensor ``new`` ``name`` from here on, and sort the nodes."""
        for node in self.graph.node:
            node.output[:] = [name if o == new else o for o in node.output]
        self.sort()

    def sort(self, rng=None):
        """Nodes in an order in which they can run; a random one of those if ``rng`` is given."""
        known = {t.name for t in self.graph.initializer} | {i.name for i in self.graph.input}
        waiting, ordered = list(self.graph.node), []
        while waiting:
            ready = [n for n in waiting if all(i == "" or i in known for i in n.input)]
            assert ready, "the planted graph has a cycle"
            chosen = [ready[rng.integers(len(ready))]] if rng is not None else ready
            for node in chosen:
                ordered.append(node)
                known.update(node.output)
            ids = {id(n) for n in chosen}
            waiting = [n for n in waiting if id(n) not in ids]
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in ordered]
        del self.graph.node[:]
        self.graph.node.extend(copies)


def strength(rng, low=0.003, high=1.0):
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def sign(rng):
    return float(rng.choice([-1.0, 1.0]))


def weights(model, *, conv_only=False):
    """Initializers with room for a fault, convolution kernels only if asked."""
    kernels = {n.input[1] for n in model.graph.node if n.op_type == "Conv"}
    return [
        t
        for t in model.graph.initializer
        if t.data_type == TensorProto.FLOAT
        and np.prod(t.dims) >= 8
        and (not conv_only or t.name in kernels)
    ]


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def replace(tensor, values):
    tensor.CopyFrom(from_array(np.ascontiguousarray(values, np.float32), tensor.name))


def a_map(model, rng):
    names = [o.name for o in model.graph.output if o.name in FLOAT_MAPS[:3]]
    return pick(rng, names)


def conv_output(model, rng):
    return pick(rng, [n.output[0] for n in model.graph.node if n.op_type == "Conv"])


def shapes_of(model):
    """Tensor name -> shape; a free N is 0."""
    told = onnx.shape_inference.infer_shapes(model)
    items = (*told.graph.value_info, *told.graph.output, *told.graph.input)
    return {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in items}
