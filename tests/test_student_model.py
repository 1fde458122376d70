from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from distill.features import frozen
from student.backbone import StudentError, WeightsUnavailable
from student.checkpoint import save_student
from student.decoder import coordinates
from student.heads import SubPixel
from student.model import Student

SMALL = {"backbone": "test_efficientnet", "height": 64, "width": 96}
PRESETS = Path(__file__).parents[1] / "conf" / "student"


@pytest.mark.parametrize(
    "backbone", ["test_efficientnet", "test_convnext", "test_vit", "test_mambaout"]
)
@pytest.mark.parametrize("stride", [2, 4])
def test_any_features_only_backbone_answers_every_task_at_full_size(backbone, stride):
    classes = {0: "floor", 7: "wall", 9: "ball"}
    tasks = ("depth", "normals", "semantic")
    model = Student(
        backbone=backbone, height=64, width=96, decoder_stride=stride, tasks=tasks, classes=classes
    ).eval()
    answer = model(torch.rand(2, 3, 64, 96))
    channels = {
        "depth": 1,
        "sky": 1,
        "depth_uncertainty": 1,
        "normals": 3,
        "normals_uncertainty": 1,
        "semantic": 3,
        "semantic_uncertainty": 1,
    }
    assert {k: v.shape for k, v in answer.items()} == {
        k: (2, c, 64, 96) for k, c in channels.items()
    }
    assert model.class_ids == [0, 7, 9]
    assert (answer["normals"].norm(dim=1) - 1).abs().max() < 1e-5
    assert ((answer["semantic_uncertainty"] >= 0) & (answer["semantic_uncertainty"] <= 1)).all()


@pytest.mark.parametrize("backbone", ["mobilenetv4_conv_small", "test_vit", "test_convnext"])
@pytest.mark.parametrize("decoder", ["fpn", "dpt"])
@pytest.mark.parametrize("stride", [2, 4])
def test_no_part_of_decoder_or_heads_is_without_use(backbone, decoder, stride):
    model = Student(backbone=backbone, height=64, width=96, decoder=decoder, decoder_stride=stride)
    sum(values.sum() for values in model(torch.rand(2, 3, 64, 96)).values()).backward()
    parts = {"decoder": model.decoder, "heads": model.heads}
    idle = [
        f"{part}.{name}"
        for part, module in parts.items()
        for name, p in module.named_parameters()
        if p.grad is None
    ]
    assert not idle


def test_only_what_was_asked_for_is_answered():
    model = Student(**SMALL, tasks=("normals",), uncertainty=False).eval()
    assert list(model(torch.rand(1, 3, 64, 96))) == ["normals"]


@pytest.mark.parametrize("bias", [-1e4, 0.0, 1e4])
def test_depth_and_uncertainty_stay_positive_and_finite_even_in_float16(bias):
    model = Student(**SMALL).eval()
    for head in model.heads.values():
        torch.nn.init.constant_(head.maps.out.bias, bias)
    answer = model(torch.rand(1, 3, 64, 96))
    for name in ("depth", "depth_uncertainty"):
        values = answer[name].half()
        assert torch.isfinite(values).all() and (answer[name] > 0).all()
    degrees = answer["normals_uncertainty"]
    assert ((degrees >= 0) & (degrees <= 180)).all()


def test_an_untrained_student_says_three_metres_facing_the_camera():
    model = Student(**SMALL).eval()
    for head in model.heads.values():
        torch.nn.init.zeros_(head.maps.out.weight)
    answer = model(torch.rand(1, 3, 64, 96))
    assert torch.allclose(answer["depth"], torch.tensor(3.0))
    assert torch.allclose(answer["normals"][0, :, 5, 5], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.allclose(answer["normals_uncertainty"], torch.tensor(20.0), atol=1e-3)


def test_sub_pixels_start_as_nearest_upsampling():
    maps = SubPixel(8, 3, stride=4, start=[0.0, 1.0, 2.0])(torch.randn(2, 8, 5, 6))
    assert maps.shape == (2, 3, 20, 24)
    cells = maps.unfold(2, 4, 4).unfold(3, 4, 4)
    assert torch.equal(cells, cells[..., :1, :1].expand_as(cells))
    assert cells.std() > 0.01


def test_coordinates_are_pixel_centres():
    grid = coordinates(2, 4)
    assert grid[0, 0].tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2
    assert grid[0, 1].tolist() == [[-0.5] * 4, [0.5] * 4]


def test_normalisation_is_inside_and_is_the_backbones():
    model = Student(**SMALL).eval()
    facts = timm.get_pretrained_cfg("test_efficientnet")
    assert model.mean.flatten().tolist() == pytest.approx(facts.mean)
    assert model.std.flatten().tolist() == pytest.approx(facts.std)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.full((1, 3, 64, 96), 0.25))
    want = (0.25 - torch.tensor(facts.mean)) / torch.tensor(facts.std)
    assert torch.allclose(seen[0][0, :, 0, 0], want)


def test_canonical_focal_defaults_to_sixty_degrees_and_config_rebuilds():
    model = Student(**SMALL)
    assert model.canonical_focal_px == pytest.approx(48 / 3**-0.5)
    again = Student(**model.config)
    assert again.config == model.config
    assert Student(**SMALL, canonical_focal_px=70).canonical_focal_px == 70


@pytest.mark.parametrize("name, millions", [("tiny", 3), ("small", 9), ("base", 30)])
def test_presets_keep_their_size(name, millions):
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    model = Student(**values)
    assert sum(p.numel() for p in model.parameters()) <= millions * 1e6


@pytest.mark.parametrize(
    "change, text",
    [
        ({"height": 80}, r"multiples of 32 px; the nearest is height=64 width=96"),
        (
            {"backbone": "mobilnetv4_conv_smal"},
            r"not a timm model; near it: mobilenetv4_conv_small",
        ),
        ({"backbone": "test_vit", "width": 100}, r"multiples of 16 px; the nearest is .*width=96"),
        ({"tasks": ["depht"]}, r"\['depht'\]: expected some of"),
        ({"tasks": []}, r"expected some of"),
        ({"tasks": ["semantic"]}, r"needs classes=\{id: name\}"),
        ({"decoder_stride": 3}, r"stride must be 2 or 4"),
        ({"width": 0}, r"width=0: expected at least 1 px"),
        ({"canonical_focal_px": -3}, r"canonical_focal_px must be positive, got -3"),
        ({"canonical_focal_px": 0}, r"canonical_focal_px must be positive, got 0"),
        ({"backbone_weights": "/nowhere.safetensors"}, r"no such file"),
        ({"height": "abc"}, r"student\.height='abc' \(str\): expected a whole number"),
        ({"height": True}, r"student\.height=True \(bool\): expected a whole number"),
        ({"decoder_stride": None}, r"student\.decoder_stride=None .*: expected a whole number"),
        ({"backbone": None}, r"student\.backbone=None \(NoneType\): expected text"),
        ({"uncertainty": "no"}, r"student\.uncertainty='no' \(str\): expected true or false"),
        ({"pretrained": "no"}, r"student\.pretrained='no' \(str\): expected true or false"),
        ({"canonical_focal_px": "wide"}, r"px='wide' \(str\): expected a number or null"),
        ({"calibration": {"depth": [float("nan"), 0.0]}}, r"depth=\[nan, 0.0\], expected two fin"),
        ({"calibration": "abc"}, r"calibration='abc' \(str\): expected a table, .* or null"),
        ({"tasks": None}, r"student\.tasks=None \(NoneType\): expected a list, .*tasks=\["),
        ({"tasks": "depth"}, r"student\.tasks='depth' \(str\): expected a list, .*tasks=\["),
        ({"tasks": [1]}, r"student\.tasks=\[1\] \(list\): expected a list, .* each text"),
    ],
)
def test_impossible_students_are_explained(change, text):
    with pytest.raises(StudentError, match=text) as caught:
        Student(**{**SMALL, **change})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("stride, near", [(2, (378, 518)), (4, (392, 504))])
def test_the_size_hinted_at_is_one_that_the_decoder_takes_too(stride, near):
    values = {"backbone": "vit_small_patch14_dinov2", "decoder_stride": stride}
    with pytest.raises(StudentError, match="the nearest is") as caught:
        Student(**values, height=384, width=512)
    assert str(caught.value).endswith(f"the nearest is height={near[0]} width={near[1]}")
    assert f"decoder_stride={stride} needs multiples of {14 * stride // 2} px" in str(caught.value)
    answer = Student(**values, height=near[0], width=near[1]).eval()(torch.rand(1, 3, *near))
    assert answer["depth"].shape == (1, 1, *near)


@pytest.mark.parametrize("decoder", ["fpn", "dpt"])
@pytest.mark.parametrize("stride", [2, 4])
def test_levels_smaller_than_their_strides_promise_are_taken_as_they_are(decoder, stride):
    """pit_ti_224 pads nothing in its first layer: 27 rows at stride 8 of 224, where 28 would be."""
    model = Student(
        **{**SMALL, "backbone": "pit_ti_224", "height": 224, "width": 224},
        decoder=decoder,
        decoder_stride=stride,
    )
    assert model.backbone.sizes[0] == (27, 27) and model.backbone.strides[0] == 8
    with torch.inference_mode():
        answer = model.eval()(torch.rand(1, 3, 224, 224))
    assert answer["depth"].shape == (1, 1, 224, 224)


@pytest.mark.parametrize(
    "backbone, text",
    [
        ("nest_tiny", r"'nest_tiny' cannot give .*: Model only handles square inputs"),
        ("mvitv2_tiny", r"'mvitv2_tiny' cannot give .*: a bare AssertionError"),
        ("convit_tiny", r"'convit_tiny' cannot look at pictures of 192x256 px .*tensor"),
    ],
)
def test_a_backbone_that_cannot_look_at_such_pictures_is_named(backbone, text):
    with pytest.raises(StudentError, match=text):
        Student(**{**SMALL, "backbone": backbone, "height": 192, "width": 256})


@pytest.mark.parametrize("strange", ["nobody's", "a student's"])
def test_weights_of_something_else_are_refused_and_not_left_to_chance(tmp_path, strange):
    path = tmp_path / "weights.safetensors"
    if strange == "a student's":
        save_student(Student(**SMALL), path, {})
    else:
        save_file({"something": torch.zeros(3)}, path)
    with pytest.raises(StudentError, match=r"has nothing for \d+ tensors of test_efficientnet"):
        Student(**SMALL, backbone_weights=str(path))
    with pytest.raises(StudentError, match=r"has nothing for \d+ tensors of test_efficientnet"):
        frozen({"name": "test_efficientnet", "weights": str(path)}, height=32, width=32)


def test_weights_from_a_local_file_and_never_from_a_pickle(tmp_path):
    whole = timm.create_model("test_efficientnet", num_classes=0)
    torch.nn.init.constant_(whole.conv_stem.weight, 0.125)
    path = tmp_path / "backbone.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict() | whole.state_dict(), path)
    model = Student(**SMALL, backbone_weights=str(path))
    assert (model.backbone.net.conv_stem.weight == 0.125).all()
    assert model.backbone.licence == "apache-2.0"
    pickled = tmp_path / "backbone.pth"
    torch.save(whole.state_dict(), pickled)
    with pytest.raises(StudentError, match=r"only \.safetensors is read"):
        Student(**SMALL, backbone_weights=str(pickled))
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(WeightsUnavailable, match="could not be loaded") as caught:
        Student(**SMALL, backbone_weights=str(path))
    assert caught.value.exit_code == 3
