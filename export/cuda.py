"""The few calls of the CUDA runtime that running an engine needs, through ctypes: no torch."""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from teacher.errors import EnvironmentFailure

NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
TO_DEVICE, TO_HOST = 1, 2
MAJOR, MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor, Minor


def _candidates() -> Iterator[str]:
    """The system's libraries, then those that pip installs under ``nvidia``."""
    yield from NAMES
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for name in NAMES:
        yield from (str(p) for p in sorted(packages.glob(f"**/{name}")))


class Cuda:
    """One device: memory, copies, a stream. Every failing call raises with CUDA's own words."""

    def __init__(self) -> None:
        """Load the library and make sure that a device answers."""
        for name in _candidates():
            try:
                self.library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise EnvironmentFailure(
                "CUDA: found no libcudart; an engine needs the CUDA runtime and an NVIDIA GPU."
            )
        self.library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self.call("cudaGetDeviceCount", ctypes.byref(count))
        if count.value < 1:
            raise EnvironmentFailure("CUDA: the runtime is there and finds no GPU.")
        self.stream = ctypes.c_void_p()
        self.call("cudaStreamCreate", ctypes.byref(self.stream))

    def call(self, name: str, *arguments: object) -> None:
        """Call and check."""
        code = getattr(self.library, name)(*arguments)
        if code:
            told = self.library.cudaGetErrorString(code)
            raise EnvironmentFailure(f"CUDA: {name}: {told.decode() if told else code}.")

    def device(self) -> tuple[str, str]:
        """(name, compute capability as "8.7") of the current device."""
        buffer = ctypes.create_string_buffer(1 << 14)  # the name comes first in every version
        names = ("cudaGetDeviceProperties_v2", "cudaGetDeviceProperties")
        name = next(n for n in names if hasattr(self.library, n))
        self.call(name, buffer, 0)
        numbers = []
        for attribute in (MAJOR, MINOR):
            value = ctypes.c_int()
            self.call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            numbers.append(str(value.value))
        return buffer.value.decode(), ".".join(numbers)

    def free_bytes(self) -> int:
        """Memory of the device that nobody has taken."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes on the device."""
        address = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        assert address.value is not None
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self.call("cudaFree", ctypes.c_void_p(address))

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to ``address``, in stream order."""
        self._copy(address, array.ctypes.data, array.nbytes, TO_DEVICE)

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Copy from ``address`` into a contiguous array, in stream order."""
        self._copy(array.ctypes.data, address, array.nbytes, TO_HOST)

    def _copy(self, to: int, source: int, size: int, way: int) -> None:
        self.call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            way,
            self.stream,
        )

    def wait(self) -> None:
        """Until everything in the stream is done."""
        self.call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Give the stream back."""
        self.call("cudaStreamDestroy", self.stream)
