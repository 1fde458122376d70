"""Lotus: expected tensors worked out step by step from the published algorithm."""

import math

import numpy as np
import pytest
import torch
from teacher_cases import (
    SIZES,
    EchoVae,
    mirrored_spread_deg,
    options,
    query,
    ramp,
    registration_error,
)
from tiny_checkpoints import write_lotus, write_marigold

from teacher.errors import UsageError
from teacher.generators import load_teacher
from teacher.generators.diffusion import keyed_noise
from teacher.label import Space, Task

torch.set_num_threads(1)
D, N = Task.DEPTH, Task.NORMALS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lotus")
    write_lotus(root / "lotus-depth-g-v2-1-disparity", generative=True)
    write_lotus(root / "lotus-depth-d-v1-0", generative=False, seed=1)
    write_lotus(root / "lotus-normal-g-v1-1", generative=True, seed=2, facing=True)
    write_lotus(root / "lotus-normal-d-v1-1", generative=False, seed=3, facing=True)
    return root


def teacher(folder, *, depth=None, normals=None, **changes):
    named = {k: v and str(folder / v) for k, v in (("depth", depth), ("normals", normals))}
    return load_teacher(**options("lotus", **({"side_px": 64} | named | changes)))


@torch.no_grad()
def published(folder, rgb, noise):
    """[B, 3, H, W] in [-1, 1] -> decoded [0, 1] picture, as the paper's one step says it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    begin_end = torch.tensor([[2, 3]])  # the two special words of the tiny vocabulary, no padding
    prompt = text(begin_end)[0].repeat(len(rgb), 1, 1)
    posterior = vae.encode(rgb).latent_dist
    z_rgb = posterior.mean * 0.18215
    seen = z_rgb if noise is None else torch.cat([z_rgb, noise], dim=1)
    # the switch (1, 0) for the annotation, embedded as sin(1), sin(0), cos(1), cos(0)
    switch = torch.tensor([[math.sin(1), 0.0, math.cos(1), 1.0]]).repeat(len(rgb), 1)
    time = torch.full((len(rgb),), 999)
    z = unet(seen, time, encoder_hidden_states=prompt, class_labels=switch).sample
    picture = vae.decode(z / 0.18215).sample
    return ((picture + 1) / 2).clamp(0, 1)


def signed(queries):
    stacked = np.stack([q.image for q in queries]).astype(np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("name", ["lotus-depth-g-v2-1-disparity", "lotus-depth-d-v1-0"])
@pytest.mark.parametrize("batch", [1, 4])
def test_depth_follows_the_published_step(folder, name, batch):
    queries = [query(f"k{i}", 48, 64, seed=i) for i in range(batch)]
    noise = torch.stack([keyed_noise(q.key, D, 0, (4, 6, 8)) for q in queries])
    expected = published(folder / name, signed(queries), noise if "-g-" in name else None)
    ours = teacher(folder, depth=name).answer(queries, [D])
    for mine, want in zip(ours, expected.mean(1).numpy(), strict=True):
        np.testing.assert_allclose(mine[D].values, want, atol=1e-5)
        assert np.ptp(want) > 0.05
        disparity = "disparity" in name
        assert mine[D].space is (Space.AFFINE_DISPARITY if disparity else Space.AFFINE_DEPTH)


@pytest.mark.parametrize("name", ["lotus-normal-g-v1-1", "lotus-normal-d-v1-1"])
def test_normals_are_turned_into_our_axes(folder, name):
    one = query("a", 48, 64)
    noise = keyed_noise("a", N, 0, (4, 6, 8))[None] if "-g-" in name else None
    picture = published(folder / name, signed([one]), noise)[0].permute(1, 2, 0).numpy()
    raw = 2 * picture - 1
    unit = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    mine = teacher(folder, normals=name).answer([one], [N])[0][N].values
    np.testing.assert_allclose(mine[..., 0], -unit[..., 0], atol=1e-4)  # short vectors
    np.testing.assert_allclose(mine[..., 1:], unit[..., 1:], atol=1e-4)


def test_larger_images_are_worked_at_the_published_size(folder):
    """75 x 100 -> antialiased bilinear to 48 x 64 -> nearest pixel centres back, as published."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    one, name = query("a", 75, 100), "lotus-depth-d-v1-0"
    small = resize(signed([one]), [48, 64], InterpolationMode.BILINEAR, antialias=True)
    picture = published(folder / name, small, None)
    back = resize(picture, [75, 100], InterpolationMode.NEAREST_EXACT)
    mine = teacher(folder, depth=name).answer([one], [D])[0][D].values
    np.testing.assert_allclose(mine, back[0].mean(0), atol=1e-5)


def test_lotus_g_gives_a_spread_and_never_sees_its_neighbours(folder):
    asked = teacher(folder, depth="lotus-depth-g-v2-1-disparity", seeds=[0, 1, 2], pass_size=4)
    queries = [query(f"k{i}", 48, 64, seed=i) for i in range(3)]
    together = asked.answer(queries, [D])
    alone = asked.answer(queries[2:], [D])[0]
    np.testing.assert_allclose(together[2][D].values, alone[D].values, atol=2e-5)
    assert together[0][D].uncertainty.shape == (48, 64) and together[0][D].uncertainty.max() > 0


def test_lotus_d_is_asked_once_or_also_mirrored(folder):
    with pytest.raises(UsageError, match="Lotus-D takes no noise and answers the same"):
        teacher(folder, depth="lotus-depth-d-v1-0", seeds=[0, 1])
    asked = teacher(folder, depth="lotus-depth-d-v1-0", mirror=True)
    answer = asked.answer([query("a", 48, 64)], [D])[0][D]
    assert answer.uncertainty.max() > 0
    assert asked.describe()["models"]["depth"]["kind"] == "D"


class EchoUnet(torch.nn.Module):
    config = type("C", (), {"in_channels": 4})

    def forward(self, x, t, **kwargs):
        assert t == 999 and kwargs["class_labels"].shape == (len(x), 4)
        return (x,)


@pytest.mark.parametrize("name", SIZES)
def test_pixels_stay_where_they_are(folder, name):
    height, width = SIZES[name]
    asked = teacher(folder, depth="lotus-depth-d-v1-0", side_px=768, resample="bilinear")
    model = asked.models[D]
    model.vae, model.unet = EchoVae(), EchoUnet()
    for axis in (0, 1):
        values = asked.answer([ramp(height, width, axis)], [D])[0][D].values
        assert values.shape == (height, width)
        worked = (height, width)[axis] * 768 // max(height, width)
        worst, mean = registration_error(values, axis, worked)
        assert worst <= 0.5 and mean <= 0.05, (axis, worst, mean)


def test_mirrored_normals_come_back_with_x_turned(folder):
    asked = teacher(folder, normals="lotus-normal-d-v1-1", mirror=True)
    asked.models[N].vae, asked.models[N].unet = EchoVae(), EchoUnet()
    one = query("a", 48, 64)
    found = asked.answer([one], [N])[0][N]
    np.testing.assert_allclose(found.uncertainty, mirrored_spread_deg(one.image), atol=0.05)


def test_wrong_checkpoints_are_explained(folder, tmp_path):
    write_marigold(tmp_path / "marigold", kind="depth")
    with pytest.raises(UsageError, match="not Lotus: its U-Net has in_channels=8, class_embed_t"):
        teacher(tmp_path, depth="marigold")
    with pytest.raises(UsageError, match="both null"):
        teacher(folder)
