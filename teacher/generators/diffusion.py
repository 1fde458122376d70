"""What the latent diffusion teachers share: noise keyed by content, latents, combining.

An answer depends on its image, the task, the seeds and the checkpoint; never on the batch it came
in, the order of the inputs, or torch's global random state.

Keys that the families share:

* ``seeds``: one answer per seed, combined into one; more than one gives a spread.
* ``mirror``: also ask about the mirrored image, with every seed.
* ``combine``: ``consensus`` or ``original`` (`combine_depth`, `combine_normals`).
* ``resample``: how the answer returns to the image's size (`teacher.generators.runtime.RESAMPLE`).
* ``device``, ``dtype``, ``offload``, ``pass_size``: `teacher.generators.runtime.Execution`.
* ``vae_tiling``: decode large images in tiles; saves memory, changes values a little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from teacher.consensus import merge_depth, merge_normals
from teacher.errors import UsageError
from teacher.generators import Query
from teacher.generators.hub import Checkpoint, open_checkpoint
from teacher.generators.runtime import (
    Execution,
    by_size,
    chunks,
    depth_answer,
    longest_side,
    normals_answer,
    padded,
    resized,
    to_signed,
)
from teacher.label import Answer, Space, Task

LN2 = 0.6931471805599453  # the median of |x| / b of a Laplace variable with scale b
COMBINE = ("consensus", "original")
DEPTH_SPACES = {"depth": Space.AFFINE_DEPTH, "disparity": Space.AFFINE_DISPARITY}


def _digest(key: str, task: Task, seed: int, mirrored: bool) -> bytes:
    name = f"noise 1\n{key}\n{task}\n{seed}{' mirrored' if mirrored else ''}"
    return hashlib.sha256(name.encode()).digest()


def keyed_noise(
    key: str, task: Task, seed: int, shape: Sequence[int], *, mirrored: bool = False
) -> Tensor:
    """Standard normal float32 noise of one image: the same on every machine and in every batch."""
    digest = _digest(key, task, seed, mirrored)
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return torch.from_numpy(
        np.random.Generator(stream).standard_normal(tuple(shape), dtype=np.float32)
    )


def keyed_generator(key: str, task: Task, seed: int, *, mirrored: bool = False) -> torch.Generator:
    """For samplers that add noise at their steps (LCM): a stream of this image's own."""
    seed_64 = int.from_bytes(_digest(key, task, seed, mirrored)[16:24], "little")
    return torch.Generator("cpu").manual_seed(seed_64 >> 1)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Whole numbers, each once, at least one."""
    if not seeds or len(set(seeds)) != len(seeds) or any(not isinstance(s, int) for s in seeds):
        raise UsageError(
            f"teacher.seeds={list(seeds)}: expected a list of different whole numbers, e.g. [0]."
        )
    return list(seeds)


def check_choice(key: str, value: str, allowed: Sequence[str]) -> str:
    """``value`` if it is among ``allowed``."""
    if value not in allowed:
        raise UsageError(f"teacher.{key}={value!r}: expected one of {list(allowed)}.")
    return value


def empty_prompt(tokenizer: Any, text_encoder: nn.Module) -> Tensor:
    """The text condition of Marigold and Lotus: "" as begin and end token alone, [1, 2, C]."""
    tokens = tokenizer(
        "",
        padding="do_not_pad",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return text_encoder.float()(tokens.input_ids)[0]


# (image latent [B,4,h,w], noise [B,4,h,w], one generator per row) -> clean latent [B,4,h,w]
Denoise = Callable[[nn.Module, Tensor, Tensor, list[torch.Generator]], Tensor]


@dataclass(kw_only=True)
class LatentModel:
    """A Stable-Diffusion-shaped predictor: VAE, U-Net, and the empty prompt's embedding.

    The text encoder is used once, at loading, and then let go of.
    """

    unet: Any
    vae: Any
    scheduler: Any
    prompt: Tensor
    checkpoint: Checkpoint
    execution: Execution

    def __post_init__(self) -> None:
        """Settle the networks; the VAE may keep a finer precision than the U-Net."""
        run = self.execution
        self.prompt = self.prompt.to(run.device, run.dtype)
        self.unet = run.settle(self.unet)
        self.vae = run.settle(self.vae, dtype=run.vae_dtype)

    @property
    def stride(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def members(
        self,
        queries: Sequence[Query],
        *,
        task: Task,
        seeds: Sequence[int],
        mirror: bool,
        side_px: int,
        zero_noise: bool,
        denoise: Denoise,
    ) -> Tensor:
        """Ask every image (all of one size) with every seed: float32 [N, E, 3, h, w], decoded.

        The image goes in with its longer side scaled to ``side_px`` and its edge repeated up to
        the stride; h x w is the scaled size, without that padding. With ``mirror`` the second half
        of E was asked of the mirrored image and is mirrored back (as pixels: a normal's x is not).
        """
        run = self.execution
        height, width = queries[0].image.shape[:2]
        size = longest_side(height, width, side_px)
        images = to_signed([q.image for q in queries], run.device)  # [N,3,H,W]
        if tuple(images.shape[-2:]) != size:
            images = nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        both = torch.stack([images, images.flip(-1)][: 1 + mirror], 1).flatten(0, 1)
        both = padded(both, self.stride).to(run.vae_dtype)  # [N*M,3,h',w']
        with run.using(self.vae):
            scene = torch.cat([self._encode(both[c]) for c in chunks(len(both), run.pass_size)])
        flips = (False, True)[: 1 + mirror]
        asked = [(n, m, seed) for n in range(len(queries)) for m in flips for seed in seeds]
        clean = []
        with run.using(self.unet) as unet:
            for part in chunks(len(asked), run.pass_size):
                rows = [n * len(flips) + m for n, m, _ in asked[part]]
                who = [(queries[n].key, task, seed, m) for n, m, seed in asked[part]]
                noise = torch.stack(
                    [keyed_noise(*w[:3], scene.shape[1:], mirrored=w[3]) for w in who]
                )
                noise = (noise * 0 if zero_noise else noise).to(run.device, run.dtype)
                streams = [keyed_generator(*w[:3], mirrored=w[3]) for w in who]
                clean.append(denoise(unet, scene[rows].to(run.dtype), noise, streams))
        with run.using(self.vae):
            pictures = torch.cat([self._decode(latent) for latent in clean])
        pictures = pictures[..., : size[0], : size[1]]
        pictures = pictures.unflatten(0, (len(queries), len(flips), len(seeds)))
        if mirror:
            pictures[:, 1] = pictures[:, 1].flip(-1)
        return pictures.flatten(1, 2)

    def _encode(self, images: Tensor) -> Tensor:
        """The mean of the VAE's posterior, scaled: [B, 4, h'/8, w'/8]."""
        return self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor

    def _decode(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self.execution.vae_dtype) / self.vae.config.scaling_factor
        return self.vae.decode(scaled, return_dict=False)[0].float()


def ask_by_size(
    queries: Sequence[Query],
    tasks: Sequence[Task],
    *,
    members: Callable[[Task, list[Query]], Tensor],
    finish: Callable[[Task, Tensor, tuple[int, int]], Answer],
) -> list[dict[Task, Answer]]:
    """One dict per query, in order.

    ``members`` answers for images of one size, [N, E, ...]; ``finish`` makes one answer of an
    image's members [E, ...] and its (height, width).
    """
    answers: list[dict[Task, Answer]] = [{} for _ in queries]
    for task in tasks:
        for group in by_size(queries):
            found = members(task, [queries[i] for i in group])
            for index, one in zip(group, found, strict=True):
                height, width = queries[index].image.shape[:2]
                answers[index][task] = finish(task, one, (height, width))
    return answers


def named_checkpoints(
    *, depth: str | None, normals: str | None, parts: Sequence[str], licences: dict[str, str]
) -> dict[Task, Checkpoint]:
    """The checkpoints of the tasks that have one; `UsageError` when none has."""
    named = {Task.DEPTH: depth, Task.NORMALS: normals}
    found = {
        task: open_checkpoint(spec, key=f"teacher.{task}", parts=parts, licences=licences)
        for task, spec in named.items()
        if spec is not None
    }
    if not found:
        raise UsageError("teacher.depth and teacher.normals are both null: name a checkpoint.")
    return found


def finite_members(members: Tensor) -> Tensor:
    """Those of [E, ...] without a NaN or infinity (half precision can overflow)."""
    return members[torch.isfinite(members).flatten(1).all(1)]


def combine_depth(members: Tensor, *, how: str) -> tuple[Tensor, Tensor | None]:
    """Affine members [E, h, w] -> value [h, w] and spread [h, w], a Laplace scale in its unit.

    ``consensus``: aligned by `align_members`, then `teacher.consensus`. ``original``: Marigold's
    ensembling as its own code sets it (CVPR 2024, sec. 3.4: BFGS over scales and shifts, 50
    iterations, tolerance 1e-6, median; median absolute deviation / ln 2 as the spread).
    One member has no spread; none leaves the value NaN.
    """
    good = finite_members(members)
    if len(good) == 0:
        return torch.full_like(members[0], torch.nan), None
    if len(good) == 1:
        return good[0], None
    if how == "original":
        from diffusers import MarigoldDepthPipeline

        value, deviation = MarigoldDepthPipeline.ensemble_depth(
            good[:, None], True, True, True, max_iter=50, tol=1e-6
        )
        return value[0, 0], deviation[0, 0] / LN2
    found = merge_depth(align_members(good).cpu().numpy(), positive=False)
    return torch.from_numpy(found.values), torch.from_numpy(found.aligned)


def align_members(members: Tensor) -> Tensor:
    """Members [E, h, w] with one common median and mean absolute deviation (MiDaS, eq. 5).

    Both are the members' averages, so one member stays as it is and no range shrinks.
    """
    middle = members.flatten(1).median(dim=1).values[:, None, None]
    reach = (members - middle).abs().mean((1, 2), keepdim=True)
    return (members - middle) * (reach.mean() / reach.clamp_min(1e-12)) + middle.mean()


def combine_normals(members: Tensor, *, how: str) -> tuple[Tensor, Tensor | None]:
    """Unit members [E, 3, h, w] -> direction [3, h, w] and mean angle to it in degrees [h, w].

    ``consensus``: the member closest to all others (`teacher.consensus`); ``original``: the member
    closest to the mean direction (Marigold), angles to that mean.
    """
    good = finite_members(members)
    if len(good) == 0:
        return torch.full_like(members[0], torch.nan), None
    if len(good) == 1:
        return good[0], None
    if how == "original":
        from diffusers import MarigoldNormalsPipeline

        value, spread = MarigoldNormalsPipeline.ensemble_normals(good, True, "closest")
        return value[0], spread[0, 0] * 180.0
    value, spread = merge_normals(good.permute(0, 2, 3, 1).cpu().numpy())
    return torch.from_numpy(value).permute(2, 0, 1), torch.from_numpy(spread)


def combined_answer(
    members: Tensor,
    *,
    size: tuple[int, int],
    how: str,
    resample: str,
    space: Space,
    negate_x: bool = False,
    **facts: Any,
) -> Answer:
    """Depth members [E, h, w] or normals [E, 3, h, w] -> one answer of the image's size.

    ``negate_x`` turns the normals of models whose x points left into our axes.
    """

    def back(values: Tensor) -> np.ndarray:  # [C, h, w] -> [H, W, C]
        return resized(values[None], size, resample)[0].permute(1, 2, 0).cpu().numpy()

    facts["asked_px"] = list(members.shape[-2:])
    if space is not Space.UNIT_NORMALS:
        value, spread = combine_depth(members, how=how)
        around = None if spread is None else back(spread[None])[..., 0]
        return depth_answer(back(value[None])[..., 0], space=space, spread=around, **facts)
    value, spread = combine_normals(members, how=how)
    around = None if spread is None else back(spread[None])[..., 0]
    normals = back(value) * ([-1, 1, 1] if negate_x else [1, 1, 1])
    return normals_answer(normals, spread_deg=around, **facts)
