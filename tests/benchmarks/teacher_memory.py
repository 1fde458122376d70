"""VRAM of the diffusion teachers at full size, computed from their configs; no weights, no GPU.

Weights: every network is built on the meta device from its published config and its parameters
are counted. Activations: one real forward pass on fake tensors, in which every live storage is
tracked; the peak above the weights is what a pass needs with memory-efficient attention (workspace
of the kernels and the allocator's rounding come on top).

    python tests/benchmarks/teacher_memory.py            # prints the table of docs/results.md
"""

from __future__ import annotations

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
SD2_UNET = {  # stabilityai/stable-diffusion-2 unet/config.json, with Marigold's doubled input
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 96,
}
SD2_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
FLUX_VAE = SD2_VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX = {"guidance_embeds": True}  # diffusers' defaults are FLUX.1-dev's
LOTUS = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive; ``peak`` of them."""

    def __init__(self, *, ignore: list[torch.Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        for tensor in ignore:
            self.seen[tensor.untyped_storage()] = True

    def _gone(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen[storage] = True
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, storage.nbytes())
        return out


def parameters(network) -> int:
    return sum(p.numel() for p in network.parameters())


def build(cls, config: dict):
    with torch.device("meta"):
        return cls(**config).eval().requires_grad_(False)


def pass_bytes(make, run, dtype: torch.dtype) -> int:
    """Peak activations of ``run(network)`` on fake tensors of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), torch.no_grad():
            network = make().eval().requires_grad_(False)
            live = LiveBytes(ignore=[*network.parameters(), *network.buffers()])
            with live:
                run(network)
    finally:
        torch.set_default_dtype(before)
    return live.peak


def unet_bytes(batch: int, height: int, width: int, dtype=torch.float16) -> int:
    from diffusers import UNet2DConditionModel

    def run(unet):
        x = torch.zeros(batch, 8, height // 8, width // 8, dtype=dtype)
        text = torch.zeros(batch, 2, 1024, dtype=dtype)
        unet(x, 1, encoder_hidden_states=text)

    return pass_bytes(lambda: UNet2DConditionModel(**SD2_UNET), run, dtype)


def decode_bytes(batch: int, height: int, width: int, config: dict, dtype=torch.float16) -> int:
    from diffusers import AutoencoderKL

    def run(vae):
        shape = (batch, config["latent_channels"], height // 8, width // 8)
        vae.decode(torch.zeros(shape, dtype=dtype))

    return pass_bytes(lambda: AutoencoderKL(**config), run, dtype)


def flux_bytes(batch: int, height: int, width: int, dtype=torch.bfloat16) -> int:
    from diffusers import FluxTransformer2DModel

    tokens = height * width // 256

    def run(flux):
        flux(
            hidden_states=torch.zeros(batch, tokens, 64, dtype=dtype),
            encoder_hidden_states=torch.zeros(batch, 512, 4096, dtype=dtype),
            pooled_projections=torch.zeros(batch, 768, dtype=dtype),
            timestep=torch.zeros(batch, dtype=dtype),
            guidance=torch.zeros(batch),
            img_ids=torch.zeros(tokens, 3, dtype=dtype),
            txt_ids=torch.zeros(512, 3, dtype=dtype),
        )

    return pass_bytes(lambda: FluxTransformer2DModel(**FLUX), run, dtype)


def weights() -> dict[str, int]:
    """Parameters of every network, counted on the meta device."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel

    return {
        "Marigold U-Net": parameters(build(UNet2DConditionModel, SD2_UNET)),
        "Lotus-G U-Net": parameters(build(UNet2DConditionModel, SD2_UNET | LOTUS)),
        "SD VAE": parameters(build(AutoencoderKL, SD2_VAE)),
        "FLUX.1 transformer": parameters(build(FluxTransformer2DModel, FLUX)),
        "FLUX.1 VAE": parameters(build(AutoencoderKL, FLUX_VAE)),
    }


def lora_parameters(rank: int) -> int:
    """One Lotus-2 adapter: r (in + out) over attention, feed-forwards, single blocks' q k v."""
    d, hidden, double, single = 3072, 12288, 19, 38
    attention, feed_forward = 8 * 2 * d, 2 * 2 * (d + hidden)
    return rank * (double * (attention + feed_forward) + single * 3 * 2 * d)


def main() -> None:
    count = weights()
    for name, n in count.items():
        print(f"| {name} | {n / 1e6:.1f} M |")
    held = 2 * (count["Marigold U-Net"] + count["SD VAE"]) / GIB
    print("\n| Marigold 768x576 fp16, pass_size | weights | U-Net | decode | none | model |")
    for batch in (1, 4, 10):
        unet = unet_bytes(batch, 576, 768) / GIB
        vae = decode_bytes(batch, 576, 768, SD2_VAE) / GIB
        alone = max(2 * count["Marigold U-Net"] / GIB + unet, 2 * count["SD VAE"] / GIB + vae)
        row = (held, unet, vae, held + max(unet, vae), alone)
        print(f"| {batch} | " + " | ".join(f"{v:.2f}" for v in row) + " |")
    lora = 4 * (lora_parameters(128) + lora_parameters(256)) / GIB  # two stages, two bytes
    vae_w = 4 * count["FLUX.1 VAE"] / GIB
    base = 2 * count["FLUX.1 transformer"] / GIB
    print("\n| Lotus-2 1024x768 bf16 | flux | adapters | VAE fp32 | pass | decode | none | model |")
    flux = flux_bytes(1, 768, 1024) / GIB
    vae = decode_bytes(1, 768, 1024, FLUX_VAE, torch.float32) / GIB
    whole = base + lora + vae_w + max(flux, vae)
    alone = max(base + lora + flux, vae_w + vae)
    row = (base, lora, vae_w, flux, vae, whole, alone)
    print("| 1 | " + " | ".join(f"{v:.2f}" for v in row) + " |")


if __name__ == "__main__":
    main()
