"""Orientation and camera from EXIF, pixel by pixel and in pixels."""

import math

import numpy as np
import pytest
from image_cases import (
    UPRIGHT,
    encoded,
    heic,
    orientation_tag,
)

from teacher.images import read
from teacher.label import Camera

# EXIF 2.32, tag 0x0112: where the stored 0th row and 0th column lie in the upright picture.
# (row, column) of the upright picture -> (row, column) of the stored one, by those words.
STORED = {
    1: lambda y, x, h, w: (y, x),  # row at the top, column at the left
    2: lambda y, x, h, w: (y, w - 1 - x),  # top, right
    3: lambda y, x, h, w: (h - 1 - y, w - 1 - x),  # bottom, right
    4: lambda y, x, h, w: (h - 1 - y, x),  # bottom, left
    5: lambda y, x, h, w: (x, y),  # left, top
    6: lambda y, x, h, w: (w - 1 - x, y),  # right, top
    7: lambda y, x, h, w: (w - 1 - x, h - 1 - y),  # right, bottom
    8: lambda y, x, h, w: (x, h - 1 - y),  # left, bottom
}


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    height, width = upright.shape[:2]
    out = np.zeros((height, width, 3) if orientation < 5 else (width, height, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            out[STORED[orientation](y, x, height, width)] = upright[y, x]
    return out


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_all_eight_orientations_come_out_upright(kind, orientation):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(stored(UPRIGHT, orientation), kind, exif=orientation_tag(orientation), **options)
    picture = read(data)
    np.testing.assert_array_equal(picture.image, UPRIGHT)
    assert (picture.camera.width, picture.camera.height) == (3, 2)
    assert picture.plain == (kind == "PNG" and orientation == 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_orientation_and_camera_turn_together(orientation):
    upright = np.repeat(np.repeat(UPRIGHT, 16, axis=0), 16, axis=1)  # whole JPEG blocks: exact
    exif = orientation_tag(orientation, film_mm=26)
    data = encoded(stored(upright, orientation), "JPEG", exif=exif, quality=100, subsampling=0)
    picture = read(data)
    assert np.abs(picture.image.astype(int) - upright).max() <= 2
    assert picture.plain == (orientation == 1)
    camera = picture.camera
    assert (camera.width, camera.height, camera.source) == (48, 32, "exif")
    assert (camera.cx, camera.cy) == (23.5, 15.5)
    # 26 mm on a frame of diagonal sqrt(36² + 24²) mm, here sqrt(48² + 32²) px: 26 * 4/3 px
    assert camera.fx == pytest.approx(26 * 48 / 36) and camera.fy == camera.fx


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("coder", ["heic", "avif"])
def test_heic_and_avif_are_turned_once(orientation, coder):
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48] = (250, 10, 10)  # only the top left quarter is red
    turned = stored(upright, orientation)
    exif = orientation_tag(orientation, film_mm=36).tobytes()
    make = heic if coder == "heic" else lambda image, **k: encoded(image, "AVIF", **k)
    data = make(turned, exif=exif, quality=95)
    picture = read(data)
    assert picture.image.shape == (64, 96, 3) and not picture.plain
    red = picture.image[..., 0] > 128
    assert red[4:28, 4:44].all() and red.mean() == pytest.approx(0.25, abs=0.03)
    assert picture.camera.source == "exif"
    assert picture.camera.fx == pytest.approx(36 * math.hypot(96, 64) / math.hypot(36, 24))


def test_a_nonsense_orientation_is_upright():
    picture = read(encoded(UPRIGHT, "PNG", exif=orientation_tag(9)))
    np.testing.assert_array_equal(picture.image, UPRIGHT)


def camera_from(**tags: float) -> Camera:
    exif = orientation_tag(1, **tags)
    return read(encoded(np.zeros((300, 400, 3), np.uint8), "JPEG", exif=exif)).camera


def test_focal_length_from_the_focal_plane():
    # 5 mm in a plane of 2540 px/inch = 100 px/mm: 500 px at the camera's own 800x600
    for unit, resolution in ((2, 2540), (3, 1000), (4, 100)):
        camera = camera_from(
            focal_mm=5, plane_resolution=resolution, plane_unit=unit, width=800, height=600
        )
        assert camera.source == "exif"
        assert camera.fx == pytest.approx(250) and camera.fy == camera.fx  # resized by one half


def test_no_or_nonsense_focal_length_is_assumed():
    want = Camera.assumed(400, 300)
    assert camera_from() == want
    assert camera_from(focal_mm=5) == want  # without a plane it says nothing
    assert camera_from(film_mm=0) == want
    assert camera_from(film_mm=60000) == want
    assert camera_from(film_mm=26).source == "exif"
    assert camera_from(film_mm=26, width=0, height=0).source == "exif"  # unwritten, not cropped


def test_a_crop_after_the_shot_makes_the_focal_length_unknown():
    exif = orientation_tag(1, film_mm=26, width=4000, height=3000)
    whole = read(encoded(np.zeros((300, 400, 3), np.uint8), "JPEG", exif=exif)).camera
    assert whole.source == "exif"
    assert whole.fx == pytest.approx(26 * 500 / math.hypot(36, 24))
    cropped = read(encoded(np.zeros((300, 300, 3), np.uint8), "JPEG", exif=exif)).camera
    assert cropped == Camera.assumed(300, 300)
