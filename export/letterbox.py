"""Any image size to the artefact's fixed size and back, with equal factors and exact geometry.

The image is scaled by one factor until it fits, centred, and surrounded by mean grey. Because both
axes share the factor, a pinhole camera stays one: focal_px is multiplied by it and metres stay
metres. Answers come back by the nearest pixel, so that depth is never averaged across an edge.
Needs NumPy and Pillow only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

GREY = (124, 116, 104)  # the mean of natural images, 0 after the usual normalisation


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """Where a ``source`` image (height, width) lies inside the fixed ``target`` (height, width).

    Attributes:
        factor: target pixels per source pixel, the same for both axes.
        inner: height and width of the picture inside the target.
        offset: top and left of the picture inside the target.
        start: the source coordinates (y, x; 0 = outer border of the first pixel) of its corner:
            less than one target pixel, cut so that the factor is exact.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    factor: float
    inner: tuple[int, int]
    offset: tuple[int, int]
    start: tuple[float, float]

    @classmethod
    def fit(cls, source: tuple[int, int], target: tuple[int, int]) -> Letterbox:
        """The largest centred placement of ``source`` in ``target``."""
        factor = min(target[0] / source[0], target[1] / source[1])
        sizes = [max(1, int(s * factor + 1e-9)) for s in source]
        inner = (min(sizes[0], target[0]), min(sizes[1], target[1]))
        offset = ((target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2)
        start = tuple(max(0.0, (s - i / factor) / 2) for s, i in zip(source, inner, strict=True))
        return cls(
            source=source,
            target=target,
            factor=factor,
            inner=inner,
            offset=offset,
            start=(start[0], start[1]),
        )

    def focal_px(self, fx: float, fy: float) -> float:
        """The target's one focal length: that of a source camera (geometric mean), scaled."""
        return math.sqrt(fx * fy) * self.factor

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3] of the source size -> uint8 [H, W, 3] of the target size."""
        if image.shape != (*self.source, 3) or image.dtype != np.uint8:
            raise ValueError(
                f"letterbox: found {image.dtype} {image.shape}, expected uint8 {(*self.source, 3)}"
            )
        canvas = np.empty((*self.target, 3), np.uint8)
        canvas[:] = GREY
        (top, left), (height, width) = self.offset, self.inner
        if self.inner == self.source:
            picture = image
        else:
            y, x = self.start
            box = (
                x,
                y,
                min(x + width / self.factor, self.source[1]),
                min(y + height / self.factor, self.source[0]),
            )
            # Pillow's bilinear filter widens with the reduction: it averages what it drops.
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box)
            picture = np.asarray(resized)
        canvas[top : top + height, left : left + width] = picture
        return canvas

    def back(self, values: np.ndarray) -> np.ndarray:
        """[..., H, W] at the target size -> [..., h, w] at the source size, by nearest pixel."""
        if values.shape[-2:] != self.target:
            raise ValueError(f"letterbox: found {values.shape}, expected [..., {self.target}]")
        index = []
        for axis in (0, 1):
            centre = np.arange(self.source[axis]) + 0.5 - self.start[axis]
            inside = np.clip(np.floor(centre * self.factor), 0, self.inner[axis] - 1)
            index.append(inside.astype(np.int64) + self.offset[axis])
        return values[..., index[0][:, None], index[1][None, :]]

    def inside(self) -> np.ndarray:
        """bool [H, W]: True where the target shows the picture, False on the grey border."""
        mask = np.zeros(self.target, bool)
        (top, left), (height, width) = self.offset, self.inner
        mask[top : top + height, left : left + width] = True
        return mask


def to_label_space(answers: Mapping[str, np.ndarray], box: Letterbox) -> dict[str, np.ndarray]:
    """One image's outputs (`export.artefact`, without N) at the source size, in label form.

    ``depth`` [h, w] with +inf where sky is more likely than not, ``normals`` [h, w, 3], ``offset``
    [2, h, w] in pixels of the source, the others as they are; what `teacher.label` describes.
    """
    out = {}
    for name, values in answers.items():
        back = box.back(values)
        out[name] = np.moveaxis(back, 0, -1) if name == "normals" else back
    if "depth" in out and "sky" in out:
        out["depth"] = np.where(out["sky"] > 0.5, np.float32(np.inf), out["depth"])
    if "offset" in out:
        out["offset"] = out["offset"] / np.float32(box.factor)
    return out
