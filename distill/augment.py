"""Augmentation that knows geometry and cameras; NumPy and Pillow, one sample at a time.

Geometry is one window: output pixel centres (x + 0.5) / factor + left - 0.5 in the source, the
same factor on both axes. Images are averaged over what they lose, labels are taken at the nearest
pixel centre, so that no depth is ever mixed across an edge; what lies outside the source is mean
grey without a label. Depth stays z-depth in metres; the focal length takes the factor.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from teacher.label import Camera

GREY = (124, 116, 104)  # as export.letterbox pads
CUTMIX_SHARE = 0.2  # of strongly augmented samples that show a piece of another
WHOLE_SHARE = 0.5  # of samples that are not cropped (docs/results.md, training)
MAX_ZOOM = 1.6  # largest enlargement beyond filling the frame
MODES = ("strong", "geometry", "none")


def sample_rng(*parts: object) -> np.random.Generator:
    """A generator that depends on the given parts alone (key, epoch, seed), never on workers."""
    digest = hashlib.sha256("\0".join(str(p) for p in parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


@dataclass(frozen=True, kw_only=True)
class Window:
    """What part of a source becomes the ``height x width`` sample.

    Attributes:
        left: source coordinate of the sample's left border [px; 0 is the source's left border].
        top: likewise [px].
        factor: sample pixels per source pixel, the same on both axes.
        height: of the sample [px].
        width: of the sample [px].
        hidden: rows at top and bottom each, and columns at left and right each, that show no
            source: what a letterboxed picture of another aspect looks like.
    """

    left: float
    top: float
    factor: float
    height: int
    width: int
    hidden: tuple[int, int] = (0, 0)

    def span(self, size: int, start: float, out: int, hidden: int = 0) -> tuple[int, int]:
        """First and last + 1 shown index whose whole pixel lies inside a source of ``size``."""
        first = max(hidden, math.ceil(-start * self.factor - 1e-6))
        last = min(out - hidden, math.floor((size - start) * self.factor + 1e-6))
        return first, max(first, last)

    def with_grey(self, sample: np.ndarray, source: tuple[int, int]) -> np.ndarray:
        """A sample's image with its border as `image` left it, whatever changed the light."""
        (x0, x1), (y0, y1) = self._spans(*source)
        out = np.empty_like(sample)
        out[:] = GREY
        out[y0:y1, x0:x1] = sample[y0:y1, x0:x1]
        return out

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3] -> uint8 [height, width, 3], averaged where it shrinks."""
        (x0, x1), (y0, y1) = self._spans(image.shape[0], image.shape[1])
        canvas = np.empty((self.height, self.width, 3), np.uint8)
        canvas[:] = GREY
        if x1 > x0 and y1 > y0:
            box = (
                max(0.0, self.left + x0 / self.factor),
                max(0.0, self.top + y0 / self.factor),
                min(float(image.shape[1]), self.left + x1 / self.factor),
                min(float(image.shape[0]), self.top + y1 / self.factor),
            )
            # Pillow's bilinear filter widens with the reduction (an area average).
            picture = Image.fromarray(image).resize(
                (x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box
            )
            canvas[y0:y1, x0:x1] = np.asarray(picture)
        return canvas

    def labels(self, values: np.ndarray, unknown: float) -> np.ndarray:
        """[h, w, ...] -> [height, width, ...] at the nearest pixel centre, ``unknown`` outside."""
        (x0, x1), (y0, y1) = self._spans(values.shape[0], values.shape[1])
        x = np.floor((np.arange(x0, x1) + 0.5) / self.factor + self.left).astype(np.int64)
        y = np.floor((np.arange(y0, y1) + 0.5) / self.factor + self.top).astype(np.int64)
        out = np.full((self.height, self.width, *values.shape[2:]), unknown, values.dtype)
        shown = values.take(y, axis=0, mode="clip")  # one axis at a time: four times as fast
        out[y0:y1, x0:x1] = shown.take(x, axis=1, mode="clip")
        return out

    def _spans(self, h: int, w: int) -> tuple[tuple[int, int], tuple[int, int]]:
        rows, columns = self.hidden
        return (
            self.span(w, self.left, self.width, columns),
            self.span(h, self.top, self.height, rows),
        )

    def camera(self, camera: Camera) -> Camera:
        """The camera of the sample."""
        return Camera(
            fx=camera.fx * self.factor,
            fy=camera.fy * self.factor,
            cx=(camera.cx + 0.5 - self.left) * self.factor - 0.5,
            cy=(camera.cy + 0.5 - self.top) * self.factor - 0.5,
            width=self.width,
            height=self.height,
            source=camera.source,
        )


def letterbox(source: tuple[int, int], target: tuple[int, int]) -> Window:
    """The whole source (height, width), centred in the target, as `export.letterbox` places it."""
    factor = min(target[0] / source[0], target[1] / source[1])
    inner = [min(t, max(1, int(s * factor + 1e-9))) for s, t in zip(source, target, strict=True)]
    start = [
        max(0.0, (s - i / factor) / 2) - (t - i) // 2 / factor
        for s, i, t in zip(source, inner, target, strict=True)
    ]
    return Window(left=start[1], top=start[0], factor=factor, height=target[0], width=target[1])


def random_window(
    rng: np.random.Generator, source: tuple[int, int], target: tuple[int, int]
) -> Window:
    """The whole picture as `distill predict` shows it, or a random crop or part-letterbox of it.

    Every second sample is the whole picture: were all enlarged, the student would take whatever is
    whole for near. The others have a factor that fills the frame (a quarter: between fitting and
    filling), seven in ten a zoom. A fifth of all get the border of a taller or wider picture: a
    student of pictures of its own aspect would meet its first border in `distill predict`.
    """
    whole = letterbox(source, target)
    fit = whole.factor
    fill = max(target[0] / source[0], target[1] / source[1])
    factor = fit * (fill / fit) ** rng.uniform() if rng.uniform() < 0.25 else fill
    if rng.uniform() < 0.7:
        factor *= MAX_ZOOM ** rng.uniform()
    slack = [s - t / factor for s, t in zip(source, target, strict=True)]
    top, left = (rng.uniform(min(0.0, s), max(0.0, s)) for s in slack)
    if rng.uniform() < WHOLE_SHARE:
        top, left, factor = whole.top, whole.left, fit
    hidden = (0, 0)
    if rng.uniform() < 0.2:  # up to 9:16 or 2:1 in a 4:3 frame
        rows, columns = int(rng.uniform(0, 0.17) * target[0]), int(rng.uniform(0, 0.3) * target[1])
        hidden = (0, columns) if rng.uniform() < 0.7 else (rows, 0)
    return Window(
        left=left, top=top, factor=factor, height=target[0], width=target[1], hidden=hidden
    )


def photometric(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Strong changes of light and sensor on uint8 [H, W, 3]; geometry and labels untouched.

    Exposure, white balance, contrast, saturation (one in twenty grey), gamma; then noise every
    second time, blur one time in five, JPEG one time in five.
    """
    x = image.astype(np.float32) / 255
    x *= np.exp(rng.normal(0, 0.2) + rng.normal(0, 0.06, 3)).astype(np.float32)
    mean = x.mean()
    x = mean + (x - mean) * np.float32(rng.uniform(0.6, 1.4))
    grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
    saturation = 0.0 if rng.uniform() < 0.05 else rng.uniform(0.5, 1.5)
    x = grey[..., None] + (x - grey[..., None]) * np.float32(saturation)
    np.clip(x, 0, 1, out=x)
    x **= np.float32(rng.uniform(0.7, 1.4))
    if rng.uniform() < 0.5:
        x += rng.standard_normal(x.shape, np.float32) * np.float32(rng.uniform(0, 0.04))
    out = (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)
    if rng.uniform() < 0.2:
        radius = rng.uniform(0.3, 1.0) * image.shape[0] / 200
        out = np.asarray(Image.fromarray(out).filter(ImageFilter.GaussianBlur(radius)))
    if rng.uniform() < 0.2:
        buffer = io.BytesIO()
        Image.fromarray(out).save(buffer, "JPEG", quality=int(rng.integers(30, 95)))
        out = np.asarray(Image.open(buffer))
    return out


def mirrored_normals(normals: np.ndarray) -> np.ndarray:
    """Left-right mirror of [H, W, 3]: columns reversed, x negated."""
    out = np.ascontiguousarray(normals[:, ::-1])
    out[..., 0] *= -1
    return out


def cutmix(
    rng: np.random.Generator, sample: dict[str, np.ndarray], other: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """``sample`` with one rectangle of ``other`` in it: image and labels alike, in place.

    Yun et al. 2019, "CutMix", equation 1; for depth as Yang et al. 2024, "Depth Anything", section
    3.3. Every pixel keeps its own label (canonical depth needs no common camera), so nothing is
    averaged; the picture as a whole has no camera any more. The rectangle takes between a tenth and
    four tenths of the area. Nothing is pasted where a depth is only affine: each picture has a
    scale and a shift of its own.
    """
    if sample.get("depth_space", 0) or other.get("depth_space", 0):
        return sample
    height, width = sample["image"].shape[-2:]
    area, aspect = rng.uniform(0.1, 0.4), math.exp(rng.uniform(-0.5, 0.5))
    tall = min(height, max(1, round(height * math.sqrt(area * aspect))))
    wide = min(width, max(1, round(width * math.sqrt(area / aspect))))
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    for name, values in sample.items():
        if values.shape[-2:] == (height, width):
            piece = other[name][..., top : top + tall, left : left + wide]
            if name == "instances":
                piece = np.where(piece > 0, piece + (1 << 16), piece)  # ids are not shared
            values[..., top : top + tall, left : left + wide] = piece
    if "camera_known" in sample:
        sample["camera_known"] = np.array(False)
    return sample
