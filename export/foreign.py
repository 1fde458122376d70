"""Models that we did not make: a short description of their inputs and outputs, so they are judged.

A YAML beside the model (or given as ``io=``), every key spelt here and nowhere else:

    image:
      name: pixel_values         # the graph's input
      layout: NCHW               # or NHWC
      dtype: float32             # or float16, uint8
      size: [518, 518]           # H, W; images are letterboxed to it
      scale: 0.00392156862745098 # of the bytes: 1/255; then (x - mean) / std
      mean: [0.485, 0.456, 0.406]
      std: [0.229, 0.224, 0.225]
      channels: RGB              # or BGR
    batch: null                  # a fixed N, or null for any
    focal_px: {name: f}          # if the graph takes it; else focal_px: 600.0, what it assumes
    outputs:
      depth: {name: predicted_depth, layout: NHW, is: metres}       # or log metres, 1/metres
      sky: {name: sky, layout: N1HW, is: probability}               # or logit
      normals: {name: n, layout: NCHW, axes: opencv}                # teacher.codecs.normals' names
      semantic: {name: logits, layout: NCHW, is: logits}            # or ids
    classes: {0: floor, 1: wall}    # of logits: one each, in order of the ids
    precision: fp32              # whose budgets of conf/task apply
    sha256: "..."                # or a list; other files are then refused. An engine needs it

`Adapter` turns letterboxed bytes into the feed, and what comes out into `export.artefact`'s form.
The file is data: nothing in it is imported, called or evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.artefact import (
    MAX_BATCH_PIXELS,
    MAX_DEPTH_M,
    MAX_PIXELS,
    MIN_DEPTH_M,
    ArtefactError,
    Card,
)
from teacher.errors import UsageError
from teacher.label import Camera

MAX_BYTES, DEEPEST = 1 << 18, 8
KEYS = ("image", "batch", "focal_px", "outputs", "classes", "precision", "sha256")
IMAGE_KEYS = ("name", "layout", "dtype", "size", "scale", "mean", "std", "channels")
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "depth": {"layout": ("NHW", "N1HW", "NHW1"), "is": ("metres", "log metres", "1/metres")},
    "sky": {"layout": ("NHW", "N1HW", "NHW1"), "is": ("probability", "logit")},
    "normals": {"layout": ("NCHW", "NHWC"), "axes": ()},
    "semantic": {"layout": ("NHW", "NCHW", "NHWC"), "is": ("ids", "logits")},
}


@dataclass(frozen=True, kw_only=True)
class Description:
    """A checked description; ``outputs``: ours -> its options."""

    path: Path
    image: dict[str, Any]
    batch: int | None
    focal_name: str
    focal_px: float
    outputs: dict[str, dict[str, str]]
    classes: dict[int, str]
    precision: str
    sha256: tuple[str, ...]

    def card(self) -> Card:
        """What `export.artefact` would say of such a model."""
        height, width = self.image["size"]
        return Card(
            height=height,
            width=width,
            batch=self.batch,
            focal_input=bool(self.focal_name),
            focal_px=self.focal_px,
            canonical_focal_px=self.focal_px,
            outputs=tuple(self.outputs),
            classes=self.classes,
            precision=self.precision,
        )


def read_description(path: str | Path) -> Description:
    """Read and check the YAML; `ArtefactError` names the key, what was found and expected."""
    import yaml

    file = Path(path)
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        raise ArtefactError(f"io={file}: found no (small) file, expected a YAML (export.foreign).")
    try:
        text, depth = file.read_text(), 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST or isinstance(event, yaml.AliasEvent):
                what = "aliases (*name)" if depth <= DEEPEST else f"more than {DEEPEST} levels"
                raise ArtefactError(f"io={file}: has {what}; write plain tables.")
        table = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArtefactError(f"io={file}: not readable YAML: {error}.") from error
    try:
        return _checked(file, table)
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtefactError(f"io={file}: {what}; the keys are in export/foreign.py.") from error


def _checked(file: Path, table: Any) -> Description:
    _only(table, KEYS, "at the top")
    image: dict[str, Any] = {
        "layout": "NCHW",
        "dtype": "float32",
        "scale": 1 / 255,
        "channels": "RGB",
    }
    image |= {"mean": [0, 0, 0], "std": [1, 1, 1]} | table["image"]
    _only(image, IMAGE_KEYS, "under image")
    _one_of(image["layout"], ("NCHW", "NHWC"), "image.layout")
    _one_of(image["dtype"], ("float32", "float16", "uint8"), "image.dtype")
    _one_of(image["channels"], ("RGB", "BGR"), "image.channels")
    image["size"] = [int(n) for n in image["size"]]
    sides = image["size"]
    if len(sides) != 2 or min(sides) < 1 or sides[0] * sides[1] > MAX_PIXELS:
        raise ValueError(f"image.size is {sides}, expected [height, width]")
    for name in ("mean", "std"):
        three = isinstance(image[name], list) and len(image[name]) == 3
        if (
            not three
            or not all(map(_is_number, image[name]))
            or (name == "std" and 0 in image[name])
        ):
            raise ValueError(
                f"image.{name} is {image[name]}, expected three numbers (std: none of them 0)"
            )
    if not _is_number(image["scale"]):
        raise ValueError(f"image.scale is {image['scale']!r}, expected a number")
    batch = None if table.get("batch") is None else int(table["batch"])
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1, or null for any")
    if (batch or 1) * sides[0] * sides[1] > MAX_BATCH_PIXELS:
        raise ValueError(f"batch is {batch}, too many images of {sides}")
    outputs = {}
    for name, options in table["outputs"].items():
        if name not in CHOICES:
            raise ValueError(f"outputs.{name}: expected some of {list(CHOICES)}")
        _only(options, ("name", *CHOICES[name]), f"under outputs.{name}")
        for key, values in CHOICES[name].items():
            if values:
                _one_of(options[key], values, f"outputs.{name}.{key}")
        outputs[name] = {k: str(v) for k, v in options.items()}
    if not outputs:
        raise ValueError("outputs is empty")
    if outputs.get("semantic", {}).get("is") == "logits" and not table.get("classes"):
        raise ValueError("outputs.semantic: logits need classes, one per logit in order of the ids")
    if "normals" in outputs:
        from teacher.codecs.normals import NormalCodec

        NormalCodec(axes=outputs["normals"]["axes"])
    focal = table.get("focal_px")
    assumed_px = Camera.assumed(image["size"][1], image["size"][0]).fx
    name = str(focal["name"]) if isinstance(focal, Mapping) else ""
    focal_px = float(assumed_px if name or focal is None else focal)
    if not 0 < focal_px < math.inf:
        raise ValueError(f"focal_px is {focal_px}, expected a positive number of pixels")
    return Description(
        path=file,
        image=image,
        batch=batch,
        focal_name=name,
        focal_px=focal_px,
        outputs=outputs,
        classes={int(k): str(v) for k, v in (table.get("classes") or {}).items()},
        precision=str(table.get("precision", "fp32")),
        sha256=tuple(str(h) for h in _listed(table.get("sha256"))),
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _only(table: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"found {type(table).__name__} {where}, expected a table")
    if strange := sorted(set(table) - set(keys)):
        raise ValueError(f"unknown {strange} {where}, expected some of {list(keys)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _one_of(value: Any, choices: tuple[str, ...], where: str) -> None:
    if value not in choices:
        raise ValueError(f"{where} is {value!r}, expected one of {list(choices)}")


class Adapter:
    """Bytes to the described feed, and the described answers to `export.artefact`'s form."""

    def __init__(self, description: Description) -> None:
        """Nothing is run yet."""
        self.about = description
        self.names = [o["name"] for o in description.outputs.values()]

    def feed(self, images: np.ndarray, focal_px: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [N, H, W, 3] RGB and [N] -> the graph's inputs."""
        about = self.about.image
        values = images if about["channels"] == "RGB" else images[..., ::-1]
        if about["dtype"] != "uint8":
            scaled = values.astype(np.float32) * np.float32(about["scale"])
            mean, std = (np.array(about[n], np.float32) for n in ("mean", "std"))
            values = ((scaled - mean) / std).astype(about["dtype"])
        if about["layout"] == "NCHW":
            values = values.transpose(0, 3, 1, 2)
        feed = {about["name"]: np.ascontiguousarray(values)}
        if self.about.focal_name:
            feed[self.about.focal_name] = focal_px
        return feed

    def answers(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays in the order of ``names`` -> outputs in the contract's names, shapes, units."""
        out = {}
        for (name, options), array in zip(self.about.outputs.items(), arrays, strict=True):
            out[name] = _convert(name, options, array, self.about.classes)
        return out


def _convert(
    name: str, options: Mapping[str, str], array: np.ndarray, classes: Mapping[int, str]
) -> np.ndarray:
    layout = options["layout"]
    if array.ndim != len(layout):
        raise ArtefactError(f"output {name}: found shape {array.shape}, expected {layout}.")
    if name == "semantic":
        if options["is"] == "logits":
            axis = 1 if layout == "NCHW" else 3
            if array.shape[axis] != len(classes):
                raise ArtefactError(
                    f"output semantic: found {array.shape[axis]} logits, expected one for each of "
                    f"{len(classes)} classes."
                )
            return np.array(sorted(classes), np.int32)[array.argmax(axis)]
        return array.astype(np.int32)
    values: np.ndarray = array.astype(np.float32)
    if name == "normals":
        from teacher.codecs.normals import NormalCodec

        last = np.moveaxis(values, 1, -1) if layout == "NCHW" else values
        ours = NormalCodec(axes=options["axes"]).to_teacher(last)  # a sign flip, its own inverse
        length = np.sqrt(np.square(ours).sum(-1, keepdims=True))
        return np.moveaxis(ours / np.maximum(length, 1e-6), -1, 1)
    values = values[:, 0] if layout == "N1HW" else values[..., 0] if layout == "NHW1" else values
    finite = np.isfinite(values)  # what is not must stay seen: neither horizon nor nearest depth
    with np.errstate(over="ignore", divide="ignore"):
        if name == "sky":
            return values if options["is"] == "probability" else 1 / (1 + np.exp(-values))
        if options["is"] == "log metres":
            values = np.exp(values)
        elif options["is"] == "1/metres":
            values = 1 / np.maximum(values, 1 / MAX_DEPTH_M)
    finite &= np.isfinite(values)
    return np.where(finite, values.clip(MIN_DEPTH_M, MAX_DEPTH_M), np.float32(np.nan))
