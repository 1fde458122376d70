"""Where and how foreign networks run: device, precision, offloading, and pixels in and out.

Every answer keeps its image's pixel grid: resampling maps whole extents onto whole extents
(pixel centres at (x + 0.5) s - 0.5), and what is padded for the network is cut off again.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators import Query
from teacher.label import Answer, Space, Task

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OFFLOADS = ("none", "model", "sequential")
RESAMPLE = ("nearest-exact", "bilinear")


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for bfloat16.

    A CPU without takes seven to twenty times as long in it as in float32 (docs/results.md).
    """
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()  # all that have AMX have it, too
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def bfloat16_if_fast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where ``device`` has it (`has_bfloat16`); float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How networks are held and run.

    Attributes:
        device: where they compute.
        dtype: of the big network's weights and activations.
        offload: ``none``: all stays on the device; ``model``: each network moves there for its
            turn; ``sequential``: each layer does (slow, smallest).
        pass_size: how many images or denoisings go through a network at once.
    """

    device: torch.device
    dtype: torch.dtype
    offload: str
    pass_size: int

    @classmethod
    def parse(
        cls, *, device: str, dtype: str, offload: str, pass_size: int, auto: str
    ) -> Execution:
        """Check the config's words; ``dtype="auto"`` is ``auto`` on a GPU, float32 elsewhere."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise UsageError(
                f"teacher.device={device!r}: not a device; use auto, cpu, cuda:0."
            ) from error
        if place.type == "cuda" and not torch.cuda.is_available():
            raise EnvironmentFailure(
                f"teacher.device={device}: torch {torch.__version__} sees no CUDA device here."
            )
        if dtype == "auto":
            dtype = auto if place.type == "cuda" else "float32"
        if dtype not in DTYPES:
            raise UsageError(f"teacher.dtype={dtype!r}: expected auto, {', '.join(DTYPES)}.")
        if place.type == "cpu" and dtype == "float16":
            raise UsageError("teacher.dtype=float16: not on the CPU; use float32 or bfloat16.")
        if offload not in OFFLOADS:
            raise UsageError(f"teacher.offload={offload!r}: expected one of {OFFLOADS}.")
        if offload == "model" and place.type == "cpu":
            raise UsageError("teacher.offload=model: nothing to offload from; the device is cpu.")
        if pass_size < 1:
            raise UsageError(f"teacher.pass_size={pass_size}: expected at least 1.")
        return cls(device=place, dtype=DTYPES[dtype], offload=offload, pass_size=pass_size)

    @property
    def vae_dtype(self) -> torch.dtype:
        """Float32 beside bfloat16 (8 bits would leave the answer 256 levels), else ``dtype``."""
        return torch.float32 if self.dtype is torch.bfloat16 else self.dtype

    def settle(self, network: nn.Module, *, dtype: torch.dtype | None = None) -> Any:
        """Bring a loaded network to its place and precision, ready for `using`."""
        network = network.eval().requires_grad_(False)
        nn.Module.to(network, dtype=dtype or self.dtype)  # diffusers' own `to` warns of nothing
        if self.offload == "sequential":
            from accelerate import cpu_offload

            return cpu_offload(network, self.device)
        return network.to("cpu" if self.offload == "model" else self.device)

    @contextlib.contextmanager
    def using(self, network: Any) -> Iterator[Any]:
        """The network on the device for the length of the block; clear words when it is too big."""
        try:
            if self.offload == "model":
                network.to(self.device)
            yield network
        except torch.cuda.OutOfMemoryError as error:
            raise EnvironmentFailure(
                f"{self.device} has too little memory for {type(network).__name__} with "
                f"teacher.pass_size={self.pass_size}, offload={self.offload}: lower pass_size, "
                "then side_px, then try vae_tiling=true, offload=model or sequential."
            ) from error
        finally:
            if self.offload == "model":
                network.to("cpu")

    def describe(self) -> dict[str, Any]:
        """What of it can change an answer."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}


def by_size(queries: Sequence[Query]) -> list[list[int]]:
    """Indices of the queries whose images share a size, each group in order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, query in enumerate(queries):
        groups.setdefault(query.image.shape[:2], []).append(index)
    return list(groups.values())


def chunks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(n)``."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def to_signed(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """uint8 [H, W, 3] of one size -> float32 [N, 3, H, W] in [-1, 1] on ``device``."""
    stacked = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
    return stacked.contiguous().float() / 255.0 * 2.0 - 1.0


def longest_side(height: int, width: int, side_px: int) -> tuple[int, int]:
    """Size with the longer side ``side_px`` (0: as it is), the other rounded down, at least 1."""
    if side_px == 0:
        return height, width
    longest = max(height, width)
    return max(1, height * side_px // longest), max(1, width * side_px // longest)


def padded(image: Tensor, multiple: int) -> Tensor:
    """Right and bottom edge repeated until both sides divide by ``multiple``."""
    pad_h, pad_w = -image.shape[-2] % multiple, -image.shape[-1] % multiple
    return F.pad(image, (0, pad_w, 0, pad_h), mode="replicate")


def resized(values: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[N, C, h, w] -> [N, C, *size] on the same extent; no-op when the size is right."""
    if tuple(values.shape[-2:]) == size:
        return values
    return F.interpolate(values, size, mode=mode)


def check_resample(resample: str) -> str:
    """Refuse an unknown way back to the image's size."""
    if resample not in RESAMPLE:
        raise UsageError(f"teacher.resample={resample!r}: expected one of {RESAMPLE}.")
    return resample


def depth_answer(
    values: np.ndarray, *, space: Space, spread: np.ndarray | None = None, **extras: Any
) -> Answer:
    """[H, W] -> Answer; what is not finite is unknown (an infinity would be read as sky)."""
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
    if spread is not None:
        spread = np.where(np.isnan(values), np.nan, spread).astype(np.float32)
    return Answer(task=Task.DEPTH, space=space, values=values, uncertainty=spread, extras=extras)


def normals_answer(
    normals: np.ndarray, *, spread_deg: np.ndarray | None = None, **extras: Any
) -> Answer:
    """[H, W, 3] in our axes, any length -> Answer of unit vectors; no direction is unknown."""
    normals = normals.astype(np.float64)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    known = np.isfinite(length) & (length > 1e-6)
    unit = np.where(known, normals / np.where(known, length, 1), np.nan).astype(np.float32)
    if spread_deg is not None:
        spread_deg = np.where(known[..., 0], spread_deg, np.nan).astype(np.float32)
    return Answer(
        task=Task.NORMALS,
        space=Space.UNIT_NORMALS,
        values=unit,
        uncertainty=spread_deg,
        extras=extras,
    )
