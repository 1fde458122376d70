"""Marigold (arXiv 2312.02145, 2505.09358) and what loads into it: LCM, E2E-FT (2409.11355).

A U-Net takes the image's latent and a noisy latent side by side and denoises the latter into the
latent of a depth or normal map. Depth is affine: 0 the near and 1 the far plane the model chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teacher.errors import UsageError
from teacher.generators import Query
from teacher.generators.diffusion import (
    COMBINE,
    DEPTH_SPACES,
    LatentModel,
    ask_by_size,
    check_choice,
    check_seeds,
    combined_answer,
    empty_prompt,
    named_checkpoints,
)
from teacher.generators.hub import Checkpoint
from teacher.generators.runtime import Execution, check_resample
from teacher.label import Answer, Space, Task

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
LICENCES = {"prs-eth/": "CreativeML OpenRAIL++-M"}
SPACES = {Task.DEPTH: Space.AFFINE_DEPTH, Task.NORMALS: Space.UNIT_NORMALS}


class MarigoldTeacher:
    """Depth and normals of one Marigold checkpoint each."""

    spaces: Mapping[Task, Space] = SPACES  # before a checkpoint says that its depth is disparity

    def __init__(
        self,
        *,
        depth: str | None,
        normals: str | None,
        seeds: list[int],
        mirror: bool,
        steps: int | None,
        side_px: int | None,
        combine: str,
        start: str,
        depth_space: str,
        normal_axes: str,
        resample: str,
        device: str,
        dtype: str,
        offload: str,
        vae_tiling: bool,
        pass_size: int,
    ) -> None:
        """Load the checkpoints.

        Args:
            depth: checkpoint of the depth model: folder, ``owner/name`` or ``owner/name@revision``.
            normals: the same for normals; None where a task is not wanted.
            steps: denoising steps; None: as the checkpoint says (1 when it starts from zeros).
            side_px: longer side the model works at; None: as the checkpoint says; 0: the image's.
            start: ``noise``, ``zeros`` (E2E-FT was trained so), or ``auto``: by the name.
            depth_space: ``depth``, ``disparity``, or ``auto``: as the checkpoint says.
            normal_axes: ``marigold``, ``lotus`` (x negated), or ``auto``: by the name.
            seeds, mirror, combine, resample, device, dtype, offload, vae_tiling, pass_size:
                `teacher.generators.diffusion`.
        """
        self.seeds, self.mirror = check_seeds(seeds), mirror
        self.combine = check_choice("combine", combine, COMBINE)
        self.resample = check_resample(resample)
        check_choice("start", start, ("auto", "noise", "zeros"))
        check_choice("depth_space", depth_space, ("auto", *DEPTH_SPACES))
        check_choice("normal_axes", normal_axes, ("auto", "marigold", "lotus"))
        self.execution = Execution.parse(
            device=device, dtype=dtype, offload=offload, pass_size=pass_size, auto="float16"
        )
        found = named_checkpoints(depth=depth, normals=normals, parts=PARTS, licences=LICENCES)
        self.models: dict[Task, _Model] = {
            task: _Model(
                checkpoint,
                task=task,
                execution=self.execution,
                steps=steps,
                side_px=side_px,
                start=start,
                vae_tiling=vae_tiling,
                depth_space=depth_space,
                normal_axes=normal_axes,
            )
            for task, checkpoint in found.items()
        }
        if len(self.seeds) > 1 and any(model.zeros for model in self.models.values()):
            raise UsageError(
                f"teacher.seeds={self.seeds}: a model that starts from zeros answers the same for "
                "every seed; use one seed."
            )
        self.tasks = tuple(self.models)
        self.spaces = {task: model.space for task, model in self.models.items()}
        self.max_side = max(model.side_px for model in self.models.values()) or None

    def describe(self) -> dict[str, Any]:
        """Checkpoints with their hashes, and every setting that shapes an answer."""
        import diffusers

        return {
            "name": "marigold",
            "models": {str(task): model.describe() for task, model in self.models.items()},
            "prompt": "",
            "seeds": self.seeds,
            "mirror": self.mirror,
            "combine": self.combine if len(self.seeds) * (1 + self.mirror) > 1 else None,
            "resample": self.resample,
            "diffusers": diffusers.__version__,
            **self.execution.describe(),
        }

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """Affine depth and unit normals at each image's own size."""
        return ask_by_size(queries, tasks, members=self._members, finish=self._finish)

    def _members(self, task: Task, alike: list[Query]) -> Tensor:
        return self.models[task].members(alike, seeds=self.seeds, mirror=self.mirror)

    def _finish(self, task: Task, members: Tensor, size: tuple[int, int]) -> Answer:
        """Members [E, C, h, w] -> one answer of the image's size."""
        model = self.models[task]
        return combined_answer(
            members[:, 0] if task is Task.DEPTH else members,
            size=size,
            how=self.combine,
            resample=self.resample,
            space=model.space,
            negate_x=model.negate_x,
            seeds=self.seeds,
        )


class _Model:
    """One checkpoint, ready to be asked."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        task: Task,
        execution: Execution,
        steps: int | None,
        side_px: int | None,
        start: str,
        vae_tiling: bool,
        depth_space: str,
        normal_axes: str,
    ) -> None:
        self.task, self.checkpoint = task, checkpoint
        e2e = "e2e" in checkpoint.repo.lower()
        self.zeros = start == "zeros" or (start == "auto" and e2e)
        self.negate_x = normal_axes == "lotus" or (normal_axes == "auto" and e2e)
        self.latent, config = _load(checkpoint, task=task, execution=execution, tiling=vae_tiling)
        kind = config.get("prediction_type") or ("depth" if task is Task.DEPTH else "normals")
        self.space = Space.UNIT_NORMALS
        if task is Task.DEPTH:
            self.space = DEPTH_SPACES[kind if depth_space == "auto" else depth_space]
        self.full_z = config.get("use_full_z_range", True)
        default = 1 if self.zeros else config.get("default_denoising_steps")
        self.steps = default if steps is None else steps
        if not self.steps or self.steps < 1:
            raise UsageError(
                f"teacher.steps={steps}: {checkpoint.repo} names no number of steps; give one "
                "(1 to 4 for trailing schedulers, 10 to 50 for Marigold v1-0)."
            )
        own_side = config.get("default_processing_resolution") or 768
        self.side_px = own_side if side_px is None else side_px
        if self.side_px < 0 or self.side_px % self.latent.stride:
            raise UsageError(
                f"teacher.side_px={side_px}: expected 0 or a multiple of {self.latent.stride}."
            )

    def describe(self) -> dict[str, Any]:
        scheduler = self.latent.scheduler
        return self.checkpoint.describe() | {
            "steps": self.steps,
            "side_px": self.side_px,
            "start": "zeros" if self.zeros else "noise",
            "scheduler": type(scheduler).__name__,
            "timestep_spacing": scheduler.config.get("timestep_spacing"),
            "answers": str(self.space),
            "x_negated": self.negate_x if self.task is Task.NORMALS else None,
            "camera": "not used",
        }

    def members(self, queries: Sequence[Query], *, seeds: Sequence[int], mirror: bool) -> Tensor:
        """All of one size -> [N, E, 1 or 3, h, w]: depth in [0, 1], or the model's own normals."""
        pictures = self.latent.members(
            queries,
            task=self.task,
            seeds=seeds,
            mirror=mirror,
            side_px=self.side_px,
            zero_noise=self.zeros,
            denoise=self._denoise,
        )  # [N,E,3,h,w]
        if self.task is Task.DEPTH:
            return (pictures.mean(2, keepdim=True).clip(-1, 1) + 1) / 2
        normals = pictures.clip(-1, 1)
        normals[:, len(seeds) :, 0] *= -1  # those of the mirrored image
        if not self.full_z:
            normals[:, :, 2] = normals[:, :, 2] * 0.5 + 0.5
        return normals / normals.norm(dim=2, keepdim=True).clamp_min(1e-6)

    def _denoise(
        self, unet: nn.Module, scene: Tensor, noise: Tensor, streams: list[torch.Generator]
    ) -> Tensor:
        scheduler, x = self.latent.scheduler, noise
        prompt = self.latent.prompt.expand(len(x), -1, -1)
        scheduler.set_timesteps(self.steps, device=x.device)
        for t in scheduler.timesteps:
            out = unet(
                torch.cat([scene, x], dim=1),  # image first: the order it was trained with
                t,
                encoder_hidden_states=prompt,
                return_dict=False,
            )[0]
            x = scheduler.step(out, t, x, generator=streams).prev_sample
        return x


def _load(
    checkpoint: Checkpoint, *, task: Task, execution: Execution, tiling: bool
) -> tuple[LatentModel, dict[str, Any]]:
    """The published layout -> networks and the pipeline's own settings."""
    from diffusers import MarigoldDepthPipeline, MarigoldNormalsPipeline

    index, unet = checkpoint.config("model_index.json"), checkpoint.config("unet/config.json")
    at = f"teacher.{task}: {checkpoint.repo}"
    if unet.get("in_channels") != 8:
        raise UsageError(
            f"{at}: not a Marigold model: its U-Net takes {unet.get('in_channels')} channels, "
            "expected 8 (the image's latent and the noisy one)."
        )
    kind = index.get("prediction_type")
    if kind is not None and (kind in DEPTH_SPACES) != (task is Task.DEPTH):
        raise UsageError(f"{at} predicts {kind!r}, not {task}; give it under its own key.")
    cls = MarigoldDepthPipeline if task is Task.DEPTH else MarigoldNormalsPipeline
    pipe = load_pipeline(cls, checkpoint, at=at)
    latent = LatentModel(
        unet=pipe.unet,
        vae=pipe.vae,
        scheduler=pipe.scheduler,
        prompt=empty_prompt(pipe.tokenizer, pipe.text_encoder),
        checkpoint=checkpoint,
        execution=execution,
    )
    if tiling:
        latent.vae.enable_tiling()
    return latent, index


def load_pipeline(cls: Any, checkpoint: Checkpoint, *, at: str) -> Any:
    """``cls.from_pretrained`` without network, remote code or pickles, on the CPU."""
    try:
        return cls.from_pretrained(
            checkpoint.folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UsageError(
            f"{at}: cannot be loaded as {cls.__name__} ({type(error).__name__}: {error})."
        ) from error
