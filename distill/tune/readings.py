"""Pictures with two valid readings: what a generator must answer with either, never with a blend.

Both are made of a scene's picture, shrunk into a frame on a wall:

* ``light`` frame, a bas-relief's extreme: a picture hanging on the wall (all flat), or a window in
  the wall with the scene behind it;
* ``dark`` frame, scale ambiguity: a window with the scene behind it, or the same as a doll's house,
  every length times `DOLL`.

A scene seen through the middle of the frame fills `SHARE` of its former angle; its depth divided
by `SHARE` keeps all widths (the canonical-camera rule D_c = D f_c / f, with f = `SHARE` f_c).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from distill.tune.scenes_cache import depth_codes, scaled_codes

SHARE = 0.75  # of the picture's sides, inside the frame
WALL_M = 1.0
DOLL = 0.3
STYLES = ("light", "dark")
_FRAME = {"light": 0.75, "dark": -0.8}  # grey of the frame, in [-1, 1]
_WALL = (0.2, 0.1, -0.1)


BEHIND, DOLLS = scaled_codes(1 / SHARE), scaled_codes(DOLL)


def _inside(height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns inside the frame."""
    h, w = round(SHARE * height), round(SHARE * width)
    top, left = (height - h) // 2, (width - w) // 2
    return slice(top, top + h), slice(left, left + w)


def framed(
    image: np.ndarray, codes: np.ndarray, *, style: str
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Image [3, H, W] in [-1, 1], depth codes [H, W] -> framed image, codes of both readings.

    The readings come in the order of this module's docstring: (picture, window) for ``light``,
    (window, doll's house) for ``dark``.
    """
    _, height, width = image.shape
    rows, columns = _inside(height, width)
    h, w = rows.stop - rows.start, columns.stop - columns.start
    out = np.empty_like(image)
    out[:] = np.array(_WALL, np.float32)[:, None, None]
    edge = max(1, round(height / 32))
    around = (
        slice(rows.start - edge, rows.stop + edge),
        slice(columns.start - edge, columns.stop + edge),
    )
    out[:, *around] = _FRAME[style]
    small = F.interpolate(
        torch.from_numpy(image)[None], size=(h, w), mode="bilinear", antialias=True
    )
    out[:, rows, columns] = small[0].numpy()
    picked = codes[((np.arange(h) + 0.5) * height / h).astype(int)][
        :, ((np.arange(w) + 0.5) * width / w).astype(int)
    ]
    flat = np.full((height, width), depth_codes(np.array(WALL_M)), np.uint16)
    window = flat.copy()
    window[rows, columns] = BEHIND[picked]
    return out, (flat, window) if style == "light" else (window, DOLLS[window])
