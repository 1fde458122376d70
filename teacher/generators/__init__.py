"""Teachers by name: one file per family, each answering in its own space.

A user's own teacher is any class with the members of `Teacher`; it may add ``max_side``, the
longer side in pixels up to which it can use an image (the label job then hands over no more), and
``spaces``, task -> space of its answers: on the class, so that a job that needs an anchor is
refused before anything is loaded; an instance may know better, by its checkpoint.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from teacher.errors import UsageError
from teacher.label import Answer, Camera, Task


@dataclass(frozen=True, kw_only=True)
class Query:
    """One image to be asked about.

    Attributes:
        key: content key; seeds are derived from it, so that an answer never depends on the batch.
        image: uint8 [H, W, 3] upright sRGB.
        camera: of this image; its ``source`` says whether it was assumed.
        uri: where the image came from (a path, ``set.tar::member``), for teachers that look up.
    """

    key: str
    image: np.ndarray
    camera: Camera
    uri: str = ""


class Teacher(Protocol):
    """Anything that answers dense questions about images."""

    tasks: tuple[Task, ...]

    def describe(self) -> dict[str, Any]:
        """Plain JSON that pins the answers: name, weights and their hash, prompts, seeds, steps."""
        ...

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """One dict per query, in order; every array has the query image's height and width."""
        ...


# name -> (module, class); a user's own teacher is named as "package.module:Class"
TEACHERS: dict[str, tuple[str, str]] = {
    "truth": ("teacher.generators.folder", "TruthTeacher"),
    "folder": ("teacher.generators.folder", "FolderTeacher"),
    "mini": ("teacher.generators.mini", "MiniTeacher"),
    "marigold": ("teacher.generators.marigold", "MarigoldTeacher"),
    "lotus": ("teacher.generators.lotus", "LotusTeacher"),
    "lotus2": ("teacher.generators.lotus2", "Lotus2Teacher"),
    "depth_pro": ("teacher.generators.specialist", "DepthProTeacher"),
    "depth_anything": ("teacher.generators.specialist", "DepthAnythingTeacher"),
}


def teacher_class(name: str) -> Any:
    """The class of a teacher by name; `UsageError` for an unknown one, listing those there are."""
    module, _, cls = name.partition(":")
    if name in TEACHERS:
        module, cls = TEACHERS[name]
    elif not cls:
        raise UsageError(
            f"teacher.name={name!r}: no such teacher; there are {sorted(TEACHERS)}, and your own "
            "as 'package.module:Class'."
        )
    try:
        return getattr(importlib.import_module(module), cls)
    except (ModuleNotFoundError, AttributeError) as error:
        if name in TEACHERS:
            raise
        raise UsageError(f"teacher.name={name!r}: cannot be imported ({error}).") from error


def load_teacher(*, name: str, **options: Any) -> Teacher:
    """Build a teacher by name (`teacher_class`); ``options`` go to its constructor."""
    cls = teacher_class(name)
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        raise UsageError(
            f"teacher.name={name!r}: its constructor is {cls.__name__}{inspect.signature(cls)}; "
            f"given are {sorted(options)}: {error}."
        ) from error
    teacher = cls(**options)
    if lacking := [m for m in ("tasks", "describe", "answer") if not hasattr(teacher, m)]:
        raise UsageError(
            f"teacher.name={name!r}: no teacher, it lacks {lacking}; see docs/own-teacher.md."
        )
    return teacher
