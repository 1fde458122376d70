"""Marigold: equal to the stock pipelines, independent of the batch, registered to the pixel."""

import json

import numpy as np
import pytest
import torch
from teacher_cases import (
    SIZES,
    EchoScheduler,
    EchoUnet,
    EchoVae,
    options,
    query,
    ramp,
    registration_error,
)
from tiny_checkpoints import ddim, write_marigold

from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators import load_teacher
from teacher.generators.diffusion import combine_depth, combine_normals, keyed_noise
from teacher.label import Space, Task

torch.set_num_threads(1)
D, N = Task.DEPTH, Task.NORMALS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from diffusers import LCMScheduler

    root = tmp_path_factory.mktemp("marigold")
    write_marigold(root / "depth", kind="depth")
    write_marigold(root / "disparity", kind="disparity", seed=1)
    write_marigold(root / "normals", kind="normals", seed=2)
    write_marigold(root / "half-z", kind="normals", seed=3, use_full_z_range=False)
    lcm = LCMScheduler.from_config(ddim(timestep_spacing="leading").config)
    write_marigold(root / "lcm", kind="depth", seed=4, scheduler=lcm, default_denoising_steps=4)
    bare = {"prediction_type": None, "default_denoising_steps": None, "_class_name": "X"}
    write_marigold(root / "marigold-e2e-ft-depth", kind="depth", seed=5, **bare)
    write_marigold(root / "marigold-e2e-ft-normals", kind="normals", seed=6, **bare)
    return root


def teacher(**changes):
    return load_teacher(**options("marigold", **({"depth": None, "normals": None} | changes)))


def noise(queries, task, seed=0):
    h, w = (n * 64 // max(q.image.shape[:2]) for q in queries[:1] for n in q.image.shape[:2])
    cells = (4, -(-h // 8), -(-w // 8))
    return torch.stack([keyed_noise(q.key, task, seed, cells) for q in queries])


def stock(folder, queries, *, kind="Depth", **call):
    import diffusers

    pipe = getattr(diffusers, f"Marigold{kind}Pipeline").from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = [np.ascontiguousarray(q.image.transpose(2, 0, 1))[None] for q in queries]
    return pipe([torch.from_numpy(i).float() / 255 for i in images], **call)


@pytest.mark.parametrize("resample", ["bilinear", "nearest-exact"])
@pytest.mark.parametrize("batch", [1, 4])
def test_depth_equals_the_stock_pipeline(folder, batch, resample):
    queries = [query(f"k{i}", 50, 71, seed=i) for i in range(batch)]
    ours = teacher(depth=str(folder / "depth"), resample=resample).answer(queries, [D])
    theirs = stock(
        folder / "depth",
        queries,
        latents=noise(queries, D),
        batch_size=batch,
        resample_method_output=resample,
    ).prediction
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[D].space is Space.AFFINE_DEPTH and mine[D].values.shape == (50, 71)
        np.testing.assert_allclose(mine[D].values, other[..., 0], atol=1e-5)
        assert np.ptp(other) > 0.1


@pytest.mark.parametrize("name", ["normals", "half-z"])
def test_normals_equal_the_stock_pipeline(folder, name):
    queries = [query(f"k{i}", 56, 40, seed=i) for i in range(4)]
    asked = teacher(normals=str(folder / name), resample="bilinear")
    ours = asked.answer(queries, [N])
    theirs = stock(
        folder / name, queries, kind="Normals", latents=noise(queries, N), batch_size=4
    ).prediction
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine[N].values, other, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(mine[N].values, axis=-1), 1, atol=1e-5)


def test_lcm_noise_between_its_steps_is_the_images_own(folder, monkeypatch):
    """Stock draws from torch's global stream; seeded like our key, it must say the same."""
    from teacher.generators import diffusion

    ours = teacher(depth=str(folder / "lcm"), resample="bilinear")
    one = query("a", 48, 64)
    monkeypatch.setattr(
        diffusion, "keyed_generator", lambda *a, **k: torch.Generator().manual_seed(77)
    )
    mine = ours.answer([one], [D])[0][D].values
    torch.manual_seed(77)
    theirs = stock(folder / "lcm", [one], latents=noise([one], D)).prediction
    np.testing.assert_allclose(mine, theirs[0, ..., 0], atol=1e-5)
    torch.manual_seed(78)
    other = stock(folder / "lcm", [one], latents=noise([one], D)).prediction
    assert np.abs(other - theirs).max() > 1e-3  # the noise between steps does matter


@pytest.mark.parametrize("name", ["depth", "lcm"])
def test_an_answer_never_depends_on_its_neighbours(folder, name):
    asked = teacher(depth=str(folder / name), pass_size=3, seeds=[0, 5])
    queries = [query(f"k{i}", *(40, 56) if i % 2 else (56, 40), seed=i) for i in range(4)]
    torch.manual_seed(1)
    together = asked.answer(queries, [D])
    torch.manual_seed(2)
    alone = [asked.answer([q], [D])[0] for q in reversed(queries)][::-1]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[D].values, b[D].values, atol=2e-5)
    moved = asked.answer([query("other key", 56, 40, seed=0)], [D])[0]
    assert np.abs(moved[D].values - together[0][D].values).max() > 1e-3


GOLDEN_NOISE = [0.011295, -1.892649, 1.218998, -1.273266]


def test_noise_is_the_same_on_every_machine():
    """Philox and ziggurat of NumPy, keyed with SHA-256: golden numbers, drawn once."""
    drawn = keyed_noise("key", D, 0, (1, 1, 4)).flatten().tolist()
    assert drawn == pytest.approx(GOLDEN_NOISE, abs=1e-6)
    big = keyed_noise("key", D, 0, (100, 1000)).numpy()
    assert abs(big.mean()) < 0.01 and abs(big.std() - 1) < 0.01
    others = [keyed_noise("key", D, 1, (9,)), keyed_noise("kez", D, 0, (9,))]
    others += [keyed_noise("key", N, 0, (9,)), keyed_noise("key", D, 0, (9,), mirrored=True)]
    assert all(np.abs(o.numpy() - big.flatten()[:9]).max() > 0.1 for o in others)


def test_every_member_has_noise_of_its_own_in_the_order_told(folder, monkeypatch):
    """Image by image, plain before mirrored, seed by seed; no two see the same numbers."""
    from teacher.generators import diffusion

    drawn = {"keyed_noise": [], "keyed_generator": []}
    for name, calls in drawn.items():
        real = getattr(diffusion, name)

        def spy(key, task, seed, *shape, mirrored=False, real=real, calls=calls):
            calls.append((key, mirrored, seed))
            return real(key, task, seed, *shape, mirrored=mirrored)

        monkeypatch.setattr(diffusion, name, spy)
    model = teacher(depth=str(folder / "depth"), pass_size=3).models[D]
    queries = [query(key, 40, 56, seed=i) for i, key in enumerate("ab")]
    members = model.members(queries, seeds=[0, 5], mirror=True)
    expected = [(k, m, s) for k in "ab" for m in (False, True) for s in (0, 5)]
    assert drawn == {"keyed_noise": expected, "keyed_generator": expected}
    for e, seed in enumerate((0, 5)):
        alone = model.members(queries[1:], seeds=[seed], mirror=False)
        torch.testing.assert_close(members[1, e], alone[0, 0], atol=2e-5, rtol=0)
    of = [("key", D, 0), ("kez", D, 0), ("key", N, 0), ("key", D, 1)]
    streams = [diffusion.keyed_generator(*one).initial_seed() for one in of]
    streams.append(diffusion.keyed_generator("key", D, 0, mirrored=True).initial_seed())
    assert len(set(streams)) == 5


def test_what_is_not_finite_is_unknown_and_never_sky():
    from teacher.generators.runtime import depth_answer

    values = np.array([[1.0, np.inf, -np.inf, np.nan]])
    found = depth_answer(values, space=Space.AFFINE_DEPTH, spread=np.ones((1, 4)))
    assert np.isnan(found.values[0, 1:]).all() and np.isnan(found.uncertainty[0, 1:]).all()
    assert found.values[0, 0] == found.uncertainty[0, 0] == 1


def test_e2e_starts_from_zeros_and_turns_its_normals(folder):
    depth, normals = (str(folder / f"marigold-e2e-ft-{t}") for t in ("depth", "normals"))
    asked = teacher(depth=depth, normals=normals, resample="bilinear")
    one = query("a", 48, 64)
    mine = asked.answer([one], [D, N])[0]
    zeros = noise([one], D) * 0
    call = {"latents": zeros, "num_inference_steps": 1, "processing_resolution": 64}
    theirs = stock(depth, [one], **call).prediction[0, ..., 0]
    np.testing.assert_allclose(mine[D].values, theirs, atol=1e-5)
    turned = stock(normals, [one], kind="Normals", **call).prediction[0] * [-1, 1, 1]
    np.testing.assert_allclose(mine[N].values, turned, atol=1e-5)
    assert asked.describe()["models"]["depth"]["start"] == "zeros"
    with pytest.raises(UsageError, match="starts from zeros answers the same for every seed"):
        teacher(depth=depth, seeds=[0, 1])


def test_disparity_is_called_disparity(folder):
    asked = teacher(depth=str(folder / "disparity"))
    assert asked.answer([query("a")], [D])[0][D].space is Space.AFFINE_DISPARITY
    forced = teacher(depth=str(folder / "disparity"), depth_space="depth")
    assert forced.answer([query("a")], [D])[0][D].space is Space.AFFINE_DEPTH


def test_original_ensembling_is_the_stock_pipelines(folder, monkeypatch):
    """The same members go into the same function with the same settings, and its word is final.

    Not compared by output: BFGS on float32 differences turns 1e-6 in the members into 0.07.
    """
    from diffusers import MarigoldDepthPipeline

    seen, real = [], MarigoldDepthPipeline.ensemble_depth

    def spy(depth, *args, **kwargs):
        seen.append((depth, args, kwargs, real(depth, *args, **kwargs)))
        return seen[-1][-1]

    monkeypatch.setattr(MarigoldDepthPipeline, "ensemble_depth", staticmethod(spy))
    one, seeds = query("a", 48, 64), [0, 1, 2]
    both = {"depth": str(folder / "depth"), "normals": str(folder / "normals")}
    asked = teacher(**both, seeds=seeds, combine="original", resample="bilinear")
    mine = asked.answer([one], [D, N])[0]
    call = {"ensemble_size": 3, "output_uncertainty": True, "batch_size": 3}
    latents = torch.cat([noise([one], D, s) for s in seeds])
    settings = {"max_iter": 50, "tol": 1e-6}
    stock(folder / "depth", [one], latents=latents, ensembling_kwargs=settings, **call)
    (ours, args, kwargs, result), (theirs, args_2, kwargs_2, _) = seen
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (args, kwargs) == (args_2, kwargs_2)
    np.testing.assert_allclose(mine[D].values, result[0][0, 0], atol=1e-6)
    np.testing.assert_allclose(mine[D].uncertainty, result[1][0, 0] / np.log(2), atol=1e-6)
    latents = torch.cat([noise([one], N, s) for s in seeds])
    normals = stock(folder / "normals", [one], kind="Normals", latents=latents, **call)
    np.testing.assert_allclose(mine[N].values, normals.prediction[0], atol=1e-5)
    np.testing.assert_allclose(mine[N].uncertainty, normals.uncertainty[0, ..., 0] * 180, atol=1e-3)


def test_consensus_undoes_each_members_scale_and_shift():
    """Members are one planted map in other scales and shifts, one pixel of one member apart."""
    truth = torch.linspace(0.2, 0.8, 600).reshape(20, 30)
    members = torch.stack([truth, truth * 0.5 + 0.1, truth * 1.2 - 0.1])
    for how in ("consensus", "original"):
        value, spread = combine_depth(members, how=how)
        fit = np.polyfit(truth.flatten(), value.flatten(), 1)
        assert fit[0] > 0
        np.testing.assert_allclose(np.polyval(fit, truth), value, atol=2e-3)
        assert spread.max() < 2e-3
        if how == "consensus":  # neither moved nor shrunk: the middle of the members' medians
            middle = members.flatten(1).median(1).values.mean()
            assert value.median() == pytest.approx(float(middle), abs=1e-3)
    members[1, 3, 4] += 0.3
    value, spread = combine_depth(members, how="consensus")
    assert spread[3, 4] > 20 * spread.flatten().median()


def test_consensus_of_normals_is_a_member_and_the_angle_its_spread():
    def direction(deg):
        return torch.tensor([np.sin(np.radians(deg)), 0, np.cos(np.radians(deg))]).float()

    members = torch.stack([direction(a)[:, None, None].expand(3, 2, 2) for a in (0, 4, 8)])
    for how in ("consensus", "original"):
        value, spread_deg = combine_normals(members, how=how)
        np.testing.assert_allclose(value[:, 0, 0], direction(4), atol=1e-6)
        np.testing.assert_allclose(spread_deg, np.full((2, 2), 8 / 3), atol=1e-2)


def test_mirrored_members_come_back_mirrored(folder):
    """With an echo, image and mirrored image must agree; x of mirrored normals changes sign."""
    asked = teacher(normals=str(folder / "normals"), mirror=True, side_px=0)
    model = asked.models[N]
    model.latent.vae, model.latent.unet = EchoVae(), EchoUnet()
    model.latent.scheduler = EchoScheduler()
    one = query("a", 16, 24)
    members = model.members([one], seeds=[0], mirror=True)[0].numpy()
    plain, mirrored = members
    np.testing.assert_allclose(mirrored[0], -plain[0], atol=1e-6)
    np.testing.assert_allclose(mirrored[1:], plain[1:], atol=1e-6)
    assert np.abs(plain[0]).max() > 0.1


@pytest.mark.parametrize("side_px", [0, 64, 768])
@pytest.mark.parametrize("name", SIZES)
def test_pixels_stay_where_they_are(folder, name, side_px):
    """The echo's ramp returns within half a pixel, without a systematic shift."""
    height, width = SIZES[name]
    if name == "12 MP" and side_px != 768:
        pytest.skip("one working size is enough for 12 megapixels")
    asked = teacher(depth=str(folder / "depth"), side_px=side_px, resample="bilinear")
    latent = asked.models[D].latent
    latent.vae, latent.unet, latent.scheduler = EchoVae(), EchoUnet(), EchoScheduler()
    asked.models[D].latent.scheduler = EchoScheduler()
    for axis in (0, 1):
        values = asked.answer([ramp(height, width, axis)], [D])[0][D].values
        assert values.shape == (height, width)
        longest = max(height, width)
        worked = (height, width)[axis] * (side_px or longest) // longest
        worst, mean = registration_error(values, axis, worked)
        assert worst <= 0.5 and mean <= 0.05, (axis, worst, mean)


def test_nearest_way_back_stays_within_half_a_working_pixel(folder):
    asked = teacher(depth=str(folder / "depth"), side_px=64)
    latent = asked.models[D].latent
    latent.vae, latent.unet, latent.scheduler = EchoVae(), EchoUnet(), EchoScheduler()
    values = asked.answer([ramp(192, 256, 1)], [D])[0][D].values
    worst, mean = registration_error(values, 1, 64)
    assert worst <= 0.5 * 256 / 64 + 0.01 and mean <= 0.05


def test_overflow_becomes_unknown_and_spares_the_neighbours(folder):
    asked = teacher(depth=str(folder / "depth"), normals=str(folder / "normals"), seeds=[0, 1])
    with torch.no_grad():
        asked.models[N].latent.unet.conv_out.bias[0] = torch.inf
    answer = asked.answer([query("a")], [D, N])[0]
    assert np.isnan(answer[N].values).all() and np.isfinite(answer[D].values).all()
    members = torch.rand(3, 8, 8)
    members[1, 2, 2] = torch.nan
    for how in ("consensus", "original"):
        value, _ = combine_depth(members, how=how)
        assert torch.isfinite(value).all()
        alone, spread = combine_depth(members[:2], how=how)
        assert torch.equal(alone, members[0]) and spread is None


def test_layerwise_offload_and_tiling_keep_the_answer(folder):
    plain = teacher(depth=str(folder / "depth")).answer([query("a")], [D])[0][D].values
    offloaded = teacher(depth=str(folder / "depth"), offload="sequential")
    np.testing.assert_allclose(offloaded.answer([query("a")], [D])[0][D].values, plain, atol=1e-6)
    unet = offloaded.models[D].latent.unet
    assert all(p.is_meta for p in unet.parameters())  # at rest, its weights are not on the device
    tiled = teacher(depth=str(folder / "depth"), vae_tiling=True)
    assert tiled.models[D].latent.vae.use_tiling
    np.testing.assert_allclose(tiled.answer([query("a")], [D])[0][D].values, plain, atol=1e-6)
    larger = teacher(depth=str(folder / "depth"), vae_tiling=True, side_px=160)
    values = larger.answer([query("a", 96, 160)], [D])[0][D].values
    assert values.shape == (96, 160) and np.isfinite(values).all()


def test_bfloat16_keeps_more_than_256_levels(folder):
    half = teacher(depth=str(folder / "depth"), dtype="bfloat16")
    latent = half.models[D].latent  # a bfloat16 decoder has 256 levels in [0.5, 1]
    assert (latent.unet.dtype, latent.vae.dtype) == (torch.bfloat16, torch.float32)
    values = half.answer([query("a", 60, 64)], [D])[0][D].values
    assert len(np.unique(values)) > 1000
    full = teacher(depth=str(folder / "depth")).answer([query("a", 60, 64)], [D])[0][D].values
    assert np.abs(values - full).max() < 0.1


def test_describe_pins_the_answer_and_names_no_path(folder):
    import hashlib

    about = teacher(depth=str(folder / "depth"), seeds=[3]).describe()
    text = json.dumps(about)
    assert str(folder) not in text
    weights = folder / "depth" / "unet" / "diffusion_pytorch_model.safetensors"
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()
    model = about["models"]["depth"]
    assert model["weights_sha256"]["unet/diffusion_pytorch_model.safetensors"] == sha
    assert (model["steps"], model["side_px"], about["seeds"]) == (2, 64, [3])


def test_wrong_checkpoints_are_explained(folder, tmp_path):
    import shutil

    from tiny_checkpoints import tiny_unet

    def broken(name, change):
        copy = tmp_path / name
        shutil.copytree(folder / "depth", copy)
        change(copy)
        return str(copy)

    unet = "unet/diffusion_pytorch_model.safetensors"
    four = broken("four", lambda p: tiny_unet(in_channels=4).save_pretrained(p / "unet"))
    bare = broken("bare", lambda p: shutil.rmtree(p / "vae"))
    pickled = broken("pickled", lambda p: (p / unet).rename(p / "unet/diffusion.bin"))
    cut = broken("cut", lambda p: (p / unet).write_bytes((p / unet).read_bytes()[:5000]))
    cases = {
        four: "takes 4 channels, expected 8",
        bare: "no vae in it; expected the subfolders unet, vae",
        pickled: r"no weights as safetensors, only pickled ones \(diffusion.bin\)",
        cut: "cannot be loaded as MarigoldDepthPipeline",
        str(folder / "normals"): "predicts 'normals', not depth",
        str(tmp_path / "nowhere"): "no such folder",
    }
    for spec, message in cases.items():
        with pytest.raises(UsageError, match=message):
            teacher(depth=spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": None}, "both null"),
        ({"seeds": [1, 1]}, "list of different whole numbers"),
        ({"side_px": 63}, "0 or a multiple of 8"),
        ({"steps": 0}, "names no number of steps"),
        ({"combine": "mean"}, "expected one of"),
        ({"resample": "bicubic"}, "expected one of"),
        ({"dtype": "float64"}, "expected auto, float32"),
        ({"dtype": "float16"}, "not on the CPU"),
        ({"device": "gpu"}, "not a device"),
        ({"offload": "model"}, "nothing to offload from"),
        ({"offload": "disk"}, "expected one of"),
        ({"pass_size": 0}, "at least 1"),
    ],
)
def test_bad_options_are_explained(folder, changes, message):
    with pytest.raises(UsageError, match=message):
        teacher(**({"depth": str(folder / "depth")} | changes))


def test_a_missing_gpu_is_the_environments_fault(folder):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(EnvironmentFailure, match="sees no CUDA device"):
        teacher(depth=str(folder / "depth"), device="cuda")
