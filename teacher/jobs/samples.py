"""One sample between source and shard: decode it, ask the teacher, make its label."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from teacher.align import AFFINE
from teacher.anchors import Anchor, needless, needs_anchor
from teacher.confidence import Calibration
from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators import Query, Teacher
from teacher.images import ImageError, bounded, encode_png, read
from teacher.jobs.plan import Entry, forget_key
from teacher.jobs.sources import Source
from teacher.label import Answer, Camera, Label, LabelError, Task, coverage, validate
from teacher.shards import content_key, encode_members, summarise


@dataclasses.dataclass(kw_only=True)
class Prepared:
    """A decoded input, or the reason why there is none."""

    entry: Entry
    query: Query | None = None
    encoded: tuple[bytes, str] | None = None
    reason: str = ""


def prepare(entry: Entry, source: Source, *, max_side: int | None) -> Prepared:
    """Bytes -> query: upright sRGB, bounded, with its camera and the file that shows just that."""
    if entry.duplicate_of:
        return Prepared(entry=entry)
    try:
        data = source.read(entry.uri)
        if source.keyed_by_bytes(entry.uri) and content_key(data) != entry.key:
            forget_key(source, entry.uri)
            raise UsageError(
                f"{entry.uri}: the file changed after it was planned. Start again: it is planned "
                "anew, into another out= if shards were already sealed."
            )
        picture = read(data)
    except ImageError as error:
        return Prepared(entry=entry, reason=str(error))
    except FileNotFoundError as error:
        raise UsageError(
            f"{entry.uri}: the file is gone since it was planned. Bring it back to go on, or start "
            "with another out=."
        ) from error
    known = source.camera(entry.uri)
    image, camera = picture.image, known if known is not None else picture.camera
    if max_side is not None:
        image, camera = bounded(image, camera, max_side=max_side)
    query = Query(key=entry.key, image=image, camera=camera, uri=entry.uri)
    untouched = picture.plain and image.shape == picture.image.shape
    suffix = "png" if data.startswith(b"\x89PNG") else "jpg" if data.startswith(b"\xff\xd8") else ""
    encoded = (data, suffix) if untouched and suffix else (encode_png(image), "png")
    return Prepared(entry=entry, query=query, encoded=encoded)


def to_label(
    item: Prepared,
    answers: dict[Task, Answer],
    tasks: Sequence[Task],
    *,
    anchor: Anchor | None = None,
    scale: Answer | None = None,
    calibration: Calibration | None = None,
) -> Label:
    """Query + answers -> label; `LabelError` with the reason when the image must be rejected.

    ``scale`` is the ``anchor``'s depth of the image, with which affine depth becomes metric.
    ``calibration`` gives confidence, see `teacher.confidence`.
    """
    assert item.query is not None and item.encoded is not None
    query = item.query
    provenance: dict[str, Any] = {"source_sha256_96": query.key}
    label = Label(
        key=query.key,
        image=query.image,
        values={},
        camera=query.camera,
        provenance=provenance,
        encoded=item.encoded,
    )
    for task in tasks:
        answer = answers.get(task)
        if answer is None:
            raise LabelError(f"the teacher gave no {task}")
        if coverage(task, answer.values) == 0:
            why = f": {answer.extras['reason']}" if "reason" in answer.extras else ""
            raise LabelError(f"the teacher's {task} has no known pixel{why}")
        if answer.space in AFFINE:
            if anchor is None:
                raise UsageError(needs_anchor(answer.space))
            answer, provenance["alignment"] = anchor.metric(answer, scale)
            if coverage(task, answer.values) == 0:
                raise LabelError(f"the teacher's {task} has no known pixel after its alignment")
        elif task is Task.DEPTH and anchor is not None:
            raise UsageError(needless(anchor.name))
        label.values[task] = answer.values
        if answer.uncertainty is not None:
            label.uncertainty[task] = answer.uncertainty
        extras = dict(answer.extras)
        if answer.residual is not None and np.isfinite(answer.residual).any():
            extras["mean_residual"] = round(float(np.nanmean(answer.residual)), 4)
        if extras:
            provenance[str(task)] = extras
        if answer.picture is not None:
            label.pictures[task] = answer.picture
        label.camera = estimated(label.camera, answer)
    if scale is not None:
        label.camera = estimated(label.camera, scale)
    if calibration is not None:
        calibration.apply(label, answers)
    return label


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finisher:
    """Everything between the answer and the tar; plain enough to be sent to another process.

    ``anchor`` aligns and is not asked: its teacher stays where it was loaded.
    """

    tasks: Sequence[Task]
    anchor: Anchor | None = None
    calibration: Calibration | None = None
    keep_pictures: bool = False

    def __call__(
        self, item: Prepared, answers: dict[Task, Answer], scale: Answer | None
    ) -> tuple[list[tuple[str, bytes]], dict[str, Any]]:
        """Members of the tar and the index row; `LabelError` when the image must be rejected."""
        label = to_label(
            item, answers, self.tasks, anchor=self.anchor, scale=scale, calibration=self.calibration
        )
        if not self.keep_pictures:
            label.pictures.clear()
        validate(label)
        return encode_members(label), summarise(label)


def estimated(camera: Camera, answer: Answer) -> Camera:
    """The camera with the focal length a model estimated, where it would else be assumed.

    Depth in metres and the focal length it was computed with belong together.
    """
    focal_px = answer.extras.get("focal_px")
    by_model = answer.extras.get("focal_source") == "model"
    if camera.source != "assumed" or focal_px is None or not by_model:
        return camera
    return dataclasses.replace(camera, fx=focal_px, fy=focal_px, source="estimated")


def asked_camera(label: Label) -> Camera:
    """The camera that a label job asked with: where a model estimated one, it had been assumed.

    (To the rounding of the shorter side, where the image was shrunk.)
    """
    camera, about = label.camera, label.provenance
    extras = [*about.values(), about.get("alignment", {}).get("anchor_extras")]
    by_model = any(isinstance(x, dict) and x.get("focal_source") == "model" for x in extras)
    if camera.source != "estimated" or not by_model:
        return camera
    return Camera.assumed(camera.width, camera.height)


def answer_split(teacher: Teacher, queries: Sequence[Query], tasks: Sequence[Task]) -> list:
    """The teacher's answers; a batch too large for the device is halved, answers stay the same.

    (A teacher's answer depends on its own image, key and seeds only, never on its neighbours.)
    """
    try:
        return teacher.answer(queries, tasks)
    except Exception as error:
        if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):
            raise
        if len(queries) == 1:
            height, width = queries[0].image.shape[:2]
            raise EnvironmentFailure(
                f"the teacher ran out of memory on a single {width}x{height} image ({error}); "
                "lower max_side, use a smaller dtype or a larger device."
            ) from error
    half = len(queries) // 2
    first = answer_split(teacher, queries[:half], tasks)
    return first + answer_split(teacher, queries[half:], tasks)
