"""Validation of a generator in training: numbers on scenes set aside, and sheets to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill.tune.adapter import Generator
from distill.tune.pairs import Batch, Pairs
from teacher.codecs.depth import DepthCodec
from teacher.codecs.normals import NormalCodec
from teacher.generators.mini_generator import to_pictures
from teacher.generators.runtime import bfloat16_if_fast
from teacher.metrics import depth_metrics, normal_metrics
from teacher.prompts import KINDS

NEAR_M, FAR_M = 0.3, 40.0


def pictures_of(generator: Generator, batch: Batch, *, steps: int) -> np.ndarray:
    """uint8 [N, H, W, 3] drawn for the batch."""
    return to_pictures(generator.draw(batch, steps=steps))


def validate(
    generator: Generator, pairs: dict[str, Pairs], *, steps: int, batches: int
) -> dict[str, float]:
    """Mean over scenes of the task metrics; ``pairs`` has one source of pairs per kind."""
    numbers: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        if np.isfinite(value):
            numbers.setdefault(name, []).append(value)

    codec, normal_codec = DepthCodec(), NormalCodec()
    for kind, source in pairs.items():
        for i in range(batches):
            batch = source.draw(i)
            drawn = pictures_of(generator, batch, steps=steps)
            truth = to_pictures(batch.answer)
            known = batch.weight[:, 0].cpu().numpy() > 0
            for n in range(len(drawn)):
                if kind == "depth":
                    depth_m = np.clip(np.nan_to_num(codec.decode(drawn[n])[0], nan=NEAR_M,
                                                    posinf=FAR_M), NEAR_M, FAR_M)  # fmt: skip
                    expected = codec.decode(truth[n])[0]
                    expected = np.where(known[n] & np.isfinite(expected), expected, np.nan)
                    scores = depth_metrics(depth_m, expected, min_m=NEAR_M, max_m=FAR_M)
                    add("delta1", scores["delta1"])
                    add("abs_rel", scores["abs_rel"])
                elif kind == "normals":
                    expected = normal_codec.decode(truth[n])[0]
                    expected[~known[n]] = np.nan
                    scores = normal_metrics(_directions(normal_codec, drawn[n]), expected)
                    add("normals_mean_deg", scores["mean_deg"])
                    add("normals_within_11_25", scores["within_11_25"])
                else:
                    gap = np.abs(drawn[n].astype(int) - truth[n]).max(-1)
                    add(f"{kind}_pixels_right", float((gap[known[n]] < 40).mean()))
    return {name: float(np.mean(values)) for name, values in numbers.items()}


def _directions(codec: NormalCodec, picture: np.ndarray) -> np.ndarray:
    """Decoded normals; a colour without a direction counts as facing the camera."""
    normals = codec.decode(picture)[0]
    normals[np.isnan(normals[..., 0])] = (0, 0, 1)
    return normals


def sheet(generator: Generator, pairs: dict[str, Pairs], *, steps: int) -> Image.Image:
    """Per kind a strip of rows: input, answer, truth."""
    columns: list[np.ndarray] = []
    for kind in (k for k in KINDS if k in pairs):
        batch = pairs[kind].draw(0)
        drawn, truth = pictures_of(generator, batch, steps=steps), to_pictures(batch.answer)
        image = to_pictures(batch.image)[batch.owner.cpu().numpy()]
        strip = [
            np.concatenate([image[n], drawn[n], truth[n]], axis=1)
            for n in range(min(6, len(drawn)))
        ]
        columns.append(np.concatenate(strip, axis=0))
    return Image.fromarray(np.concatenate(columns, axis=1))


def write_sheet(image: Image.Image, path: Path) -> None:
    """PNG, twice the size, pixels kept as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


@torch.inference_mode()
def report(
    generator: Generator, pairs: dict[str, Pairs], *, folder: Path, step: int, steps: int
) -> dict[str, Any]:
    """Numbers at ``steps`` flow steps, and a sheet in ``folder``."""
    device = next(generator.network.parameters()).device
    with bfloat16_if_fast(device):
        numbers = validate(generator, pairs, steps=steps, batches=2)
        write_sheet(sheet(generator, pairs, steps=steps), folder / f"step-{step:07d}.png")
    return numbers
