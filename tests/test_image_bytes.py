"""Cut, lying, broken and oversized files are refused with a reason, never half decoded."""

import io

import numpy as np
import pytest
from image_cases import (
    UPRIGHT,
    WHOLE,
    encoded,
    peak_mib,
    png,
    textured,
)
from PIL import Image, ImageFile

from teacher.errors import EnvironmentFailure, UsageError
from teacher.images import ImageError, decode, encode_png, read

CUTS = (0.3, 0.6, 0.95, 0.999)


def test_the_pixel_limit_holds_before_decoding():
    bomb = png((13000, 13000), 1, 0, b"\0" * (1625 * 13000))
    assert len(bomb) < 25_000
    reason, peak = peak_mib("try: decode(data)\nexcept ImageError as error: print(error)", bomb)
    assert "13000x13000 is 169.0 megapixels, the limit is 80.0" in reason
    assert peak < 200


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


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_cut_short_is_refused_wherever_it_is_cut(name):
    data = WHOLE[name]()
    assert np.abs(decode(data).astype(int) - textured()).mean() < 60  # whole: it decodes
    last = len(data) - (2 if name == "gif" else 1)  # a GIF's own end mark is optional
    for cut in [int(len(data) * share) for share in CUTS] + [last]:
        kind = name.split()[0]
        ours = kind in ("jpeg", "png", "gif", "webp")  # for the others the decoder notices
        with pytest.raises(ImageError, match=f"{'truncated' if ours else 'broken'} {kind} image"):
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


def test_a_progressive_jpeg_without_its_last_scan_is_refused():
    data = encoded(textured(240, 320), "JPEG", progressive=True)
    glued = data[: data.rindex(b"\xff\xda")] + b"\xff\xd9"  # every scan that is left is whole
    Image.open(io.BytesIO(glued)).load()
    with pytest.raises(ImageError, match="the last progressive scans are missing"):
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
