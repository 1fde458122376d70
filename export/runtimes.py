"""One way to run every artefact: ``with open_runtime(path) as r: r(images) -> {task: array}``.

``student.safetensors`` runs in torch, ``*.onnx`` in ONNX Runtime; both answer with the names,
shapes and units of `export.artefact`, so that either can stand in for the other. A runtime that
silently fell back to another provider would prove nothing: the one that runs is asserted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from export.artefact import (
    MAX_DEPTH_M,
    MIN_DEPTH_M,
    ArtefactError,
    Card,
    card_from_metadata,
    describe_output,
    expected_shape,
)
from export.foreign import Adapter, read_description
from teacher.cores import usable_cores
from teacher.errors import EnvironmentFailure, UsageError
from teacher.store import hash_file

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
HEAVY = {"Conv", "ConvTranspose", "FusedConv", "Gemm", "MatMul", "Resize", "LayerNormalization"}
Answers = dict[str, np.ndarray]


class Runtime(Protocol):
    """What every runtime offers.

    Attributes: ``card``; ``facts``, plain JSON on what runs; ``largest``, the largest batch that it
    takes at once, or None where N is free.
    """

    card: Card
    facts: dict[str, Any]
    largest: int | None

    def __enter__(self) -> Self:
        """Load the artefact."""
        ...

    def __exit__(self, *_: object) -> None:
        """Let it go."""
        ...

    def __call__(self, images: np.ndarray, focal_px: np.ndarray | None = None) -> Answers:
        """uint8 [N, H, W, 3] and focal lengths [N] (None: the recorded camera) -> outputs."""
        ...


def open_runtime(
    path: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    rounding: bool = False,
    io: str | os.PathLike[str] | None = None,
    profile: str = "",
) -> Runtime:
    """The runtime for a file, by its suffix.

    Args:
        path: ``.onnx``, ``.engine`` or ``.safetensors``.
        provider: where an ``.onnx`` must run: `PROVIDERS`. If it cannot, that is an error.
        threads: CPU threads; None: `teacher.cores.usable_cores`.
        rounding: on the CPU, let half-precision graphs round at every node (`export.rounding`);
            otherwise ONNX Runtime computes them in float32, which proves nothing about them.
        io: description of a model that we did not make (`export.foreign`).
        profile: prefix of the file into which ONNX Runtime writes every node's time; an engine
            adds its layers' up (`export.trt_runtime.TrtRuntime.layer_ms`).

    Raises:
        ArtefactError: not ours, damaged, or unsafe. EnvironmentFailure: the provider cannot run.
    """
    file = Path(path)
    threads = usable_cores() if threads is None else threads
    if threads < 1:
        raise UsageError(f"threads={threads}: expected at least 1.")
    if provider not in PROVIDERS:
        raise UsageError(f"provider={provider!r}: expected one of {list(PROVIDERS)}.")
    if not file.is_file():
        raise ArtefactError(f"{file}: no such file; expected .onnx, .engine or .safetensors.")
    adapter = None if io is None else Adapter(read_description(os.fspath(io)))
    if file.suffix == ".onnx":
        return OnnxRuntime(
            file,
            provider=provider,
            threads=threads,
            rounding=rounding,
            adapter=adapter,
            profile=profile,
        )
    if file.suffix == ".engine":
        from export.trt_runtime import TrtRuntime

        return TrtRuntime(file, adapter=adapter, timed=bool(profile))
    if file.suffix == ".safetensors":
        return TorchRuntime(file, threads=threads)
    raise ArtefactError(f"{file}: expected a name that ends in .onnx, .engine or .safetensors.")


def check_images(images: np.ndarray, focal_px: np.ndarray | None, card: Card) -> np.ndarray:
    """Refuse what the artefact was not made for; the focal lengths, float32 [N]."""
    if images.dtype != np.uint8 or images.shape[1:] != (card.height, card.width, 3):
        raise UsageError(
            f"images: found {images.dtype} {list(images.shape)}, expected uint8 "
            f"[N,{card.height},{card.width},3]; export.letterbox brings any size there."
        )
    if focal_px is None:
        return np.full(len(images), card.focal_px, np.float32)
    focal = np.array(focal_px, np.float32)  # a copy: torch takes no negative strides
    if focal.shape != (len(images),) or not (np.isfinite(focal) & (focal > 0)).all():
        raise UsageError(
            f"focal_px: found {focal.tolist()}, expected one positive number of pixels for each "
            f"of the {len(images)} images."
        )
    return focal


def gathered(parts: Sequence[Answers], focal: np.ndarray, card: Card) -> Answers:
    """The groups' answers as one, in metres of the images' own cameras.

    metres = canonical * f / f_c, so another camera is a factor on the baked one's metres.
    """
    answers = {name: np.concatenate([part[name] for part in parts]) for name in card.outputs}
    if not card.focal_input and "depth" in answers:
        factor = (focal / np.float32(card.focal_px))[:, None, None]
        answers["depth"] = (answers["depth"] * factor).clip(MIN_DEPTH_M, MAX_DEPTH_M)
    return answers


class TorchRuntime:
    """The student itself in torch: in fp32 on the CPU the reference that all others are held to."""

    largest: int | None = None

    def __init__(
        self, path: Path, *, threads: int, device: str = "cpu", precision: str = "fp32"
    ) -> None:
        """Read the checkpoint; nothing is unpickled.

        ``device``: cpu or cuda. ``precision``: fp32, or fp16 or bf16 by torch's autocast.
        """
        import torch

        from export.onnx_graph import Delivered, card_of
        from student.checkpoint import load_student

        if device == "cuda" and not torch.cuda.is_available():
            raise EnvironmentFailure(
                f"{path.name}: torch {torch.__version__} finds no GPU; ask for provider=cpu."
            )
        self.torch, self.threads, self.device = torch, threads, device
        student = load_student(path)
        card = card_of(student, semantic_logits=True, student_sha256=hash_file(path))
        self.card = dataclasses.replace(card, precision=precision)
        self.module = Delivered(student, self.card).eval().to(device)
        self.facts = {
            "runtime": "torch",
            "version": torch.__version__,
            "device": device if device == "cpu" else torch.cuda.get_device_name(),
            "threads": threads,
        }
        if precision != "fp32":
            self.facts["autocast"] = precision

    def __enter__(self) -> Self:
        """Take the asked number of threads; fp32 means fp32, also in a GPU's convolutions."""
        cudnn: Any = self.torch.backends.cudnn
        self.before = self.torch.get_num_threads(), cudnn.allow_tf32
        self.torch.set_num_threads(self.threads)
        cudnn.allow_tf32 = False
        return self

    def __exit__(self, *_: object) -> None:
        """Give torch its former settings back."""
        cudnn: Any = self.torch.backends.cudnn
        threads, cudnn.allow_tf32 = self.before
        self.torch.set_num_threads(threads)

    def __call__(self, images: np.ndarray, focal_px: np.ndarray | None = None) -> Answers:
        """See `Runtime`."""
        focal = check_images(images, focal_px, self.card)
        half = {"fp16": self.torch.float16, "bf16": self.torch.bfloat16}.get(self.card.precision)
        fed = [self.torch.from_numpy(a).to(self.device) for a in (np.array(images), focal)]
        autocast = self.torch.autocast(self.device, dtype=half, enabled=half is not None)
        with self.torch.inference_mode(), autocast:
            arrays = self.module(*fed)
        whole = [a.float() if a.is_floating_point() else a for a in arrays]
        return {n: a.cpu().numpy() for n, a in zip(self.card.outputs, whole, strict=True)}


def _placement(session: Any) -> dict[str, list[str]]:
    """Provider -> operators that really run there, as ONNX Runtime recorded it."""
    placed: dict[str, list[str]] = {}
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before ONNX Runtime 1.24
        return placed
    for part in session.get_provider_graph_assignment_info():
        placed.setdefault(part.ep_name, []).extend(n.op_type for n in part.get_nodes())
    return placed


class OnnxRuntime:
    """An exported graph in ONNX Runtime, on the provider that was asked for and no other."""

    def __init__(
        self,
        path: Path,
        *,
        provider: str,
        threads: int,
        rounding: bool = False,
        adapter: Adapter | None = None,
        profile: str = "",
    ) -> None:
        """Check the file as untrusted data and read its card, or take a foreign one's."""
        from export.onnx_files import check_external_data, check_sizes, read_model
        from export.rounding import low_precision

        model = read_model(path)
        self.path, self.adapter, self.profile = path, adapter, profile
        if adapter is None:
            metadata = {p.key: p.value for p in model.metadata_props}
            self.card = card_from_metadata(metadata, where=str(path))
        else:
            self.card = adapter.about.card()
            if adapter.about.sha256 and hash_file(path) not in adapter.about.sha256:
                raise ArtefactError(f"{path}: not the file that {adapter.about.path} describes.")
        check_sizes(model, where=str(path))
        self.external = check_external_data(model, path)
        self._check_interface(model)
        self.provider, self.threads = PROVIDERS[provider], threads
        self.largest = self.card.batch
        half = low_precision(model) if rounding and provider == "cpu" else ""
        self.rounded = half
        self.facts: dict[str, Any] = {}

    def _check_interface(self, model: Any) -> None:
        outputs = tuple(o.name for o in model.graph.output)
        stored = {i.name for i in model.graph.initializer}
        inputs = [i.name for i in model.graph.input if i.name not in stored]
        if self.adapter is None:
            wanted = ["image", "focal_px"][: 1 + self.card.focal_input]
            promised, who = self.card.outputs, "its card promises"
            fits = outputs == promised and inputs == wanted
        else:
            about = self.adapter.about
            wanted = [n for n in (about.image["name"], about.focal_name) if n]
            promised, who = tuple(self.adapter.names), f"{about.path} describes"
            fits = set(promised) <= set(outputs) and set(inputs) == set(wanted)
        if not fits:
            raise ArtefactError(
                f"{self.path}: inputs {inputs} and outputs {list(outputs)}, {who} "
                f"{wanted} and {list(promised)}. Export the student again, or mend the description."
            )
        if self.adapter is None:
            self._check_types(model)

    def _check_types(self, model: Any) -> None:
        """The contract's element types: who reads buffers by it would read nonsense otherwise."""
        from onnx import TensorProto

        types = {"image": "uint8", "focal_px": "float32"}
        types |= {name: describe_output(name).dtype for name in self.card.outputs}
        kinds = {"uint8": TensorProto.UINT8, "int32": TensorProto.INT32}
        for item in (*model.graph.input, *model.graph.output):
            wanted = types.get(item.name)
            found = item.type.tensor_type.elem_type
            if wanted is not None and found != kinds.get(wanted, TensorProto.FLOAT):
                raise ArtefactError(
                    f"{self.path}: {item.name} is {TensorProto.DataType.Name(found).lower()}, the "
                    f"contract says {wanted}. Export the student again."
                )

    def __enter__(self) -> Self:
        """Start the session; `EnvironmentFailure` if another provider would run."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # its warnings go to the screen; failures raise anyway
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if self.profile:
            options.enable_profiling, options.profile_file_prefix = True, self.profile
        if self.provider not in ort.get_available_providers():
            self._wrong_provider(ort.get_available_providers())
        try:
            source = self._source(options)
            exact = {"use_tf32": "0"} if self.provider == PROVIDERS["cuda"] else {}  # fp32 is fp32
            chosen = [(self.provider, exact)]
            self.session = ort.InferenceSession(source, options, providers=chosen)
        except ArtefactError:
            raise
        except Exception as error:  # ONNX Runtime's classes share no public base
            raise ArtefactError(f"{self.path}: ONNX Runtime refuses it: {error}") from error
        running = self.session.get_providers()
        if running[0] != self.provider:
            self._wrong_provider(running)
        self.session.disable_fallback()
        placed = _placement(self.session)
        strays = [op for name, ops in placed.items() if name != self.provider for op in ops]
        if heavy := sorted(set(strays) & HEAVY):
            self._wrong_provider([f"another provider for {', '.join(heavy)}"])
        self.facts = {
            "runtime": "onnxruntime",
            "version": ort.__version__,
            "providers": running,
            "threads": self.threads,
            "nodes": {name: len(ops) for name, ops in placed.items()},
        }
        if self.rounded:
            self.facts["rounding"] = f"{self.rounded} after every node that the graph says"
        return self

    def _source(self, options: Any) -> str | bytes:
        """What the session loads: the file as it is, or the graph that rounds."""
        if not self.rounded:
            return str(self.path) if self.external else self.path.read_bytes()
        import onnx
        import onnxruntime as ort

        from export.rounding import emulate

        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return emulate(onnx.load(self.path)).SerializeToString()

    def _wrong_provider(self, found: list[str]) -> None:
        raise EnvironmentFailure(
            f"{self.path.name}: {self.provider} was asked for and cannot run here; ONNX Runtime "
            f"would use {found}. Install its libraries, or ask for provider=cpu."
        )

    def __exit__(self, *_: object) -> None:
        """End the session."""
        if self.profile:
            self.session.end_profiling()
        del self.session

    def __call__(self, images: np.ndarray, focal_px: np.ndarray | None = None) -> Answers:
        """See `Runtime`. A graph of fixed N is fed in groups, the last one filled up."""
        focal = check_images(images, focal_px, self.card)
        size = self.card.batch or max(1, len(images))
        parts = [
            self._run(images[i : i + size], focal[i : i + size], size)
            for i in range(0, len(images), size)
        ]
        return gathered(parts, focal, self.card)

    def _run(self, images: np.ndarray, focal: np.ndarray, size: int) -> Answers:
        n = len(images)
        if n < size:
            fill = [n - 1] * (size - n)
            images, focal = (np.concatenate([a, a[fill]]) for a in (images, focal))
        if self.adapter is not None:
            names, feed = self.adapter.names, self.adapter.feed(images, focal)
        else:
            names, feed = list(self.card.outputs), {"image": np.ascontiguousarray(images)}
            if self.card.focal_input:
                feed["focal_px"] = focal
        try:
            arrays = self.session.run(names, feed)
        except Exception as error:  # ONNX Runtime's classes share no public base
            raise ArtefactError(f"{self.path}: fails when run: {error}") from error
        answers = (
            dict(zip(names, arrays, strict=True))
            if self.adapter is None
            else self.adapter.answers(arrays)
        )
        for name, array in answers.items():
            expected = expected_shape(name, self.card, len(images))
            if array.shape != expected:
                raise ArtefactError(
                    f"{self.path}: output {name} has shape {array.shape}, expected {expected}."
                )
        return {name: array[:n] for name, array in answers.items()}
