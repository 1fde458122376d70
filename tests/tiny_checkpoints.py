"""Tiny random checkpoints in the published on-disk layouts, written as their authors write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]


def write_clip_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt, tokenizer_config.json, as in Stable Diffusion's ``tokenizer/``."""
    folder.mkdir(parents=True)
    vocab = {word: i for i, word in enumerate(["a", "b", *WORDS])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_clip_text_model(folder: Path, *, width: int = 32) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=3,
        projection_dim=width,
    )
    CLIPTextModel(config).eval().save_pretrained(folder)


def tiny_vae(**changes):
    from diffusers import AutoencoderKL

    settings = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "scaling_factor": 0.18215,
        "sample_size": 64,
    }
    return AutoencoderKL(**(settings | changes)).eval()


def tiny_unet(**changes):
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**(settings | changes)).eval()


def ddim(**changes):
    from diffusers import DDIMScheduler

    settings = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    return DDIMScheduler(**(settings | changes))


def write_stable(
    folder: Path,
    *,
    index: dict,
    scheduler,
    seed: int = 0,
    unet: dict | None = None,
    facing: bool = False,
) -> Path:
    """The common body of Marigold, E2E-FT and Lotus: five subfolders and ``model_index.json``.

    ``facing`` biases the decoder's blue, so that normals look at the viewer as real ones do and
    none is so short that dividing by its length magnifies rounding.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    tiny_unet(**(unet or {})).save_pretrained(folder / "unet")
    vae = tiny_vae()
    with torch.no_grad():
        vae.decoder.conv_out.bias[2] += 0.9 * facing
    vae.save_pretrained(folder / "vae")
    write_clip_text_model(folder / "text_encoder")
    write_clip_tokenizer(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    body = {
        "_diffusers_version": "0.25.0",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(body | index, indent=2))
    return folder


def write_marigold(folder: Path, *, kind: str, scheduler=None, seed: int = 0, **index) -> Path:
    """A Marigold checkpoint; ``kind`` is ``depth``, ``disparity`` or ``normals``."""
    names = {"normals": "MarigoldNormalsPipeline"}
    facts = {
        "_class_name": names.get(kind, "MarigoldDepthPipeline"),
        "default_denoising_steps": 2,
        "default_processing_resolution": 64,
        "prediction_type": kind,
    }
    if kind == "normals":
        facts["use_full_z_range"] = True
    else:
        facts |= {"scale_invariant": True, "shift_invariant": True}
    return write_stable(
        folder,
        index=facts | index,
        scheduler=scheduler or ddim(),
        seed=seed,
        facing=kind == "normals",
    )


def write_lotus(folder: Path, *, generative: bool, facing: bool = False, seed: int = 0) -> Path:
    """A Lotus checkpoint: x0 U-Net with a projected task switch; 8 (G) or 4 (D) channels in."""
    unet = {
        "in_channels": 8 if generative else 4,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 4,
    }
    index = {"_class_name": "LotusGPipeline" if generative else "LotusDPipeline"}
    nothing = {"feature_extractor": [None, None], "safety_checker": [None, None]}
    return write_stable(
        folder,
        index=index | nothing,
        scheduler=ddim(prediction_type="sample", rescale_betas_zero_snr=False),
        seed=seed,
        unet=unet,
        facing=facing,
    )
