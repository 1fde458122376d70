"""What a student computes in while it learns: names, the choice among them, autocast."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.optim import muon
from torch import Tensor, nn

from teacher.generators.runtime import has_bfloat16

# Name -> what the student computes in under autocast; the losses are always float32.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def chosen(precision: str, device: str) -> str:
    """One of `PRECISIONS`; ``auto`` is bf16 on GPUs that have it, else fp32.

    bf16 on a CPU is only taken when asked for: it needs a processor with such instructions
    (docs/results.md, training).
    """
    if precision == "auto":
        good = device == "cuda" and has_bfloat16(torch.device(device))
        return "bf16" if good else "fp32"
    return precision


def autocast(precision: str, device: str) -> torch.autocast:
    """The context in which a network on ``device`` computes in one of `PRECISIONS`."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)


class Muon(muon.Muon):
    """timm's, which orthogonalises in bfloat16, and in float32 on a device without it."""

    def step(self, closure: Any = None) -> Any:
        """As there."""
        if has_bfloat16(self.param_groups[0]["params"][0].device):
            return super().step(closure)
        usual = muon.zeropower_via_newtonschulz  # `step` has no argument for its type
        muon.zeropower_via_newtonschulz = functools.partial(usual, dtype=torch.float32)
        try:
            return super().step(closure)
        finally:
            muon.zeropower_via_newtonschulz = usual


class DepthwiseInFloat32(nn.Conv2d):
    """A depthwise convolution that autocast leaves alone.

    oneDNN's bfloat16 gradient of one takes three to ten times as long as the float32 one on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Conv2d`, in float32."""
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())

    @staticmethod
    def within(network: nn.Module, precision: str, device: str) -> None:
        """Make every depthwise `nn.Conv2d` of ``network`` one of these, for bf16 on a CPU.

        Those of derived classes (`timm`'s `Conv2dSame`) stay what they are.
        """
        if (precision, device) != ("bf16", "cpu"):
            return
        for layer in network.modules():
            if type(layer) is nn.Conv2d and layer.groups == layer.in_channels > 1:
                layer.__class__ = DepthwiseInFloat32
