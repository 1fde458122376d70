"""A label job as plain values: enough to build its worker in any process, here or elsewhere.

With several workers the models are loaded in the workers only. What the plan must know of them
(`About`) is found out by `survey`, in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher.anchors import Anchor, check_anchor, load_anchor
from teacher.confidence import Calibration
from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators import Teacher, load_teacher, teacher_class
from teacher.jobs.commit import this_host
from teacher.jobs.engines import Worker
from teacher.jobs.plan import Entry, Plan
from teacher.jobs.sources import Source, open_source
from teacher.label import Task
from teacher.shards import canonical_json

PROBE_FROM_BATCHES = 10  # smaller jobs start at once: the probe would be a visible part of them
LIBRARIES = ("dense-distill", "numpy", "pillow", "torch", "diffusers", "transformers", "numba")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a plan and its label set must know of the models; plain values."""

    teacher: dict[str, Any]
    anchor: dict[str, Any] | None
    calibration: dict[str, Any] | None
    tasks: list[Task]
    max_side: int | None
    software: dict[str, str]
    cost: tuple[float, float] | None = None  # seconds in the teacher, bytes; per image, if probed


@dataclass(frozen=True, kw_only=True)
class Models:
    """The loaded teacher and anchor of a job."""

    teacher: Teacher
    anchor: Anchor | None
    calibration: Calibration | None
    about: About


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `teacher.jobs.run.label` was asked for, without the plan."""

    teacher: dict[str, Any]
    images: str
    video: dict[str, Any] | None
    tasks: list[str]
    max_side: int | None
    keep_pictures: bool
    threads: int
    batch_size: int
    anchor: dict[str, Any] | None
    align: dict[str, Any] | None
    calibration: str | None = None

    def source(self) -> Source:
        """Where the images come from."""
        return open_source(self.images, video=self.video)

    def load(self) -> Models:
        """Load teacher and anchor; refuse what they cannot do."""
        anchor_name = (self.anchor or {}).get("name")
        check_anchor(teacher_class(self.teacher["name"]), anchor_name, self.tasks)
        teacher = load_teacher(**self.teacher)
        wanted = parse_tasks(self.tasks, teacher.tasks)
        anchor = load_anchor(self.anchor, self.align)
        check_anchor(teacher, anchor_name, wanted)
        calibration = self._calibration(teacher, anchor, wanted)
        own_side = getattr(teacher, "max_side", None)
        about = About(
            teacher=teacher.describe(),
            anchor=anchor.describe() if anchor is not None else None,
            calibration=calibration.describe() if calibration is not None else None,
            tasks=wanted,
            max_side=min((s for s in (self.max_side, own_side) if s is not None), default=None),
            software=software(),
        )
        return Models(teacher=teacher, anchor=anchor, calibration=calibration, about=about)

    def facts(self, about: About) -> dict[str, Any]:
        """What decides the labels beside the inputs; part of the plan's hash."""
        found: dict[str, Any] = {"teacher": about.teacher, "max_side": about.max_side}
        found["tasks"] = [str(t) for t in about.tasks]
        found["keep_pictures"] = self.keep_pictures
        if about.anchor is not None:
            found["anchor"] = about.anchor
        if about.calibration is not None:
            found["calibration"] = about.calibration
        return found

    def _calibration(
        self, teacher: Teacher, anchor: Anchor | None, tasks: Sequence[Task]
    ) -> Calibration | None:
        """The calibration file, checked against the teacher and the tasks it will judge."""
        if self.calibration is None:
            return None
        if anchor is not None:
            raise UsageError(
                "calibration and anchor exclude each other: an aligned depth has the uncertainty "
                "of its alignment. Leave one of them out."
            )
        calibration = Calibration.load(self.calibration)
        calibration.fits(teacher.describe(), tasks)
        return calibration


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A job with its plan and folder: what a worker needs to build itself in its own process."""

    job: Job
    plan: Plan
    folder: Path

    def build(
        self, *, models: Models | None = None, source: Source | None = None, quiet: bool = False
    ) -> Worker:
        """A worker; what was loaded already may be handed over.

        Raises:
            EnvironmentFailure: what this process loads is not what the job was planned with.
        """
        if models is None:
            models = self.job.load()
            self._check(self.job.facts(models.about))
        return Worker(
            teacher=models.teacher,
            source=source or self.job.source(),
            plan=self.plan,
            folder=self.folder,
            tasks=models.about.tasks,
            max_side=models.about.max_side,
            keep_pictures=self.job.keep_pictures,
            threads=self.job.threads,
            anchor=models.anchor,
            calibration=models.calibration,
            quiet=quiet,
        )

    def _check(self, here: dict[str, Any]) -> None:
        """Refuse to mix: a branch moved on since the plan, other files on this node."""
        for name in sorted({*here, *self.plan.facts}):
            loaded, planned = here.get(name), self.plan.facts.get(name)
            if canonical_json(loaded) == canonical_json(planned):
                continue
            if isinstance(loaded, dict) and isinstance(planned, dict):
                part = next(k for k in {**planned, **loaded} if loaded.get(k) != planned.get(k))
                name, loaded, planned = f"{name}.{part}", loaded.get(part), planned.get(part)
            raise EnvironmentFailure(
                f"{this_host()}: this worker loads {name} {loaded!r:.80}, the job was planned with "
                f"{planned!r:.80}. Labels of two teachers never mix: give every worker the same "
                "files and revision, then start the same command again."
            )


def survey(job: Job) -> About:
    """Load the models, say what the plan must know and, for a large job, what an image costs."""
    models, source = job.load(), job.source()
    uris = source.list()
    if len(uris) < PROBE_FROM_BATCHES * job.batch_size:
        return models.about
    few = [Entry(uri=uri, key=source.key(uri)) for uri in uris[: job.batch_size]]
    plan = Plan(entries=few, shard_size=len(few), batch_size=len(few), facts={})
    worker = Recipe(job=job, plan=plan, folder=Path()).build(models=models, source=source)
    return About(**vars(models.about) | {"cost": worker.probe(0)})


def software() -> dict[str, str]:
    """Versions of what decides the bytes: Python and the libraries loaded in this process."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        module = {"pillow": "PIL", "dense-distill": "teacher"}.get(name, name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if module in sys.modules:
                found[name] = importlib.metadata.version(name)
    return found


def parse_tasks(tasks: Sequence[str], offered: Sequence[Task]) -> list[Task]:
    """Task names -> tasks in the fixed order, checked against what the teacher can answer."""
    known = [str(t) for t in offered]
    strange = [t for t in tasks if t not in known]
    if strange or not tasks:
        raise UsageError(f"tasks={list(tasks)}: this teacher answers {known}; ask for those.")
    return [t for t in Task if t in tasks]
