"""What the ruler refuses to measure, with a message that says what to do."""

from __future__ import annotations

import numpy as np

from teacher.errors import UsageError


def check_pair(where: str, pred: np.ndarray, truth: np.ndarray, *, vectors: bool = False) -> None:
    """Refuse anything but two floating [H, W] (or [H, W, 3]) arrays of one shape."""
    want = "[H, W, 3]" if vectors else "[H, W]"
    for name, array in (("pred", pred), ("truth", truth)):
        if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
            found = getattr(array, "dtype", type(array).__name__)
            raise UsageError(
                f"{where}: {name} is {found}, expected a floating NumPy array {want}; "
                "decode integer files with their scale first, call .numpy() on tensors"
            )
        if array.ndim != (3 if vectors else 2) or (vectors and array.shape[-1] != 3):
            raise UsageError(
                f"{where}: {name} has shape {array.shape}, expected {want}: one image at a time"
            )
    if pred.shape != truth.shape:
        raise UsageError(
            f"{where}: pred is {pred.shape} but truth is {truth.shape}; "
            "bring the prediction to the truth's resolution"
        )


def check_ids(where: str, pred: np.ndarray, truth: np.ndarray) -> None:
    """Refuse anything but two integer [H, W] arrays of one shape."""
    for name, ids in (("pred", pred), ("truth", truth)):
        if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim != 2:
            found = f"{getattr(ids, 'dtype', type(ids).__name__)} {np.shape(ids)}"
            raise UsageError(f"{where}: {name} is {found}, expected integer ids [H, W]")
    if pred.shape != truth.shape:
        raise UsageError(
            f"{where}: pred is {pred.shape} but truth is {truth.shape}; "
            "bring the prediction to the truth's resolution, by nearest neighbour"
        )


def check_same(where: str, **arrays: np.ndarray) -> None:
    """Refuse arrays whose shapes differ."""
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) != 1:
        raise UsageError(f"{where}: shapes differ: {shapes}, expected one shape for all")
