"""Learning what a frozen network sees: the student's features are drawn towards its features.

The frozen network is a `timm` backbone or the mini generator's image encoder (a generator's inner
features are general: that is the thesis). It looks at the picture before light and sensor were
changed. The loss is that of Yang et al. 2024, "Depth Anything", equation 7: one minus the cosine,
where it is below a tolerance. The projection that makes the channels equal is thrown away.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from distill.masked import global_sum, world
from student.backbone import Backbone
from student.kinds import wrong_kind
from student.model import Student
from teacher.errors import UsageError
from teacher.jobs.licences import read_ledger

MINI = "mini"
TOLERANCE = 0.85  # a cosine above it is near enough (Depth Anything, section 3.4)


class Source(TypedDict, total=False):
    """A frozen network: a `timm` name or "mini"; a local file; what its loss counts."""

    name: str
    weights: str | None
    pretrained: bool
    weight: float


class TimmFeatures(nn.Module):
    """The coarsest feature map of a frozen `timm` backbone."""

    def __init__(
        self, name: str, *, height: int, width: int, pretrained: bool, weights: str
    ) -> None:
        """The input size is brought to the nearest that the backbone takes."""
        super().__init__()
        stride = Backbone.stride_of(name)
        self.size = tuple(max(stride, round(v / stride) * stride) for v in (height, width))
        self.net = Backbone(
            name, height=self.size[0], width=self.size[1], pretrained=pretrained, weights=weights
        )
        self.channels, self.stride = self.net.channels[-1], self.net.strides[-1]
        self.licence = self.net.licence
        self.register_buffer("mean", torch.tensor(self.net.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(self.net.std).view(1, 3, 1, 1))
        self.mean: Tensor
        self.std: Tensor

    def forward(self, image: Tensor) -> Tensor:
        """sRGB [B,3,H,W] in [0, 1] -> [B,C,h,w]."""
        if image.shape[-2:] != self.size:
            image = nn.functional.interpolate(
                image, size=self.size, mode="bilinear", antialias=True
            )
        return self.net((image - self.mean) / self.std)[-1]


class MiniFeatures(nn.Module):
    """The mini generator's image encoder at 1/8: what it keeps of an image for all its tasks."""

    def __init__(self, weights: str, *, height: int, width: int) -> None:
        """``weights``: a mini generator's .safetensors; "" takes the shipped one."""
        from teacher.generators.mini_generator import WEIGHTS, MiniGenerator

        super().__init__()
        generator = MiniGenerator.from_pretrained(weights or WEIGHTS)
        self.net = generator.net.image
        self.size = generator.working_size(height, width)
        self.channels, self.stride = generator.net.patch.out_channels, 8
        self.licence = str(generator.card.get("license", ""))
        self.licences = read_ledger(generator.card.get("licences"))

    def forward(self, image: Tensor) -> Tensor:
        """sRGB [B,3,H,W] in [0, 1] -> [B,C,h,w]."""
        if image.shape[-2:] != self.size:
            image = nn.functional.interpolate(
                image, size=self.size, mode="bilinear", antialias=True
            )
        return self.net(image * 2 - 1).eighth


def frozen(source: dict[str, Any], *, height: int, width: int) -> TimmFeatures | MiniFeatures:
    """The frozen network of ``source``: ``name`` (a `timm` name, or "mini"), ``weights`` (a local
    file), ``pretrained``."""
    wrong = wrong_kind(Source, source, where="features.")
    if wrong is not None:
        raise UsageError(wrong)
    name, weights = source["name"], source.get("weights") or ""
    if weights and not Path(weights).is_file():
        raise UsageError(f"features.weights={weights!r}: no such file")
    net: TimmFeatures | MiniFeatures
    if name == MINI:
        net = MiniFeatures(weights, height=height, width=width)
    else:
        pretrained = source.get("pretrained", False)
        if not pretrained and not weights:
            raise UsageError(
                f"features.name={name}: an untrained network has nothing to teach; set "
                "features.pretrained=true or features.weights=FILE.safetensors"
            )
        net = TimmFeatures(name, height=height, width=width, pretrained=pretrained, weights=weights)
    return net.eval().requires_grad_(False)


class FeatureLoss(nn.Module):
    """The student's feature map nearest in stride, projected, against the frozen network's."""

    def __init__(self, source: dict[str, Any], student: Student) -> None:
        """See `frozen` for ``source``; its ``weight`` is what the loss counts."""
        super().__init__()
        size = {k: student.config[k] for k in ("height", "width")}
        # in a tuple: frozen weights are no part of the state
        self.teacher = (frozen(source, **size),)
        self.weight = float(source.get("weight", 1.0))
        if not 0 <= self.weight < math.inf:
            found = f"features.weight={source['weight']}"
            raise UsageError(f"{found}: expected a finite number of at least 0")
        strides = student.backbone.strides
        aim = self.teacher[0].stride
        self.level = min(range(len(strides)), key=lambda i: (abs(strides[i] - aim), -i))
        self.project = nn.Conv2d(student.backbone.channels[self.level], self.teacher[0].channels, 1)
        self.seen: list[Tensor] = []
        student.backbone.register_forward_hook(lambda _, __, out: setattr(self, "seen", out))

    @torch.no_grad()
    def aim(self, clean: Tensor) -> Tensor:
        """What the frozen network sees of the unchanged pictures [B,3,H,W]; autocast may apply."""
        return self.teacher[0].to(clean.device)(clean).float()

    def forward(self, aim: Tensor) -> Tensor:
        """After the student has looked: the loss against `aim`."""
        return feature_loss(self.project(self.seen[self.level].float()), aim)


def feature_loss(said: Tensor, aim: Tensor) -> Tensor:
    """Mean over positions of 1 - cosine, 0 where the cosine is above `TOLERANCE`.

    ``aim`` [B,C,h,w] is taken per channel as distance from its mean over the batch: what all
    positions share teaches nothing. ``said`` is resized to it.
    """
    if said.shape[-2:] != aim.shape[-2:]:
        said = nn.functional.interpolate(said, size=aim.shape[-2:], mode="bilinear")
    places = aim.numel() // aim.shape[1] * world()
    aim = aim - (global_sum(aim.sum((0, 2, 3))) / places).view(1, -1, 1, 1)
    cosine = nn.functional.cosine_similarity(said, aim, dim=1)
    kept = torch.where(cosine < TOLERANCE, 1 - cosine, 0.0)
    return global_sum(kept.sum()) / global_sum(torch.tensor(kept.numel(), device=kept.device))
