"""Run, then judge: this half runs. Every artefact answers the same images; the answers are files.

    answers/inputs/KEY.npz     image uint8 [H,W,3] as the artefacts saw it, focal_px
    answers/NAME/KEY.npz       one array per output, without N, as `export.artefact` says
    answers/NAME/run.json      what ran, how, and how consistent it is with itself

so that judging can be repeated, or done elsewhere, without running anything.
"""

from __future__ import annotations

import json
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.artefact import ArtefactError, Card, broken_promise, plain
from export.letterbox import Letterbox
from export.parity import TIE, margin, worst_gap
from export.runtimes import Answers, Runtime, open_runtime
from teacher.errors import UsageError
from teacher.jobs.commit import replace_atomically
from teacher.store import LabelSet, hash_file

INPUTS, RUN = "inputs", "run.json"
MOST_SIZES = 64
BATCHES = (1, 2, 3, 5, 8)  # besides the main one: small, odd, and not a multiple of any tile


def save_inputs(labels: LabelSet, keys: Sequence[str], card: Card, folder: Path) -> None:
    """Letterbox the images once, with the focal length that each then has."""
    target = folder / INPUTS
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for key in tqdm(keys, desc="images", unit="img", disable=None, leave=False):
        label = labels[key]
        box = Letterbox.fit(label.image.shape[:2], (card.height, card.width))
        focal_px = np.float32(box.focal_px(label.camera.fx, label.camera.fy))
        np.savez(target / f"{key}.npz", image=box.apply(label.image), focal_px=focal_px)


def load(folder: Path, name: str, key: str) -> Answers:
    """One image's saved arrays; `UsageError` if they are not there."""
    path = folder / name / f"{key}.npz"
    if not path.is_file():
        raise UsageError(f"{path}: no saved answer; run `distill verify` with rerun=true once.")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{path}: a saved answer that cannot be read ({error}), cut or changed since; run "
            "`distill verify` with rerun=true."
        ) from error


def batches(
    folder: Path, keys: Sequence[str], size: int
) -> Iterator[tuple[Sequence[str], np.ndarray, np.ndarray]]:
    """(keys, images, focal lengths) in groups of ``size`` from the saved inputs."""
    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        items = [load(folder, INPUTS, key) for key in part]
        yield (
            part,
            np.stack([i["image"] for i in items]),
            np.array([i["focal_px"] for i in items], np.float32),
        )


def run_artefact(
    path: Path,
    keys: Sequence[str],
    folder: Path,
    *,
    batch: int,
    provider: str,
    threads: int | None,
    question: bool = True,
    logits: bool = False,
    io: str | Path | None = None,
) -> dict[str, Any]:
    """Answer the saved inputs with one artefact; returns what ``run.json`` then holds.

    ``question``: whether its `consistency` is asked as well (needless for the reference).
    ``logits``: whether ``semantic_logits`` are saved too. ``io``: see `export.foreign`.

    A file that cannot be opened or run is a result too: ``error`` says what happened.
    """
    name = path.name
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    facts: dict[str, Any] = {"file": name, "sha256": hash_file(path), "batch": batch}
    facts["keys"] = list(keys)
    facts["io_sha256"] = "" if io is None else hash_file(Path(io))
    try:
        with open_runtime(
            path, provider=provider, threads=threads, rounding=True, io=io
        ) as runtime:
            card = runtime.card
            facts["precision"] = card.precision
            facts["outputs"] = [o for o in card.outputs if logits or o != "semantic_logits"]
            facts["student_sha256"] = card.student_sha256
            facts["classes"] = {str(k): v for k, v in card.classes.items()}
            facts["canonical_focal_px"] = card.canonical_focal_px
            facts["size"] = [card.height, card.width]
            _check_size(path, card, folder, keys)
            batch = facts["batch"] = card.batch or min(batch, runtime.largest or batch)
            save = _Saver(target, card, logits=logits)
            begun = time.perf_counter()
            for part, images, focal_px in tqdm(
                list(batches(folder, keys, batch)), desc=name, unit="batch", disable=None
            ):
                save(part, runtime(images, focal_px))
            facts["wall_s"] = round(time.perf_counter() - begun, 3)
            facts["runtime"] = runtime.facts
            facts["consistency"] = (
                consistency(runtime, keys, folder, batch=batch) if question else {}
            )
            for i, key in enumerate(DARK_KEYS):
                images, focal_px = dark_images(folder, keys)
                save([key], runtime(images[i : i + 1], focal_px[i : i + 1]))
            facts["broken"] = save.broken
    except ArtefactError as error:
        facts["error"] = str(error)
    replace_atomically(target / RUN, json.dumps(plain(facts), indent=1).encode() + b"\n")
    return facts


def _check_size(path: Path, card: Card, folder: Path, keys: Sequence[str]) -> None:
    found = load(folder, INPUTS, keys[0])["image"].shape[:2]
    if found != (card.height, card.width):
        raise ArtefactError(
            f"{path}: made for {card.height}x{card.width} images, the student for "
            f"{found[0]}x{found[1]}; it is another student's."
        )


class _Saver:
    """Writes answers, one file per image, and counts the promises that they break."""

    def __init__(self, target: Path, card: Card, *, logits: bool) -> None:
        self.target, self.card, self.logits = target, card, logits
        self.broken: dict[str, dict[str, Any]] = {}

    def __call__(self, keys: Sequence[str], answers: Answers) -> None:
        for name, array in answers.items():
            for key, one in zip(keys, array, strict=True):
                if what := broken_promise(name, one, self.card):
                    count = self.broken.setdefault(name, {"what": what, "images": 0, "first": key})
                    count["images"] += 1
        kept = {n: a for n, a in answers.items() if self.logits or n != "semantic_logits"}
        if "semantic" in kept:
            ids = kept["semantic"]
            small = np.uint8 if 0 <= ids.min(initial=0) and ids.max(initial=0) < 255 else np.int32
            kept["semantic"] = ids.astype(small)
        if "semantic_logits" in answers:
            kept["semantic_tie"] = margin(answers["semantic_logits"]) < TIE
        for i, key in enumerate(keys):
            np.savez(self.target / f"{key}.npz", **{n: a[i] for n, a in kept.items()})


def dark_images(folder: Path, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What cameras also see: a covered lens, a blown-out frame, and a real scene at night.

    With the first image's focal length: artefacts may be exported with other recorded cameras.
    """
    first = load(folder, INPUTS, keys[0])
    real = first["image"]
    images = [np.zeros_like(real), np.full_like(real, 255), (real * 0.1).astype(np.uint8)]
    return np.stack(images), np.full(len(images), first["focal_px"], np.float32)


DARK_KEYS = ("covered-lens", "blown-out", "night")


def consistency(
    runtime: Runtime, keys: Sequence[str], folder: Path, *, batch: int
) -> dict[str, dict[str, float]]:
    """How far the artefact contradicts itself, per output: the largest gap of each question.

    ``repeat`` the same batch twice; ``permuted`` the rows in reverse; ``identical_rows`` one image
    in every row, both of ``batch`` and of the largest one; ``other_batch`` the same images in
    batches of other sizes: every one of an engine's profile, `BATCHES` where N is free. No
    reference is needed.
    """
    names = [n for n in runtime.card.outputs if n != "semantic_logits"]
    worst: dict[str, dict[str, float]] = {name: {} for name in names}
    for question, found, expected in _questions(runtime, keys, folder, batch=batch):
        for name in names:
            gap = worst_gap(name, found[name], expected[name])
            worst[name][question] = max(gap, worst[name].get(question, 0.0))
    return worst


def _questions(
    runtime: Runtime, keys: Sequence[str], folder: Path, *, batch: int
) -> Iterator[tuple[str, Answers, Answers]]:
    """(question, answers, answers that they must equal), one after the other: they are large."""
    sizes = batch_sizes(runtime, batch)
    most = max(sizes)
    chosen = [keys[i % len(keys)] for i in range(most)]
    _, images, focal_px = next(batches(folder, chosen, most))
    first = runtime(images[:batch], focal_px[:batch])
    yield "repeat", runtime(images[:batch], focal_px[:batch]), first
    whole = runtime(images, focal_px) if most > batch else first
    for n, straight in {batch: first, most: whole}.items():
        turned = runtime(images[:n][::-1], focal_px[:n][::-1])
        yield "permuted", _rows(turned, slice(None, None, -1)), straight
        same = runtime(np.repeat(images[:1], n, 0), np.repeat(focal_px[:1], n))
        rows = {name: np.repeat(a[:1], n, 0) for name, a in same.items()}
        yield "identical_rows", same, rows
    yield "other_batch", first, _rows(whole, slice(0, batch))
    for n in sizes:
        if n not in (batch, most):
            yield "other_batch", runtime(images[:n], focal_px[:n]), _rows(whole, slice(0, n))


def batch_sizes(runtime: Runtime, batch: int) -> list[int]:
    """The batch sizes to be asked: all of a profile, up to `MOST_SIZES` of them; else a choice."""
    if runtime.card.batch is not None:
        return [batch]
    if runtime.largest is None:
        return sorted({batch, *BATCHES})
    if runtime.largest <= MOST_SIZES:
        return list(range(1, runtime.largest + 1))
    return sorted({batch, *BATCHES, *range(16, runtime.largest, 16), runtime.largest})


def _rows(answers: Answers, which: slice) -> Answers:
    return {name: array[which] for name, array in answers.items()}
