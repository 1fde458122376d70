"""Pictures of answers and labels side by side, for the training log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

UNKNOWN = (90, 90, 90)
SKY = (235, 240, 250)


def depth_picture(depth: np.ndarray, *, near: float, far: float) -> np.ndarray:
    """Depth [H, W] -> uint8 [H, W, 3]: log depth from near (red) to far (blue), NaN grey."""
    known = np.isfinite(depth) & (depth > 0)
    share = np.log(np.where(known, depth, near) / near) / max(np.log(far / near), 1e-6)
    out = (matplotlib.colormaps["turbo_r"](np.clip(share, 0, 1))[..., :3] * 255).astype(np.uint8)
    out[np.isnan(depth)] = UNKNOWN
    out[np.isposinf(depth)] = SKY
    return out


def normals_picture(normals: np.ndarray) -> np.ndarray:
    """Unit normals [H, W, 3] -> uint8 [H, W, 3], (n + 1) / 2, NaN grey."""
    unknown = np.isnan(normals).any(-1)
    out = np.clip((np.nan_to_num(normals) + 1) * 127.5, 0, 255).astype(np.uint8)
    out[unknown] = UNKNOWN
    return out


def semantic_picture(channels: np.ndarray) -> np.ndarray:
    """Class channels [H, W] (-1 unknown) -> uint8 [H, W, 3] in twenty colours."""
    palette = (np.array(matplotlib.colormaps["tab20"].colors) * 255).astype(np.uint8)  # type: ignore[attr-defined]
    out = palette[channels.clip(0) % len(palette)]
    out[channels < 0] = UNKNOWN
    return out


def instances_picture(heat: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Centre heat [H, W] and offsets [2, H, W] -> uint8 [H, W, 3]: direction as hue, heat white."""
    turn = np.nan_to_num(np.arctan2(offset[1], offset[0]) / (2 * np.pi)) % 1.0
    length = np.nan_to_num(np.hypot(offset[0], offset[1]))
    colour = matplotlib.colormaps["hsv"](turn)[..., :3]
    colour = colour * np.clip(length / max(heat.shape[1] / 16, 1), 0, 1)[..., None]
    colour = np.maximum(colour, np.nan_to_num(heat)[..., None])
    out = (colour * 255).astype(np.uint8)
    out[np.isnan(heat)] = UNKNOWN
    return out


def comparison(
    batch: Mapping[str, np.ndarray], answer: Mapping[str, np.ndarray], tasks: Sequence[str]
) -> np.ndarray:
    """One row per sample: input, then answer and label of every task: uint8 [rows, columns, 3].

    ``batch`` and ``answer`` are NumPy versions of what `distill.data` and the student give.
    """
    rows = []
    for i in range(len(batch["image"])):
        cells = [(batch["image"][i].transpose(1, 2, 0) * 255).astype(np.uint8)]
        for task in tasks:
            if task == "depth":
                said, truth = answer["depth"][i, 0].copy(), batch["depth"][i, 0]
                said[answer["sky"][i, 0] > 0] = np.inf
                finite = truth[np.isfinite(truth)]
                near, far = np.percentile(finite, (2, 98)) if finite.size else (0.5, 10.0)
                cells += [depth_picture(d, near=near, far=far) for d in (said, truth)]
            elif task == "normals":
                cells += [
                    normals_picture(a["normals"][i].transpose(1, 2, 0)) for a in (answer, batch)
                ]
            elif task == "instances":
                truth = batch["instances"][i]
                cells += [
                    instances_picture(answer["center"][i, 0], answer["offset"][i]),
                    instances_picture(truth[0], truth[1:]),
                ]
            else:
                said, truth = answer["semantic"][i].argmax(0), batch["semantic"][i]
                cells += [semantic_picture(said), semantic_picture(truth)]
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows, axis=0)
