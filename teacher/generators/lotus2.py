"""Lotus-2 (arXiv 2512.01030): FLUX.1-dev with two adapters, deterministic, no noise anywhere.

The core predictor maps the image's packed latent to the annotation's in one pass (time step 1), a
small convolution smooths the 2 x 2 packing away (local continuity module), and the detail
sharpener walks some Euler steps of a flow from there. Depth answers are disparity.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.errors import UsageError
from teacher.generators import Query
from teacher.generators.adapters import attach, check_complete, use_adapter
from teacher.generators.diffusion import COMBINE, check_choice, combined_answer
from teacher.generators.hub import Checkpoint, open_checkpoint
from teacher.generators.runtime import Execution, by_size, check_resample, chunks, to_signed
from teacher.label import Answer, Space, Task

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PARTS = ("transformer", "vae", "scheduler", *TEXT_PARTS)
LICENCES = {"black-forest-labs/FLUX.1-dev": "FLUX.1 [dev] Non-Commercial License"}
FILE_TASK = {Task.DEPTH: "depth", Task.NORMALS: "normal"}
SPACES = {Task.DEPTH: Space.AFFINE_DISPARITY, Task.NORMALS: Space.UNIT_NORMALS}
STAGES = ("core_predictor", "detail_sharpener")
GUIDANCE = 3.5
CORE_TIME_STEP = 1
SHARPENER_TIME_STEPS = 10  # the schedule's range, T' of the paper


class Lotus2Teacher:
    """Disparity and normals of Lotus-2."""

    spaces: Mapping[Task, Space] = SPACES

    def __init__(
        self,
        *,
        base: str,
        adapters: str,
        answers: list[str],
        steps: int,
        mirror: bool,
        side_px: int,
        combine: str,
        resample: str,
        device: str,
        dtype: str,
        offload: str,
        vae_tiling: bool,
        pass_size: int,
    ) -> None:
        """Load FLUX.1-dev once and the adapters of the wanted tasks.

        Args:
            base: FLUX.1-dev: folder, ``owner/name`` or ``owner/name@revision`` (gated on the hub).
            adapters: folder or repository with ``lotus-2_{stage}_{task}.safetensors``.
            answers: which of ``depth`` and ``normals`` to load.
            steps: of the detail sharpener; 0: the core predictor's answer as it is.
            side_px: larger images are worked at this longer side; 0: at their own.
            mirror, combine, resample, device, dtype, offload, vae_tiling, pass_size:
                `teacher.generators.diffusion`; ``dtype="auto"`` is bfloat16 on a GPU.
        """
        self.tasks = tuple(task for task in FILE_TASK if task in answers)
        if not self.tasks or len(self.tasks) != len(answers):
            raise UsageError(f"teacher.answers={answers}: expected some of ['depth', 'normals'].")
        if steps < 0 or side_px < 0:
            raise UsageError(f"teacher.steps={steps}, side_px={side_px}: expected 0 or more.")
        self.steps, self.mirror = steps, mirror
        self.side_px, self.max_side = side_px, side_px or None
        self.combine = check_choice("combine", combine, COMBINE)
        self.resample = check_resample(resample)
        self.execution = run = Execution.parse(
            device=device, dtype=dtype, offload=offload, pass_size=pass_size, auto="bfloat16"
        )
        self.base = open_checkpoint(base, key="teacher.base", parts=PARTS, licences=LICENCES)
        self.adapters = open_checkpoint(adapters, key="teacher.adapters")
        transformer, vae, self.scheduler, condition = load_flux(self.base, run)
        self.condition = {k: v.to(run.device, run.dtype) for k, v in condition.items()}
        self.continuity: dict[Task, nn.Module] = {}
        for task in self.tasks:
            files = {
                stage: adapter_file(self.adapters, f"lotus-2_{stage}_{FILE_TASK[task]}.safetensors")
                for stage in (*STAGES, "lcm")
            }
            for stage in STAGES:
                attach(transformer, read_tensors(files[stage]), name=f"{stage}_{task}")
            module = LocalContinuity(transformer.config.in_channels // 4)
            check_complete(module, read_tensors(files["lcm"]), where=files["lcm"].name)
            self.continuity[task] = run.settle(module)
        if vae_tiling:
            vae.enable_tiling()
        self.transformer: Any = run.settle(transformer)
        self.vae: Any = run.settle(vae, dtype=run.vae_dtype)

    def describe(self) -> dict[str, Any]:
        """Checkpoints with their hashes, and every setting that shapes an answer."""
        import diffusers

        return {
            "name": "lotus2",
            "base": self.base.describe(),
            "adapters": self.adapters.describe(),
            "answers": {str(task): str(space) for task, space in SPACES.items()},
            "prompt": "",
            "guidance": GUIDANCE,
            "steps": self.steps,
            "side_px": self.side_px,
            "mirror": self.mirror,
            "combine": self.combine if self.mirror else None,
            "resample": self.resample,
            "camera": "not used",
            "diffusers": diffusers.__version__,
            **self.execution.describe(),
        }

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """Affine disparity and unit normals at each image's own size."""
        answers: list[dict[Task, Answer]] = [{} for _ in queries]
        for group in by_size(queries):
            for part in chunks(len(group), self.execution.pass_size):
                few = group[part]
                images = to_signed([queries[i].image for i in few], self.execution.device)
                images = at_working_size(images, self.side_px)
                for task in tasks:
                    members = [self.pictures(images, task)]  # [B,3,h,w] each
                    if self.mirror:
                        members.append(self.pictures(images.flip(-1), task).flip(-1))
                    stacked = torch.stack(members, 1)  # [B,E,3,h,w]
                    for index, pictures in zip(few, stacked, strict=True):
                        size = queries[index].image.shape[:2]
                        answers[index][task] = self._finish(task, pictures, size)
        return answers

    def _finish(self, task: Task, pictures: Tensor, size: tuple[int, int]) -> Answer:
        """Pictures [E, 3, h, w] in [0, 1] -> one answer of the image's size."""
        common: dict[str, Any] = {"size": size, "how": self.combine, "resample": self.resample}
        if task is Task.DEPTH:
            return combined_answer(pictures.mean(1), space=Space.AFFINE_DISPARITY, **common)
        normals = 2 * pictures - 1
        normals[1:, 0] *= -1  # the mirrored image's
        normals = normals / normals.norm(dim=1, keepdim=True).clamp_min(1e-6)
        return combined_answer(normals, space=Space.UNIT_NORMALS, negate_x=True, **common)

    @torch.no_grad()
    def pictures(self, images: Tensor, task: Task) -> Tensor:
        """[B, 3, h, w] in [-1, 1], sides multiples of 16 -> decoded pictures in [0, 1]."""
        run, config = self.execution, self.vae.config
        with run.using(self.vae) as vae:
            scene = vae.encode(images.to(run.vae_dtype)).latent_dist.mode()
            scene = ((scene - config.shift_factor) * config.scaling_factor).to(run.dtype)
        height, width = scene.shape[-2:]  # [B,16,h/8,w/8]
        with run.using(self.transformer):
            use_adapter(self.transformer, f"core_predictor_{task}")
            time = torch.full((len(scene),), CORE_TIME_STEP / 1000)
            latent = unpack(self._flow(pack(scene), time, height, width), height, width)
            with run.using(self.continuity[task]) as continuity:
                latent = continuity(latent)
            latent = self._sharpen(pack(latent), task, height, width)
        latent = unpack(latent, height, width).to(run.vae_dtype)
        with run.using(self.vae) as vae:
            picture = vae.decode(
                latent / config.scaling_factor + config.shift_factor, return_dict=False
            )[0]
        return (picture.float() / 2 + 0.5).clip(0, 1)

    def _sharpen(self, x: Tensor, task: Task, height: int, width: int) -> Tensor:
        """Euler steps of the detail sharpener's flow on packed latents [B, h w / 4, 64]."""
        if self.steps == 0:
            return x
        use_adapter(self.transformer, f"detail_sharpener_{task}")
        config = self.scheduler.config
        self.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / self.steps, self.steps),
            device=x.device,
            mu=schedule_shift(x.shape[1], config),
        )
        for t in self.scheduler.timesteps:
            flow = self._flow(x, t.expand(len(x)) / 1000, height, width)
            x = self.scheduler.step(flow, t, x, return_dict=False)[0].to(x.dtype)
        return x

    def _flow(self, x: Tensor, time: Tensor, height: int, width: int) -> Tensor:
        """One pass of the transformer with the empty prompt."""
        n, device = len(x), x.device
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((n,), GUIDANCE, device=device)
        words = self.condition["words"].expand(n, -1, -1)
        return self.transformer(
            hidden_states=x,
            timestep=time.to(device, x.dtype),
            guidance=guidance,
            pooled_projections=self.condition["pooled"].expand(n, -1),
            encoder_hidden_states=words,
            txt_ids=torch.zeros(words.shape[1], 3, device=device, dtype=x.dtype),
            img_ids=places(height // 2, width // 2).to(device, x.dtype),
            return_dict=False,
        )[0]


class LocalContinuity(nn.Module):
    """x + Conv3x3(GELU(Conv3x3(x))), the widening of the middle two-fold (paper, eq. 14)."""

    def __init__(self, channels: int) -> None:
        """``channels`` of the unpacked latent: 16 for FLUX."""
        super().__init__()
        self.lcm = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape."""
        return x + self.lcm(x)


def pack(latent: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 * w/2, 4 C]: 2 x 2 cells become one token."""
    cells = latent.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B,C,h/2,2,w/2,2]
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of ``height`` x ``width``."""
    cells = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def places(rows: int, columns: int) -> Tensor:
    """Position of every token: (0, row, column), [rows * columns, 3]."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)


def schedule_shift(tokens: int, config: Any) -> float:
    """FLUX's shift mu, linear in the number of image tokens."""
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def at_working_size(images: Tensor, side_px: int) -> Tensor:
    """At most ``side_px`` long, both sides scaled down to multiples of 16, at least 16.

    The published sizes; unlike there, what is made smaller is filtered first (no aliases).
    """
    height, width = images.shape[-2:]
    longest = max(height, width)
    if side_px and longest > side_px:
        height, width = (max(1, math.floor(n * side_px / longest)) for n in (height, width))
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    scale = max(min(height, width) // 16, 1) * 16 / min(height, width)
    size = tuple(max(16, int(n * scale) // 16 * 16) for n in (height, width))
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def adapter_file(checkpoint: Checkpoint, name: str) -> Path:
    """A file of the adapters' checkpoint, or words that list what there is."""
    path = checkpoint.folder / name
    if not path.is_file():
        found = sorted(p.name for p in checkpoint.folder.glob("*.safetensors"))
        raise UsageError(f"teacher.adapters: {checkpoint.repo} has no {name}; found {found}.")
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    The continuity module's authors read theirs with ``torch.load``; should a file be such an
    archive in spite of its name, it is opened by torch's restricted, tensors-only reader.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return load_file(path)
            file.seek(0)  # from memory: torch would judge a path by its name
            return torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise UsageError(f"teacher.adapters: {path.name} cannot be read ({error}).") from error


def load_flux(checkpoint: Checkpoint, run: Execution) -> tuple[Any, Any, Any, dict[str, Tensor]]:
    """Transformer, VAE, scheduler and the empty prompt's embedding; the text encoders go again."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    folder = checkpoint.folder
    load = {"use_safetensors": True, "local_files_only": True, "dtype": run.dtype}
    try:
        text = FluxPipeline.from_pretrained(folder, transformer=None, vae=None, **load)
        with torch.no_grad():
            words, pooled, _ = text.encode_prompt(prompt="", prompt_2=None, device="cpu")
        del text
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", **load)
        vae = AutoencoderKL.from_pretrained(folder / "vae", **(load | {"dtype": run.vae_dtype}))
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            folder / "scheduler", num_train_timesteps=SHARPENER_TIME_STEPS
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UsageError(
            f"teacher.base: {checkpoint.repo} cannot be loaded as FLUX.1-dev "
            f"({type(error).__name__}: {error})."
        ) from error
    return transformer, vae, scheduler, {"words": words, "pooled": pooled}
