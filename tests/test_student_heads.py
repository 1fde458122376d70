import json
import math

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file

from distill.scale_fit import fitted_uncertainty
from export.onnx_graph import card_of, to_onnx
from student.backbone import Backbone, StudentError
from student.depth_heads import (
    BINS,
    BinsDepthHead,
    LogDepthHead,
    MixtureDepthHead,
    StepDepthHead,
    bin_centres,
)
from student.dpt import DptDecoder
from student.grouping import group
from student.model import FACTORS, Student, log_factors

SMALL = {"backbone": "test_efficientnet", "height": 64, "width": 96}


def spoken(head: torch.nn.Module, maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a head answers when its last convolution gives ``maps`` [C] everywhere."""
    torch.nn.init.zeros_(head.maps.out.weight)
    with torch.no_grad():
        head.maps.out.bias.copy_(maps.repeat_interleave(head.maps.shuffle.upscale_factor**2))
    answer = head.eval()(torch.randn(1, 8, 3, 3))
    return {k: v[0, :, 1, 1] for k, v in answer.items()}


def test_bins_answer_the_better_surface_and_not_the_mean_of_two():
    maps = torch.full((BINS + 1,), -9.0)
    maps[4:7] = torch.tensor([1.0, 3.0, 1.0])  # a surface around bin 5
    maps[20:23] = torch.tensor([0.5, 2.5, 0.5])  # another, a little less likely
    said = spoken(BinsDepthHead(8, stride=2, uncertainty=True), maps)
    assert said["depth"].item() == pytest.approx(bin_centres()[5].exp().item(), rel=1e-4)
    share = maps[:BINS].softmax(0)
    away = (share * (bin_centres() - bin_centres()[5]).abs()).sum()
    assert said["depth_uncertainty"].item() == pytest.approx(away.item(), rel=1e-4)


@pytest.mark.parametrize("beside", [0.0, 0.25, 0.5])
def test_a_sure_answer_between_two_bins_is_as_sure_as_one_on_a_bin(beside):
    maps = torch.full((BINS + 1,), -30.0)
    maps[9], maps[10] = math.log(1 - beside), math.log(max(beside, 1e-12))
    said = spoken(BinsDepthHead(8, stride=2, uncertainty=True), maps)
    want = (1 - beside) * bin_centres()[9] + beside * bin_centres()[10]
    assert said["depth"].log().item() == pytest.approx(want.item(), abs=1e-4)
    assert said["depth_uncertainty"].item() < 0.003  # the bins are 0.22 apart


def test_a_mixture_answers_its_higher_peak_with_the_expected_distance():
    near, far, b_near, b_far, weight = math.log(1.0), math.log(4.0), 0.1, 0.3, 0.4
    logit = math.log(weight / (1 - weight))
    maps = torch.tensor([near, far, math.log(b_near), math.log(b_far), logit, -3.0])
    said = spoken(MixtureDepthHead(8, stride=2, uncertainty=True), maps)
    assert said["depth"].item() == pytest.approx(1.0, rel=1e-5)  # 0.4 / 0.1 is above 0.6 / 0.3
    x = np.linspace(near - 8, far + 8, 400_001)
    density = weight / (2 * b_near) * np.exp(-np.abs(x - near) / b_near)
    density += (1 - weight) / (2 * b_far) * np.exp(-np.abs(x - far) / b_far)
    want = np.trapezoid(density * np.abs(x - near), x)
    assert said["depth_uncertainty"].item() == pytest.approx(want, rel=1e-4)


def test_a_step_lies_half_its_height_to_either_side_of_the_log_depth():
    head = StepDepthHead(8, stride=2, uncertainty=True)
    torch.nn.init.zeros_(head.step.weight)
    for side, want in ((9.0, 4.0), (-9.0, 1.0), (0.0, 2.0), (math.atanh(0.5), 2 * math.sqrt(2))):
        half_height = math.log(2.0)
        with torch.no_grad():
            head.step.bias.copy_(torch.tensor([half_height, side]).repeat_interleave(4))
        said = spoken(head, torch.tensor([math.log(2.0), -3.0, math.log(0.3)]))
        assert said["depth"].item() == pytest.approx(want, rel=1e-4)
        assert said["sky"].item() == -3.0
        assert said["depth_uncertainty"].item() == pytest.approx(0.3)


@pytest.mark.parametrize("uncertainty", [True, False])
def test_a_step_head_begins_as_the_log_head_it_takes_its_weights_from(uncertainty):
    log = LogDepthHead(8, stride=4, uncertainty=uncertainty).eval()
    step = StepDepthHead(8, stride=4, uncertainty=uncertainty).eval()
    missing, strange = step.load_state_dict(log.state_dict(), strict=False)
    assert sorted(missing) == ["step.bias", "step.weight"] and not strange
    x = torch.randn(2, 8, 3, 5)
    said, other = step(x), log(x)
    assert said.keys() == other.keys() and all(torch.equal(said[k], other[k]) for k in said)
    said["depth"].sum().backward()
    height, side = step.step.weight.grad.split(16)
    assert height.abs().sum() > 0 and not side.any()  # the height first, then the side learns


@pytest.mark.parametrize("head", ["bins", "mixture"])
def test_untrained_distributions_speak_of_three_metres_too(head):
    model = Student(**SMALL, tasks=["depth"], depth_head=head).eval()
    torch.nn.init.zeros_(model.heads["depth"].maps.out.weight)
    depth = model(torch.rand(1, 3, 64, 96))["depth"]
    assert ((depth > 2.3) & (depth < 3.8)).all()


@pytest.mark.parametrize("channels", [[8, 16, 24, 32], [12, 12, 12, 12]])
def test_dpt_resamples_a_plain_transformer_and_keeps_a_pyramid(channels):
    plain = len(set(channels)) == 1
    strides = [14] * 4 if plain else [4, 8, 16, 32]
    height, width = (70, 98) if plain else (64, 96)
    sizes = [(height // s, width // s) for s in strides]
    plan = {"channels": channels, "strides": strides, "sizes": sizes}
    decoder = DptDecoder(**plan, height=height, width=width, stride=2, base=16)
    maps = [
        torch.randn(1, c, height // s, width // s) for c, s in zip(channels, strides, strict=True)
    ]
    levels = [step(m) for step, m in zip(decoder.reassemble, maps, strict=True)]
    found = [tuple(level.shape[-2:]) for level in levels]
    wanted = [(20, 28), (10, 14), (5, 7), (3, 4)] if plain else [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert found == wanted == decoder.sizes
    out = decoder.eval()(torch.zeros(1, 3, height, width), maps)
    assert out.shape == (1, 16, height // 2, width // 2)
    maps[3] = maps[3] + 1  # the coarsest level reaches the output
    assert not torch.allclose(decoder(torch.zeros(1, 3, height, width), maps), out)


def test_instances_come_back_from_their_own_centres_and_offsets():
    from distill.instances import center_offset

    ids = np.zeros((48, 64), np.int32)
    ids[5:20, 5:25], ids[25:45, 30:60], ids[8:16, 40:44] = 3, 9, 4
    ids[30:34, 40:50] = 4000  # lies on the middle of 9, hides a part of it
    heat = center_offset(ids)
    found, scores = group(heat[0], heat[1:])
    assert scores.tolist() == [1.0] * 4 and found.dtype == np.uint16
    for number in (3, 4, 9, 4000):
        got = found[ids == number]
        name = np.bincount(got).argmax()
        right = (got == name).mean()
        assert name > 0 and right > 0.97, (number, right)
        assert ((found == name) & (ids != number)).sum() <= 9  # the background at a centre
    nothing, none = group(np.zeros((48, 64), np.float32), heat[1:])
    assert not nothing.any() and len(none) == 0
    hidden, _ = group(heat[0], heat[1:], foreground=ids == 9)
    assert (hidden[ids != 9] == 0).all() and (hidden[ids == 9] > 0).mean() > 0.9
    with pytest.raises(ValueError, match=r"offset \(48, 64\): expected \[H, W\] and \[2, H, W\]"):
        group(heat[0], heat[0])
    with pytest.raises(ValueError, match=r"foreground \(5, 5\)"):
        group(heat[0], heat[1:], foreground=np.ones((5, 5), bool))


def test_grouping_ignores_nan_and_small_things():
    heat, offset = np.zeros((20, 20), np.float32), np.full((2, 20, 20), np.nan, np.float32)
    heat[10, 10] = heat[3, 3] = 0.9
    heat[0, 0] = np.nan
    offset[:, 8:13, 8:13] = np.array(np.meshgrid(np.arange(2, -3, -1), np.arange(2, -3, -1)))
    offset[:, 3, 3] = 0
    found, scores = group(heat, offset)
    assert (found[8:13, 8:13] == 1).all() and (found > 0).sum() == 25
    assert scores.tolist() == [pytest.approx(0.9)]


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": ["depth", "normals", "instances"], "depth_head": "bins", "decoder": "dpt"},
        {"tasks": ["depth"], "depth_head": "mixture", "calibration": {"depth": [2.0, 0.5]}},
        {"tasks": ["depth", "normals"], "depth_head": "step", "decoder_stride": 4},
        {"backbone": "vit_tiny_patch16_224", "decoder": "dpt", "height": 48},
        {
            "backbone": "test_vit",
            "tasks": ["depth"],
            "calibration": {"depth_uncertainty": [0.5, 1.5]},
        },
        {
            "depth_head": "step",
            "calibration": {
                "depth": [1.2, 0.1],
                "depth_uncertainty": [1.5, 0.8, -0.2, 0.03, 0.05],
                "normals_uncertainty": [3.0, 0.9, 0.1, 0.4, 0.2],
            },
        },
    ],
)
def test_every_part_exports_and_onnx_runtime_agrees(change):
    torch.manual_seed(0)
    model = Student(**{**SMALL, **change}).eval()
    if change.get("depth_head") == "step":
        torch.nn.init.normal_(model.heads["depth"].step.weight, std=0.3)  # it begins without
    card = card_of(model, batch=1, focal_input=False)
    graph = to_onnx(model, card)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    image = torch.randint(0, 256, (1, model.config["height"], 96, 3), dtype=torch.uint8)
    got = dict(zip(card.outputs, session.run(None, {"image": image.numpy()}), strict=True))
    want = model(image.permute(0, 3, 1, 2).float() / 255)
    factor = card.focal_px / card.canonical_focal_px
    assert np.allclose(got["depth"], want["depth"][:, 0].detach().numpy() * factor, rtol=2e-3)
    for name in set(got) & {"center", "offset", "normals"}:
        np.testing.assert_allclose(got[name], want[name].detach().numpy(), atol=2e-3, rtol=1e-3)
    for name in set(got) & {"depth_uncertainty", "normals_uncertainty"}:
        np.testing.assert_allclose(got[name], want[name][:, 0].detach().numpy(), rtol=5e-3)
    strange = {"GridSample", "If", "Loop", "Scan"}
    assert not strange & {node.op_type for node in graph.graph.node}
    for node in graph.graph.node:
        if node.op_type == "Resize":
            modes = {a.name: a for a in node.attribute}
            assert modes["mode"].s in (b"linear", b"nearest")
            assert "antialias" not in modes or modes["antialias"].i == 0


def test_position_embeddings_are_resampled_once_for_the_students_size(tmp_path):
    """DINOv2 weights at another size than they were made for: as timm's own resampling says."""
    name = "vit_tiny_patch16_224"
    whole = timm.create_model(name, img_size=64, num_classes=0)
    torch.nn.init.normal_(whole.pos_embed)
    path = tmp_path / "vit.safetensors"
    save_file(whole.state_dict(), path, metadata={"license": "my-own-1.0"})
    net = Backbone(name, height=32, width=96, weights=str(path))
    assert net.licence == "my-own-1.0"
    baked = net.net.model.pos_embed
    assert baked.shape == (1, 1 + 2 * 6, 192)
    want = timm.layers.resample_abs_pos_embed(whole.pos_embed, new_size=[2, 6], num_prefix_tokens=1)
    assert torch.allclose(baked, want, atol=1e-5)
    assert Backbone(name, height=32, width=96, weights=str(path), licence="mit").licence == "mit"


def test_calibrated_students_change_by_their_constants_and_rebuild():
    torch.manual_seed(0)
    plain = Student(**SMALL).eval()
    constants = {"depth": [2.0, 0.25], "normals_uncertainty": [0.5, 1.2]}
    fitted = Student(**{**plain.config, "calibration": constants}).eval()
    fitted.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 64, 96)
    a, b = plain(image), fitted(image)
    assert torch.allclose(b["depth"], 2 * a["depth"] + 0.25)
    assert torch.allclose(b["normals_uncertainty"], 0.5 * a["normals_uncertainty"] ** 1.2)
    assert torch.equal(a["depth_uncertainty"], b["depth_uncertainty"])
    again = Student(**json.loads(json.dumps(fitted.config)))
    assert again.config == fitted.config


def test_the_factors_of_an_uncertainty_by_hand():
    """A step from 1 m to e m between the columns 1 and 2, and a crease of 90 degrees there."""
    depth = torch.tensor([1.0, 1.0, math.e, math.e]).expand(1, 1, 5, 4)
    facing, across = torch.tensor([0.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 0.0])
    normals = torch.stack([facing, facing, across, across], 1).view(1, 3, 1, 4).expand(1, 3, 5, 4)
    answer = {
        "depth": depth,
        "depth_uncertainty": torch.full_like(depth, 0.2),
        "normals": normals,
        "normals_uncertainty": torch.full_like(depth, 9.0),
    }
    found = {k: v.exp() for k, v in log_factors("depth_uncertainty", answer).items()}
    assert tuple(found) == ("depth_uncertainty", *FACTORS["depth_uncertainty"])
    rows = {name: m[0, 0, 2].tolist() for name, m in found.items()}
    assert rows["depth_uncertainty"] == pytest.approx([0.2] * 4)
    assert rows["depth"] == pytest.approx([1.0, 1.0, math.e, math.e])
    assert rows["rise"] == pytest.approx([0.01, 1.0, 0.01, 0.01], abs=1e-6)
    assert rows["drop"] == pytest.approx([0.01, 0.01, 1.0, 0.01], abs=1e-6)
    found = {k: v.exp() for k, v in log_factors("normals_uncertainty", answer).items()}
    assert tuple(found) == ("normals_uncertainty", *FACTORS["normals_uncertainty"])
    one_third = 1 - math.hypot(1 / 3, 2 / 3)  # three pixels of nine have the other normal
    for row in found["spread"][0, 0].tolist():  # at the image's border as well
        assert row == pytest.approx([0.01, one_third, one_third, 0.01], abs=1e-6)
    assert found["slant"][0, 0, 2].tolist() == pytest.approx([1 / math.e, 1 / math.e, 1, 1])
    assert found["depth_uncertainty"][0, 0, 2].tolist() == pytest.approx([0.2] * 4)
    del answer["depth"], answer["depth_uncertainty"]
    assert len(log_factors("normals_uncertainty", answer)) == 3


def test_a_fitted_uncertainty_is_the_product_of_powers_that_the_fit_meant():
    torch.manual_seed(0)
    plain = Student(**SMALL).eval()
    constants = {
        "depth": [2.0, 0.25],
        "depth_uncertainty": [1.5, 0.8, -0.2, 0.3, 0.4],
        "normals_uncertainty": [3.0, 0.9, 0.2, 0.4, 0.3],
    }
    fitted = Student(**{**plain.config, "calibration": constants}).eval()
    fitted.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        said, answer = plain(image), fitted(image)
    for name in FACTORS:
        logs = np.stack([f.numpy().ravel() for f in log_factors(name, said).values()], 1)
        want = fitted_uncertainty(logs, tuple(constants[name]))  # of what it says unfitted
        np.testing.assert_allclose(answer[name].ravel(), want, rtol=1e-4)
    huge = Student(**{**plain.config, "calibration": {"depth_uncertainty": [1e9, 1.0]}}).eval()
    assert (huge(image)["depth_uncertainty"] == 20.0).all()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"decoder": "unet"}, r"decoder='unet': expected \['fpn', 'dpt'\]"),
        ({"depth_head": "ordinal"}, r"expected \['log', 'step', 'bins', 'mixture'\]"),
        (
            {"calibration": {"sky": [1, 0]}},
            r"sky=\[1.0, 0.0\], expected two finite .* at most so many: \{'depth': 2, 'depth_unc",
        ),
        ({"calibration": {"depth": [1]}}, r"depth=\[1.0\], expected two finite numbers or more"),
        ({"calibration": {"depth": [1, 2, 3]}}, r"at most so many: \{'depth': 2"),
        ({"calibration": {"depth_uncertainty": [1] * 6}}, r"'depth_uncertainty': 5, 'normals_unc"),
        (
            {"tasks": ["normals"], "calibration": {"normals_uncertainty": [1] * 5}},
            r"at most so many: \{'normals_uncertainty': 4\}",
        ),
        (
            {"uncertainty": False, "calibration": {"depth_uncertainty": [1, 1]}},
            r"at most so many: \{'depth': 2\}",
        ),
    ],
)
def test_impossible_choices_are_explained(change, text):
    with pytest.raises(StudentError, match=text):
        Student(**{**SMALL, **change})
