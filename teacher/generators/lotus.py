"""Lotus G and D (arXiv 2409.18124): one step from the image's latent to the annotation's.

The U-Net of Stable Diffusion 2, fine-tuned to give the clean latent itself (x0) at the single time
step 999. G also sees noise, D the image alone. A switch in the time embedding, (1, 0) through sine
and cosine, asks for the annotation instead of the image's reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
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
TIME_STEP = 999
SPACES = {Task.DEPTH: Space.AFFINE_DISPARITY, Task.NORMALS: Space.UNIT_NORMALS}


class LotusTeacher:
    """Depth (or disparity) and normals of one Lotus checkpoint each."""

    spaces: Mapping[Task, Space] = SPACES  # before a checkpoint's name says that it gives depth

    def __init__(
        self,
        *,
        depth: str | None,
        normals: str | None,
        seeds: list[int],
        mirror: bool,
        side_px: int,
        combine: str,
        depth_space: str,
        resample: str,
        device: str,
        dtype: str,
        offload: str,
        vae_tiling: bool,
        pass_size: int,
    ) -> None:
        """Load the checkpoints; whether one is G or D its U-Net tells.

        Args:
            depth: checkpoint of the depth model: folder, ``owner/name`` or ``owner/name@revision``.
            normals: the same for normals; None where a task is not wanted.
            seeds: as below; more than one for G only.
            side_px: longer side the model works at; 0: the image's.
            depth_space: ``depth``, ``disparity``, or ``auto``: by the checkpoint's name.
            mirror, combine, resample, device, dtype, offload, vae_tiling, pass_size:
                `teacher.generators.diffusion`.
        """
        self.seeds, self.mirror = check_seeds(seeds), mirror
        self.combine = check_choice("combine", combine, COMBINE)
        self.resample = check_resample(resample)
        check_choice("depth_space", depth_space, ("auto", *DEPTH_SPACES))
        if side_px < 0 or side_px % 8:
            raise UsageError(f"teacher.side_px={side_px}: expected 0 or a multiple of 8.")
        self.side_px, self.max_side = side_px, side_px or None
        self.execution = Execution.parse(
            device=device, dtype=dtype, offload=offload, pass_size=pass_size, auto="float16"
        )
        found = named_checkpoints(depth=depth, normals=normals, parts=PARTS, licences={})
        self.models = {
            task: load_lotus(checkpoint, execution=self.execution, tiling=vae_tiling)
            for task, checkpoint in found.items()
        }
        if len(self.seeds) > 1 and not all(is_generative(m) for m in self.models.values()):
            raise UsageError(
                f"teacher.seeds={self.seeds}: Lotus-D takes no noise and answers the same for "
                "every seed; use one seed, or mirror=true for a second answer."
            )
        self.tasks = tuple(self.models)
        self.spaces = {task: SPACES[task] for task in self.tasks}
        if depth is not None:
            name = self.models[Task.DEPTH].checkpoint.repo
            kind = "disparity" if "disparity" in name.lower() else "depth"
            self.spaces[Task.DEPTH] = DEPTH_SPACES[kind if depth_space == "auto" else depth_space]

    def describe(self) -> dict[str, Any]:
        """Checkpoints with their hashes, and every setting that shapes an answer."""
        import diffusers

        models = {
            str(task): model.checkpoint.describe()
            | {
                "kind": "G" if is_generative(model) else "D",
                "answers": str(self.spaces[task]),
            }
            for task, model in self.models.items()
        }
        return {
            "name": "lotus",
            "models": models,
            "prompt": "",
            "steps": 1,
            "time_step": TIME_STEP,
            "side_px": self.side_px,
            "seeds": self.seeds,
            "mirror": self.mirror,
            "combine": self.combine if len(self.seeds) * (1 + self.mirror) > 1 else None,
            "resample": self.resample,
            "camera": "not used",
            "diffusers": diffusers.__version__,
            **self.execution.describe(),
        }

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """Affine depth or disparity and unit normals at each image's own size."""
        return ask_by_size(queries, tasks, members=self._members, finish=self._finish)

    def _members(self, task: Task, alike: list[Query]) -> Tensor:
        model = self.models[task]
        return model.members(
            alike,
            task=task,
            seeds=self.seeds,
            mirror=self.mirror,
            side_px=self.side_px,
            zero_noise=False,
            denoise=partial(predict, model),
        )  # [N,E,3,h,w]

    def _finish(self, task: Task, pictures: Tensor, size: tuple[int, int]) -> Answer:
        """Decoded pictures [E, 3, h, w] -> one answer of the image's size."""
        if task is Task.DEPTH:
            members = (pictures / 2 + 0.5).clip(0, 1).mean(1)  # per channel first, as published
        else:
            members = pictures.clip(-1, 1)
            members[len(self.seeds) :, 0] *= -1  # those of the mirrored image
            members = members / members.norm(dim=1, keepdim=True).clamp_min(1e-6)
        return combined_answer(
            members,
            size=size,
            how=self.combine,
            resample=self.resample,
            space=self.spaces[task],
            negate_x=True,  # Lotus' x points left
            seeds=self.seeds,
        )


def is_generative(model: LatentModel) -> bool:
    """G sees the image's latent and noise, D the image's latent alone."""
    return bool(model.unet.config.in_channels == 8)


def predict(
    model: LatentModel, unet: nn.Module, scene: Tensor, noise: Tensor, streams: list
) -> Tensor:
    """The annotation's clean latent [B, 4, h, w] in one step."""
    switch = torch.tensor([1.0, 0.0])  # annotation; (0, 1) would be the image itself
    switch = torch.cat([switch.sin(), switch.cos()]).to(scene).expand(len(scene), -1)
    return unet(
        torch.cat([scene, noise], dim=1) if is_generative(model) else scene,
        TIME_STEP,
        encoder_hidden_states=model.prompt.expand(len(scene), -1, -1),
        class_labels=switch,
        return_dict=False,
    )[0]


def load_lotus(checkpoint: Checkpoint, *, execution: Execution, tiling: bool) -> LatentModel:
    """The published layout -> networks; diffusers has the parts but no pipeline for them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    config = checkpoint.config("unet/config.json")
    channels, embedded = config.get("in_channels"), config.get("class_embed_type")
    if channels not in (4, 8) or embedded != "projection":
        raise UsageError(
            f"checkpoint {checkpoint.repo}: not Lotus: its U-Net has in_channels={channels}, "
            f"class_embed_type={embedded!r}; expected 8 (G) or 4 (D) and 'projection'."
        )
    try:
        load: Any = {"use_safetensors": True, "local_files_only": True}
        parts = {
            "unet": UNet2DConditionModel.from_pretrained(checkpoint.folder / "unet", **load),
            "vae": AutoencoderKL.from_pretrained(checkpoint.folder / "vae", **load),
        }
        text_encoder = CLIPTextModel.from_pretrained(checkpoint.folder / "text_encoder", **load)
        tokenizer = CLIPTokenizer.from_pretrained(
            checkpoint.folder / "tokenizer", local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UsageError(
            f"checkpoint {checkpoint.repo}: cannot be loaded as Lotus "
            f"({type(error).__name__}: {error})."
        ) from error
    model = LatentModel(
        **parts,
        scheduler=None,
        prompt=empty_prompt(tokenizer, text_encoder),
        checkpoint=checkpoint,
        execution=execution,
    )
    if tiling:
        model.vae.enable_tiling()
    return model
