"""What a lesson writes down: one CSV row per step and per validation, TensorBoard, pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.data import DataModule
from distill.losses import all_losses
from distill.module import Lesson
from distill.pictures import comparison
from student.checkpoint import write_atomic
from teacher import metrics

STEPS, VALIDATIONS, PICTURE = "metrics.csv", "validation.csv", "validation.png"
ROWS_SHOWN = 4
MIN_M, MAX_M = 0.3, 40.0  # where depth is judged, as in `teacher.score`


class Journal:
    """Appends to a run's logs; a resumed run first drops what came after its checkpoint."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Open the logs of ``folder`` for a lesson that goes on after ``step``."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        for name in (STEPS, VALIDATIONS):
            _drop_after(folder / name, step)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._waiting: list[dict[str, float]] = []

    def step(self, lesson: Lesson) -> None:
        """Note one step; it reaches the disk with the next `flush`."""
        values = {name: float(value) for name, value in lesson.last.items()}
        self._waiting.append({"step": lesson.step_number, **values})

    def flush(self) -> None:
        """Write the noted steps; TensorBoard gets the last of them."""
        if not self._waiting:
            return
        _append(self.folder / STEPS, self._waiting)
        last = self._waiting[-1]
        for name, value in last.items():
            if name != "step" and math.isfinite(value):
                self.board.add_scalar(f"train/{name}", value, int(last["step"]))
        self._waiting = []

    def validation(
        self, lesson: Lesson, numbers: dict[str, float], picture: np.ndarray | None
    ) -> None:
        """Note a validation and its picture."""
        self.flush()
        _append(self.folder / VALIDATIONS, [{"step": lesson.step_number, **numbers}])
        for name, value in numbers.items():
            if math.isfinite(value):
                self.board.add_scalar(f"validation/{name}", value, lesson.step_number)
        if picture is not None:
            self.board.add_image("answers", picture, lesson.step_number, dataformats="HWC")
            Image.fromarray(picture).save(self.folder / PICTURE)
        self.board.flush()

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self.board.close()


def _append(path: Path, rows: list[dict[str, float]]) -> None:
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _drop_after(path: Path, step: int) -> None:
    """Keep the header and the rows up to ``step``; a half-written last line goes too."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines[1:] if _step_of(line) <= step]
    text = "".join(lines[:1] + kept) if lines and lines[0].endswith("\n") else ""
    write_atomic(path, text.encode())


def _step_of(line: str) -> float:
    first, comma, _ = line.partition(",")
    return int(first) if comma and line.endswith("\n") and first.isdigit() else math.inf


@torch.no_grad()
def validate(lesson: Lesson, data: DataModule) -> tuple[dict[str, float], np.ndarray | None]:
    """The averaged student on the held-out images, whole and letterboxed.

    Returns:
        ``loss`` and, by the ruler of `teacher.metrics` at the student's size, ``abs_rel``,
        ``delta1`` (unaligned metres), ``mean_deg``, ``miou``: per image, then mean; and the
        picture of the first few. Empty without held-out images.
    """
    sums: dict[str, list[float]] = {}
    names = lesson.student.config["classes"].values()
    confusion = metrics.SemanticConfusion(classes=dict(enumerate(names))) if names else None
    picture = None
    for batch in data.val_batches():
        batch = {k: v.to(lesson.device) for k, v in batch.items()}
        answer = lesson.average.student(batch["image"])
        sums.setdefault("loss", []).append(float(all_losses(answer, batch)["total"]))
        here = {k: v.float().cpu().numpy() for k, v in answer.items()}
        truth = {k: v.cpu().numpy() for k, v in batch.items()}
        for name, value in _judge(lesson, here, truth, confusion):
            sums.setdefault(name, []).append(value)
        if picture is None:
            few = [{k: v[:ROWS_SHOWN] for k, v in d.items()} for d in (truth, here)]
            picture = comparison(few[0], few[1], lesson.student.tasks)
    numbers = {name: float(np.mean(values)) for name, values in sums.items()}
    if confusion is not None and sums:
        numbers["miou"] = float(confusion.result()["miou"])
    return numbers, picture


def _judge(
    lesson: Lesson,
    answer: dict[str, np.ndarray],
    truth: dict[str, np.ndarray],
    confusion: metrics.SemanticConfusion | None,
) -> Iterator[tuple[str, float]]:
    """Every number of every image of a batch by name; images without truth are left out."""
    for i, focal_px in enumerate(truth["focal_px"]):
        if "depth" in answer:
            to_metres = focal_px / lesson.student.canonical_focal_px
            pair = (answer["depth"][i, 0] * to_metres, truth["depth"][i, 0] * to_metres)
            numbers = metrics.depth_metrics(*pair, min_m=MIN_M, max_m=MAX_M)
            if numbers["count"]:
                yield from ((name, float(numbers[name])) for name in ("abs_rel", "delta1"))
        if "normals" in answer:
            pair = (answer["normals"][i], truth["normals"][i])
            angles = metrics.normal_metrics(*(a.transpose(1, 2, 0) for a in pair))
            if angles["count"]:
                yield "mean_deg", float(angles["mean_deg"])
        if confusion is not None:
            said = answer["semantic"][i].argmax(0).astype(np.uint16)
            confusion.add(said, truth["semantic"][i].astype(np.uint16))  # -1 becomes 65535, unknown
