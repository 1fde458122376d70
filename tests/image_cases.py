"""Image files crafted in memory for the decoder's tests.

Files Pillow cannot write (16-bit colour PNG, ICC profiles) are built here byte by byte.
"""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

UPRIGHT = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 9  # 2 rows, 3 columns


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


def orientation_tag(orientation: int, **more: float) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    names = {"film_mm": 41989, "focal_mm": 37386, "plane_resolution": 41486, "plane_unit": 41488}
    inner = exif.get_ifd(0x8769)
    for name, value in more.items():
        inner[names.get(name) or {"width": 40962, "height": 40963}[name]] = value
    return exif


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


def peak_mib(script: str, data: bytes) -> tuple[str, float]:
    """Run ``script`` on ``data`` (bytes named so there); what it printed, its own peak in MiB.

    VmHWM, because ru_maxrss of a child starts at its parent's.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system lacks")
    probe = (
        "import sys; from teacher.images import ImageError, decode\n"
        "data = sys.stdin.buffer.read()\n"
        f"{script}\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, input=data, capture_output=True, check=True, timeout=120)
    printed, _, peak_kib = done.stdout.decode().strip().rpartition("\n")
    return printed, int(peak_kib) / 1024
