"""An engine as a `export.runtimes.Runtime`; hash, TensorRT and GPU are checked before loading.

An engine of ours has its sidecar. One that we did not make has a description (`export.foreign`)
that must name its sha256: an engine is executable code, and somebody has to vouch for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from export import trt_engine
from export.artefact import MAX_ELEMENTS, ArtefactError, expected_shape
from export.cuda import Cuda
from export.foreign import Adapter
from export.runtimes import Answers, check_images, gathered
from export.trt_sidecar import Profile, check_machine, checked_bytes, read_sidecar
from teacher.store import hash_file

DTYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8, "INT8": np.int8,
    "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_,
}  # fmt: skip


class TrtRuntime:
    """Runs one engine on one stream; batches outside its profile are filled up or split."""

    def __init__(self, path: Path, *, adapter: Adapter | None = None, timed: bool = False) -> None:
        """Read the sidecar or the description only; nothing is deserialised yet.

        ``timed``: add up what every layer takes in `layer_ms`.
        """
        self.path, self.adapter, self.timed = path, adapter, timed
        self.sidecar = None if adapter is not None else read_sidecar(path)
        self.promised: Mapping[str, Any] = {}
        if self.sidecar is not None:
            self.card, self.promised = self.sidecar.card_of(), self.sidecar.engine
            self.profile = self.sidecar.profile
        else:
            assert adapter is not None
            self.card = adapter.about.card()
            if not adapter.about.sha256:
                raise ArtefactError(
                    f"{path}: {adapter.about.path} names no sha256. An engine is executable code "
                    "and is loaded only if its description vouches for its very bytes."
                )
            found = hash_file(path)
            named = found if found in adapter.about.sha256 else adapter.about.sha256[0]
            self.promised = {"sha256": named, "bytes": path.stat().st_size}
            self.profile = Profile(smallest=1, best=1, largest=self.card.batch or 1)
        self.largest: int | None = self.profile.largest
        self.facts: dict[str, Any] = {}
        self.layer_ms: dict[str, float] = {}

    def __enter__(self) -> Self:
        """Check hash and machine, then deserialise."""
        who = "its description" if self.sidecar is None else "its sidecar"
        data = checked_bytes(self.path, self.promised, who=who)
        trt = trt_engine.import_tensorrt()
        self.cuda = Cuda()
        gpu, compute = self.cuda.device()
        if self.sidecar is not None:
            check_machine(
                self.sidecar,
                version=trt.__version__,
                gpu=gpu,
                compute=compute,
                where=str(self.path),
            )
        self.logger = trt_engine.make_logger(trt)
        self.runtime = trt.Runtime(self.logger)
        # a version-compatible plan carries a lean runtime; ours is allowed: its hash is known
        ours = self.sidecar is not None and self.sidecar.version_compatible
        self.runtime.engine_host_code_allowed = ours
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            told = "; ".join(self.logger.lines[-3:])
            raise ArtefactError(f"{self.path}: TensorRT does not load it: {told}")
        self.context = self.engine.create_execution_context()
        if self.timed:
            self.times = make_profiler(trt, self.layer_ms)
            self.context.profiler = self.times
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        fed = trt.TensorIOMode.INPUT
        self.inputs = [n for n in self.names if self.engine.get_tensor_mode(n) == fed]
        self._check_names()
        if self.sidecar is None:
            self._read_profile()
        self.buffers = {n: self._host(n) for n in self.names}
        self.addresses = {n: self.cuda.allocate(a.nbytes) for n, a in self.buffers.items()}
        for name, address in self.addresses.items():
            self.context.set_tensor_address(name, address)
        self.facts = {
            "runtime": "tensorrt",
            "version": trt.__version__,
            "device": gpu,
            "compute": compute,
            "profile": [self.profile.smallest, self.largest],
        }
        return self

    def _check_names(self) -> None:
        """An engine of ours has the card's tensors and no others; another one at least these."""
        if self.adapter is None:
            fed = ["image", "focal_px"][: 1 + self.card.focal_input]
            given, who = list(self.card.outputs), "its card promises"
            fits = set(self.names) == {*fed, *given} and set(self.inputs) == set(fed)
        else:
            about = self.adapter.about
            fed = [n for n in (about.image["name"], about.focal_name) if n]
            given, who = self.adapter.names, f"{about.path} describes"
            fits = set(self.inputs) == set(fed) and set(given) <= set(self.names) - set(fed)
        if not fits:
            outputs = [n for n in self.names if n not in self.inputs]
            raise ArtefactError(
                f"{self.path}: inputs {self.inputs} and outputs {outputs}, {who} {fed} and {given}."
            )

    def _read_profile(self) -> None:
        """The batch sizes that a described engine takes, from the engine itself."""
        least, best, most = self.engine.get_tensor_profile_shape(self.inputs[0], 0)
        self.profile = Profile(smallest=least[0], best=best[0], largest=most[0])
        self.largest = self.profile.largest

    def _host(self, name: str) -> np.ndarray:
        """Room for the largest batch of one tensor."""
        kind = self.engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise ArtefactError(f"{self.path}: {name} is {kind}, expected one of {list(DTYPES)}.")
        largest = self.profile.largest
        if self.adapter is not None:
            shape = (largest, *tuple(self.engine.get_tensor_shape(name))[1:])
        elif name == "image":
            shape = (largest, self.card.height, self.card.width, 3)
        else:
            fed = name == "focal_px"
            shape = (largest,) if fed else expected_shape(name, self.card, largest)
        if min(shape) < 1 or math.prod(shape) > MAX_ELEMENTS:
            raise ArtefactError(f"{self.path}: {name} has shape {list(shape)}; it is not run.")
        return np.empty(shape, DTYPES[kind])

    def __exit__(self, *_: object) -> None:
        """Give memory back."""
        for address in self.addresses.values():
            self.cuda.free(address)
        del self.context, self.engine, self.runtime
        self.cuda.close()

    def __call__(self, images: np.ndarray, focal_px: np.ndarray | None = None) -> Answers:
        """See `export.runtimes.Runtime`."""
        focal = check_images(images, focal_px, self.card)
        step = self.profile.largest
        parts = [
            self._run(images[i : i + step], focal[i : i + step])
            for i in range(0, len(images), step)
        ]
        return gathered(parts, focal, self.card)

    def _run(self, images: np.ndarray, focal: np.ndarray) -> Answers:
        count = len(images)
        size = max(count, self.profile.smallest)
        rows = np.minimum(np.arange(size), count - 1)  # filled up with the last one
        if self.adapter is not None:
            feed = self.adapter.feed(images[rows], focal[rows])
        else:
            feed = {"image": images[rows]}
            if self.card.focal_input:
                feed["focal_px"] = focal[rows]
        for name, array in feed.items():
            if not self.context.set_input_shape(name, array.shape):
                raise ArtefactError(f"{self.path}: refuses {name} of shape {array.shape}.")
            part = self.buffers[name][:size]
            part[...] = array
            self.cuda.to_device(self.addresses[name], part)
        if not self.context.execute_async_v3(self.cuda.stream.value or 0):
            raise ArtefactError(f"{self.path}: fails when run: {'; '.join(self.logger.lines[-3:])}")
        wanted = self.card.outputs if self.adapter is None else self.adapter.names
        for name in wanted:
            self.cuda.to_host(self.buffers[name][:size], self.addresses[name])
        self.cuda.wait()
        arrays = [self.buffers[n][:size].copy() for n in wanted]
        if self.adapter is None:
            answers = dict(zip(wanted, arrays, strict=True))
        else:
            answers = self.adapter.answers(arrays)
        for name, array in answers.items():
            expected = expected_shape(name, self.card, size)
            if array.shape != expected:
                raise ArtefactError(
                    f"{self.path}: output {name} has shape {array.shape}, expected {expected}."
                )
        return {name: array[:count] for name, array in answers.items()}


def make_profiler(trt: Any, layer_ms: dict[str, float]) -> Any:
    """A TensorRT profiler that adds up what every layer takes [ms] in ``layer_ms``."""

    class Times(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            layer_ms[layer_name] = layer_ms.get(layer_name, 0.0) + ms

    return Times()
