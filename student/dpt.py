"""A DPT-style decoder: reassemble four feature maps into a pyramid, fuse them with residual units.

After Ranftl et al. 2021, "Vision Transformers for Dense Prediction", section 3: features of a plain
transformer, all at one stride s, are resampled to s/4, s/2, s, 2s; pyramids stay as they are. Then,
coarse to fine: residual unit, addition, residual unit, bilinear upsampling, projection. Batch norm
inside the units, as in that paper's released models, folds away at export.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from student.backbone import upsampled


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with pre-activation, added to the input (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        """``channels`` in and out."""
        super().__init__()
        steps: list[nn.Module] = []
        for _ in range(2):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            steps += [nn.ReLU(), conv, nn.BatchNorm2d(channels)]
        self.steps = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> the same."""
        return x + self.steps(x)


def _resample(channels: int, zoom: float) -> nn.Module:
    """A level of a plain transformer to its place in the pyramid: zoom 4, 2, 1 or 1/2."""
    if zoom > 1:
        return nn.ConvTranspose2d(channels, channels, int(zoom), stride=int(zoom))
    if zoom < 1:
        return nn.Conv2d(channels, channels, 3, stride=2, padding=1)
    return nn.Identity()


class DptDecoder(nn.Module):
    """Backbone features -> one feature map [B, base, H/stride, W/stride].

    Args:
        channels: backbone channels per level, fine to coarse.
        strides: backbone strides [px] per level; all equal for a plain transformer.
        sizes: (height, width) of the backbone's levels.
        height: input image height [px].
        width: input image width [px].
        stride: output stride, 2 or 4.
        base: channels of the output; twice as many inside the fusion.
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
        plain = len(set(strides)) == 1
        count = len(channels)
        zooms = [2.0 ** (2 - i) if plain else 1.0 for i in range(count)]
        inner = 2 * base
        self.sizes = [
            (_zoomed(h, z), _zoomed(w, z)) for (h, w), z in zip(sizes, zooms, strict=True)
        ]
        self.end = (-(-height // stride), -(-width // stride))
        self.reassemble = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, inner, 1), _resample(inner, z), nn.Conv2d(inner, inner, 3, padding=1)
            )
            for c, z in zip(channels, zooms, strict=True)
        )
        self.lateral = nn.ModuleList(ResidualUnit(inner) for _ in range(count - 1))
        self.fuse = nn.ModuleList(ResidualUnit(inner) for _ in range(count))
        self.project = nn.ModuleList(nn.Conv2d(inner, inner, 1) for _ in range(count))
        self.out = nn.Conv2d(inner, base, 3, padding=1)

    def forward(self, image: Tensor, features: list[Tensor]) -> Tensor:
        """Backbone features, fine to coarse -> [B,base,h,w]; the image itself is not looked at."""
        levels = [step(f) for step, f in zip(self.reassemble, features, strict=True)]
        x = self.fuse[-1](levels[-1])
        for i, finer in reversed(list(enumerate(itertools.islice(self.sizes, len(levels) - 1)))):
            x = self.project[i + 1](upsampled(x, finer)) + self.lateral[i](levels[i])
            x = self.fuse[i](x)
        return self.out(upsampled(self.project[0](x), self.end))


def _zoomed(size: int, zoom: float) -> int:
    """Pixels of a level after `_resample`."""
    return int(size * zoom) if zoom >= 1 else -(-size // 2)
