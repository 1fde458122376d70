"""Queries, coordinate ramps and echo networks for the tests of foreign teachers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml

from teacher.generators import Query
from teacher.label import Camera

SIZES = {
    "odd": (75, 101),
    "portrait": (120, 67),
    "panorama": (40, 400),
    "4:3": (96, 128),
    "tiny": (7, 5),
    "12 MP": (3000, 4000),
}


def query(key: str, height: int = 40, width: int = 56, *, seed: int = 0) -> Query:
    """A smooth random image, so that resampling is well behaved."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 10.0
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.3, 2, (3, 3))]
    image = ((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)
    return Query(key=key, image=image, camera=Camera.assumed(width, height))


def ramp(height: int, width: int, axis: int) -> Query:
    """All three channels hold the pixel's x (axis 1) or y (axis 0), 0 to 255, unrounded."""
    n = (height, width)[axis]
    line = np.arange(n, dtype=np.float32) / max(n - 1, 1) * 255
    plane = np.broadcast_to(line if axis == 1 else line[:, None], (height, width))
    image = np.repeat(plane[..., None], 3, axis=2)
    return Query(key="ramp", image=image, camera=Camera.assumed(width, height))


def registration_error(values: np.ndarray, axis: int, worked_px: int) -> tuple[float, float]:
    """Worst and mean error in pixels of an echoed ramp (0..1), away from the resampled border."""
    n = values.shape[axis]
    found = values * max(n - 1, 1)
    true = np.arange(n) if axis == 1 else np.arange(n)[:, None]
    border = int(np.ceil(n / worked_px)) if n > worked_px else 1
    inner = slice(border, max(n - border, border + 1))
    error = (found - true)[(slice(None), inner) if axis == 1 else (inner,)]
    return float(np.abs(error).max()), float(abs(error.mean()))


def mirrored_spread_deg(image: np.ndarray) -> np.ndarray:
    """What a mirrored asking must add where the network echoes the picture as normals.

    It says (x, y, z) of either image; turned back, the second member is (-x, y, z), 2 asin|x| away
    from the first; the spread is the mean angle of the two to one of them.
    """
    n = image.astype(np.float64) / 127.5 - 1
    x = n[..., 0] / np.linalg.norm(n, axis=-1)
    return np.degrees(np.arcsin(np.abs(x)))


class EchoVae(torch.nn.Module):
    """Latents that hold the very pixels: 8 x 8 blocks folded into channels."""

    config = SimpleNamespace(block_out_channels=(1,) * 4, scaling_factor=0.5, shift_factor=0.25)

    def encode(self, x):
        latent = torch.nn.functional.pixel_unshuffle(x, 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latent))

    def decode(self, z, return_dict=False):
        return (torch.nn.functional.pixel_shuffle(z, 8),)


class EchoUnet(torch.nn.Module):
    """Answers with the scene's latent, the first half of what it is shown."""

    def forward(self, x, t, **kwargs):
        return (x[:, : 3 * 64],)


class EchoScheduler:
    config: dict = {}  # noqa: RUF012

    def set_timesteps(self, n, device=None):
        self.timesteps = [0]

    def step(self, out, t, x, generator=None):
        return SimpleNamespace(prev_sample=out)


def options(name: str, **changes) -> dict:
    """The teacher's keys as ``conf/teacher/NAME.yaml`` has them, on the CPU, with changes."""
    path = Path(__file__).parents[1] / "conf" / "teacher" / f"{name}.yaml"
    values = yaml.safe_load(path.read_text()) | {"device": "cpu"} | changes
    assert values.keys() <= set(yaml.safe_load(path.read_text())), changes
    return values
