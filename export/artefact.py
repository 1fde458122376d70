"""What a delivered artefact promises: its inputs, outputs, units, and the card that it carries.

Reader and writer of the card stand here side by side. The card is a flat table of strings (each
one JSON) in the ONNX file's ``metadata_props``; it is data and is never instantiated. Inputs:
``image`` uint8 [N, H, W, 3] sRGB and, if ``focal_input``, ``focal_px`` float32 [N]: the camera's
focal length in pixels of that H x W image. Needs neither torch nor onnx.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from teacher.errors import UsageError

FORMAT, VERSION = "dense-distill/artefact", 1
PREFIX = "dense_distill."
FRAME = "camera frame: x right, y up, z toward the viewer; a wall facing the camera is (0, 0, 1)"
DAMAGE = (AttributeError, KeyError, TypeError, ValueError, RecursionError)  # of foreign JSON
MIN_DEPTH_M, MAX_DEPTH_M = 1e-3, 1e5  # the graph's own clip: what comes out is always finite
MAX_PIXELS = 1 << 26  # an artefact that claims a larger image is refused
MAX_BATCH_PIXELS = 1 << 28  # and a fixed batch that has more of them
MAX_ELEMENTS = 1 << 31  # of one tensor


class ArtefactError(UsageError):
    """A file that is not an artefact of ours, or not a whole one; the text says which and why."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output of the graph: element type, shape in the symbols N, C, H, W, and unit."""

    dtype: str
    shape: tuple[str | int, ...]
    unit: str


_MAP = ("N", "H", "W")
OUTPUTS: dict[str, Output] = {
    "depth": Output(dtype="float32", shape=_MAP, unit="metres to the camera plane, finite"),
    "sky": Output(dtype="float32", shape=_MAP, unit="probability"),
    "normals": Output(dtype="float32", shape=("N", 3, "H", "W"), unit=f"unit vector; {FRAME}"),
    "semantic": Output(dtype="int32", shape=_MAP, unit="class id"),
    "center": Output(dtype="float32", shape=("N", 1, "H", "W"), unit="score of an object's centre"),
    "offset": Output(dtype="float32", shape=("N", 2, "H", "W"), unit="px right and down, to it"),
    "depth_uncertainty": Output(dtype="float32", shape=_MAP, unit="Laplace scale of log depth"),
    "normals_uncertainty": Output(dtype="float32", shape=_MAP, unit="expected angle, degrees"),
    "semantic_uncertainty": Output(dtype="float32", shape=_MAP, unit="1 - p"),
}
OPTIONAL = {
    "semantic_logits": Output(dtype="float32", shape=("N", "C", "H", "W"), unit="logit per class")
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts an artefact carries.

    Attributes:
        height, width: the fixed image size [px].
        batch: the fixed N, or None when N is free.
        focal_input: whether ``focal_px`` is an input; if not, `focal_px` is baked in.
        focal_px: the recorded camera's focal length at H x W, used where none is given.
        canonical_focal_px: f_c, the focal length at which the student's depth is metric.
        outputs: names in order, keys of `OUTPUTS` or `OPTIONAL`.
        classes: class id -> name, for ``semantic``.
        precision: ``fp32``, ...
        licences: plain text, one entry per ancestor.
        provenance: plain JSON of the student's checkpoint.
        student_sha256: of the ``student.safetensors`` it was made from.
    """

    height: int
    width: int
    batch: int | None
    focal_input: bool
    focal_px: float
    canonical_focal_px: float
    outputs: tuple[str, ...]
    classes: dict[int, str] = field(default_factory=dict)
    precision: str = "fp32"
    licences: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    student_sha256: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The label tasks among the outputs, in the contract's order."""
        return tuple(t for t in ("depth", "normals", "semantic") if t in self.outputs)

    def confidence(self, task: str, uncertainty: np.ndarray) -> np.ndarray | None:
        """Probability that a pixel is right (depth ratio < 1.25, angle < 11.25 degrees), float32.

        From ``uncertainty``, the output ``<task>_uncertainty`` of any shape, by the table that
        `distill calibrate checkpoint=` has put beside the student: of what it found, or of the
        losses' own law where that was as good. None if it never did.
        """
        try:
            table = _confidences(self.provenance).get(task)
        except DAMAGE as error:
            raise ArtefactError(f"the student's calibration is damaged: {error}.") from error
        return None if table is None else np.interp(uncertainty, *table).astype(np.float32)


def describe_output(name: str) -> Output:
    """The contract of one output, or an `ArtefactError` that lists the known names."""
    known = OUTPUTS | OPTIONAL
    if name not in known:
        raise ArtefactError(f"output {name!r}: unknown; the contract has {', '.join(known)}.")
    return known[name]


def card_to_metadata(card: Card) -> dict[str, str]:
    """The card as the string table that goes into the file."""
    table: dict[str, Any] = asdict(card)
    table["classes"] = {str(k): v for k, v in card.classes.items()}
    table["outputs"] = {name: asdict(describe_output(name)) for name in card.outputs}
    table |= {"format": FORMAT, "version": VERSION, "frame": FRAME}
    table["input"] = "image: uint8 [N,H,W,3] sRGB, upright; normalisation is inside the graph"
    return {PREFIX + k: json.dumps(v, sort_keys=k != "outputs") for k, v in sorted(table.items())}


def card_from_metadata(metadata: Mapping[str, str], *, where: str) -> Card:
    """The inverse of `card_to_metadata`; raises `ArtefactError` naming ``where``."""
    if PREFIX + "format" not in metadata:
        raise ArtefactError(
            f"{where}: not an artefact made by `distill export` (its metadata has no "
            f"{PREFIX}format). Only those can be run here; export the student again."
        )
    try:
        table = {k.removeprefix(PREFIX): json.loads(v) for k, v in metadata.items() if PREFIX in k}
        version = int(table["version"])
        names = {f.name for f in fields(Card)}
        found = {k: v for k, v in table.items() if k in names}
        found["outputs"] = tuple(found["outputs"])
        found["licences"] = tuple(map(str, found["licences"]))
        found["classes"] = {int(k): str(v) for k, v in found["classes"].items()}
        card = Card(**found)
        _check(card)
    except DAMAGE as error:
        raise ArtefactError(f"{where}: its metadata is damaged: {error}.") from error
    if version > VERSION:
        raise ArtefactError(
            f"{where}: artefact format version {version}; this program reads up to {VERSION}. "
            "Update the program."
        )
    return card


def _check(card: Card) -> None:
    for name in card.outputs:
        describe_output(name)
    for name in ("height", "width", "batch"):
        size = getattr(card, name)
        if not (type(size) is int and size >= 1) and (name, size) != ("batch", None):
            raise ValueError(f"{name} is {size!r}, expected a whole number of at least 1")
    if card.height * card.width > MAX_PIXELS:
        raise ValueError(f"image size {card.height}x{card.width}")
    if (card.batch or 1) * card.height * card.width > MAX_BATCH_PIXELS:
        raise ValueError(f"batches of {card.batch} images of {card.height}x{card.width}")
    for name in ("focal_px", "canonical_focal_px"):
        length = getattr(card, name)
        if not (isinstance(length, int | float) and 0 < length < math.inf):
            raise ValueError(f"{name} is {length!r}, expected a positive number of pixels")
    _confidences(card.provenance)
    if not (isinstance(card.precision, str) and isinstance(card.focal_input, bool)):
        raise ValueError(f"precision {card.precision!r}, focal_input {card.focal_input!r}")


def _confidences(provenance: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Per task the table [2, n] of rising uncertainties and falling probabilities."""
    tables = {}
    for task, fit in provenance.get("calibration", {}).get("confidence", {}).items():
        tables[task] = u, p = np.asarray(fit["values"], np.float64)
        falling = (np.diff(u) >= 0).all() and (np.diff(p) <= 0).all() and np.isfinite(u).all()
        if not (len(u) and falling and (np.abs(p - 0.5) <= 0.5).all()):
            raise ValueError(f"confidence of {task}: expected probabilities that fall with it")
    return tables


def expected_shape(name: str, card: Card, batch: int) -> tuple[int, ...]:
    """The shape of output ``name`` for ``batch`` images."""
    size = {"N": batch, "H": card.height, "W": card.width, "C": len(card.classes)}
    shape: Sequence[str | int] = describe_output(name).shape
    return tuple(size[s] if isinstance(s, str) else s for s in shape)


RANGES = {  # output -> lowest and highest value that the contract allows
    "depth": (MIN_DEPTH_M, MAX_DEPTH_M),
    "sky": (0.0, 1.0),
    "depth_uncertainty": (0.0, math.inf),
    "normals_uncertainty": (0.0, 180.0),
    "semantic_uncertainty": (0.0, 1.0),
}
SLACK = 2e-3  # of a bound, for outputs computed in half precision


def broken_promise(name: str, array: np.ndarray, card: Card) -> str:
    """What of the contract one image's output [...] breaks, as a clause; empty if nothing."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return "values that are not finite"
    if name == "semantic" and card.classes and not np.isin(array, list(card.classes)).all():
        return "class ids outside its table"
    if name == "normals":
        length = np.sqrt(np.square(array.astype(np.float64)).sum(0))
        if np.abs(length - 1).max() > 0.05:
            return "vectors whose length is not 1"
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if array.min() < low - SLACK * abs(low) - 1e-6 or array.max() > high + SLACK * abs(high):
        return f"values outside {low:g} to {high:g}"
    return ""


def plain(value: Any) -> Any:
    """Only what strict JSON holds: tuples become lists, a number that is not finite null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
