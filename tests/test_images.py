"""The one image decoder: every case crafted in memory, expected pixels from closed form or by hand.

Files Pillow cannot write (16-bit colour PNG, ICC profiles) are built here byte by byte.
"""

import io
import math
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from teacher.errors import EnvironmentFailure, UsageError
from teacher.images import ImageError, bounded, decode, encode_png, read
from teacher.label import Camera

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "photos"
CUTS = (0.3, 0.6, 0.95, 0.999)


def encoded(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(stream, kind, **options)
    return stream.getvalue()


def heic(image: np.ndarray, **options) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(image)).save(stream, **options)
    return stream.getvalue()


def png(size: tuple[int, int], depth: int, color: int, rows: bytes, *extra: tuple) -> bytes:
    """A PNG of the given bit depth and colour type from unfiltered rows, with further chunks."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0)
    bytes_a_row = len(rows) // size[1]
    lines = b"".join(b"\0" + rows[i : i + bytes_a_row] for i in range(0, len(rows), bytes_a_row))
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def textured(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Smooth random colours, uint8 [H, W, 3]: work for any coder."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


# -- upright ---------------------------------------------------------------------------------

UPRIGHT = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 9  # 2 rows, 3 columns

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


def orientation_tag(orientation: int, **more: float) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    names = {"film_mm": 41989, "focal_mm": 37386, "plane_resolution": 41486, "plane_unit": 41488}
    inner = exif.get_ifd(0x8769)
    for name, value in more.items():
        inner[names.get(name) or {"width": 40962, "height": 40963}[name]] = value
    return exif


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


# -- transparency ----------------------------------------------------------------------------


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


# -- depth and colour models -------------------------------------------------------------------


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


# -- colour profiles ---------------------------------------------------------------------------

SRGB_XYZ = [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]]
P3_XYZ = [[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]]


def profile(columns: list[list[float]] | None, gamma: float | None = None) -> bytes:
    """An ICC v4 profile: RGB from D50-adapted primaries (XYZ each), or grey where there are none.

    Its curve is sRGB's (parametric type 3) unless a plain ``gamma`` is given.
    """

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)

    srgb = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    curve = b"para\0\0\0\0" + (
        b"\0\3\0\0" + fixed(*srgb) if gamma is None else b"\0\0\0\0" + fixed(gamma)
    )
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)}
    tags[b"desc"] = b"mluc\0\0\0\0" + struct.pack(">IIHHII", 1, 12, 0x656E, 0x5553, 2, 28) + b"\0t"
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns or [], strict=False):
        tags[name] = b"XYZ \0\0\0\0" + fixed(*column)
    for name in (b"rTRC", b"gTRC", b"bTRC") if columns else (b"kTRC",):
        tags[name] = curve
    body, table, start = b"", struct.pack(">I", len(tags)), 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    space = b"RGB " if columns else b"GRAY"
    head = b"\0\0\0\0\x04\x20\0\0mntr" + space + b"XYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    head += b"acsp" + b"\0" * 28 + fixed(0.9642, 1.0, 0.8249) + b"\0" * 48
    return struct.pack(">I", 4 + len(head) + len(table) + len(body)) + head + table + body


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
    np.testing.assert_array_equal(
        decode(png((1, 1), 8, 2, b"\1\2\3", (b"cICP", bytes([1, 13, 0, 1])))), [[[1, 2, 3]]]
    )


# -- frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_many(kind):
    red, blue = (Image.new("RGB", (16, 16), c) for c in ("red", "blue"))
    options = {"WEBP": {"lossless": True}, "MPO": {"quality": 100}}.get(kind, {})
    data = encoded(red, kind, save_all=True, append_images=[blue], **options)
    picture = read(data)
    assert np.abs(picture.image.astype(int) - [255, 0, 0]).max() <= (2 if kind == "MPO" else 0)
    assert picture.format == ("jpeg" if kind == "MPO" else kind.lower())


# -- size limits -------------------------------------------------------------------------------


def test_the_pixel_limit_holds_before_decoding():
    bomb = png((13000, 13000), 1, 0, b"\0" * (1625 * 13000))
    assert len(bomb) < 25_000
    probe = (
        "import resource, sys; from teacher.images import decode, ImageError\n"
        "try: decode(sys.stdin.buffer.read())\n"
        "except ImageError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], input=bomb, capture_output=True, check=True, timeout=60
    )
    reason, peak_mib = done.stdout.decode().splitlines()
    assert "13000x13000 is 169.0 megapixels, the limit is 80.0" in reason
    assert int(peak_mib) < 200


def test_the_pixel_limit_is_exact_and_can_be_moved():
    data = encoded(np.zeros((10, 10, 3), np.uint8), "PNG")
    assert decode(data, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match="too large: 10x10"):
        decode(data, max_pixels=99)


def test_one_pixel_wide_images():
    for shape in ((1, 1, 3), (1, 700, 3), (700, 1, 3)):
        image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_array_equal(decode(encode_png(image)), image)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ImageError):
        decode(png((0, 1), 8, 2, b"\0"))


# -- cut, lying and broken files -----------------------------------------------------------------

WHOLE = {
    "jpeg": lambda: encoded(textured(), "JPEG"),
    "jpeg progressive": lambda: encoded(textured(), "JPEG", progressive=True),
    "jpeg restarts": lambda: encoded(textured(), "JPEG", restart_marker_rows=1),
    "jpeg grey": lambda: encoded(textured()[..., 0], "JPEG"),
    "png": lambda: encoded(textured(), "PNG"),
    "webp": lambda: encoded(textured(), "WEBP"),
    "gif": lambda: encoded(textured(), "GIF"),
    "bmp": lambda: encoded(textured(), "BMP"),
    "pnm": lambda: encoded(textured(), "PPM"),
    "tiff": lambda: encoded(textured(), "TIFF"),
    "tiff lzw": lambda: encoded(textured(), "TIFF", compression="tiff_lzw"),
    "avif": lambda: encoded(textured(), "AVIF"),
    "heif": lambda: heic(textured()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_cut_short_is_refused_wherever_it_is_cut(name):
    data = WHOLE[name]()
    assert np.abs(decode(data).astype(int) - textured()).mean() < 60  # whole: it decodes
    last = len(data) - (2 if name == "gif" else 1)  # a GIF's own end mark is optional
    for cut in [int(len(data) * share) for share in CUTS] + [last]:
        with pytest.raises(ImageError, match=f"(truncated|broken) {name.split()[0]} image"):
            decode(data[: min(cut, last)])


@pytest.mark.parametrize("share", (0.3, 0.6, 0.95))
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_cut_jpeg_with_an_end_marker_glued_on_is_refused(mode, options, share):
    data = encoded(Image.fromarray(textured(240, 320)).convert(mode), "JPEG", **options)
    assert decode(data).shape == (240, 320, 3)
    glued = data[: int(len(data) * share)] + b"\xff\xd9"
    Image.open(io.BytesIO(glued)).load()  # Pillow finds nothing wrong with it
    with pytest.raises(ImageError, match="truncated jpeg image"):
        decode(glued)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_whole_jpeg_that_is_mid_grey_is_no_cut_one(options):
    grey = np.full((40, 40, 3), 128, np.uint8)
    picture = read(encoded(grey, "JPEG", **options))
    np.testing.assert_array_equal(picture.image, grey)


def test_bytes_after_the_end_are_fine():
    image = textured()
    for kind in ("JPEG", "PNG", "GIF"):
        data = encoded(image, kind)
        np.testing.assert_array_equal(decode(data + b"\0\0ftypmp42 motion" * 99), decode(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0" * 100, "100 zero bytes"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"\xef\xbb\xbf  <html>", "an HTML page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an XML or SVG document"),
        (b"%PDF-1.7", "a PDF document"),
        (b"\0\0\0\x20ftypisom\0\0\0\0", "a video"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"Pf\n2 2\n-1.0\n", "PFM"),
        (b"hello, world", "starts with 68 65 6c 6c"),
        (b"\xff\xd8\xff", "truncated jpeg"),
        (b"\x89PNG\r\n\x1a\n", "truncated png"),
    ],
)
def test_what_is_no_image_says_what_it_is(data, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        decode(data)
    assert isinstance(caught.value, UsageError) and caught.value.exit_code == 2


def test_a_raw_camera_file_is_not_its_preview():
    preview = Image.fromarray(UPRIGHT)
    with pytest.raises(ImageError, match="raw camera file"):
        decode(encoded(preview, "TIFF", tiffinfo={254: 1}))
    with pytest.raises(ImageError, match="raw camera file"):
        decode(encoded(preview, "TIFF", tiffinfo={50706: b"\1\4\0\0"}))


def test_a_flipped_byte_of_a_png_is_seen_wherever_it_is():
    data = encoded(textured(), "PNG")
    for position in np.random.default_rng(0).integers(0, len(data), 60):
        with pytest.raises(ImageError):
            decode(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", WHOLE)
def test_broken_bytes_give_an_image_or_a_reason(name):
    data = WHOLE[name]()
    outcomes = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        hurt = bytearray(data)
        for position in rng.integers(0, len(data) if seed % 2 else min(len(data), 300), 3):
            hurt[position] = rng.integers(0, 256)
        del hurt[len(hurt) - int(rng.integers(0, 3)) * (seed % 3) :]
        try:
            picture = read(bytes(hurt))
        except ImageError as error:
            assert str(error)
            outcomes.add("refused")
        else:
            assert picture.image.dtype == np.uint8 and picture.image.shape[2] == 3
            outcomes.add("read")
    assert "refused" in outcomes


def test_a_process_that_tolerates_cut_files_is_told(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(EnvironmentFailure, match="LOAD_TRUNCATED_IMAGES"):
        decode(encode_png(UPRIGHT))


# -- camera ----------------------------------------------------------------------------------


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


def test_a_crop_after_the_shot_makes_the_focal_length_unknown():
    exif = orientation_tag(1, film_mm=26, width=4000, height=3000)
    whole = read(encoded(np.zeros((300, 400, 3), np.uint8), "JPEG", exif=exif)).camera
    assert whole.source == "exif"
    assert whole.fx == pytest.approx(26 * 500 / math.hypot(36, 24))
    cropped = read(encoded(np.zeros((300, 300, 3), np.uint8), "JPEG", exif=exif)).camera
    assert cropped == Camera.assumed(300, 300)


# -- size and storage ------------------------------------------------------------------------


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


# -- all together ----------------------------------------------------------------------------


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
    probe = (
        "import resource, sys; from teacher.images import decode\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "data = sys.stdin.buffer.read(); before = peak(); image = decode(data)\n"
        "print(image.shape, (peak() - before) * 2**20 / image.nbytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], input=photo, capture_output=True, check=True, timeout=120
    )
    shape, times = done.stdout.decode().rsplit(" ", 1)
    assert shape == "(4000, 3000, 3)" and float(times) < 6


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photos in {PHOTOS}")
def test_real_photographs_decode_to_what_pillow_sees():
    paths = sorted(PHOTOS.glob("*.jpg"))
    assert paths
    for path in paths:
        picture = read(path.read_bytes())
        assert picture.plain
        np.testing.assert_array_equal(picture.image, np.asarray(Image.open(path).convert("RGB")))
