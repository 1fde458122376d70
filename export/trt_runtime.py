"""An engine as a `export.runtimes.Runtime`; hash, TensorRT and GPU are checked before loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from export import trt_engine
from export.artefact import ArtefactError, expected_shape
from export.cuda import Cuda
from export.runtimes import Answers, check_images, gathered
from export.trt_sidecar import check_machine, checked_bytes, read_sidecar

DTYPES = {"FLOAT": np.float32, "UINT8": np.uint8, "INT32": np.int32}  # the contract's, no others


class TrtRuntime:
    """Runs one engine on one stream; batches outside its profile are filled up or split."""

    def __init__(self, path: Path) -> None:
        """Read the sidecar only; nothing is deserialised yet."""
        self.path, self.sidecar = path, read_sidecar(path)
        self.card = self.sidecar.card_of()
        self.largest: int | None = self.sidecar.profile.largest
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Check hash and machine, then deserialise."""
        data = checked_bytes(self.path, self.sidecar)
        trt = trt_engine.import_tensorrt()
        self.cuda = Cuda()
        gpu, compute = self.cuda.device()
        check_machine(
            self.sidecar, version=trt.__version__, gpu=gpu, compute=compute, where=str(self.path)
        )
        self.logger = trt_engine.make_logger(trt)
        self.runtime = trt.Runtime(self.logger)
        # a version-compatible plan carries a lean runtime; ours is allowed: its hash is known
        self.runtime.engine_host_code_allowed = self.sidecar.version_compatible
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            told = "; ".join(self.logger.lines[-3:])
            raise ArtefactError(f"{self.path}: TensorRT does not load it: {told}")
        self.context = self.engine.create_execution_context()
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        wanted = {"image", *self.card.outputs} | ({"focal_px"} if self.card.focal_input else set())
        if set(self.names) != wanted:
            raise ArtefactError(
                f"{self.path}: has tensors {sorted(self.names)}, its card promises {sorted(wanted)}"
            )
        dtypes = {n: np.dtype(DTYPES[self.engine.get_tensor_dtype(n).name]) for n in self.names}
        self.buffers = {n: self._host(n, dtypes[n]) for n in self.names}
        self.addresses = {n: self.cuda.allocate(a.nbytes) for n, a in self.buffers.items()}
        for name, address in self.addresses.items():
            self.context.set_tensor_address(name, address)
        self.facts = {
            "runtime": "tensorrt",
            "version": trt.__version__,
            "device": gpu,
            "compute": compute,
            "profile": [self.sidecar.profile.smallest, self.largest],
        }
        return self

    def _host(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Room for the largest batch of one tensor."""
        largest = self.sidecar.profile.largest
        if name == "image":
            return np.empty((largest, self.card.height, self.card.width, 3), dtype)
        if name == "focal_px":
            return np.empty(largest, dtype)
        return np.empty(expected_shape(name, self.card, largest), dtype)

    def __exit__(self, *_: object) -> None:
        """Give memory back."""
        for address in self.addresses.values():
            self.cuda.free(address)
        del self.context, self.engine, self.runtime
        self.cuda.close()

    def __call__(self, images: np.ndarray, focal_px: np.ndarray | None = None) -> Answers:
        """See `export.runtimes.Runtime`."""
        focal = check_images(images, focal_px, self.card)
        step = self.sidecar.profile.largest
        parts = [
            self._run(images[i : i + step], focal[i : i + step])
            for i in range(0, len(images), step)
        ]
        return gathered(parts, focal, self.card)

    def _run(self, images: np.ndarray, focal: np.ndarray) -> Answers:
        count = len(images)
        size = max(count, self.sidecar.profile.smallest)
        rows = np.minimum(np.arange(size), count - 1)  # filled up with the last one
        feed = {"image": images[rows]} | (
            {"focal_px": focal[rows]} if self.card.focal_input else {}
        )
        for name, array in feed.items():
            if not self.context.set_input_shape(name, array.shape):
                raise ArtefactError(f"{self.path}: refuses {name} of shape {array.shape}.")
            part = self.buffers[name][:size]
            part[...] = array
            self.cuda.to_device(self.addresses[name], part)
        if not self.context.execute_async_v3(self.cuda.stream.value or 0):
            raise ArtefactError(f"{self.path}: fails when run: {'; '.join(self.logger.lines[-3:])}")
        for name in self.card.outputs:
            self.cuda.to_host(self.buffers[name][:size], self.addresses[name])
        self.cuda.wait()
        return {n: self.buffers[n][:count].copy() for n in self.card.outputs}
