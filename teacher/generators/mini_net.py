"""The mini generator's network: image encoder, text encoder, transformer, picture decoder.

It predicts the clean picture y from x_s = (1 - s) y + s noise (rectified flow, Liu et al.,
arXiv 2209.03003, with x0 parametrisation), an instruction, and optionally an input image. Pictures
and images live in [-1, 1], [B, 3, H, W] with H and W multiples of 8. Three parts are worth knowing:

* the image encoder runs once per image, whatever the number of prompts, seeds and steps;
* colours written in the prompt are tokens that carry their RGB, and the decoder may *point* at one
  per pixel (a pointer network, Vinyals et al., arXiv 1506.03134), so palettes come back exactly;
* the mean of the noise, whitened, conditions everything, so a seed's global choices (which way the
  instance colours turn) are readable in the first step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.generators.mini_layers import (
    Block,
    ResBlock,
    attend,
    fourier,
    norm_channels,
    norm_tokens,
    places,
)
from teacher.generators.mini_text import NGRAM_BUCKETS, NGRAMS_PER_TOKEN


class Text(NamedTuple):
    """Tokenised prompts (`mini_text.tokenize`), stacked.

    ngrams int64 [B, T, G] (bucket 0 = none), rgb float [B, T, 4] (RGB in [-1, 1] and a flag),
    mask bool [B, T], colour_at int64 [B, MAX_COLOURS] (token index of every colour),
    colour_mask bool [B, MAX_COLOURS].
    """

    ngrams: Tensor
    rgb: Tensor
    mask: Tensor
    colour_at: Tensor
    colour_mask: Tensor


class Prompt(NamedTuple):
    """Prompts as the text encoder read them: tokens [B, T, D], sentence [B, D], kinds [B, tasks]
    (logits of what is asked), and the `Text` itself.
    """

    tokens: Tensor
    sentence: Tensor
    kinds: Tensor
    text: Text

    def first(self, count: int) -> Prompt:
        """The first ``count`` prompts."""
        text = Text(*(t[:count] for t in self.text))
        return Prompt(self.tokens[:count], self.sentence[:count], self.kinds[:count], text)


class Features(NamedTuple):
    """What the image encoder keeps: [B, c, H/2, W/2], [B, 2c, H/4, W/4], [B, width, H/8, W/8]."""

    half: Tensor
    quarter: Tensor
    eighth: Tensor

    def select(self, index: Tensor) -> Features:
        """The features of images ``index`` [N], repeats allowed."""
        return Features(*(f[index] for f in self))


class ImageEncoder(nn.Module):
    """Image -> features at 1/2, 1/4, 1/8. Nothing of task, noise or time enters.

    Most of the network's sight is here, because it runs once per image: convolutions down to 1/8,
    transformer blocks there, and a way back up, so that the fine features know the whole picture.
    """

    def __init__(self, channels: int, width: int, *, blocks: int, heads: int) -> None:
        """``channels`` at 1/2, twice that at 1/4, ``width`` at 1/8."""
        super().__init__()
        c = channels
        self.stem = nn.Conv2d(12, c, 3, padding=1)
        self.block2 = ResBlock(c)
        self.down4 = nn.Conv2d(c, 2 * c, 2, stride=2)
        self.blocks4 = nn.Sequential(ResBlock(2 * c), ResBlock(2 * c))
        self.down8 = nn.Conv2d(2 * c, 4 * c, 2, stride=2)
        self.block8 = ResBlock(4 * c)
        self.widen = nn.Conv2d(4 * c, width, 1)
        self.position = nn.Linear(24, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.up4 = nn.Conv2d(width, 8 * c, 1)
        self.merge4 = nn.Sequential(ResBlock(2 * c), ResBlock(2 * c))
        self.up2 = nn.Conv2d(2 * c, 4 * c, 1)
        self.merge2 = ResBlock(c)

    def forward(self, image: Tensor) -> Features:
        """[B, 3, H, W] in [-1, 1] -> `Features`."""
        x = F.pixel_unshuffle(image, 2).contiguous(memory_format=torch.channels_last)
        half = self.block2(self.stem(x))
        quarter = self.blocks4(self.down4(half))
        x = self.widen(norm_channels(self.block8(self.down8(quarter))))
        hh, ww = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.position(places(hh, ww, x.device))
        for block in self.blocks:
            x = block(x, None, None, None)
        eighth = norm_tokens(x).transpose(1, 2).reshape(len(x), -1, hh, ww)
        eighth = eighth.contiguous(memory_format=torch.channels_last)
        quarter = self.merge4(quarter + F.pixel_shuffle(self.up4(eighth), 2))
        half = self.merge2(half + F.pixel_shuffle(self.up2(norm_channels(quarter)), 2))
        return Features(half, quarter, eighth)


class TextEncoder(nn.Module):
    """Bags of character n-grams -> token features, a sentence vector and task logits."""

    def __init__(self, width: int, *, layers: int, max_tokens: int, tasks: int) -> None:
        """``tasks`` counts the kinds of request the head tells apart, "something else" included."""
        super().__init__()
        self.ngrams = nn.EmbeddingBag(NGRAM_BUCKETS, width, mode="sum", padding_idx=0)
        self.rgb = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(max_tokens, width) * 0.1)
        self.neighbours = nn.Conv1d(width, width, 7, padding=3, groups=4)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.task_head = nn.Linear(width, tasks)
        nn.init.normal_(self.ngrams.weight, std=1 / math.sqrt(NGRAMS_PER_TOKEN))

    def forward(self, text: Text) -> Prompt:
        """Read prompts."""
        b, t, g = text.ngrams.shape
        x = self.ngrams(text.ngrams.reshape(b * t, g)).reshape(b, t, -1)
        x = (x + self.rgb(text.rgb) + self.position[:t]) * text.mask[..., None]
        x = x + F.silu(self.neighbours(x.transpose(1, 2))).transpose(1, 2) * text.mask[..., None]
        for block in self.blocks:
            x = block(x, None, None, text.mask)
        x = norm_tokens(x)
        weight = text.mask[..., None].to(x.dtype)
        sentence = (x * weight).sum(1) / weight.sum(1).clamp_min(1)
        return Prompt(x, sentence, self.task_head(sentence), text)


class MiniNet(nn.Module):
    """(picture x_s, time s, prompt, image features or none) -> the clean picture."""

    def __init__(
        self,
        *,
        channels: int = 32,
        width: int = 192,
        image_blocks: int = 5,
        blocks: int = 4,
        heads: int = 6,
        text_width: int = 128,
        text_layers: int = 2,
        max_tokens: int = 120,
        tasks: int = 6,
    ) -> None:
        """Sizes; the shipped weights carry theirs in the JSON card."""
        super().__init__()
        c, self.max_tokens, key = channels, max_tokens, 16
        self.image = ImageEncoder(c, width, blocks=image_blocks, heads=heads)
        self.text = TextEncoder(text_width, layers=text_layers, max_tokens=max_tokens, tasks=tasks)
        self.null = nn.ParameterList(torch.zeros(n) for n in (c, 2 * c, width))
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.from_image = nn.Conv2d(width, width, 1)
        self.position = nn.Linear(24, width)
        self.condition = nn.Sequential(
            nn.Linear(24 + 3 + text_width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            Block(width, heads, text_width=text_width if i % 2 == 0 else 0) for i in range(blocks)
        )
        self.up4 = nn.Conv2d(width, 4 * 2 * c, 1)
        self.noisy4 = nn.Conv2d(48, 2 * c, 1)
        self.blocks4 = nn.ModuleList(ResBlock(2 * c, condition=width) for _ in range(2))
        self.query4 = nn.Linear(2 * c, 2 * c)
        self.key_value4 = nn.Linear(text_width, 4 * c)
        self.gain4 = nn.Parameter(torch.ones(4))
        self.up2 = nn.Conv2d(2 * c, 4 * c, 1)
        self.noisy2 = nn.Conv2d(12, c, 1)
        self.block2 = ResBlock(c, condition=width)
        self.picture = nn.Conv2d(c, 4 * (3 + 1 + key), 3, padding=1)
        self.colour_key = nn.Linear(text_width, key)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def encode_image(self, image: Tensor) -> Features:
        """Image [B, 3, H, W] in [-1, 1] -> features to be reused over prompts, seeds, steps."""
        return self.image(image)

    def no_image(self, size: tuple[int, int], count: int) -> Features:
        """Features of "no image" for a picture of ``size`` (H, W): pure generation."""
        h, w = size
        maps = [
            p[None, :, None, None].expand(count, -1, h // f, w // f)
            for p, f in zip(self.null, (2, 4, 8), strict=True)
        ]
        return Features(*maps)

    def forward(self, noisy: Tensor, s: Tensor, prompt: Prompt, features: Features) -> Tensor:
        """[B, 3, H, W] at times s [B] in (0, 1] -> clean picture [B, 3, H, W]."""
        return self.paint(self.decode(noisy, s, prompt, features), prompt)

    def decode(self, noisy: Tensor, s: Tensor, prompt: Prompt, features: Features) -> Tensor:
        """As `forward`, up to [B, 3 + 1 + key, H, W]: colour, share of pointing, query."""
        tokens, sentence, _, text = prompt
        b, _, h, w = noisy.shape
        mean = noisy.float().mean((2, 3)) * math.sqrt(h * w)  # N(0, 1) at s = 1
        time = fourier(s.float() / 2, 12)
        cond = self.condition(torch.cat([time, mean.clamp(-4, 4), sentence], dim=-1))

        # 1/8: image features, noisy patches and the prompt meet
        x = self.patch(noisy) + self.from_image(features.eighth)
        hh, ww = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.position(places(hh, ww, x.device))
        modulation = self.modulation(cond).reshape(b, 6, -1)
        for block in self.blocks:
            x = block(x, modulation, tokens, text.mask)
        x = norm_tokens(x).transpose(1, 2).reshape(b, -1, hh, ww)

        # 1/4: image skip, noisy picture, another look at the prompt
        x = F.pixel_shuffle(self.up4(x.contiguous(memory_format=torch.channels_last)), 2)
        x = x + features.quarter + self.noisy4(F.pixel_unshuffle(noisy, 4))
        x = self.blocks4[0](x.contiguous(memory_format=torch.channels_last), cond)
        k, v = self.key_value4(tokens).chunk(2, dim=-1)
        q = self.query4(norm_channels(x).flatten(2).transpose(1, 2))
        x = x + attend(q, k, v, self.gain4, text.mask).transpose(1, 2).reshape(x.shape)
        x = self.blocks4[1](x.contiguous(memory_format=torch.channels_last), cond)

        # 1/2, then pixels: a drawn colour, or one pointed at among the prompt's
        x = F.pixel_shuffle(self.up2(x), 2) + features.half
        x = x + self.noisy2(F.pixel_unshuffle(noisy, 2))
        x = self.block2(x.contiguous(memory_format=torch.channels_last), cond)
        return F.pixel_shuffle(self.picture(norm_channels(x)), 2)

    def point(self, x: Tensor, prompt: Prompt, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For pairs ``rows`` [R]: scores [R, K, H W] and RGB [R, K, 3] of the prompts' colours."""
        tokens, text = prompt.tokens, prompt.text
        at, mask = text.colour_at[rows, :, None], text.colour_mask[rows]
        keys = self.colour_key(tokens[rows].gather(1, at.expand(-1, -1, tokens.shape[2])))
        rgb = text.rgb[rows, :, :3].gather(1, at.expand(-1, -1, 3)).float()
        scores = keys @ x[rows, 4:].flatten(2)
        return scores.float().masked_fill(~mask[:, :, None], -1e4), rgb

    def paint(self, x: Tensor, prompt: Prompt) -> Tensor:
        """`decode`'s output -> picture [B, 3, H, W], mixing drawn and pointed-at colours."""
        rows = prompt.text.colour_mask.any(1).nonzero()[:, 0]
        drawn = x[:, :3].float()
        if not len(rows):
            return drawn
        _, _, h, w = x.shape
        scores, rgb = self.point(x, prompt, rows)
        pointed = (rgb.transpose(1, 2) @ scores.softmax(1)).reshape(-1, 3, h, w)
        share = x[rows, 3:4].float().sigmoid()
        return drawn.index_copy(0, rows, drawn[rows] * (1 - share) + pointed * share)

    def count_parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.parameters())
