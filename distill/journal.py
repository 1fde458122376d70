"""What a lesson writes down: one CSV row per step and per validation, TensorBoard, pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill.data import DataModule
from distill.losses import all_losses
from distill.masked import alone
from distill.module import Lesson
from distill.pictures import comparison
from student.checkpoint import write_atomic
from student.grouping import group
from student.model import Student
from teacher import metrics

STEPS, VALIDATIONS, PICTURE = "metrics.csv", "validation.csv", "validation.png"
ROWS_SHOWN = 4
WORST = 3  # cases kept per task
# What ranks a case, per task: the number, and whether larger is worse.
HEADLINE = {
    "depth": ("abs_rel", True),
    "normals": ("mean_deg", True),
    "semantic": ("pixel_accuracy", False),
    "instances": ("pq", False),
}
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
        self.picture(picture)
        self.board.flush()

    def picture(self, picture: np.ndarray | None) -> None:
        """Put the answers to the first held-out images beside the logs."""
        if picture is not None:
            Image.fromarray(picture).save(self.folder / PICTURE)

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
def validate(
    lesson: Lesson, data: DataModule
) -> tuple[dict[str, float], np.ndarray | None, list[dict[str, Any]]]:
    """The averaged student on the held-out images, whole and letterboxed.

    Returns:
        ``loss`` and, by the ruler of `teacher.metrics` at the student's size, ``abs_rel``,
        ``delta1`` (unaligned metres), ``boundary_f1``, ``mean_deg``, ``pixel_accuracy``: per image,
        then mean; ``miou`` and ``pq`` over all; the picture of the first few; and the worst cases
        of each task (``task``, ``key``, ``number``, ``value``, ``picture``). Empty without held-out
        images.
    """
    sums: dict[str, list[float]] = {}
    names = lesson.student.config["classes"].values()
    confusion = metrics.SemanticConfusion(classes=dict(enumerate(names))) if names else None
    tally = metrics.PanopticTally(classes={0: "none", 1: "object"})
    picture, cases, at = None, Cases(), 0
    for batch in data.val_batches():
        batch = {k: v.to(lesson.device) for k, v in batch.items()}
        answer = lesson.average.student(batch["image"])
        with alone():  # the other processes are not here
            sums.setdefault("loss", []).append(float(all_losses(answer, batch)["total"]))
        here = {k: v.float().cpu().numpy() for k, v in answer.items()}
        truth = {k: v.cpu().numpy() for k, v in batch.items()}
        for i in range(len(truth["image"])):
            one, said = ({k: v[i : i + 1] for k, v in d.items()} for d in (truth, here))
            numbers = judge(lesson.student, said, one, confusion, tally)
            for name, value in numbers.items():
                sums.setdefault(name, []).append(value)
            cases.offer(data.val[at][1], numbers, one, said, lesson.student.tasks)
            at += 1
        if picture is None:
            few = [{k: v[:ROWS_SHOWN] for k, v in d.items()} for d in (truth, here)]
            picture = comparison(few[0], few[1], lesson.student.tasks)
    means = {name: float(np.mean(values)) for name, values in sums.items()}
    if confusion is not None and "pixel_accuracy" in means:
        means["miou"] = float(confusion.result()["miou"])
    if "pq" in means:
        means["pq"] = float(tally.result()["per_class"]["object"]["pq"])
    return means, picture, cases.listed()


class Cases:
    """The worst few images of every task, with their pictures."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.found: dict[str, list[dict[str, Any]]] = {}

    def offer(
        self,
        key: str,
        numbers: dict[str, float],
        truth: dict[str, np.ndarray],
        answer: dict[str, np.ndarray],
        tasks: Sequence[str],
    ) -> None:
        """Keep this image for the tasks in which it is among the worst."""
        for task in tasks:
            name, large_is_bad = HEADLINE[task]
            if name not in numbers:
                continue
            value = numbers[name]
            kept = self.found.setdefault(task, [])
            rank = value if large_is_bad else -value
            if len(kept) == WORST and rank <= kept[-1]["rank"]:
                continue
            picture = comparison(truth, answer, [task])
            case = {"task": task, "key": key, "number": name, "value": value, "rank": rank}
            kept.append(case | {"picture": picture})
            kept.sort(key=lambda c: (-c["rank"], c["key"]))
            del kept[WORST:]

    def listed(self) -> list[dict[str, Any]]:
        """All kept cases, task by task, worst first."""
        return [case for kept in self.found.values() for case in kept]


def judge(
    student: Student,
    answer: dict[str, np.ndarray],
    truth: dict[str, np.ndarray],
    confusion: metrics.SemanticConfusion | None,
    tally: metrics.PanopticTally,
) -> dict[str, float]:
    """The numbers of one image (batch axis of 1) by name; a task without truth is left out.

    So are metres where the label's depth is affine only (``depth_space``): nobody measured them.
    """
    out: dict[str, float] = {}
    if "depth" in answer:
        to_metres = truth["focal_px"][0] / student.canonical_focal_px
        pair = (answer["depth"][0, 0] * to_metres, truth["depth"][0, 0] * to_metres)
        numbers = metrics.depth_metrics(*pair, min_m=MIN_M, max_m=MAX_M)
        if numbers["count"]:
            measured = not truth["depth_space"][0]
            out |= {name: float(numbers[name]) for name in ("abs_rel", "delta1") if measured}
            sky = answer["sky"][0, 0] > 0  # its outline is an edge
            edges = metrics.boundary_f1(np.where(sky, np.inf, pair[0]), pair[1])
            out |= {} if math.isnan(edges) else {"boundary_f1": edges}
    if "normals" in answer:
        pair = (answer["normals"][0].transpose(1, 2, 0), truth["normals"][0].transpose(1, 2, 0))
        angles = metrics.normal_metrics(*pair)
        if angles["count"]:
            out["mean_deg"] = float(angles["mean_deg"])
    if confusion is not None:
        said = answer["semantic"][0].argmax(0).astype(np.uint16)
        aim = truth["semantic"][0].astype(np.uint16)  # -1 becomes 65535, unknown
        confusion.add(said, aim)
        known = aim != 65535
        if known.any():
            out["pixel_accuracy"] = float((said == aim)[known].mean())
    if "center" in answer and (truth["instance_ids"] >= 0).any():
        out |= _judge_instances(answer, truth, tally)
    return out


def _judge_instances(
    answer: dict[str, np.ndarray], truth: dict[str, np.ndarray], tally: metrics.PanopticTally
) -> dict[str, float]:
    """PQ of one image's grouped instances, without regard to class; added to ``tally`` as well."""
    said, _ = group(answer["center"][0, 0], answer["offset"][0])
    aim = truth["instance_ids"][0]
    classes = [np.where(ids < 0, 255, ids > 0).astype(np.uint8) for ids in (said, aim)]
    one = metrics.PanopticTally(classes={0: "none", 1: "object"})
    one.add((classes[0], said), (classes[1], aim.clip(0).astype(np.uint16)))
    tally.merge(one)
    found = one.result()["per_class"]["object"]
    return {"pq": float(found["pq"])} if found["tp"] + found["fn"] else {}
