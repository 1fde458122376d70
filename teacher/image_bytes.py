"""What a file's bytes are, and whether they are all there: checks that need no decoder.

Decoders forgive: libjpeg fills what is missing with grey, libpng stops at the last row it got,
a GIF's end is optional. `check_whole` does not, so that a download cut short is never a picture.
"""

from __future__ import annotations

import re
import zlib

from teacher.errors import UsageError

HDR_CURVES = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273


class ImageError(UsageError):
    """Bytes that are no usable image; the text is the reason."""


def refuse_hdr(curve: int | None) -> None:
    """Refuse the transfer characteristics (ITU-T H.273) that only a tone map can bring to sRGB."""
    if curve in HDR_CURVES:
        raise ImageError(
            f"HDR image ({HDR_CURVES[curve]} curve): there is no one way to sRGB; tone-map it first"
        )


SIGNATURES: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"\xff\xd8\xff"), "jpeg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"BM"), "bmp"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "tiff"),
    (re.compile(rb"P[1-6][\s#]"), "pnm"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "avif"),
    (re.compile(rb"....ftypmi[af][f1].{0,64}?avif", re.DOTALL), "avif"),
    (re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL), "heif"),
)
STRANGERS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"\s*<svg|\s*<\?xml", re.I), "an XML or SVG document"),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<", re.I), "an HTML page (a failed download?)"),
    (re.compile(rb"%PDF"), "a PDF document"),
    (re.compile(rb"....ftyp|\x1a\x45\xdf\xa3", re.DOTALL), "a video"),
    (re.compile(rb"version https://git-lfs"), "a git-lfs pointer (run git lfs pull)"),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive"),
    (re.compile(rb"Pf|PF"), "a PFM float image"),
)


def kind_of(data: bytes) -> str:
    """The format by content; raises `ImageError` that names what it is instead."""
    if not data:
        raise ImageError("not an image: the file is empty (0 bytes)")
    for pattern, kind in SIGNATURES:
        if pattern.match(data):
            return kind
    for pattern, what in STRANGERS:
        if pattern.match(data):
            raise ImageError(f"not an image: this is {what}")
    if not data.strip(b"\0"):
        raise ImageError(f"not an image: {len(data)} zero bytes")
    raise ImageError(
        f"not an image this project reads: it starts with {data[:8].hex(' ')}; "
        "convert it to JPEG or PNG"
    )


# A marker: 0xff and a code; not a stuffed zero, a restart marker (those stay inside) or fill.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _jpeg_scan_ends(data: bytes) -> list[int]:
    """Offsets just after each scan's entropy code.

    Refuses a file without an end marker, and a progressive one (SOF2, T.81 annex G) whose scans
    do not bring every coefficient of every component down to its last bit.
    """
    position = 2
    scan_ends: list[int] = []
    unsent: dict[tuple[int, int], int] = {}  # (component, coefficient) -> low bits still to come
    while found := JPEG_MARKER.search(data, position):
        start, code = found.start(), data[found.start() + 1]
        if code == 0xD9:
            if any(unsent.values()):
                raise ImageError("truncated jpeg image: the last progressive scans are missing")
            return scan_ends
        position = start + 2
        if code in (0x01, 0xD8):  # markers without a segment
            continue
        body = data[position + 2 : position + int.from_bytes(data[position : position + 2], "big")]
        position += 2 + len(body)
        if code == 0xC2:
            unsent = {(c, k): 13 for c in body[6 : 6 + 3 * body[5] : 3] for k in range(64)}
        if code == 0xDA:
            end = JPEG_MARKER.search(data, position)
            if end is None:
                break
            if unsent:
                first, last, bits = body[-3:]
                sent = [(c, k) for c in body[1:-3:2] for k in range(first, last + 1)]
                unsent.update(dict.fromkeys(sent, bits & 15))
            position = end.start()
            scan_ends.append(position)
    raise ImageError(f"truncated jpeg image: no end marker in {len(data)} bytes")


def _check_png(data: bytes) -> None:
    """Every chunk up to IEND is there and its CRC holds; the curve is not HDR."""
    position = 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        body = data[position + 4 : position + 8 + length]
        if position + 12 + length > len(data):
            break
        name, crc = body[:4], data[position + 8 + length : position + 12 + length]
        if zlib.crc32(body) != int.from_bytes(crc, "big"):
            raise ImageError(f"broken png image: the checksum of chunk {name!r} does not match")
        if name == b"cICP" and length == 4:
            refuse_hdr(body[5])
        if name == b"IEND":
            return
        position += 12 + length
    raise ImageError(f"truncated png image: no IEND chunk in {len(data)} bytes")


def _check_gif(data: bytes) -> None:
    """The blocks of the first frame end with their terminator, or the file is cut short."""

    def table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    position = 13 + table(data[10])
    while data[position] != 0x2C:
        if data[position] != 0x21:
            raise ImageError(f"broken gif image: block {data[position]:#04x} before any frame")
        position += 2
        while data[position]:
            position += 1 + data[position]
        position += 1
    position += 10 + table(data[position + 9]) + 1
    while data[position]:  # raises IndexError at the end of a cut file
        position += 1 + data[position]


def check_whole(data: bytes, kind: str) -> list[int]:
    """Refuse a file cut short where its decoder would not; a JPEG's scan ends come back."""
    if kind == "jpeg":
        return _jpeg_scan_ends(data)
    if kind == "png":
        _check_png(data)
    if kind == "webp" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ImageError(
            f"truncated webp image: {len(data)} bytes of {8 + int.from_bytes(data[4:8], 'little')}"
        )
    if kind == "gif":
        try:
            _check_gif(data)
        except IndexError:
            raise ImageError(f"truncated gif image: it ends after {len(data)} bytes") from None
    return []
