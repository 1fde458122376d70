"""ONNX files as untrusted data: what is read, what is refused, and the rules for our own graphs.

External tensors are followed only to a regular, unlinked file inside the model's own folder
(CVE-2022-25882, CVE-2024-27318, CVE-2026-27489 and its link variants were all about this).
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import onnx

from export.artefact import MAX_ELEMENTS, ArtefactError

MAX_MODEL_BYTES = 1 << 31  # protobuf's own limit
MAX_EXTERNAL_BYTES = 1 << 35
MAX_NODES = 100_000
RESIZE_MODES = ("nearest", "linear")


def read_model(path: Path) -> onnx.ModelProto:
    """The model without its external tensors, after checking that those may be followed.

    Raises `ArtefactError`: not a regular file, too large, not ONNX, external data outside.
    """
    if not path.is_file() or path.is_symlink():
        raise ArtefactError(f"{path}: found no regular file, expected an ONNX model.")
    size = path.stat().st_size
    if size > MAX_MODEL_BYTES:
        raise ArtefactError(f"{path}: {size} bytes, more than the {MAX_MODEL_BYTES} of any ONNX.")
    try:
        model = onnx.load(path, load_external_data=False)
        whole = len(model.graph.output) > 0
    except Exception as error:  # protobuf raises its own, version-dependent classes
        raise ArtefactError(f"{path}: not a readable ONNX model ({error}).") from error
    if not whole:
        raise ArtefactError(f"{path}: not a readable ONNX model (its graph has no outputs).")
    check_external_data(model, path)
    return model


def graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every graph nested in a node's attributes, also those of functions."""
    pending = [model.graph]
    for function in model.functions:
        pending.extend(_nested(function.node))
    while pending:
        graph = pending.pop()
        yield graph
        pending.extend(_nested(graph.node))


def _nested(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from attribute.graphs
            if attribute.HasField("g"):
                yield attribute.g


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: initializers, sparse ones, and those inside node attributes."""
    nodes = [n for f in model.functions for n in f.node]
    for graph in graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        nodes.extend(graph.node)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse_ones = [*attribute.sparse_tensors]
            if attribute.HasField("sparse_tensor"):
                sparse_ones.append(attribute.sparse_tensor)
            for sparse in sparse_ones:
                yield from (sparse.values, sparse.indices)


def check_external_data(model: onnx.ModelProto, path: Path) -> bool:
    """Whether the model has external tensors; `ArtefactError` if one may not be followed."""
    folder = path.resolve().parent
    files: dict[str, int] = {}
    for tensor in tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        facts = {entry.key: entry.value for entry in tensor.external_data}
        name = facts.get("location", "")
        pure = PurePosixPath(name)
        if not name or "\\" in name or ":" in name or pure.is_absolute() or len(pure.parts) != 1:
            _refuse(path, tensor, name, "a plain file name in the model's own folder")
        if pure.parts[0] in ("..", "."):
            _refuse(path, tensor, name, "a plain file name in the model's own folder")
        if name not in files:
            files[name] = _size_of_regular_file(folder / name, path, tensor, name)
        try:
            start, length = int(facts.get("offset", 0)), int(facts.get("length", files[name]))
        except ValueError:
            start = length = -1
        if start < 0 or length < 0 or start + length > files[name]:
            found = f"{name} [{facts.get('offset')} + {facts.get('length')}]"
            _refuse(path, tensor, found, f"a range inside its {files[name]} bytes")
    if sum(files.values()) > MAX_EXTERNAL_BYTES:
        raise ArtefactError(f"{path}: external data of {sum(files.values())} bytes is too large.")
    return bool(files)


def check_sizes(model: onnx.ModelProto, *, where: str) -> None:
    """Refuse declared shapes that would make a small file ask for more memory than any student."""
    for tensor in tensors(model):
        if min(tensor.dims, default=0) < 0 or math.prod(tensor.dims) > MAX_ELEMENTS:
            raise ArtefactError(
                f"{where}: tensor {tensor.name!r} claims shape {list(tensor.dims)}, more than the "
                f"{MAX_ELEMENTS} elements that are read. It is not run."
            )
    nodes = sum(len(graph.node) for graph in graphs(model))
    if nodes > MAX_NODES:
        raise ArtefactError(f"{where}: {nodes} nodes, more than {MAX_NODES}. It is not run.")
    try:  # what nodes make out of constants: a few bytes may ask for terabytes
        inside = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    except onnx.shape_inference.InferenceError:
        inside = model.graph.value_info  # whoever runs it will say what is wrong
    for item in (*model.graph.input, *model.graph.output, *inside):
        dims = item.type.tensor_type.shape.dim
        sizes = [dim.dim_value for dim in dims if dim.HasField("dim_value")]
        if min(sizes, default=0) < 0 or math.prod(sizes) > MAX_ELEMENTS:
            raise ArtefactError(f"{where}: {item.name!r} claims shape {sizes}. It is not run.")


def _size_of_regular_file(file: Path, path: Path, tensor: onnx.TensorProto, name: str) -> int:
    try:
        facts = file.lstat()
    except OSError as error:
        raise ArtefactError(
            f"{path}: tensor {tensor.name!r} lies in {name!r}, which is missing ({error.strerror})."
        ) from error
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
        _refuse(path, tensor, name, "a regular file without symbolic or hard links")
    return facts.st_size


def _refuse(path: Path, tensor: onnx.TensorProto, found: str, expected: str) -> None:
    raise ArtefactError(
        f"{path}: tensor {tensor.name!r} points to external data {found!r}; expected {expected}. "
        "The file was made elsewhere or was tampered with; it is not run."
    )


def check_rules(model: onnx.ModelProto, *, where: str) -> None:
    """Refuse graphs that TensorRT is known to take wrongly, naming the node and the reason.

    No ``If``, ``Loop`` or ``Scan``; ``Resize`` only nearest or linear without antialias; the uint8
    ``image`` goes into ``Cast`` and nowhere else.
    """
    problems = []
    for graph in graphs(model):
        for node in graph.node:
            name = f"{node.op_type} node {node.name!r}"
            if node.op_type in ("If", "Loop", "Scan"):
                problems.append(f"{name}: control flow; make the choice in Python before export")
            elif node.op_type == "Resize":
                facts = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                mode = facts.get("mode", b"nearest").decode()
                if mode not in RESIZE_MODES or facts.get("antialias", 0):
                    problems.append(
                        f"{name}: mode {mode!r}, antialias {facts.get('antialias', 0)}; use nearest"
                        " or bilinear without antialias, or bake the result at export size"
                    )
            if "image" in node.input and node.op_type != "Cast":
                problems.append(f"{name}: reads the uint8 input; only Cast may")
    if problems:
        raise ArtefactError(f"{where}: the graph breaks the export rules: {'; '.join(problems)}.")
