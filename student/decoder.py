"""A light feature-pyramid decoder: top-down, wider where coarse, ending at one fine stride.

After Lin et al. 2017, "Feature Pyramid Networks for Object Detection" (lateral 1x1 convolutions,
top-down addition), with three changes for metric depth: a global context vector and the pixel's
coordinates enter at the coarsest level (absolute scale and the horizon are not local), channels
halve every second octave, and a two-convolution stem delivers the stride that the backbone lacks.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from student.backbone import conv_block, upsampled


def coordinates(height: int, width: int) -> Tensor:
    """Pixel-centre coordinates x (right) and y (down) in (-1, 1): [1, 2, height, width]."""
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x, grid_y])[None]


def level_channels(base: int, stride: int, finest: int) -> int:
    """Channels of the level at ``stride``: ``base`` at the finest, times sqrt(2) per octave."""
    return max(8, round(base * (stride / finest) ** 0.5 / 8) * 8)


class Decoder(nn.Module):
    """Backbone features -> one feature map [B, base, H/stride, W/stride].

    Args:
        channels: backbone channels per level, fine to coarse.
        strides: backbone strides [px] per level.
        sizes: (height, width) of the backbone's levels.
        height: input image height [px].
        width: input image width [px].
        stride: output stride, 2 or 4.
        base: channels of the output.
    """

    def __init__(
        self,
        *,
        channels: list[int],
        strides: list[int],
        sizes: list[tuple[int, int]],
        height: int,
        width: int,
        stride: int,
        base: int,
    ) -> None:
        """Plan the levels once, with fixed sizes, so that the exported graph has constant sizes."""
        super().__init__()
        pyramid = zip(channels, strides, sizes, strict=True)
        levels = [(c, s, size) for c, s, size in pyramid if s >= stride]
        self.skipped = len(channels) - len(levels)
        self.stem: nn.ModuleList = nn.ModuleList()
        inputs, at = 3, 2
        missing = levels[0][1] > stride
        while missing and at < levels[0][1] and at <= 4:  # finer than the backbone's finest
            self.stem.append(conv_block(inputs, base, stride=2))
            inputs, at = base, at * 2
        steps = [2 ** (i + 1) for i in range(len(self.stem))]
        stem_levels = [(base, s, (-(-height // s), -(-width // s))) for s in steps if s >= stride]
        self.stem_skipped = len(self.stem) - len(stem_levels)
        levels = stem_levels + levels
        widths = [level_channels(base, s, stride) for _, s, _ in levels]
        self.sizes = [size for _, _, size in levels]
        self.end = (height // stride, width // stride)
        self.lateral = nn.ModuleList(
            nn.Conv2d(c, w, 1) for (c, _, _), w in zip(levels, widths, strict=True)
        )
        self.context = nn.Sequential(nn.Conv2d(levels[-1][0], widths[-1], 1), nn.ReLU())
        self.where = nn.Conv2d(2, widths[-1], 1, bias=False)
        self.narrow = nn.ModuleList(
            nn.Conv2d(coarse, fine, 1) for fine, coarse in itertools.pairwise(widths)
        )
        self.fuse = nn.ModuleList(conv_block(w, w) for w in widths)
        self.register_buffer("grid", coordinates(*self.sizes[-1]), persistent=False)
        self.grid: Tensor

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Normalised image [B,3,H,W] and backbone features, fine to coarse -> [B,base,h,w]."""
        details, x = [], image
        for step in self.stem:
            x = step(x)
            details.append(x)
        levels = details[self.stem_skipped :] + features[self.skipped :]
        coarsest = levels[-1]
        x = self.lateral[-1](coarsest) + self.where(self.grid)
        x = x + self.context(coarsest.mean((2, 3), keepdim=True))
        x = self.fuse[-1](x)
        for i in range(len(levels) - 2, -1, -1):
            x = upsampled(self.narrow[i](x), self.sizes[i]) + self.lateral[i](levels[i])
            x = self.fuse[i](x)
        return upsampled(x, self.end)
