"""Whatever the pixels are, sRGB comes out: expected colours from closed form or by hand."""

import struct

import numpy as np
import pytest
from image_cases import (
    P3_XYZ,
    SRGB_XYZ,
    UPRIGHT,
    encoded,
    heic,
    png,
    profile,
    textured,
)
from PIL import Image

from teacher.images import ImageError, decode, read


def test_transparency_is_composited_over_white():
    rgba = np.array(
        [[[255, 0, 0, 255], [255, 0, 0, 0], [200, 100, 0, 51], [0, 0, 0, 128]]], np.uint8
    )
    # c a + 255 (1 - a): 200*.2+204 = 244, 100*.2+204 = 224, 0+204; black at 128/255: 127
    want = [[[255, 0, 0], [255, 255, 255], [244, 224, 204], [127, 127, 127]]]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        picture = read(encoded(rgba, kind, **options))
        np.testing.assert_array_equal(picture.image, want)
        assert not picture.plain
    grey = np.array([[[0, 255], [0, 0], [0, 51]]], np.uint8)
    np.testing.assert_array_equal(decode(encoded(grey, "PNG"))[0, :, 0], [0, 255, 204])


def test_opaque_alpha_stays_plain():
    rgba = np.dstack([UPRIGHT, np.full((2, 3), 255, np.uint8)])
    picture = read(encoded(rgba, "PNG"))
    np.testing.assert_array_equal(picture.image, UPRIGHT)
    assert picture.plain


def test_palette_with_a_transparent_entry():
    indexed = Image.new("P", (3, 1))
    indexed.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    indexed.putdata([0, 1, 2])
    opaque = read(encoded(indexed, "PNG"))
    np.testing.assert_array_equal(opaque.image, [[[10, 20, 30], [200, 0, 0], [0, 0, 250]]])
    for data in (
        encoded(indexed, "PNG", transparency=1),
        encoded(indexed, "GIF", transparency=1),
        encoded(indexed, "PNG", transparency=b"\xff\x00\xff"),
    ):
        picture = read(data)
        np.testing.assert_array_equal(picture.image, [[[10, 20, 30], [255, 255, 255], [0, 0, 250]]])
        assert not picture.plain


def test_16_bit_grey_is_scaled_not_saturated():
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    want = np.floor(levels / 257 + 0.5).astype(np.uint8)  # 257 = 65535 / 255
    big_endian = levels.astype(">u2").tobytes()
    for data in (
        png((64, 64), 16, 0, big_endian),
        encoded(levels, "TIFF"),
        b"P5 64 64 65535\n" + big_endian,
    ):
        picture = read(data)
        np.testing.assert_array_equal(picture.image, np.repeat(want[..., None], 3, axis=2))
        assert not picture.plain


def test_16_bit_grey_with_a_transparent_level():
    data = png((2, 1), 16, 0, struct.pack(">2H", 4096, 4097), (b"tRNS", struct.pack(">H", 4096)))
    np.testing.assert_array_equal(decode(data)[0, :, 0], [255, 16])


def test_16_bit_colour_keeps_the_high_byte():
    rows = struct.pack(">6H", 0, 255, 256, 32768, 65279, 65535)
    picture = read(png((2, 1), 16, 2, rows))
    np.testing.assert_array_equal(picture.image, [[[0, 0, 1], [128, 254, 255]]])
    assert not picture.plain


def tiff_grey(values: bytes, *, bits: int, photometric: int, width: int) -> bytes:
    """A little-endian one-strip TIFF of a single row."""
    tags = [
        (256, 3, width), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, len(values)),
    ]  # fmt: skip
    padded = values + b"\0" * (len(values) % 2)
    ifd = struct.pack("<H", len(tags))
    ifd += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(padded)) + padded + ifd + b"\0\0\0\0"


def test_tiff_grey_of_12_bits_and_white_is_zero():
    twelve = tiff_grey(bytes([0xFF, 0xF8, 0x00]), bits=12, photometric=1, width=2)
    np.testing.assert_array_equal(decode(twelve)[0, :, 0], [255, 128])  # 4095, 2048 of 4095
    inverted = tiff_grey(struct.pack("<2H", 0, 65535), bits=16, photometric=0, width=2)
    np.testing.assert_array_equal(decode(inverted)[0, :, 0], [255, 0])


def test_pixels_without_a_defined_white_are_refused():
    with pytest.raises(ImageError, match="floating-point pixels have no defined white"):
        decode(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
    with pytest.raises(ImageError, match="32-bit or signed integer pixels"):
        decode(encoded(Image.fromarray(np.ones((2, 2), np.int32)), "TIFF"))


def test_grey_and_bilevel_become_three_equal_channels():
    grey = np.array([[0, 77, 255]], np.uint8)
    picture = read(encoded(grey, "PNG"))
    np.testing.assert_array_equal(picture.image, np.repeat(grey[..., None], 3, axis=2))
    assert picture.plain
    bits = decode(png((8, 1), 1, 0, b"\xa5"))  # 0xa5 = 10100101
    np.testing.assert_array_equal(bits[0, :, 1], [255, 0, 255, 0, 0, 255, 0, 255])


def test_cmyk_of_an_adobe_jpeg_is_not_inverted():
    cmyk = np.zeros((16, 48, 4), np.uint8)
    cmyk[:, 16:32] = (0, 255, 255, 0)  # no cyan: red
    cmyk[:, 32:] = (0, 0, 0, 255)  # all ink
    picture = read(encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100))
    colours = picture.image[8, [8, 24, 40]].astype(int)
    assert np.abs(colours - [[255, 255, 255], [255, 0, 0], [0, 0, 0]]).max() <= 3
    assert not picture.plain


def test_lab_and_ycbcr_tiff():
    lab = np.zeros((1, 3, 3), np.uint8)
    lab[0] = [[255, 0, 0], [138, 81, 70], [0, 0, 0]]  # white; L* 54.3 a 81 b 70 (D50): red
    colours = decode(encoded(Image.fromarray(lab, "LAB"), "TIFF"))[0].astype(int)
    assert np.abs(colours - [[255, 255, 255], [255, 0, 0], [0, 0, 0]]).max() <= 6
    ycbcr = Image.fromarray(np.array([[[76, 85, 255], [255, 128, 128]]], np.uint8), "YCbCr")
    colours = decode(encoded(ycbcr, "TIFF"))[0].astype(int)  # BT.601 of red, and white
    assert np.abs(colours - [[254, 0, 0], [255, 255, 255]]).max() <= 2


def linear(code: np.ndarray) -> np.ndarray:
    v = np.asarray(code) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def coded(light: np.ndarray) -> np.ndarray:
    v = np.clip(light, 0, 1)
    return 255 * np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)


def test_phone_p3_becomes_srgb():
    # Display P3 codes of sRGB's own corners (the well-known 234 51 35 and its sisters) and white.
    corners = np.array([[[234, 51, 35], [117, 251, 76], [0, 0, 245], [255, 255, 255]]], np.uint8)
    picture = read(encoded(corners, "PNG", icc_profile=profile(P3_XYZ)))
    want = [[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]]
    assert np.abs(picture.image.astype(int) - want).max() <= 8  # gamut corners: steepest of all
    assert not picture.plain

    # Inside the gamut: linear P3 to linear sRGB by their primaries (CSS Color 4).
    p3_to_srgb = np.array(
        [
            [1.2249401, -0.2249404, 0.0],
            [-0.0420569, 1.0420571, 0.0],
            [-0.0196376, -0.0786361, 1.0982735],
        ]
    )
    muted = np.random.default_rng(3).integers(90, 170, (8, 8, 3), dtype=np.uint8)
    image = decode(encoded(muted, "PNG", icc_profile=profile(P3_XYZ)))
    expected = coded(linear(muted) @ p3_to_srgb.T)
    assert np.abs(image - expected).max() <= 1.5
    assert np.abs(image.astype(int) - muted).max() > 10  # and it is not just what was stored


def test_a_profile_that_is_srgb_leaves_the_pixels_alone():
    picture = read(encoded(UPRIGHT, "PNG", icc_profile=profile(SRGB_XYZ)))
    np.testing.assert_array_equal(picture.image, UPRIGHT)
    assert picture.plain


def test_a_grey_profile_and_an_rgb_profile_on_grey():
    grey = np.array([[0, 64, 128, 255]], np.uint8)
    image = decode(encoded(grey, "PNG", icc_profile=profile(None, gamma=1.0)))
    assert np.abs(image[0, :, 0] - coded(grey[0] / 255)).max() <= 1.5  # linear light, coded
    assert (image == image[..., :1]).all()
    image = decode(encoded(grey, "PNG", icc_profile=profile(SRGB_XYZ, gamma=1.0)))
    assert np.abs(image[0, :, 0] - coded(grey[0] / 255)).max() <= 1.5
    same = read(encoded(grey, "PNG", icc_profile=profile(P3_XYZ)))  # neutral stays neutral
    assert np.abs(same.image[0, :, 0].astype(int) - grey[0]).max() <= 1


def test_an_unusable_profile_is_ignored():
    for icc in (b"no profile at all", profile(P3_XYZ)[:200], profile(None)):
        picture = read(encoded(UPRIGHT, "PNG", icc_profile=icc))
        np.testing.assert_array_equal(picture.image, UPRIGHT)
        assert picture.plain


def test_profile_and_transparency_together():
    rgba = np.array([[[117, 251, 76, 255], [117, 251, 76, 0], [0, 0, 0, 51]]], np.uint8)
    image = decode(encoded(rgba, "PNG", icc_profile=profile(P3_XYZ))).astype(int)
    assert np.abs(image - [[[0, 255, 0], [255, 255, 255], [204, 204, 204]]]).max() <= 8


def test_hdr_is_refused():
    for code, name in ((16, "PQ"), (18, "HLG")):
        data = png((1, 1), 8, 2, b"\1\2\3", (b"cICP", bytes([9, code, 0, 1])))
        with pytest.raises(ImageError, match=rf"HDR image \({name} curve\)"):
            decode(data)
        for data in (heic(textured()), encoded(textured(), "AVIF")):
            box = data.index(b"colrnclx") + 10  # after the name: primaries, transfer curve
            decode(data)
            with pytest.raises(ImageError, match=rf"HDR image \({name} curve\)"):
                decode(data[:box] + bytes([0, code]) + data[box + 2 :])
    np.testing.assert_array_equal(
        decode(png((1, 1), 8, 2, b"\1\2\3", (b"cICP", bytes([1, 13, 0, 1])))), [[[1, 2, 3]]]
    )
