"""What gives an affine answer its metres: another teacher's metric depth, or a known range.

Any teacher that answers in metres is an anchor: ``folder`` (depth files, sparse points, data sets),
``truth`` (a label set), ``depth_pro``, ``depth_anything``, a user's own class. ``range`` takes the
nearest and the farthest depth of the scene.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from teacher.align import (
    AFFINE,
    METHODS,
    Alignment,
    AlignmentError,
    apply,
    fit,
    fit_range,
    weights_of,
)
from teacher.errors import UsageError
from teacher.generators import Query, Teacher, load_teacher
from teacher.label import Answer, Space, Task

METRIC_TEACHERS = ("folder", "truth", "depth_pro", "depth_anything")
LISTED = (
    "anchor=folder (depth files or sparse points beside the images, or a data set's layout), "
    "anchor=truth (a label set), anchor=range (near_m and far_m of the scene), anchor=depth_pro "
    "and anchor=depth_anything (metric models); docs/anchors.md shows each"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchor:
    """An anchor and how answers are aligned with it.

    Attributes:
        name: as chosen, kept with every label.
        teacher: answers with metric depth; None for a range.
        range_m: (near, far) in metres; None for a teacher.
        method: the solver (`teacher.align.METHODS`).
        max_residual: largest median |ln(z / anchor)| of an image that is still labelled.
    """

    name: str
    teacher: Teacher | None = None
    range_m: tuple[float, float] | None = None
    method: str = "ransac"
    max_residual: float = 0.1

    def describe(self) -> dict[str, Any]:
        """Plain JSON that pins the metres: the anchor, the solver, the limit."""
        about = {"name": self.name, "method": self.method, "max_residual": self.max_residual}
        if self.range_m is not None:
            return {"name": self.name, "near_m": self.range_m[0], "far_m": self.range_m[1]}
        assert self.teacher is not None
        return about | {"teacher": self.teacher.describe()}

    def ask(
        self, queries: Sequence[Query], answered: Callable[..., list[dict[Task, Answer]]]
    ) -> list[Answer | None]:
        """The anchor's depth for each query; ``answered(teacher, queries, tasks)`` asks it."""
        if self.teacher is None:
            return [None] * len(queries)
        found = answered(self.teacher, queries, [Task.DEPTH])
        for one in found:
            if Task.DEPTH in one:
                _refuse_affine(self.name, one[Task.DEPTH].space)
        return [one.get(Task.DEPTH) for one in found]

    def metric(self, answer: Answer, scale: Answer | None) -> tuple[Answer, dict[str, Any]]:
        """The affine ``answer`` in metres, and its alignment for the provenance.

        ``scale`` is what `ask` gave. Raises `AlignmentError` when the image must be rejected.
        """
        if self.range_m is not None:
            near_m, far_m = self.range_m
            found = fit_range(answer.values, near_m=near_m, far_m=far_m, space=answer.space)
        elif scale is None:
            raise AlignmentError(f"the anchor {self.name} has no depth for this image")
        else:
            found = self._fit(answer, scale)
        about = found.to_json() | {"anchor": self.name}
        if scale is not None and scale.extras:
            about["anchor_extras"] = scale.extras
        return apply(answer, found), about

    def _fit(self, answer: Answer, scale: Answer) -> Alignment:
        weights = None
        if scale.uncertainty is not None:
            weights = weights_of(scale.values, scale.uncertainty, space=answer.space)
        if why := scale.extras.get("reason"):
            raise AlignmentError(f"the anchor {self.name} has no depth for this image: {why}")
        found = fit(
            answer.values, scale.values, space=answer.space, weights=weights, method=self.method
        )
        assert found.residual is not None
        if not found.residual <= self.max_residual:
            raise AlignmentError(
                f"alignment residual {found.residual:.3g} (median |ln(depth / anchor)| over "
                f"{found.points} points) is above align.max_residual={self.max_residual:g}"
            )
        return found


def load_anchor(anchor: dict[str, Any] | None, align: dict[str, Any] | None) -> Anchor | None:
    """``anchor`` (``name`` and its own keys; name None: no anchor) and ``align`` -> `Anchor`."""
    options = dict(anchor or {})
    name = options.pop("name", None)
    if name is None:
        return None
    how: dict[str, Any] = {"method": "ransac", "max_residual": 0.1} | (align or {})
    if how["method"] not in METHODS:
        raise UsageError(f"align.method={how['method']!r}: expected one of {METHODS}.")
    if not (how["max_residual"] > 0 and math.isfinite(how["max_residual"])):
        raise UsageError(f"align.max_residual={how['max_residual']}: expected more than 0.")
    if name == "range":
        near_m, far_m = float(options["near_m"]), float(options["far_m"])
        if not 0 < near_m < far_m < math.inf:
            raise UsageError(f"anchor.near_m={near_m} far_m={far_m}: expected 0 < near_m < far_m.")
        return Anchor(name="range", range_m=(near_m, far_m), **how)
    if ":" not in name and name not in METRIC_TEACHERS:
        raise UsageError(f"anchor.name={name!r} gives no metres. There are {LISTED}.")
    teacher = load_teacher(name=name, **options)
    if Task.DEPTH not in teacher.tasks:
        raise UsageError(f"anchor.name={name}: it answers no depth. There are {LISTED}.")
    _refuse_affine(name, getattr(teacher, "spaces", {}).get(Task.DEPTH, Space.METRIC))
    return Anchor(name=name, teacher=teacher, **how)


def _refuse_affine(name: str, space: Space) -> None:
    """An anchor's answers are metres, or nothing could be aligned with them."""
    if space is not Space.METRIC:
        raise UsageError(
            f"anchor.name={name}: it answers depth as {str(space)!r}, and an anchor must answer in "
            f"metres. There are {LISTED}."
        )


def check_anchor(teacher: Any, anchor: str | None, tasks: Sequence[str]) -> None:
    """Refuse affine depth without an anchor, and an anchor without use.

    ``teacher`` is a class, before anything of it is loaded, or a loaded teacher, which may know its
    space better; ``anchor`` the name of the anchor. A teacher that does not tell its ``spaces`` is
    judged by its first answer instead.
    """
    space = getattr(teacher, "spaces", {}).get(Task.DEPTH)
    if Task.DEPTH not in tasks or space is None:
        return
    if space in AFFINE and anchor is None:
        raise UsageError(needs_anchor(space))
    if space is Space.METRIC and anchor is not None:
        raise UsageError(needless(anchor))


def needs_anchor(space: Space) -> str:
    """The message for an affine teacher without an anchor."""
    return (
        f"the teacher answers depth as {str(space)!r}; a label set holds metres, so the job "
        f"needs a metric anchor to align it with: {LISTED}."
    )


def needless(anchor: str) -> str:
    """The message for a metric teacher with an anchor."""
    return (
        f"anchor.name={anchor}: this teacher answers depth in metres already, nothing is "
        "aligned with an anchor. Leave the anchor out."
    )
