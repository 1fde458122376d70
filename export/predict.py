"""`distill predict`: answers on any images, at their own size, with pictures a person can read.

Any aspect goes by `export.letterbox` to the artefact's fixed size and back; the camera's focal
length follows, so metres stay metres. Written per image, beside each other:

    NAME.depth.npy        float32 [h, w] metres; +inf sky     NAME.depth.png     picture with scale
    NAME.normals.npy      float32 [h, w, 3] unit vectors      NAME.normals.png   picture
    NAME.semantic.png     8- or 16-bit class ids              NAME.semantic.view.png   picture
    NAME.<task>_uncertainty.npy   float32 [h, w], unit as in `teacher.label`
    NAME.<task>_confidence.npy    float32 [h, w], probability of being right (depth: NaN in the
                                  sky), of a student that `distill calibrate checkpoint=` has seen

and ``predictions.json`` with one row per input: every input is answered, or rejected with a reason.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from export import pictures
from export.artefact import Card
from export.letterbox import Letterbox, to_label_space
from export.runtimes import Runtime, open_runtime
from teacher.errors import UsageError
from teacher.images import ImageError, encode_png, read
from teacher.jobs.commit import replace_atomically
from teacher.jobs.sources import Source, open_source
from teacher.label import Camera
from teacher.store import hash_file

INDEX, FORMAT = "predictions.json", "dense-distill/predictions"


@dataclass(frozen=True, kw_only=True)
class Item:
    """A decoded input and its place in the artefact's frame."""

    uri: str
    image: np.ndarray
    camera: Camera
    box: Letterbox


def predict(
    *,
    model: str,
    images: str,
    out: str,
    batch: int = 4,
    provider: str = "cpu",
    threads: int | None = None,
    focal_px: float | None = None,
) -> dict[str, Any]:
    """Answer every image of a source.

    Args:
        model: ``student.onnx``, ``.engine`` or ``student.safetensors``.
        images: folder, glob, ``.txt`` list, image, or label set (`teacher.jobs.sources`).
        out: folder for the answers: new, empty, or of an earlier predict.
        batch: images per call.
        provider: where ``.onnx`` must run: cpu, cuda, tensorrt.
        threads: CPU threads; None: all cores of this process.
        focal_px: focal length of the original images, for files that do not know theirs.
    """
    if batch < 1:
        raise UsageError(f"batch={batch}: expected at least 1.")
    if focal_px is not None and not 0 < focal_px < math.inf:
        raise UsageError(f"focal_px={focal_px}: expected a focal length in pixels, or null.")
    source = open_source(images)
    rows: list[dict[str, Any]] = []
    with open_runtime(model, provider=provider, threads=threads) as runtime:
        folder = _open_folder(Path(out))  # not before the model runs: a refusal leaves nothing
        before = _files_of(folder)
        about = {
            "format": FORMAT,
            "version": 1,
            "model": {"file": model, "sha256": hash_file(Path(model)), "runtime": runtime.facts},
            "outputs": [o for o in runtime.card.outputs if o != "semantic_logits"],
            "classes": {str(k): v for k, v in runtime.card.classes.items()},
        }
        _write_index(folder, about | {"complete": False, "rows": [], "earlier": sorted(before)})
        names = [uri for uri in source.list() if not _is_own(images, uri, folder)]
        with tqdm(total=len(names), desc="predict", unit="img") as bar:
            for group in _groups(source, names, runtime, rows, batch=batch, focal_px=focal_px):
                rows += _answer(group, runtime, folder)
                bar.update(len(rows) - bar.n)
            bar.update(len(rows) - bar.n)
    rows.sort(key=lambda row: row["uri"])
    rejected = [row for row in rows if row["state"] == "rejected"]
    done = len(rows) - len(rejected)
    summary = f"{done} of {len(rows)} images answered in {folder}"
    if rejected:
        summary += f", {len(rejected)} rejected (first: {rejected[0]['uri']}: "
        summary += f"{rejected[0]['reason']})"
    result = about | {"complete": True, "summary": summary, "rows": rows}
    _write_index(folder, result)
    for name in before - _files_of(folder):  # answers of an earlier predict that has another model
        (folder / name).unlink(missing_ok=True)
    if not done:
        raise UsageError(f"images={images}: {summary}; no image could be read.")
    return {
        "summary": summary,
        "answered": done,
        "rejected": len(rejected),
        "index": str(folder / INDEX),
    }


def _open_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder}: found a file, expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if found and INDEX not in found:
        raise UsageError(
            f"out={folder}: found {found[:3]} and no {INDEX}, expected a new or empty folder or an "
            "earlier predict's. Choose another out=."
        )
    return folder


def _files_of(folder: Path) -> set[str]:
    """What the index in ``folder`` says was written there; nothing without one."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        names = {name for row in index["rows"] for name in row.get("files", {}).values()}
        names |= set(index.get("earlier", []))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
    return {n for n in names if (folder / n).resolve().is_relative_to(folder.resolve())}


def _is_own(images: str, uri: str, folder: Path) -> bool:
    """Whether an input is what an earlier predict wrote; ``out`` may lie in ``images``."""
    if "://" in images:
        return False
    path = Path(images).expanduser()
    root = path if path.is_dir() else path.parent if path.is_file() else Path()
    return (root / uri).resolve().is_relative_to(folder.resolve())


def _write_index(folder: Path, content: dict[str, Any]) -> None:
    replace_atomically(folder / INDEX, json.dumps(content, indent=1).encode() + b"\n")


def _groups(
    source: Source,
    names: list[str],
    runtime: Runtime,
    rows: list[dict[str, Any]],
    *,
    batch: int,
    focal_px: float | None,
) -> Iterator[list[Item]]:
    """Decode in groups of ``batch``; what cannot be decoded goes to ``rows`` with its reason."""
    size = (runtime.card.height, runtime.card.width)
    group: list[Item] = []
    for uri in names:
        try:
            picture = read(source.read(uri))
        except (ImageError, OSError) as error:
            rows.append({"uri": uri, "state": "rejected", "reason": str(error)})
            continue
        camera = source.camera(uri) or picture.camera
        if focal_px is not None and camera.source == "assumed":
            height, width = picture.image.shape[:2]
            camera = Camera.centred(focal_px, width, height)
        box = Letterbox.fit(picture.image.shape[:2], size)
        group.append(Item(uri=uri, image=picture.image, camera=camera, box=box))
        if len(group) == batch:
            yield group
            group = []
    if group:
        yield group


def _answer(group: list[Item], runtime: Runtime, folder: Path) -> list[dict[str, Any]]:
    """Run one group and write its files; one row per image."""
    images = np.stack([item.box.apply(item.image) for item in group])
    focal_px = np.array([i.box.focal_px(i.camera.fx, i.camera.fy) for i in group], np.float32)
    answers = runtime(images, focal_px)
    answers.pop("semantic_logits", None)
    rows = []
    for i, item in enumerate(group):
        own = to_label_space({n: a[i] for n, a in answers.items()}, item.box)
        rows.append(_write(item, own | _confidences(own, runtime.card), folder))
    return rows


def _confidences(answers: dict[str, np.ndarray], card: Card) -> dict[str, np.ndarray]:
    """``<task>_confidence`` [h, w] of every uncertainty that the card has a table for."""
    found = {}
    for task in card.tasks:
        u = answers.get(f"{task}_uncertainty")
        sure = None if u is None else card.confidence(task, u)
        if sure is not None:
            found[f"{task}_confidence"] = sure
    if "depth_confidence" in found:  # a sky has no depth to be right
        found["depth_confidence"][np.isposinf(answers["depth"])] = np.nan
    return found


def output_name(uri: str) -> str:
    """Where an input's files go below ``out``: its own relative path, never outside."""
    path = PurePath(uri)
    if path.is_absolute() or ".." in path.parts:
        return f"{hashlib.sha256(uri.encode()).hexdigest()[:8]}-{path.name}"
    return str(path)


def _write(item: Item, answers: dict[str, np.ndarray], folder: Path) -> dict[str, Any]:
    stem = output_name(item.uri)
    (folder / stem).parent.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}

    def put(suffix: str, data: bytes) -> None:
        replace_atomically(folder / f"{stem}.{suffix}", data)
        files[suffix] = f"{stem}.{suffix}"

    row: dict[str, Any] = {"uri": item.uri, "state": "answered"}
    for name, values in answers.items():
        if name == "sky":
            continue  # it is the +inf of depth
        if name == "semantic":
            ids = values.astype(np.uint8 if values.max(initial=0) < 255 else np.uint16)
            stream = io.BytesIO()
            Image.fromarray(ids).save(stream, "PNG")
            put("semantic.png", stream.getvalue())
            put("semantic.view.png", encode_png(pictures.classes_picture(ids)))
            continue
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(values, np.float32), allow_pickle=False)
        put(f"{name}.npy", stream.getvalue())
    if "depth" in answers:
        near_m, far_m = pictures.depth_range(answers["depth"])
        view = pictures.depth_picture(answers["depth"], near_m, far_m)
        ends = (f"{near_m:.2g} m", f"{far_m:.2g} m")
        put("depth.png", encode_png(pictures.with_scale(view, ends, pictures.DEPTH_MAP)))
        known = answers["depth"][np.isfinite(answers["depth"])]
        percentiles = np.percentile(known, (5, 50, 95)) if known.size else ()
        row["depth_m_p5_p50_p95"] = [round(float(v), 4) for v in percentiles]
        row["sky_share"] = round(float(np.isposinf(answers["depth"]).mean()), 4)
    if "normals" in answers:
        put("normals.png", encode_png(pictures.normals_picture(answers["normals"])))
    return row | {"camera": item.camera.to_json(), "files": files}
