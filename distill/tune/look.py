"""What of a scene a tuning pair shows, and the truth that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from distill.tune.scenes_cache import scaled_codes

WINDOW_SIDES = (0.7, 1.0)  # of the sides of a scene that a window shows


def as_picture(rgb: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [3, H, W]."""
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


@dataclass(frozen=True)
class Look:
    """What of a scene a pair shows: all of it or a window brought to full size, mirrored or not.

    ``top``, ``left``, ``height``, ``width`` of the window and ``size`` (H, W) of the scene, in px.
    """

    size: tuple[int, int]
    top: int
    left: int
    height: int
    width: int
    mirror: bool

    @classmethod
    def whole(cls, size: tuple[int, int], mirror: bool) -> Look:
        """The scene as it is, or its mirror image."""
        return cls(size, 0, 0, *size, mirror)

    @classmethod
    def window(cls, size: tuple[int, int], mirror: bool, rng: np.random.Generator) -> Look:
        """A window of `WINDOW_SIDES` of the sides, anywhere."""
        share = rng.uniform(*WINDOW_SIDES)
        h, w = (max(1, round(share * n)) for n in size)
        top, left = (int(rng.integers(n - k + 1)) for n, k in zip(size, (h, w), strict=True))
        return cls(size, top, left, h, w, mirror)

    def truth(self, plane: np.ndarray) -> np.ndarray:
        """A plane [H, W, ...] of truth, every pixel taken from one of the scene's, never mixed."""
        rows = self.top + ((np.arange(self.size[0]) + 0.5) * self.height / self.size[0]).astype(int)
        columns = ((np.arange(self.size[1]) + 0.5) * self.width / self.size[1]).astype(int)
        columns = self.left + (columns[::-1] if self.mirror else columns)
        return np.asarray(plane)[np.ix_(rows, columns)]

    def depth(self, codes: np.ndarray) -> np.ndarray:
        """Depth codes; a window is seen with a longer lens, so D_c = D f_c / f is smaller there."""
        codes = self.truth(codes)
        return (
            codes if self.width == self.size[1] else scaled_codes(self.width / self.size[1])[codes]
        )

    def normals(self, normals: np.ndarray) -> np.ndarray:
        """Normals [H, W, 3] of int8 as float32; the mirror negates x."""
        found = self.truth(normals).astype(np.float32) / 127
        if self.mirror:
            found[..., 0] *= -1
        return found

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> float32 in [0, 1]; windows are enlarged bilinearly."""
        x = image[self.top : self.top + self.height, self.left : self.left + self.width]
        x = (x[:, ::-1] if self.mirror else x).astype(np.float32) / 255
        if x.shape[:2] == self.size:
            return x
        wide = F.interpolate(torch.from_numpy(as_picture(x))[None], size=self.size, mode="bilinear")
        return wide[0].permute(1, 2, 0).numpy()
