"""The one image decoder: bytes in, upright sRGB and a camera out, or an `ImageError` that says why.

What every reader of this project can rely on:

* the content decides, never the name: JPEG, PNG, WebP, GIF, BMP, TIFF, PNM, HEIC, AVIF;
* pixels are uint8 [H, W, 3], sRGB, upright (all eight EXIF orientations; HEIC and AVIF by their
  own rotation boxes), the first frame of an animation, the first page of a TIFF;
* transparency is composited over white, in sRGB, after colour management;
* grey of 9 to 16 bits is scaled by its own white (round(255 v / (2^bits - 1))), colour of 16 bits
  keeps its high byte; float and 32-bit integer images have no defined white and are refused;
* an embedded ICC profile is converted to sRGB (relative colorimetric, black point compensated).
  One that changes no colour by more than `SRGB_TOLERANCE` is sRGB in all but rounding and leaves
  the pixels alone. An unreadable or mismatched profile is ignored, as browsers do. HDR transfer
  curves (PQ, HLG) are refused; gAMA/cHRM and wide primaries named without a profile are ignored;
* at most `MAX_PIXELS`, known from the header before a single pixel is decoded;
* a file cut short is refused, wherever it was cut; bytes after the end (Motion Photos, MPO) are
  fine. A flipped bit inside JPEG's entropy code decodes to a different image and cannot be seen.

Safe to call from several threads. A JPEG needs about five times its pixels (3 bytes each).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from teacher.errors import EnvironmentFailure, UsageError
from teacher.exif import camera_of, read_exif
from teacher.image_bytes import ImageError, check_whole, kind_of, refuse_hdr
from teacher.label import Camera

__all__ = ["MAX_PIXELS", "ImageError", "Picture", "bounded", "decode", "encode_png", "read"]

MAX_PIXELS = 80_000_000  # 240 MB of RGB; below Pillow's own warning at 89 Mpx
SRGB_TOLERANCE = 3  # of 255


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded image.

    Attributes:
        image: uint8 [H, W, 3] upright sRGB, C-contiguous.
        camera: of this image; source "exif" or "assumed".
        format: "jpeg", "png", "webp", "gif", "bmp", "tiff", "pnm", "heif" or "avif".
        plain: a plain decoder (no EXIF, ICC or alpha handling) sees exactly ``image`` in the
            original bytes; only ever true for 8-bit JPEG and PNG.
    """

    image: np.ndarray
    camera: Camera
    format: str
    plain: bool


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image in ``data`` as uint8 [H, W, 3], upright sRGB; raises `ImageError`."""
    return read(data, max_pixels=max_pixels).image


def read(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode ``data`` and say what else the file knows; raises `ImageError` with the reason.

    ``max_pixels`` bounds width x height as the header states them, before decoding.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise EnvironmentFailure(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: some library in this process turned it "
            "on, and cut files would decode to grey rows; set it to False"
        )
    kind = kind_of(data)
    try:
        scan_ends = check_whole(data, kind)
        source = _open(data, kind)
        _check_size(source, max_pixels)
        _check_content(source, data, kind)
        source.load()
        if kind == "jpeg":
            _check_entropy(source, data, scan_ends)
        exif = read_exif(source)
        base, alpha = _planes(source, kind)
        rgb, managed = _to_srgb(base, source.info.get("icc_profile"))
        rgb = _upright(_over_white(rgb, alpha), exif.get("orientation", 1))
    except (UsageError, EnvironmentFailure):
        raise
    except MemoryError as error:
        raise EnvironmentFailure(f"out of memory while decoding a {kind} image") from error
    except Exception as error:  # hostile bytes: the decoders raise whatever they stumble over
        raise ImageError(f"broken {kind} image: {error or type(error).__name__}") from error
    upright, deep = exif.get("orientation", 1) == 1, kind == "png" and data[24] > 8
    plain = upright and not managed and alpha is None and not deep and base.mode in ("L", "RGB")
    del source, base, alpha  # half of the memory, before the copy
    return Picture(
        image=np.array(rgb),
        camera=camera_of(exif, rgb.width, rgb.height),
        format=kind,
        plain=plain and kind in ("jpeg", "png"),
    )


def _check_entropy(source: Image.Image, data: bytes, scan_ends: list[int]) -> None:
    """Refuse a JPEG whose entropy code ends early although an end marker follows.

    libjpeg fills missing blocks with mid-grey, and missing refinements with nothing, in silence.
    So where the last pixel is mid-grey, or the file is progressive, decode it again with other
    bytes appended to each scan: a whole scan never looks at them.
    """
    last = source.getpixel((source.width - 1, source.height - 1))
    grey = set(last if isinstance(last, tuple) else (last,)) <= {127, 128}
    if not grey and not source.info.get("progressive"):
        return
    pieces: list[bytes] = []
    start = 0
    for end in scan_ends:
        pieces += [data[start:end], b"\x5a\x3c\x96\x69\x0f\xa5" * 32]
        start = end
    other = JpegImagePlugin.JpegImageFile(io.BytesIO(b"".join([*pieces, data[start:]])))
    try:
        other.load()
        same = other.tobytes() == source.tobytes()
    except OSError:
        same = False
    if not same:
        raise ImageError("truncated jpeg image: a scan ends before its last block")


def _heif(stream: io.BytesIO) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise EnvironmentFailure(f"HEIC images need pillow-heif, which fails: {error}") from error
    return pillow_heif.HeifImageFile(stream)


OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "pnm": PpmImagePlugin.PpmImageFile,
    "heif": _heif,
    "avif": AvifImagePlugin.AvifImageFile,
}


def _open(data: bytes, kind: str) -> Image.Image:
    """Read the header only; the classes directly, so that no registry or global limit matters."""
    return OPENERS[kind](io.BytesIO(data))


def _check_size(source: Image.Image, max_pixels: int) -> None:
    width, height = source.size
    if width < 1 or height < 1:
        raise ImageError(f"the image is empty: {width}x{height} pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"too large: {width}x{height} is {width * height / 1e6:.1f} megapixels, the limit is "
            f"{max_pixels / 1e6:.1f}; shrink the image, or raise max_pixels"
        )


def _check_content(source: Any, data: bytes, kind: str) -> None:
    """Refuse raw camera files, whose first page is only a preview, and HDR curves."""
    if kind == "tiff" and (
        data[8:10] == b"CR" or 50706 in source.tag_v2 or source.tag_v2.get(254, 0) & 1
    ):
        raise ImageError("a raw camera file (or only a preview); develop it to JPEG or TIFF first")
    if kind == "heif" and not source.info.get("icc_profile"):
        refuse_hdr((source.info.get("nclx_profile") or {}).get("transfer_characteristics"))
    if kind == "avif" and (box := data.find(b"colrnclx", 0, 1 << 16)) >= 0:
        refuse_hdr(int.from_bytes(data[box + 10 : box + 12], "big"))


# -- pixels ----------------------------------------------------------------------------------


def _grey8(levels: np.ndarray, *, white: int) -> Image.Image:
    """Integer grey [H, W] in 0..white as mode L, rounded to nearest."""
    scaled = (levels.astype(np.uint32) * 255 + white // 2) // white
    return Image.fromarray(scaled.astype(np.uint8))


def _deep_grey(source: Any, kind: str) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 9 to 16 bits and its one transparent level, as modes L, L."""
    levels = np.asarray(source)
    white = 65535
    if kind == "tiff":
        white = (1 << int(source.tag_v2.get(258, (16,))[0])) - 1
        if source.tag_v2.get(262) == 0:  # white is zero; Pillow inverts 8 bits only
            levels = white - levels
    hole = source.info.get("transparency")
    alpha = None if hole is None else Image.fromarray(np.uint8(255) * (levels != hole))
    return _grey8(levels, white=white), alpha


def _planes(source: Image.Image, kind: str) -> tuple[Image.Image, Image.Image | None]:
    """The picture as L, RGB, CMYK or LAB of 8 bits, and its opacity (L) if it has one."""
    mode = source.mode
    if mode.startswith("I;16") or (mode == "I" and kind == "pnm"):
        return _deep_grey(source, kind)
    if mode in ("I", "F"):
        what = "floating-point" if mode == "F" else "32-bit or signed integer"
        raise ImageError(f"{what} pixels have no defined white; save it as 8 or 16-bit grey or RGB")
    if "transparency" in source.info or mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        full = source.convert("RGBA")
        alpha = full.getchannel("A")
        return full.convert("RGB"), None if alpha.getextrema() == (255, 255) else alpha
    if mode in ("1", "L"):
        return source.convert("L"), None
    return (source if mode in ("RGB", "CMYK", "LAB") else source.convert("RGB")), None


def _over_white(rgb: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def _probe(mode: str) -> Image.Image:
    """A picture that samples the mode's colours: every grey, or a 17 x 17 x 17 grid."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(grid.reshape(17, -1, 3))


def _to_srgb(base: Image.Image, icc: bytes | None) -> tuple[Image.Image, bool]:
    """``base`` as sRGB, and whether that differs from what ``base.convert("RGB")`` gives."""
    if not icc:
        return base.convert("RGB"), base.mode == "LAB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        if mode == "RGB" and base.mode == "L":
            base = base.convert("RGB")
        if mode != base.mode:
            return base.convert("RGB"), base.mode == "LAB"
        to_srgb = ImageCms.buildTransform(
            profile,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode != "CMYK":
            before = np.asarray(_probe(mode).convert("RGB")).astype(int)
            after = np.asarray(to_srgb.apply(_probe(mode)))
            if np.abs(after - before).max() <= SRGB_TOLERANCE:
                return base.convert("RGB"), False
        return to_srgb.apply(base), True
    except (ImageCms.PyCMSError, OSError, KeyError):  # a profile nobody can use
        return base.convert("RGB"), base.mode == "LAB"


UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Undo the EXIF orientation (1..8); anything else means upright."""
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


# -- size and storage ------------------------------------------------------------------------


def bounded(image: np.ndarray, camera: Camera, max_side: int) -> tuple[np.ndarray, Camera]:
    """``image`` uint8 [H, W, 3] shrunk (Lanczos) so that its longer side is at most ``max_side``.

    The whole picture maps to the whole picture: the longer side becomes ``max_side``, the shorter
    one is rounded to whole pixels, and the camera takes exactly these two factors, which differ
    by less than 0.5 / (shorter side) of themselves. Never enlarges; a small image comes back as is.
    """
    if max_side < 1:
        raise UsageError(f"max_side must be at least 1 pixel, got {max_side}")
    height, width = image.shape[:2]
    scale = max_side / max(width, height)
    if scale >= 1:
        return image, camera
    new_width, new_height = (max(1, round(side * scale)) for side in (width, height))
    small = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.LANCZOS)
    return np.array(small), camera.resized(width=new_width, height=new_height)


def encode_png(image: np.ndarray) -> bytes:
    """``image`` uint8 [H, W, 3] as a PNG that any decoder reads back exactly; no metadata."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"encode_png: got {image.dtype} {image.shape}, expected uint8 [H,W,3]")
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
