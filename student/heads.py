"""One head per task: the decoder's features to values in the units of the label contract.

A head predicts ``stride x stride`` sub-pixels per decoder cell (Shi et al. 2016, "Real-Time Single
Image and Video Super-Resolution", equation 4): full-resolution edges for the price of one coarse
convolution, exported as DepthToSpace. Its weights start equal over the sub-pixels (Aitken et al.
2017, "Checkerboard artifact free sub-pixel convolution"), that is as nearest upsampling.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from student.backbone import conv_block

START_ANGLE_DEG = 20.0  # what an untrained normals uncertainty says

Image = Float[Tensor, "b _c _h _w"]  # channels and size change on the way: only b is bound


class SubPixel(nn.Module):
    """Features [B,C,h,w] -> ``outputs`` maps [B,outputs,h*stride,w*stride], linear at the end."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, start: list[float]) -> None:
        """``start``: the constant each output begins with (the bias)."""
        super().__init__()
        self.hidden = conv_block(inputs, inputs)
        self.out = nn.Conv2d(inputs, outputs * stride**2, 1)
        self.shuffle = nn.PixelShuffle(stride)
        with torch.no_grad():
            weight = torch.randn(outputs, inputs, 1, 1) * (0.1 / math.sqrt(inputs))
            self.out.weight.copy_(weight.repeat_interleave(stride**2, 0))
            self.out.bias.copy_(torch.tensor(start).repeat_interleave(stride**2))  # type: ignore[union-attr]

    def forward(self, x: Image) -> Image:
        """See the class."""
        return self.shuffle(self.out(self.hidden(x)))


class NormalsHead(nn.Module):
    """Unit normals (x right, y up, z to the viewer) and their expected angular error."""

    def __init__(self, inputs: int, *, stride: int, uncertainty: bool) -> None:
        """``inputs``: decoder channels."""
        super().__init__()
        share = START_ANGLE_DEG / 180
        start = [0.0, 0.0, 1.0, math.log(share / (1 - share))]
        self.uncertainty = uncertainty
        outputs = 3 + uncertainty
        self.maps = SubPixel(inputs, outputs, stride=stride, start=start[:outputs])

    def forward(self, x: Image) -> dict[str, Image]:
        """``normals`` [B,3,H,W] unit vectors; ``normals_uncertainty`` [B,1,H,W] in degrees."""
        maps = self.maps(x).float()
        answer = {"normals": nn.functional.normalize(maps[:, :3], dim=1, eps=1e-4)}
        if self.uncertainty:
            answer["normals_uncertainty"] = 180 * maps[:, 3:4].sigmoid()
        return answer


class SemanticHead(nn.Module):
    """Class logits; their uncertainty is 1 - p of the most likely class."""

    def __init__(self, inputs: int, *, stride: int, classes: int, uncertainty: bool) -> None:
        """``classes``: number of channels, in the order of the model's ``class_ids``."""
        super().__init__()
        self.uncertainty = uncertainty
        self.maps = SubPixel(inputs, classes, stride=stride, start=[0.0] * classes)

    def forward(self, x: Image) -> dict[str, Image]:
        """``semantic`` [B,C,H,W] logits; ``semantic_uncertainty`` [B,1,H,W] in [0, 1]."""
        logits = self.maps(x).float()
        answer = {"semantic": logits}
        if self.uncertainty:
            answer["semantic_uncertainty"] = 1 - logits.softmax(1).amax(1, keepdim=True)
        return answer


class InstancesHead(nn.Module):
    """Where the centre of a thing is, and from every pixel the way to its own thing's centre.

    Cheng et al. 2020, "Panoptic-DeepLab", section 3.2; `student.grouping` makes instances of it,
    outside the graph. Offsets grow with the picture, so they are learnt in shares of its diagonal.
    """

    def __init__(self, inputs: int, *, stride: int, diagonal_px: float) -> None:
        """``diagonal_px``: of the input image."""
        super().__init__()
        self.diagonal_px = diagonal_px
        self.maps = SubPixel(inputs, 3, stride=stride, start=[-4.0, 0.0, 0.0])

    def forward(self, x: Image) -> dict[str, Image]:
        """``center`` [B,1,H,W] score in (0, 1); ``offset`` [B,2,H,W] px, right and down."""
        maps = self.maps(x).float()
        return {"center": maps[:, :1].sigmoid(), "offset": maps[:, 1:] * self.diagonal_px}
