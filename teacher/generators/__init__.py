"""Teachers by name: one file per family, each answering in its own space.

A user's own teacher is any class with the three members of `Teacher`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

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
