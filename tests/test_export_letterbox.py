"""Letterbox: equal factors, centres that map where the geometry says, nothing averaged."""

import numpy as np
import pytest

from export.letterbox import GREY, Letterbox, to_label_space
from teacher.label import Camera


def test_hand_worked_placement_of_a_wide_image():
    box = Letterbox.fit((50, 100), (64, 80))
    assert box.factor == 0.8
    assert box.inner == (40, 80) and box.offset == (12, 0) and box.start == (0.0, 0.0)
    image = np.full((50, 100, 3), 200, np.uint8)
    seen = box.apply(image)
    assert seen.shape == (64, 80, 3)
    assert (seen[12:52] == 200).all() and (seen[:12] == GREY).all() and (seen[52:] == GREY).all()
    assert box.inside().sum() == 40 * 80 and box.inside()[12, 0] and not box.inside()[11, 0]


@pytest.mark.parametrize("source", [(64, 96), (101, 67), (33, 500), (1200, 800), (7, 5), (1, 1)])
def test_back_then_is_the_pixel_whose_centre_lies_there(source):
    target = (64, 96)
    box = Letterbox.fit(source, target)
    rows = np.repeat(np.arange(64, dtype=np.float32)[:, None], 96, 1)
    cols = np.repeat(np.arange(96, dtype=np.float32)[None], 64, 0)
    back = box.back(np.stack([rows, cols]))
    assert back.shape == (2, *source)
    for axis, values in ((0, back[0][:, 0]), (1, back[1][0])):
        # a source centre, in target coordinates where pixel i covers [i, i + 1)
        place = (np.arange(source[axis]) + 0.5 - box.start[axis]) * box.factor + box.offset[axis]
        within = (place > box.offset[axis]) & (place < box.offset[axis] + box.inner[axis])
        assert within.mean() > 0.9 or source[axis] < 10
        np.testing.assert_array_less(np.abs(values + 0.5 - place)[within], 0.5 + 1e-6)


def test_apply_samples_where_back_reads():
    """A ramp of brightness comes back at every pixel to within one target pixel's slope."""
    source = (150, 210)
    ramp = np.repeat(np.linspace(20, 230, 210)[None], 150, 0)
    image = np.repeat(ramp[..., None], 3, 2).round().astype(np.uint8)
    box = Letterbox.fit(source, (64, 96))
    seen = box.apply(image)[..., 0].astype(np.float32)
    assert np.abs(box.back(seen) - ramp).max() <= 1.01 / box.factor + 1  # 1 level per source pixel


def test_same_size_is_untouched():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    box = Letterbox.fit((64, 96), (64, 96))
    np.testing.assert_array_equal(box.apply(image), image)
    np.testing.assert_array_equal(box.back(image[..., 0]), image[..., 0])


def test_focal_length_follows_one_factor_so_that_angles_survive():
    camera = Camera.assumed(640, 427, fov_deg=70)
    box = Letterbox.fit((427, 640), (64, 96))
    half_angle = np.arctan((640 / 2) / camera.fx)
    seen_half_width = 640 / 2 * box.factor
    assert np.arctan(seen_half_width / (camera.fx * box.factor)) == pytest.approx(half_angle)


def test_label_space_puts_sky_at_infinity_and_vectors_last():
    box = Letterbox.fit((2, 3), (2, 3))
    sky = np.array([[0.4, 0.6, 0.5]] * 2, np.float32)
    normals = np.arange(18, dtype=np.float32).reshape(3, 2, 3)
    out = to_label_space(
        {"depth": np.ones((2, 3), np.float32), "sky": sky, "normals": normals}, box
    )
    np.testing.assert_array_equal(out["depth"], np.array([[1, np.inf, 1]] * 2, np.float32))
    assert out["depth"].dtype == np.float32
    np.testing.assert_array_equal(out["normals"][1, 2], normals[:, 1, 2])


def test_wrong_shapes_are_named():
    box = Letterbox.fit((50, 100), (64, 80))
    with pytest.raises(ValueError, match=r"found uint8 \(50, 99, 3\), expected uint8 \(50, 100, 3"):
        box.apply(np.zeros((50, 99, 3), np.uint8))
    with pytest.raises(ValueError, match=r"found \(64, 81\)"):
        box.back(np.zeros((64, 81)))


def test_focal_length_is_the_geometric_mean_as_in_training():
    box = Letterbox.fit((100, 200), (50, 100))
    assert box.focal_px(80.0, 125.0) == pytest.approx(50)  # sqrt(80 * 125) = 100, halved
