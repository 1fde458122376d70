"""Faults planted into exported graphs, and rewrites that must not matter (no tests here).

A fault is ``f(model, rng) -> what was done``; it changes the graph in place. Strengths are drawn
log-uniformly, so that a campaign also holds faults that are too weak to hurt: where detection
starts is what is measured. Every graph stays a valid artefact with its card.
"""

import numpy as np
from graph_editing import (
    Graph,
    a_map,
    conv_output,
    pick,
    replace,
    shapes_of,
    sign,
    strength,
    weights,
)
from onnx import TensorProto
from onnx.numpy_helper import to_array

# -- weights -----------------------------------------------------------------------------------


def scaled_weight(model, rng):
    tensor, factor = pick(rng, weights(model)), 1 + sign(rng) * strength(rng)
    replace(tensor, to_array(tensor) * factor)
    return f"{tensor.name} x {factor:.4f}"


def zeroed_channels(model, rng):
    tensor = pick(rng, weights(model, conv_only=True))
    values = to_array(tensor).copy()
    count = max(1, int(strength(rng, 0.01, 1) * len(values)))
    values[rng.choice(len(values), count, replace=False)] = 0
    replace(tensor, values)
    return f"{count} of {len(values)} channels of {tensor.name} are 0"


def swapped_weights(model, rng):
    found = {}
    for tensor in weights(model):
        found.setdefault(tuple(tensor.dims), []).append(tensor)
    a, b = rng.choice(len(same := pick(rng, [t for t in found.values() if len(t) > 1])), 2, False)
    left, right = to_array(same[a]).copy(), to_array(same[b]).copy()
    replace(same[a], right)
    replace(same[b], left)
    return f"{same[a].name} <-> {same[b].name}"


def noisy_weight(model, rng):
    tensor, share = pick(rng, weights(model)), strength(rng)
    values = to_array(tensor)
    replace(tensor, values + rng.normal(0, share * values.std() + 1e-12, values.shape))
    return f"{tensor.name} + {share:.4f} sigma"


def swapped_channels(model, rng):
    tensor = pick(rng, weights(model, conv_only=True))
    values = to_array(tensor).copy()
    count = min(len(values), int(2 + strength(rng, 0.01, 1) * len(values)))
    chosen = rng.choice(len(values), count, replace=False)
    values[chosen] = values[np.roll(chosen, 1)]
    replace(tensor, values)
    return f"{count} channels of {tensor.name} rotated"


def coarse_weight(model, rng):
    tensor, bits = pick(rng, weights(model, conv_only=True)), int(rng.integers(2, 7))
    values = to_array(tensor)
    step = np.abs(values).max() / (2 ** (bits - 1) - 1)
    replace(tensor, np.round(values / step) * step)
    return f"{tensor.name} in {bits} bits"


def mirrored_kernel(model, rng):
    kernels = [t for t in weights(model, conv_only=True) if t.dims[-1] > 1]
    tensor = pick(rng, kernels)
    replace(tensor, to_array(tensor)[..., ::-1])
    return f"{tensor.name} mirrored"


# -- input -------------------------------------------------------------------------------------


def cast_image(model):
    return next(n.output[0] for n in model.graph.node if n.input[:1] == ["image"])


def swapped_colours(model, rng):
    g, name = Graph(model), cast_image(model)
    order = pick(rng, [[2, 1, 0], [1, 0, 2], [0, 2, 1], [1, 2, 0], [0, 0, 0]])
    g.finish(g.op("Gather", g.behind(name), g.const(np.array(order)), axis=3), name)
    return f"channels {order}"


def wrong_normalisation(model, rng):
    g, name = Graph(model), cast_image(model)
    factor, shift = 1 + sign(rng) * strength(rng), sign(rng) * strength(rng, 0.1, 128)
    scaled = g.op("Mul", g.behind(name), g.const(np.float32(factor)))
    g.finish(g.op("Add", scaled, g.const(np.float32(shift))), name)
    return f"image x {factor:.4f} + {shift:.2f}"


def wrong_gamma(model, rng):
    g, name, gamma = Graph(model), cast_image(model), 1 + sign(rng) * strength(rng, 0.01, 0.8)
    unit = g.op("Mul", g.behind(name), g.const(np.float32(1 / 255)))
    power = g.op("Pow", unit, g.const(np.float32(gamma)))
    g.finish(g.op("Mul", power, g.const(np.float32(255))), name)
    return f"gamma {gamma:.3f}"


# -- resolution and place ----------------------------------------------------------------------


def _resampled(g, name, rank, factor):
    empty = g.const(np.zeros(0, np.float32))
    axes = [1.0] * (rank - 2)
    small = g.op(
        "Resize", name, empty, g.const(np.array([*axes, 1 / factor, 1 / factor], np.float32)),
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    return g.op(
        "Resize", small, empty, g.const(np.array([*axes, factor, factor], np.float32)),
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def half_resolution(model, rng):
    g, name, factor = Graph(model), a_map(model, rng), float(rng.choice([2, 4, 8]))
    g.finish(_resampled(g, g.behind(name), 4 if name == "normals" else 3, factor), name)
    return f"{name} at 1/{factor:g}"


def half_resolution_inside(model, rng):
    kinds = {n.output[0]: n for n in model.graph.node if n.op_type == "Relu"}
    shapes = shapes_of(model)
    names = [n for n in kinds if len(s := shapes.get(n, ())) == 4 and s[2] % 2 == 0 == s[3] % 2]
    g, name = Graph(model), pick(rng, names)
    g.finish(_resampled(g, g.behind(name), 4, 2.0), name)
    return f"{name} at half resolution"


def shifted(model, rng):
    g, name, pixels = Graph(model), a_map(model, rng), int(rng.integers(1, 9))
    old, axis = g.behind(name), int(rng.choice([-1, -2]))
    ends = np.array([pixels]), np.array([1 << 30])
    at = g.const(np.array([axis]))
    first = g.op("Slice", old, g.const(np.array([0])), g.const(ends[0]), at)
    rest = g.op("Slice", old, g.const(ends[0]), g.const(ends[1]), at)
    g.finish(g.op("Concat", rest, first, axis=axis), name)
    return f"{name} rolled by {pixels} px along {axis}"


def mirrored_answer(model, rng):
    g, name = Graph(model), a_map(model, rng)
    back = [g.const(np.array([v])) for v in (-1, -(1 << 30), -1, -1)]
    g.finish(g.op("Slice", g.behind(name), back[0], back[1], back[2], back[3]), name)
    return f"{name} mirrored left to right"


def broken_border(model, rng):
    g, name, pixels = Graph(model), a_map(model, rng), int(rng.integers(1, 17))
    old, at = g.behind(name), g.const(np.array([-1]))
    cut = g.const(np.array([-pixels]))
    inner = g.op("Slice", old, g.const(np.array([0])), cut, at)
    outer = g.op("Slice", old, cut, g.const(np.array([1 << 30])), at)
    wrong = (
        g.op("Neg", outer) if name == "normals" else g.op("Mul", outer, g.const(np.float32(0.5)))
    )
    g.finish(g.op("Concat", inner, wrong, axis=-1), name)
    return f"last {pixels} columns of {name} are wrong"


def blurred_edges(model, rng):
    g, size = Graph(model), int(rng.choice([3, 5, 7, 9]))
    axis = g.const(np.array([1]))
    wide = g.op("Unsqueeze", g.behind("depth"), axis)
    pad = [size // 2] * 4
    mean = g.op("AveragePool", wide, kernel_shape=[size, size], pads=pad, strides=[1, 1])
    g.finish(g.op("Squeeze", mean, axis), "depth")
    return f"depth averaged over {size}x{size}"


def every_kth_line(model, rng):
    g, name, k = Graph(model), a_map(model, rng), int(2 ** rng.integers(1, 6))
    shape = shapes_of(model)[name]
    mask = np.ones(shape[-2], np.float32)
    mask[k - 1 :: k] = 1 + sign(rng) * strength(rng, 0.02, 0.9)
    g.finish(g.op("Mul", g.behind(name), g.const(mask[:, None])), name)
    return f"every {k}th line of {name} x {mask.min():.3f}..{mask.max():.3f}"


# -- units, frames, classes --------------------------------------------------------------------


def wrong_unit(model, rng):
    g = Graph(model)
    factor = pick(rng, [0.3048, 3.2808, 1000.0, 0.001, 100.0, 1 + sign(rng) * strength(rng)])
    g.finish(g.op("Mul", g.behind("depth"), g.const(np.float32(factor))), "depth")
    return f"depth x {factor:.4f}"


def focal_ignored(model, rng):
    g, old = Graph(model), None
    share = g.op("Div", g.const(np.float32(110.85)), "focal_px")
    if rng.random() < 0.5:  # or applied twice
        share = g.op("Reciprocal", share)
    old = g.behind("depth")
    wide = g.op("Unsqueeze", share, g.const(np.array([1, 2])))
    g.finish(g.op("Mul", old, wide), "depth")
    return "focal length ignored or applied twice"


def other_depth(model, rng):
    g, kind = Graph(model), pick(rng, ["Reciprocal", "Sqrt", "ray", "offset"])
    old = g.behind("depth")
    if kind == "ray":  # distance along the ray instead of z
        height, width = shapes_of(model)["depth"][-2:]
        y, x = np.mgrid[0:height, 0:width]
        ray = np.sqrt(1 + ((x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2) / 110.85**2)
        new = g.op("Mul", old, g.const(ray.astype(np.float32)))
    elif kind == "offset":
        new = g.op("Add", old, g.const(np.float32(strength(rng, 0.003, 1))))
    else:
        new = g.op(kind, old)
    g.finish(new, "depth")
    return f"depth as {kind}"


def saturated_depth(model, rng):
    g, most_m = Graph(model), float(rng.choice([2.5, 4, 6, 10]))
    g.finish(g.op("Min", g.behind("depth"), g.const(np.float32(most_m))), "depth")
    return f"depth ends at {most_m} m"


def mirrored_normals(model, rng):
    g = Graph(model)
    signs = pick(rng, [[-1, 1, 1], [1, -1, 1], [1, 1, -1], [1, -1, -1], [-1, -1, -1]])
    values = np.array(signs, np.float32).reshape(1, 3, 1, 1)
    g.finish(g.op("Mul", g.behind("normals"), g.const(values)), "normals")
    return f"normals x {signs}"


def turned_normals(model, rng):
    g, angle = Graph(model), np.radians(strength(rng, 0.1, 45))
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    order = rng.permutation(3)
    turn = turn[order][:, order].astype(np.float32)
    g.finish(g.op("Conv", g.behind("normals"), g.const(turn[:, :, None, None])), "normals")
    return f"normals turned by {np.degrees(angle):.2f} degrees"


def class_order(model, rng):
    g, classes = Graph(model), 22
    table = np.arange(classes, dtype=np.int32)
    count = int(rng.integers(2, 7))
    chosen = rng.choice(classes, count, replace=False)
    table[chosen] = table[np.roll(chosen, 1)]
    old = g.behind("semantic")
    g.finish(g.op("Gather", g.const(table), old), "semantic")
    return f"classes {sorted(chosen.tolist())} rotated"


def wrong_sky(model, rng):
    g, kind = Graph(model), pick(rng, ["1 - p", "p * k", "p + k"])
    old = g.behind("sky")
    k = g.const(np.float32(strength(rng, 0.02, 0.9)))
    if kind == "1 - p":
        new = g.op("Sub", g.const(np.float32(1)), old)
    else:
        new = g.op("Mul" if kind == "p * k" else "Add", old, k)
        new = g.op("Min", new, g.const(np.float32(1)))
    g.finish(new, "sky")
    return f"sky {kind}"


# -- faults of runtimes ------------------------------------------------------------------------


def _factor_map(g, name, per_row, factor):
    """``name`` x ``factor`` in the rows where ``per_row`` (float [N]) is 1."""
    extra = g.op("Mul", per_row, g.const(np.float32(factor - 1)))
    whole = g.op("Add", extra, g.const(np.float32(1)))
    axes = [1, 2, 3] if name == "normals" else [1, 2]
    wide = g.op("Unsqueeze", whole, g.const(np.array(axes)))
    g.finish(g.op("Mul", g.behind(name), wide), name)


def wrong_when_two(model, rng):
    g, name = Graph(model), a_map(model, rng)
    factor = -1.0 if name == "normals" else 1 + sign(rng) * strength(rng, 0.003, 0.9)
    equal = g.op("Equal", g.op("Shape", "focal_px"), g.const(np.array([2])))
    zeros = g.op("Mul", "focal_px", g.const(np.float32(0)))
    rows = g.op("Add", zeros, g.op("Cast", equal, to=TensorProto.FLOAT))
    _factor_map(g, name, rows, factor)
    return f"{name} x {factor:.4f} in batches of two"


def wrong_every_kth_image(model, rng):
    g, name, k = Graph(model), a_map(model, rng), int(rng.integers(2, 6))
    factor = -1.0 if name == "normals" else 1 + sign(rng) * strength(rng, 0.003, 0.9)
    ones = g.op("Add", g.op("Mul", "focal_px", g.const(np.float32(0))), g.const(np.float32(1)))
    index = g.op("CumSum", ones, g.const(np.array(0, np.int64)))
    rest = g.op("Mod", index, g.const(np.float32(k)), fmod=1)
    rows = g.op("Cast", g.op("Equal", rest, g.const(np.float32(0))), to=TensorProto.FLOAT)
    _factor_map(g, name, rows, factor)
    return f"every {k}th image: {name} x {factor:.4f}"


def nondeterminism(model, rng):
    g, name = Graph(model), conv_output(model, rng)
    share = strength(rng, 0.001, 0.5)
    old = g.behind(name)
    noise = g.op("RandomNormalLike", old, scale=share, mean=0.0)
    g.finish(g.op("Add", old, noise), name)
    return f"noise of {share:.4f} on {name}"


def nan_in_the_dark(model, rng):
    g, name = Graph(model), a_map(model, rng)
    below = float(rng.choice([8, 16, 24, 32]))
    mean = g.op("ReduceMean", cast_image(model), g.const(np.array([1, 2, 3])), keepdims=0)
    room = g.op("Sub", mean, g.const(np.float32(below)))
    wrong = g.op("Mul", g.op("Sqrt", room), g.const(np.float32(0)))  # sqrt of less than 0 is NaN
    axes = [1, 2, 3] if name == "normals" else [1, 2]
    wide = g.op("Unsqueeze", wrong, g.const(np.array(axes)))
    g.finish(g.op("Add", g.behind(name), wide), name)
    return f"{name} is NaN where the image's mean is below {below:g}"


def half_overflow(model, rng):
    """x -> float16(x * s) / s: what a float16 normalisation does to activations that are large."""
    g, name = Graph(model), conv_output(model, rng)
    scale = g.const(np.float32(strength(rng, 1e3, 3e5)))
    large = g.op("Mul", g.behind(name), scale)
    half = g.op("Cast", g.op("Cast", large, to=TensorProto.FLOAT16), to=TensorProto.FLOAT)
    g.finish(g.op("Div", half, scale), name)
    return f"{name} overflows float16"


def wrong_uncertainty(model, rng):
    names = [o.name for o in model.graph.output if o.name.endswith("_uncertainty")]
    g, name, factor = Graph(model), pick(rng, names), strength(rng, 0.3, 0.99)
    g.finish(g.op("Mul", g.behind(name), g.const(np.float32(factor))), name)
    return f"{name} x {factor:.3f}"


FAULTS = (
    scaled_weight, zeroed_channels, swapped_weights, noisy_weight, swapped_channels, coarse_weight,
    mirrored_kernel, swapped_colours, wrong_normalisation, wrong_gamma, half_resolution,
    half_resolution_inside, shifted, mirrored_answer, broken_border, blurred_edges, every_kth_line,
    wrong_unit, focal_ignored, other_depth, saturated_depth, mirrored_normals, turned_normals,
    class_order, wrong_sky, wrong_when_two, wrong_every_kth_image, nondeterminism, nan_in_the_dark,
    half_overflow, wrong_uncertainty,
)  # fmt: skip


def stale(model, other, rng):
    """The weights of an earlier student, or a blend with them; ``other`` has the same graph."""
    share = 1.0 if rng.random() < 0.4 else strength(rng, 0.01, 1)
    theirs = [to_array(t) for t in other.graph.initializer if t.data_type == TensorProto.FLOAT]
    ours = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    for tensor, values in zip(ours, theirs, strict=True):
        replace(tensor, (1 - share) * to_array(tensor) + share * values)
    return f"{share:.3f} of an earlier student's weights"
