"""The one image decoder as a whole: frames, storage, plainness, threads, memory, photographs."""

import io
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_cases import (
    P3_XYZ,
    SRGB_XYZ,
    UPRIGHT,
    WHOLE,
    encoded,
    orientation_tag,
    peak_mib,
    png,
    profile,
    textured,
)
from PIL import Image

from teacher.errors import UsageError
from teacher.images import bounded, decode, encode_png, read
from teacher.label import Camera

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "photos"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_many(kind):
    red, blue = (Image.new("RGB", (16, 16), c) for c in ("red", "blue"))
    options = {"WEBP": {"lossless": True}, "MPO": {"quality": 100}}.get(kind, {})
    data = encoded(red, kind, save_all=True, append_images=[blue], **options)
    picture = read(data)
    assert np.abs(picture.image.astype(int) - [255, 0, 0]).max() <= (2 if kind == "MPO" else 0)
    assert picture.format == ("jpeg" if kind == "MPO" else kind.lower())


def test_bounded_shrinks_the_image_and_the_camera_alike():
    height, width = 480, 641
    ramp = np.repeat(np.linspace(0, 255, width)[None], height, axis=0)
    image = np.repeat(ramp[..., None], 3, axis=2).round().astype(np.uint8)
    camera = Camera(fx=500, fy=500, cx=(width - 1) / 2, cy=100, width=width, height=height)
    small, follows = bounded(image, camera, 320)
    assert small.shape == (240, 320, 3) and small.dtype == np.uint8
    assert follows == camera.resized(width=320, height=240)
    assert abs(follows.fx / follows.fy - 1) < 0.5 / 240
    # a ramp stays a ramp: pixel x of the small one is where its centre lies in the large one
    x = np.arange(5, 315)
    lies_at = (x + 0.5) * width / 320 - 0.5
    assert np.abs(small[120, x, 0] - lies_at * 255 / (width - 1)).max() <= 1


def test_bounded_averages_instead_of_picking():
    stripes = np.zeros((64, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the small image can show: mid-grey, no moiré
    small, _ = bounded(stripes, Camera.assumed(512, 64), 100)
    assert np.abs(small[:, 5:-5].astype(int) - 127.5).max() < 8


def test_bounded_leaves_small_images_alone_and_keeps_a_pixel():
    image, camera = UPRIGHT, Camera.assumed(3, 2)
    same, also = bounded(image, camera, 3)
    assert same is image and also is camera
    thin, follows = bounded(np.zeros((1, 1000, 3), np.uint8), Camera.assumed(1000, 1), 10)
    assert thin.shape == (1, 10, 3) and (follows.width, follows.height) == (10, 1)
    with pytest.raises(UsageError, match="max_side must be at least 1"):
        bounded(image, camera, 0)


def test_png_round_trip_and_its_door():
    image = textured()
    picture = read(encode_png(image))
    np.testing.assert_array_equal(picture.image, image)
    assert picture.plain
    with pytest.raises(UsageError, match=r"got float64 \(2, 2\), expected uint8"):
        encode_png(np.zeros((2, 2)))


def test_plain_means_what_a_plain_decoder_sees():
    files = [
        encoded(textured(), "JPEG"),
        encoded(textured(), "JPEG", exif=orientation_tag(6)),
        encoded(textured(), "JPEG", icc_profile=profile(P3_XYZ)),
        encoded(textured(), "JPEG", icc_profile=profile(SRGB_XYZ)),
        encoded(textured()[..., 0], "PNG"),
        encoded(Image.fromarray(textured()).quantize(16), "PNG"),
        encoded(np.dstack([textured(), textured()[..., 0]]), "PNG"),
        png((2, 1), 16, 0, struct.pack(">2H", 0, 30000)),
    ]
    claims = []
    for data in files:
        picture = read(data)
        sees = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        same = sees.shape == picture.image.shape and bool((sees == picture.image).all())
        assert same == picture.plain
        claims.append(same)
    assert claims == [True, False, False, True, True, True, False, False]


def test_threads_agree():
    files = [WHOLE[name]() for name in WHOLE] * 4
    alone = [decode(data) for data in files]
    start = threading.Barrier(8)

    def work(index: int) -> bool:
        if index < 8:
            start.wait(timeout=30)
        return bool((decode(files[index]) == alone[index]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(len(files))))


def test_a_12_megapixel_photo_fits_in_six_times_its_pixels():
    photo = encoded(
        textured(3000, 4000), "JPEG", icc_profile=profile(P3_XYZ), exif=orientation_tag(6)
    )
    before = peak_mib("", photo)[1]
    shape, peak = peak_mib("print(decode(data).shape)", photo)
    assert shape == "(4000, 3000, 3)"
    assert peak - before < 6 * 3 * 12e6 / 2**20


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photos in {PHOTOS}")
def test_real_photographs_decode_to_what_pillow_sees():
    paths = sorted(PHOTOS.glob("*.jpg"))
    assert paths
    for path in paths:
        picture = read(path.read_bytes())
        assert picture.plain
        np.testing.assert_array_equal(picture.image, np.asarray(Image.open(path).convert("RGB")))
