"""Lotus-2: expected tensors worked out from the published algorithm with merged weights."""

import io
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from teacher_cases import (
    SIZES,
    EchoVae,
    mirrored_spread_deg,
    options,
    query,
    ramp,
    registration_error,
)
from tiny_checkpoints import LOTUS2_LAYERS, write_flux, write_lotus2_adapters

from teacher.errors import UsageError
from teacher.generators import load_teacher
from teacher.generators.lotus2 import at_working_size, pack, places, unpack
from teacher.label import Space, Task

torch.set_num_threads(1)
D, N = Task.DEPTH, Task.NORMALS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lotus2")
    write_flux(root / "FLUX.1-dev")
    write_lotus2_adapters(root / "Lotus-2", flux=root / "FLUX.1-dev", seed=1)
    return root


def teacher(folder, **changes):
    where = {"base": str(folder / "FLUX.1-dev"), "adapters": str(folder / "Lotus-2")}
    return load_teacher(**options("lotus2", **(where | {"steps": 3} | changes)))


@pytest.fixture(scope="module")
def both(folder):
    return teacher(folder)


def merged(folder, name):
    """A transformer whose weights already contain the adapter: W + B A."""
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import load_file

    network = FluxTransformer2DModel.from_pretrained(folder / "FLUX.1-dev" / "transformer")
    lora = load_file(folder / "Lotus-2" / f"lotus-2_{name}.safetensors")
    for path in LOTUS2_LAYERS:
        a, b = (lora[f"transformer.{path}.lora_{half}.weight"] for half in "AB")
        network.get_submodule(path).weight.data += b @ a
    return network


@torch.no_grad()
def published(folder, task, rgb, steps):
    """[B, 3, H, W] in [-1, 1] -> picture in [0, 1], following paper and repository by hand."""
    from diffusers import AutoencoderKL, FluxPipeline
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, T5EncoderModel

    flux, n = folder / "FLUX.1-dev", len(rgb)
    vae = AutoencoderKL.from_pretrained(flux / "vae")
    clip = CLIPTextModel.from_pretrained(flux / "text_encoder")
    t5 = T5EncoderModel.from_pretrained(flux / "text_encoder_2")
    pooled = clip(torch.tensor([[2] + [3] * 76])).pooler_output  # begin, end, padding
    words = t5(torch.tensor([[1] + [0] * 511]))[0]  # end, padding
    z = (vae.encode(rgb).latent_dist.mean - 0.1159) * 0.3611
    h, w = z.shape[-2:]
    x = FluxPipeline._pack_latents(z, n, 4, h, w)
    ids = FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", torch.float32)

    def flow(network, x, time):
        return network(
            hidden_states=x,
            timestep=torch.full((n,), time),
            guidance=torch.full((n,), 3.5),
            pooled_projections=pooled.repeat(n, 1),
            encoder_hidden_states=words.repeat(n, 1, 1),
            txt_ids=torch.zeros(512, 3),
            img_ids=ids,
        ).sample

    x = flow(merged(folder, f"core_predictor_{task}"), x, 1 / 1000)
    z = FluxPipeline._unpack_latents(x, h * 8, w * 8, 8)
    path = folder / "Lotus-2" / f"lotus-2_lcm_{task}.safetensors"
    c = torch.load(io.BytesIO(path.read_bytes())) if task == "depth" else load_file(path)
    hidden = F.gelu(F.conv2d(z, c["lcm.0.weight"], c["lcm.0.bias"], padding=1))
    z = z + F.conv2d(hidden, c["lcm.2.weight"], c["lcm.2.bias"], padding=1)
    x = FluxPipeline._pack_latents(z, n, 4, h, w)
    # Euler over sigma from 1 to 0, shifted by mu, linear in the tokens: 256 -> 0.5, 4096 -> 1.15
    mu = 0.5 + (1.15 - 0.5) * (x.shape[1] - 256) / (4096 - 256)
    line = [1 - i * (1 - 1 / steps) / max(steps - 1, 1) for i in range(steps)]
    sigma = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in line] + [0.0]
    sharpener = merged(folder, f"detail_sharpener_{task}")
    for now, after in itertools.pairwise(sigma):
        x = x + (after - now) * flow(sharpener, x, now * 10 / 1000)
    z = FluxPipeline._unpack_latents(x, h * 8, w * 8, 8)
    return ((vae.decode(z / 0.3611 + 0.1159).sample + 1) / 2).clamp(0, 1)


def signed(queries):
    stacked = np.stack([q.image for q in queries]).astype(np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))


def test_both_tasks_follow_the_published_algorithm(folder, both):
    queries = [query(f"k{i}", 32, 48, seed=i) for i in range(2)]
    answers = both.answer(queries, [D, N])
    depth = published(folder, "depth", signed(queries), 3).mean(1).numpy()
    raw = 2 * published(folder, "normal", signed(queries), 3).permute(0, 2, 3, 1).numpy() - 1
    for mine, disparity, vector in zip(answers, depth, raw, strict=True):
        assert mine[D].space is Space.AFFINE_DISPARITY and np.ptp(disparity) > 0.1
        np.testing.assert_allclose(mine[D].values, disparity, atol=1e-5)
        length = np.linalg.norm(vector, axis=-1, keepdims=True)
        known = length[..., 0] > 0.05  # shorter ones magnify rounding
        unit = vector / length * [-1, 1, 1]
        np.testing.assert_allclose(mine[N].values[known], unit[known], atol=2e-4)


def test_without_steps_the_core_predictor_answers(folder, both):
    one = query("a", 32, 48)
    core = teacher(folder, steps=0, answers=["depth"]).answer([one], [D])[0][D].values
    sharp = both.answer([one], [D])[0][D].values
    assert np.abs(core - sharp).max() > 1e-3


def test_mirror_gives_a_spread_and_batches_do_not_matter(folder, both):
    asked = teacher(folder, mirror=True, pass_size=3)
    queries = [query(f"k{i}", *((32, 48) if i != 1 else (48, 32)), seed=i) for i in range(3)]
    together = asked.answer(queries, [D, N])
    alone = asked.answer([queries[2]], [D])[0][D]
    np.testing.assert_allclose(together[2][D].values, alone.values, atol=2e-5)
    assert all(a[t].uncertainty.max() > 0 for a in together for t in (D, N))
    assert both.answer(queries[:1], [D])[0][D].uncertainty is None


def test_packing_is_the_stock_pipelines():
    from diffusers import FluxPipeline

    z = torch.randn(2, 4, 6, 10)
    stock = FluxPipeline._pack_latents(z, 2, 4, 6, 10)
    assert torch.equal(pack(z), stock) and torch.equal(unpack(stock, 6, 10), z)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(places(3, 5).float(), ids)


@pytest.mark.parametrize("name", SIZES)
def test_pixels_stay_where_they_are(both, name, monkeypatch):
    """Sides become multiples of 16 by resampling alone, so the ramp only has to come back."""
    height, width = SIZES[name]
    monkeypatch.setattr(both, "vae", EchoVae())
    monkeypatch.setattr(both, "continuity", {D: torch.nn.Identity()})
    monkeypatch.setattr(both, "_flow", lambda x, *a: x)
    monkeypatch.setattr(both, "_sharpen", lambda x, *a: x)
    monkeypatch.setattr(both, "resample", "bilinear")
    for axis in (0, 1):
        values = both.answer([ramp(height, width, axis)], [D])[0][D].values
        assert values.shape == (height, width)
        n, longest = (height, width)[axis], max(height, width)
        worked = n if longest < 16 else max(min(n, n * 1024 // longest) - 31, 1)
        worst, mean = registration_error(values, axis, worked)
        assert worst <= 0.5 and mean <= 0.05, (axis, worst, mean)


def test_mirrored_normals_come_back_with_x_turned(both, monkeypatch):
    monkeypatch.setattr(both, "vae", EchoVae())
    monkeypatch.setattr(both, "continuity", {N: torch.nn.Identity()})
    monkeypatch.setattr(both, "_flow", lambda x, *a: x)
    monkeypatch.setattr(both, "_sharpen", lambda x, *a: x)
    monkeypatch.setattr(both, "mirror", True)
    one = query("a", 32, 48)
    found = both.answer([one], [N])[0][N]
    np.testing.assert_allclose(found.uncertainty, mirrored_spread_deg(one.image), atol=0.05)


@pytest.mark.parametrize(
    "size, side_px, worked",
    [
        ((75, 101), 0, (64, 80)),  # both by 64/75, 64 x 86.2, then down to a multiple of 16
        ((1000, 2000), 1024, (512, 1024)),
        ((1000, 1990), 1024, (512, 1008)),  # 514 x 1024, by 512/514: 512 x 1020.02
        ((512, 1024), 1024, (512, 1024)),
        ((40, 400), 100, (16, 160)),  # 10 x 100, enlarged until the shorter side has 16
        ((7, 5), 0, (16, 16)),
    ],
)
def test_working_size_by_hand(size, side_px, worked):
    assert tuple(at_working_size(torch.zeros(1, 3, *size), side_px).shape[-2:]) == worked


def test_bad_files_are_explained(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    def changed(name, change):
        copy = tmp_path / name
        shutil.copytree(folder / "Lotus-2", copy)
        change(copy)
        return str(copy)

    core, lcm = "lotus-2_core_predictor_depth.safetensors", "lotus-2_lcm_depth.safetensors"

    def edit(path, **tensors):
        save_file(load_file(path) | tensors, path)

    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    cases = {
        changed("absent", lambda p: (p / lcm).unlink()): "has no lotus-2_lcm_depth",
        changed("cut", lambda p: (p / core).write_bytes(b"\0" * 9)): "cannot be read",
        changed("key", lambda p: edit(p / core, strange=torch.ones(1))): "not a LoRA weight",
        changed(
            "shape", lambda p: edit(p / core, **{key: torch.ones(3, 5)})
        ): r"expected \[r, 32\]",
        changed(
            "layer", lambda p: edit(p / core, **{"transformer.x.lora_A.weight": torch.ones(1, 1)})
        ): "no layer 'x'",
        changed("lcm", lambda p: shutil.copy(p / core, p / lcm)): "expected {'lcm.0.weight'",
    }
    for adapters, message in cases.items():
        with pytest.raises(UsageError, match=message):
            teacher(folder, adapters=adapters, answers=["depth"])
    with pytest.raises(UsageError, match="expected some of"):
        teacher(folder, answers=["depht"])
    with pytest.raises(UsageError, match="no transformer"):
        teacher(folder, base=str(folder / "Lotus-2"))
