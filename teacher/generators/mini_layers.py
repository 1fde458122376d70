"""What the mini generator's network is made of: norms, convolution and transformer blocks, places.

Feature maps are [B, C, H, W], channels last in memory; tokens are [B, N, D].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE = 0.3  # what a fresh transformer branch adds to the residual stream, in its standard deviation


def norm_channels(x: Tensor) -> Tensor:
    """Layer norm over channels of [B, C, H, W] (channels-last in memory, so without a copy)."""
    y = x.permute(0, 2, 3, 1)
    return F.layer_norm(y, (x.shape[1],)).permute(0, 3, 1, 2)


def norm_tokens(x: Tensor) -> Tensor:
    """Layer norm over the last axis, without weights."""
    return F.layer_norm(x, x.shape[-1:])


class ResBlock(nn.Module):
    """Norm, optional scale and shift from a condition, two 3x3 convolutions, residual."""

    def __init__(self, channels: int, *, condition: int = 0) -> None:
        """``condition`` is the width of the conditioning vector, 0 for none."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(condition, 2 * channels) if condition else None
        nn.init.zeros_(self.conv2.weight)
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> the same."""
        y = norm_channels(x)
        if self.film is not None and condition is not None:
            scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return x + self.conv2(F.silu(self.conv1(y)))


def attend(q: Tensor, k: Tensor, v: Tensor, gain: Tensor, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention [B, N, D] x [B, M, D] -> [B, N, D]; mask bool [B, M], True = visible.

    Queries and keys are normalised per head and sharpened by ``gain`` [heads] (Henry et al., arXiv
    2010.04245): without that the scores grew to hundreds within 3000 steps, a hard choice that
    learns no more, and then the gradients exploded. Written out: for these short sequences on CPU
    it is faster than the fused kernel.
    """
    b, n, d = q.shape
    size = d // len(gain)
    q, k, v = (t.reshape(b, -1, len(gain), size).transpose(1, 2) for t in (q, k, v))
    q = F.layer_norm(q, (size,)) * (gain * size**-0.5).to(q.dtype)[:, None, None]
    scores = q @ F.layer_norm(k, (size,)).transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, -1e4).to(scores.dtype)[:, None, None]
    with torch.autocast(q.device.type, enabled=False):  # else the softmax is copied to float32
        weights = scores.softmax(-1)
    return (weights @ v.to(weights.dtype)).transpose(1, 2).reshape(b, n, d)


class Block(nn.Module):
    """Transformer block with adaptive norm; cross-attends to the prompt when ``text_width`` > 0.

    Every branch is normalised before it is added (sandwich norm, Ding et al., arXiv 2105.13290), so
    that the residual stream grows with the gates alone.
    """

    def __init__(self, width: int, heads: int, *, text_width: int = 0) -> None:
        """``text_width`` 0 leaves the cross-attention out."""
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.query = nn.Linear(width, width) if text_width else None
        self.key_value = nn.Linear(text_width, 2 * width) if text_width else None
        self.cross_out = nn.Linear(width, width) if text_width else None
        self.modulation = nn.Parameter(torch.zeros(6, width))
        self.cross_gate = nn.Parameter(torch.full((width,), GATE)) if text_width else None

    def forward(
        self, x: Tensor, modulation: Tensor | None, text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Tokens [B, N, D]; modulation [B, 6, D] (scale, shift, gate, twice); text [B, T, Dt]."""
        m = self.modulation if modulation is None else self.modulation + modulation
        m = m.to(x.dtype).expand(x.shape[0], 6, x.shape[2])[:, :, None]
        y = norm_tokens(x) * (1 + m[:, 0]) + m[:, 1]
        self_mask = mask if text is None else None  # the text encoder masks itself
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        x = x + norm_tokens(self.out(attend(q, k, v, self.gain[0], self_mask))) * (GATE + m[:, 2])
        if self.query is not None and self.key_value is not None and text is not None:
            assert self.cross_out is not None and self.cross_gate is not None
            k, v = self.key_value(text).chunk(2, dim=-1)
            q = self.query(norm_tokens(x))
            x = x + norm_tokens(self.cross_out(attend(q, k, v, self.gain[1], mask))) * (
                self.cross_gate.to(x.dtype)
            )
        y = norm_tokens(x) * (1 + m[:, 3]) + m[:, 4]
        return x + norm_tokens(self.down(F.gelu(self.up(y)))) * (GATE + m[:, 5])


def fourier(x: Tensor, count: int) -> Tensor:
    """Sines and cosines of octaves of x in [0, 1]: [...] -> [..., 2 count]."""
    angle = x[..., None] * (math.pi * 2.0 ** torch.arange(count, device=x.device))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def places(height: int, width: int, device: torch.device) -> Tensor:
    """Where each of height x width tokens is, as fractions of the picture: [1, N, 24]."""
    row = fourier((torch.arange(height, device=device) + 0.5) / height, 6)[:, None]
    column = fourier((torch.arange(width, device=device) + 0.5) / width, 6)[None]
    both = [row.expand(-1, width, -1), column.expand(height, -1, -1)]
    return torch.cat(both, dim=-1).reshape(1, height * width, -1)
