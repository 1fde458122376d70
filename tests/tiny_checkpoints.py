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


def write_flux(folder: Path, *, seed: int = 0) -> Path:
    """FLUX.1-dev's layout: two text encoders, two tokenizers, transformer, VAE, flow scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).save_pretrained(folder / "transformer")
    facts = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False}
    tiny_vae(**facts, use_post_quant_conv=False).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    ).save_pretrained(folder / "scheduler")
    write_clip_text_model(folder / "text_encoder")
    write_clip_tokenizer(folder / "tokenizer")
    words = T5Config(
        vocab_size=8,
        d_model=24,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=3,
        tie_word_embeddings=False,
    )
    T5EncoderModel(words).eval().save_pretrained(folder / "text_encoder_2")
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁", -2.0)]
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(folder / "tokenizer_2")
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.30.0.dev0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


LOTUS2_LAYERS = [
    *(f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.0.attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")),
    "transformer_blocks.0.attn.to_add_out",
    *(f"transformer_blocks.0.{n}" for n in ("ff.net.0.proj", "ff.net.2")),
    *(f"transformer_blocks.0.{n}" for n in ("ff_context.net.0.proj", "ff_context.net.2")),
    *(f"single_transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")),
]


def write_lotus2_adapters(folder: Path, *, flux: Path, seed: int = 0, rank: int = 3) -> Path:
    """The six files of Lotus-2; the depth continuity module as a torch archive, as it is read."""
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    network = FluxTransformer2DModel.from_pretrained(flux / "transformer")
    for task in ("depth", "normal"):
        for stage in ("core_predictor", "detail_sharpener"):
            tensors = {}
            for path in LOTUS2_LAYERS:
                layer, key = network.get_submodule(path), f"transformer.{path}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, layer.in_features) * 0.2
                tensors[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, rank) * 0.2
            save_file(tensors, folder / f"lotus-2_{stage}_{task}.safetensors")
        lcm = {"lcm.0.weight": torch.randn(8, 4, 3, 3) * 0.1, "lcm.0.bias": torch.randn(8) * 0.1}
        lcm |= {"lcm.2.weight": torch.randn(4, 8, 3, 3) * 0.1, "lcm.2.bias": torch.randn(4) * 0.1}
        path = folder / f"lotus-2_lcm_{task}.safetensors"
        torch.save(lcm, path) if task == "depth" else save_file(lcm, path)
    return folder
