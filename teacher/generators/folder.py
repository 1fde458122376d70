"""Labels that exist on disk, as a teacher: exact truth of a label set, looked up by content key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from teacher.generators import Query
from teacher.label import Answer, Space, Task
from teacher.store import LabelSet

SPACE_OF = {
    Task.DEPTH: Space.METRIC,
    Task.NORMALS: Space.UNIT_NORMALS,
    Task.SEMANTIC: Space.CLASS_IDS,
    Task.INSTANCES: Space.INSTANCE_IDS,
}


class TruthTeacher:
    """Answers with the stored labels of the same image; an image it does not know gets none."""

    def __init__(self, *, labels: str) -> None:
        """``labels``: a label set; it is verified before the first answer."""
        self.labels = LabelSet(labels)
        self.labels.verify()
        self.tasks = self.labels.tasks

    def describe(self) -> dict[str, Any]:
        """The set is pinned by its plan hash, not by its path."""
        classes = {str(k): v for k, v in self.labels.classes.items()}
        return {"name": "truth", "plan_hash": self.labels.meta["plan_hash"], "classes": classes}

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """The stored arrays, if the image has the size of the label."""
        answers: list[dict[Task, Answer]] = []
        for query in queries:
            answers.append({})
            if query.key not in self.labels:
                continue
            label = self.labels[query.key]
            if label.image.shape != query.image.shape:
                continue
            for task in tasks:
                if task in label.values:
                    extras = label.provenance.get(str(task), {})
                    answers[-1][task] = Answer(
                        task=task, space=SPACE_OF[task], values=label.values[task], extras=extras
                    )
        return answers
