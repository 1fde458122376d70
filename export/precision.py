"""One fp32 graph to fp16, bf16 or int8: the precision is in the graph, for every runtime to see.

* ``fp16``, ``bf16``: NVIDIA Model-Optimizer's AutoCast on real images. It runs on a twin with a
  fixed N (a free one makes it fail), whose N is freed again afterwards. bf16 needs opset 22, which
  TensorRT reads from 10.12 on at the earliest (`export.readiness`).
* ``int8-trt``, ``int8-cpu``: explicit Q/DQ pairs, calibrated on the same images, weights symmetric
  per output channel. They differ because the kernels differ. TensorRT wants zero points of 0
  (symmetric activations), a Q/DQ pair before a layer and none behind it, so that it can fuse what
  follows, the bias in fp32, and the weights as a Q/DQ pair of their own. The CPU's VNNI kernels
  multiply unsigned by signed bytes: activations are uint8 with a zero point, which does not waste
  half the codes behind a ReLU, and every quantised node is fenced by Q/DQ on both sides, so that
  chains of them stay in bytes.

``islands`` are groups of nodes (`groups_of`) that stay in fp32; norms, softmax and the heads'
activations always do (`ALWAYS_FP32`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.rounding import NORMALISATIONS, run_unoptimised, types_of
from teacher.errors import EnvironmentFailure

HALF = ("fp16", "bf16")
INT8 = ("int8-cpu", "int8-trt")
ALWAYS_FP32 = (
    *NORMALISATIONS,
    "Softmax",
    "Exp",
    "Sigmoid",
    "Tanh",
    "ReduceL2",
    "ReduceMean",
    "Pow",
)
INSTALL = (
    "pip install nvidia-modelopt onnx-graphsurgeon polygraphy onnxslim lief cppimport && "
    "pip install --no-deps onnxconverter-common"
)
Feeds = Sequence[Mapping[str, np.ndarray]]


def group_of(name: str) -> str:
    """The group of a stored tensor by its name: a stage, a decoder's part, a half of a head."""
    parts = name.removeprefix("student.").split(".")
    if parts[0] == "heads":
        return ".".join([*parts[:2], *[p for p in parts[2:4] if p != "maps"][:1]])
    if parts[0] == "decoder":
        return ".".join(parts[:2])
    if parts[0] == "backbone":
        rest = [p for p in parts[1:] if p not in ("net", "model")]
        numbered = len(rest) > 1 and rest[1].isdigit()
        return "backbone." + ".".join(rest[: 2 if numbered else 1])
    return "other"


def groups_of(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Group -> names of its nodes. A node without weights belongs to who made its input."""
    stored = {t.name for t in model.graph.initializer}
    made_in: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for node in model.graph.node:
        own = [group_of(i) for i in node.input if i in stored and i.startswith("student.")]
        before = [made_in[i] for i in node.input if i in made_in]
        group = (own or before or ["input"])[0]
        made_in.update(dict.fromkeys(node.output, group))
        groups.setdefault(group, []).append(node.name)
    return groups


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph; every node has a name of its own."""
    result = onnx.ModelProto.FromString(model.SerializeToString())
    seen: set[str] = set()
    for i, node in enumerate(result.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{i}"
        seen.add(node.name)
    return result


def lower(
    model: onnx.ModelProto, precision: str, feeds: Feeds, *, islands: Iterable[str] = ()
) -> onnx.ModelProto:
    """The graph in ``precision``, its inputs and outputs unchanged.

    ``feeds``: real inputs, [1, ...] each, for calibration. ``islands``: groups that stay in fp32.
    """
    source = named(model)
    groups = groups_of(source)
    kept = [node for group in islands for node in groups[group]]
    if precision in HALF:
        result = autocast(source, precision, feeds, keep=kept)
    else:
        result = quantise(source, precision, feeds, keep=kept)
    _same_interface(result, model)
    onnx.checker.check_model(result)
    return result


def _same_interface(result: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Inputs, outputs and the card of ``model``; shapes inside are for a runtime to find out."""
    for ours, theirs in ((result.graph.input, model.graph.input),
                         (result.graph.output, model.graph.output)):  # fmt: skip
        kept = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in theirs]
        del ours[:]
        ours.extend(kept)
    del result.graph.value_info[:]
    helper.set_model_props(result, {p.key: p.value for p in model.metadata_props})
    result.producer_name, result.producer_version = model.producer_name, ""


# -- fp16 and bf16 -----------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """AutoCast logs every node it converts."""
    logger = logging.getLogger("modelopt")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    for child in ("modelopt.onnx", "modelopt.onnx.autocast"):
        logging.getLogger(child).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def autocast(
    model: onnx.ModelProto, precision: str, feeds: Feeds, *, keep: Sequence[str]
) -> onnx.ModelProto:
    """fp16 or bf16 by Model-Optimizer, nodes named in ``keep`` in fp32."""
    try:
        from modelopt.onnx.autocast import convert_to_mixed_precision
    except ImportError as error:
        raise EnvironmentFailure(
            f"precision={precision}: needs NVIDIA Model-Optimizer ({error}). Install it with: "
            f"{INSTALL}"
        ) from error
    twin = _with_batch(model, 1)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "twin.onnx"
        path.write_bytes(twin.SerializeToString())
        images = Path(folder) / "feeds"
        images.mkdir()
        for i, feed in enumerate(feeds):
            np.savez(images / f"{i:04d}.npz", **feed)  # type: ignore[arg-type]
        return convert_to_mixed_precision(
            str(path),
            low_precision_type=precision,
            nodes_to_exclude=[f"^{re.escape(name)}$" for name in keep],
            op_types_to_exclude=list(ALWAYS_FP32),
            keep_io_types=True,
            calibration_data=str(images),
            providers=["cpu"],
        )


def _with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A twin with a fixed N."""
    twin = onnx.ModelProto.FromString(model.SerializeToString())
    for item in (*twin.graph.input, *twin.graph.output):
        item.type.tensor_type.shape.dim[0].dim_value = batch
    del twin.graph.value_info[:]
    return twin


# -- int8 --------------------------------------------------------------------------------------


def activation_ranges(model: onnx.ModelProto, feeds: Feeds) -> dict[str, tuple[float, float]]:
    """Float tensor -> lowest and highest value, each the mean over images of the image's own.

    The mean of extremes forgives a single odd image, where the extreme of all would waste codes.
    """
    types = types_of(model)
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    graph = probed.graph
    names = [o for n in graph.node for o in n.output if types.get(o) == TensorProto.FLOAT]
    outputs = []
    for name in names:
        for op in ("ReduceMin", "ReduceMax"):
            outputs.append(f"{op}/{name}")
            graph.node.append(helper.make_node(op, [name], [outputs[-1]], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(outputs[-1], TensorProto.FLOAT, []))
    found = np.array(run_unoptimised(probed, outputs, feeds), np.float64).mean(0)
    return {n: (float(found[2 * i]), float(found[2 * i + 1])) for i, n in enumerate(names)}


def quantise(
    model: onnx.ModelProto, precision: str, feeds: Feeds, *, keep: Sequence[str]
) -> onnx.ModelProto:
    """Explicit Q/DQ around convolutions and products, nodes named in ``keep`` in fp32."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    for_trt = precision == "int8-trt"
    types: list[str] = ["Conv", "MatMul", "Gemm"] + ([] if for_trt else ["Add", "Concat"])
    options: dict[str, Any] = {
        "ActivationSymmetric": for_trt,
        "WeightSymmetric": True,
        "AddQDQPairToWeight": for_trt,
        "QuantizeBias": not for_trt,
        "OpTypesToExcludeOutputQuantization": types if for_trt else [],
        "DedicatedQDQPair": False,
    }
    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in activation_ranges(model, feeds).items()
    }
    source = onnx.shape_inference.infer_shapes(model)
    quantizer = QDQQuantizer(
        source,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if for_trt else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=list(keep),
        op_types_to_quantize=types,
        extra_options=options,
    )
    with _silence():
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    return result


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The quantizer warns about every tensor without a range (the graph's own inputs)."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous)


def quantised_share(model: onnx.ModelProto) -> float:
    """Share of the multiplications' weights (by bytes of fp32) that are not fp32 any more."""
    stored = {t.name: t for t in model.graph.initializer}
    made = {o: n for n in model.graph.node for o in n.output}
    low = total = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or len(node.input) < 2:
            continue
        name, cast = node.input[1], False
        while name in made and made[name].op_type in ("DequantizeLinear", "QuantizeLinear", "Cast"):
            cast |= made[name].op_type != "Cast"
            name = made[name].input[0]
        if name in stored:
            size = int(np.prod(stored[name].dims))
            total += size
            low += size * (cast or stored[name].data_type != TensorProto.FLOAT)
    return low / total if total else 0.0
