"""Label sets with exact truth as flat memory-mapped arrays: what instruction tuning reads fast.

A cache is keyed by the label set's sealed samples; growing the set rebuilds it. Depth is kept as
16-bit u = f(depth) of the power transform, so that every colour map is one table lookup.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from distill.data import merged_classes
from teacher.errors import UsageError
from teacher.label import Label, Task, unknown_class
from teacher.store import LabelSet

LAM, C = -3.0, 10 / 3  # the depth codec's defaults (DESIGN section 4)
CANONICAL_FOV_DEG = 65.0  # depth is learnt in a camera of this field of view across the width
UNKNOWN_CODE, SKY_CODE, CODES = 0, 65535, 65534
NO_CLASS = 255
MAX_INSTANCES = 64
_PLANES = {"image": (np.uint8, 3), "depth": (np.uint16, 1), "normals": (np.int8, 3),
           "semantic": (np.uint8, 1), "instances": (np.uint8, 1)}  # fmt: skip


@dataclass
class Scenes:
    """Arrays over N scenes of one size.

    image uint8 [N, H, W, 3]; depth uint16 [N, H, W] codes (0 unknown, 65535 sky);
    normals int8 [N, H, W, 3] times 127 (all zero = unknown); semantic uint8 (255 unknown);
    instances uint8 (0 none); instance_class uint8 [N, 64] class of every instance id;
    focal_px of the canonical camera: depth is D focal_px / fx, in metres.
    """

    image: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    semantic: np.ndarray
    instances: np.ndarray
    instance_class: np.ndarray
    captions: list[str]
    keys: list[str]
    classes: dict[int, str]
    focal_px: float

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.keys)

    def halved(self) -> Scenes:
        """The same scenes at half the size: images averaged, labels picked."""
        image = np.asarray(self.image)
        n, h, w, _ = image.shape
        mean = np.empty((n, h // 2, w // 2, 3), np.uint8)
        for i in range(n):
            block = image[i].reshape(h // 2, 2, w // 2, 2, 3).astype(np.uint16)
            mean[i] = (block.sum((1, 3)) + 2) // 4
        picked = {
            name: np.ascontiguousarray(getattr(self, name)[:, ::2, ::2])
            for name in ("depth", "normals", "semantic", "instances")
        }
        return Scenes(
            image=mean,
            **picked,
            instance_class=self.instance_class,
            captions=self.captions,
            keys=self.keys,
            classes=self.classes,
            focal_px=self.focal_px / 2,
        )


def depth_codes(depth_m: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
    """Depth [m] (NaN unknown, +inf sky) -> uint16 codes of u = 1 - (1 + scale d / 10)^-2."""
    with np.errstate(invalid="ignore"):
        u = 1 - (1 - depth_m * scale / (LAM * C)) ** (LAM + 1)
        codes = np.clip(np.rint(u * CODES), 1, CODES)
    codes = np.where(np.isposinf(depth_m), SKY_CODE, codes)
    return np.where(np.isnan(depth_m), UNKNOWN_CODE, codes).astype(np.uint16)


def depth_of_codes_m() -> np.ndarray:
    """Depth [m] of each of the 65536 codes, the inverse of `depth_codes`; NaN unknown, sky."""
    u = np.arange(65536) / CODES
    with np.errstate(divide="ignore", invalid="ignore"):
        depth_m = -LAM * C * ((1 - u) ** -0.5 - 1)
    depth_m[UNKNOWN_CODE], depth_m[CODES:] = np.nan, np.nan
    return depth_m


@functools.lru_cache(maxsize=256)
def scaled_codes(factor: float) -> np.ndarray:
    """[65536] depth code -> code of ``factor`` times the depth; unknown and sky stay."""
    table = depth_codes(depth_of_codes_m() * factor)
    table[UNKNOWN_CODE], table[SKY_CODE - 1 :] = UNKNOWN_CODE, SKY_CODE
    return table


def _instances(label: Label) -> tuple[np.ndarray, np.ndarray]:
    """Instance ids packed to 1..63 and the class (majority of its pixels) of each."""
    ids = label.values[Task.INSTANCES]
    semantic = label.values[Task.SEMANTIC]
    packed = np.zeros(ids.shape, np.uint8)
    classes = np.full(MAX_INSTANCES, NO_CLASS, np.uint8)
    present = [i for i in np.unique(ids).tolist() if i != 0][: MAX_INSTANCES - 1]
    for new, old in enumerate(present, start=1):
        mask = ids == old
        known = semantic[mask & (semantic != unknown_class(semantic.dtype))]
        packed[mask] = new
        if known.size:
            classes[new] = np.bincount(known).argmax()
    return packed, classes


def _check(label: Label, size: tuple[int, int], path: str) -> None:
    missing = [str(t) for t in Task if t not in label.values]
    if missing:
        raise UsageError(
            f"{path}: sample {label.key} has no {', '.join(missing)}; tuning needs depth, normals,"
            " semantic and instances (`distill scenes` writes all four)"
        )
    if label.image.shape[:2] != size:
        raise UsageError(
            f"{path}: sample {label.key} is {label.image.shape[1]}x{label.image.shape[0]}, expected"
            f" {size[1]}x{size[0]}; render the scenes at one size"
        )


def load_scenes(path: str | Sequence[str], *, cache: str) -> Scenes:
    """The sealed samples of one or several label sets as arrays, cached in the folder ``cache``."""
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise UsageError("data=[]: expected at least one label set")
    sets = [LabelSet(p) for p in paths]
    for p, label_set in zip(paths, sets, strict=True):
        if not len(label_set.keys):
            raise UsageError(f"{p}: no sealed sample; wait for `distill scenes` or check the path")
    classes = merged_classes(sets)
    keys = [key for label_set in sets for key in label_set.keys]
    if len(set(keys)) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise UsageError(f"{', '.join(paths)}: image {twice} is in two of them; render other seeds")
    first = sets[0][keys[0]]
    size = (int(first.image.shape[0]), int(first.image.shape[1]))
    digest = hashlib.sha256(
        json.dumps([keys, size, LAM, C, CANONICAL_FOV_DEG]).encode()
    ).hexdigest()[:16]
    folder = Path(cache) / digest
    if not (folder / "facts.json").exists():
        _build(paths, sets, classes, size, folder)
        for other in Path(cache).iterdir():  # of the set before it grew
            if other != folder:
                shutil.rmtree(other)
    facts = json.loads((folder / "facts.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _PLANES}
    return Scenes(
        **arrays,
        instance_class=np.load(folder / "instance_class.npy"),
        captions=facts["captions"],
        keys=keys,
        classes={int(k): v for k, v in facts["classes"].items()},
        focal_px=facts["focal_px"],
    )


def _build(
    paths: list[str],
    sets: list[LabelSet],
    classes: dict[int, str],
    size: tuple[int, int],
    folder: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    keys = [
        (p, label_set, key)
        for p, label_set in zip(paths, sets, strict=True)
        for key in label_set.keys
    ]
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=dtype,
            shape=(len(keys), *size) + ((depth,) if depth > 1 else ()),
        )
        for name, (dtype, depth) in _PLANES.items()
    }  # fmt: skip
    instance_class = np.full((len(keys), MAX_INSTANCES), NO_CLASS, np.uint8)
    captions: list[str] = []
    focal_px = size[1] / 2 / math.tan(math.radians(CANONICAL_FOV_DEG) / 2)
    for i, (path, label_set, key) in enumerate(tqdm(keys, desc="cache scenes", unit="scene")):
        label = label_set[key]
        _check(label, size, path)
        arrays["image"][i] = label.image
        scale = focal_px / label.camera.fx  # canonical camera: D_c = D f_c / f
        arrays["depth"][i] = depth_codes(label.values[Task.DEPTH], scale=scale)
        normals = np.nan_to_num(label.values[Task.NORMALS], nan=0.0)
        arrays["normals"][i] = np.rint(normals * 127)
        semantic = label.values[Task.SEMANTIC]
        known = semantic != unknown_class(semantic.dtype)
        arrays["semantic"][i] = np.where(known, semantic, NO_CLASS)
        arrays["instances"][i], instance_class[i] = _instances(label)
        captions.append(str(label.provenance.get("caption", "")))
    for array in arrays.values():
        array.flush()
    np.save(folder / "instance_class.npy", instance_class)
    facts = {"captions": captions, "classes": classes, "focal_px": focal_px}
    temporary = folder / "facts.json.part"
    temporary.write_text(json.dumps(facts))
    temporary.replace(folder / "facts.json")
