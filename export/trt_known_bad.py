"""TensorRT releases that are known to answer wrongly, by pattern and precision, with the threads.

Consulted before building: an engine that somebody has already seen go wrong is not worth an hour of
tuning. The table is short and cautious: it names what was reported, not what may be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from export.trt_sidecar import release_of

ISSUES = "https://github.com/NVIDIA/TensorRT/issues/"
ATTENTION, TRANSFORMER, DETECTION = "attention", "vision transformer", "detection transformer"


@dataclass(frozen=True, kw_only=True)
class Known:
    """One report. ``releases``: (major, minor); ``from_batch``: the smallest N that it needs."""

    releases: tuple[tuple[int, int], ...]
    pattern: str
    precisions: tuple[str, ...]
    what: str
    link: str
    from_batch: int = 1


TABLE = (
    Known(
        releases=((10, 2),),
        pattern=TRANSFORMER,
        precisions=("fp32", "fp16"),
        what="vision transformers answer wrongly; other projects block this release",
        link="https://github.com/ultralytics/ultralytics/pull/24368",
    ),
    Known(
        releases=((10, 3),),
        pattern=TRANSFORMER,
        precisions=("fp16",),
        what="DINOv3 segmentation collapses to one class; Depth Anything V2 is wrong on Orin",
        link=ISSUES + "4723",
    ),
    Known(
        releases=((10, 4),),
        pattern=TRANSFORMER,
        precisions=("fp32", "fp16", "bf16"),
        what="DINOv3 ViT-B is miscompiled even in fp32 (cosine 0.018), all NaN in fp16",
        link=ISSUES + "4742",
    ),
    Known(
        releases=((10, 7),),
        pattern=ATTENTION,
        precisions=("fp32", "fp16", "bf16"),
        what="scaled_dot_product_attention answers wrongly",
        link=ISSUES + "4333",
    ),
    Known(
        releases=((10, 11), (11, 1)),
        pattern=TRANSFORMER,
        precisions=("fp32", "fp16"),
        what="SegFormer is exact for one image and wrong by orders of magnitude for several",
        link=ISSUES + "4853",
        from_batch=2,
    ),
    Known(
        releases=((10, 14), (11, 1)),
        pattern=DETECTION,
        precisions=("fp32",),
        what="strongly typed fp32: four identical rows give four answers",
        link=ISSUES + "4813",
    ),
)


def _has(model: onnx.ModelProto, *names: str) -> bool:
    return any(n.op_type in names for n in model.graph.node)


def has_attention(model: onnx.ModelProto) -> bool:
    """Whether a softmax's answer reaches a product of matrices, or there is an Attention node."""
    if _has(model, "Attention"):
        return True
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    through = ("Cast", "Identity", "Dropout", "Reshape", "Transpose", "Mul", "Where", "IsNaN",
               "QuantizeLinear", "DequantizeLinear")  # fmt: skip
    for node in model.graph.node:
        pending = list(node.output) if node.op_type == "Softmax" else []
        while pending:
            for reader in readers.get(pending.pop(), []):
                if reader.op_type in ("MatMul", "Gemm", "Einsum"):
                    return True
                if reader.op_type in through:
                    pending.extend(reader.output)
    return False


PATTERNS: dict[str, Callable[[onnx.ModelProto], bool]] = {
    ATTENTION: has_attention,
    TRANSFORMER: lambda m: has_attention(m) and _has(m, "LayerNormalization", "ReduceMean"),
    DETECTION: lambda m: has_attention(m) and _has(m, "TopK", "GridSample", "GatherElements"),
}


def consult(
    model: onnx.ModelProto, *, version: str, precision: str, largest_batch: int
) -> list[Known]:
    """The reports that fit a graph, a TensorRT version ("10.3.0.26") and a precision."""
    release = release_of(version)
    return [
        known
        for known in TABLE
        if release in known.releases
        and precision in known.precisions
        and largest_batch >= known.from_batch
        and PATTERNS[known.pattern](model)
    ]
