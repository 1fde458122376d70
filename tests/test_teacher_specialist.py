"""Depth Pro and Depth Anything V2: equal to their own post-processing, metres by the camera."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from teacher_cases import SIZES, options, query, ramp

from teacher.errors import UsageError
from teacher.generators import load_teacher
from teacher.generators.specialist import metres
from teacher.label import Camera, Space, Task

torch.set_num_threads(1)
D = Task.DEPTH


def dinov2(**changes):
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
        "image_size": 32,
    }
    return settings | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        DepthProConfig,
        DepthProForDepthEstimation,
        DepthProImageProcessor,
        Dinov2Config,
        DPTImageProcessor,
    )

    root = tmp_path_factory.mktemp("specialists")
    for name, kind in (("metric", "metric"), ("relative", "relative")):
        torch.manual_seed(0)
        backbone = Dinov2Config(
            **dinov2(patch_size=14, image_size=56),
            out_features=["stage1", "stage2", "stage3", "stage4"],
            reshape_hidden_states=False,
            apply_layernorm=True,
        )
        config = DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=16,
            patch_size=14,
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            head_hidden_size=8,
            depth_estimation_type=kind,
            max_depth=20 if kind == "metric" else 1,
        )
        DepthAnythingForDepthEstimation(config).save_pretrained(root / name)
        DPTImageProcessor(
            size={"height": 56, "width": 56}, ensure_multiple_of=14, keep_aspect_ratio=True
        ).save_pretrained(root / name)
    torch.manual_seed(0)
    vit = {"model_type": "dinov2", **dinov2()}
    pro = DepthProConfig(
        patch_size=32,
        fusion_hidden_size=16,
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[16, 16],
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[12, 12],
        merge_padding_value=1,
        use_fov_model=True,
        num_fov_head_layers=2,
        image_model_config=vit,
        patch_model_config=vit,
        fov_model_config=vit,
    )
    model = DepthProForDepthEstimation(pro)
    with torch.no_grad():
        model.fov_model.head.layers[-1].bias += 55.0  # degrees, as a trained one would say
        [m for m in model.head.modules() if isinstance(m, torch.nn.Conv2d)][-1].bias += 0.5
    model.save_pretrained(root / "pro")
    DepthProImageProcessor(size={"height": 64, "width": 64}).save_pretrained(root / "pro")
    return root


def pro(folder, **changes):
    named = {"checkpoint": str(folder / "pro"), "pass_size": 4}
    return load_teacher(**options("depth_pro", **(named | changes)))


def anything(folder, name):
    return load_teacher(**options("depth_anything", checkpoint=str(folder / name)))


def stock(folder, queries):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    model = AutoModelForDepthEstimation.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        found = model(**processor(images=[q.image for q in queries], return_tensors="pt"))
    sizes = [q.image.shape[:2] for q in queries]
    return processor.post_process_depth_estimation(found, target_sizes=sizes)


def test_depth_pro_equals_its_own_post_processing_without_a_camera(folder):
    queries = [query(f"k{i}", 50, 70, seed=i) for i in range(3)]
    answers = pro(folder).answer(queries, [D])
    for mine, theirs in zip(answers, stock(folder / "pro", queries), strict=True):
        want = theirs["predicted_depth"].numpy()
        known = np.isfinite(mine[D].values)
        assert known.mean() > 0.5 and mine[D].space is Space.METRIC
        np.testing.assert_allclose(mine[D].values[known], want[known], rtol=1e-4)
        assert (want[~known] >= 9999).all()  # what it clips to 10 km is unknown here
        assert mine[D].extras["focal_source"] == "model"
        assert mine[D].extras["focal_px"] == pytest.approx(float(theirs["focal_length"]), rel=1e-4)


def test_a_known_focal_length_scales_the_metres(folder):
    """Depth is proportional to the focal length: twice the focal length, twice as far."""
    one = query("a", 50, 70)
    asked = pro(folder)

    def with_focal(focal_px, source):
        camera = Camera(
            fx=focal_px, fy=focal_px, cx=34.5, cy=24.5, width=70, height=50, source=source
        )
        return asked.answer([dataclasses.replace(one, camera=camera)], [D])[0][D]

    near, far = with_focal(60.0, "known"), with_focal(120.0, "exif")
    both = np.isfinite(near.values) & np.isfinite(far.values)
    np.testing.assert_allclose(far.values[both], 2 * near.values[both], rtol=1e-5)
    assert (near.extras["focal_px"], near.extras["focal_source"]) == (60.0, "known")
    assert far.extras["focal_source"] == "exif"
    assert with_focal(60.0, "assumed").extras["focal_source"] == "model"
    own = pro(folder, focal="model").answer([one], [D])[0][D]
    np.testing.assert_array_equal(own.values, with_focal(60.0, "assumed").values)


def test_metres_by_hand():
    """raw 0.5 at W 640, f 320: inverse 0.5 * 640 / 320 = 1 -> 1 m; 0 and beyond 10 km: unknown."""
    raw = torch.tensor([[0.5, 0.05, 0.0, 4e-5, -1.0]])
    found = metres(raw, focal_px=320.0, width=640)[0]
    np.testing.assert_allclose(found[:2], [1.0, 10.0], rtol=1e-6)
    assert torch.isnan(found[2:]).all()


@pytest.mark.parametrize(
    ("name", "space"), [("metric", Space.METRIC), ("relative", Space.AFFINE_DISPARITY)]
)
def test_depth_anything_equals_its_own_post_processing(folder, name, space):
    queries = [query(f"k{i}", 50, 70, seed=i) for i in range(3)]
    answers = anything(folder, name).answer(queries, [D])
    for mine, theirs in zip(answers, stock(folder / name, queries), strict=True):
        assert mine[D].space is space
        known = np.isfinite(mine[D].values)
        np.testing.assert_allclose(
            mine[D].values[known], theirs["predicted_depth"].numpy()[known], atol=1e-5
        )
        assert known.mean() > 0.9


def test_a_relative_checkpoint_needs_an_anchor_before_it_is_asked(folder):
    from teacher.anchors import check_anchor

    with pytest.raises(UsageError, match="'affine disparity'; a label set holds metres"):
        check_anchor(anything(folder, "relative"), None, [D])
    check_anchor(anything(folder, "metric"), None, [D])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", ["pro", "metric"])
def test_pixels_stay_where_they_are(folder, kind, name):
    """The network is an echo of its (normalised) input; processors and the way back are real."""
    height, width = SIZES[name]
    asked = pro(folder, focal="camera") if kind == "pro" else anything(folder, kind)
    size = {"height": 518, "width": 518} if kind == "metric" else {"height": 768, "width": 768}
    asked.net.processor.size = type(asked.net.processor.size)(**size)
    processor = asked.net.processor
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )

    class Echo(torch.nn.Module):
        def forward(self, pixel_values):
            self.seen = pixel_values.shape[-2:]
            grey = (pixel_values * std + mean).mean(1)
            return SimpleNamespace(predicted_depth=grey + 1, field_of_view=None)

    asked.net.model = Echo()
    for axis in (0, 1):
        one = ramp(height, width, axis)
        camera = dataclasses.replace(one.camera, fx=float(width), source="known")  # W / f = 1
        one = dataclasses.replace(one, camera=camera, image=one.image.astype(np.uint8))
        values = asked.answer([one], [D])[0][D].values
        grey = (1 / values if kind == "pro" else values) - 1
        line = one.image[..., 0].astype(np.float64) / 255 * 255  # the 8-bit ramp as it was shown
        worked = asked.net.model.seen[axis]
        step_px = max((height, width)[axis] - 1, 1) / 255  # pixels per grey level
        border = 2 * int(np.ceil(max((height, width)[axis] / worked, 1))) + 2
        inner = [slice(None), slice(None)]
        inner[axis] = slice(border, -border)
        error = ((grey * 255 - line) * step_px)[tuple(inner)]
        if error.size == 0:
            assert values.shape == (height, width)
            continue
        assert abs(error.mean()) <= max(0.05, 0.5 * step_px * 0.1), (axis, error.mean())
        if step_px <= 1:  # finer ramps than 8 bits cannot be told to half a pixel one by one
            assert np.abs(error).max() <= 0.5 + step_px, (axis, np.abs(error).max())


def test_depth_pro_counts_as_non_commercial_and_depth_anything_by_its_size():
    from teacher.generators.specialist import DEPTH_ANYTHING_LICENCES, DEPTH_PRO_LICENCES
    from teacher.jobs.licences import terms_of

    assert "non-commercial" in terms_of(DEPTH_PRO_LICENCES["apple/DepthPro"])
    for name, licence in DEPTH_ANYTHING_LICENCES.items():
        assert ("non-commercial" in terms_of(licence)) == (not name.endswith("Small"))


def test_describe_names_range_and_hash(folder):
    about = json.loads(json.dumps(anything(folder, "metric").describe()))
    assert (about["range_m"], about["answers"]) == (20.0, "metric")
    assert len(about["model"]["weights_sha256"]["model.safetensors"]) == 64
    assert str(folder) not in json.dumps(about)


def test_wrong_checkpoints_are_explained(folder, tmp_path):
    with pytest.raises(UsageError, match="is a 'depth_anything' model, expected 'depth_pro'"):
        load_teacher(**options("depth_pro", checkpoint=str(folder / "metric")))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        load_teacher(**options("depth_pro", checkpoint=str(tmp_path)))
    with pytest.raises(UsageError, match="expected one of"):
        pro(folder, focal="guess")
