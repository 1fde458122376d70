"""Run, then judge: this half judges saved answers (`export.answers`) against budgets.

Budgets (``conf/task/*.yaml``): {task: {precision: {"parity": {output: {measure: limit}},
"loss": {metric: limit}}}}. Every output of an artefact needs a budget: what is not bounded is not
checked, so a missing one is an error and not a pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.answers import DARK_KEYS, load
from export.letterbox import Letterbox, to_label_space
from export.parity import MEASURES, TASK_OF, TIE, UNITS, measures, summarise
from teacher.errors import UsageError
from teacher.label import Label, Task
from teacher.score import score
from teacher.store import LabelSet

LARGER_IS_BETTER = ("delta", "iou", "miou", "within", "pixel_accuracy", "f1")
Budgets = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One missed budget: which artefact, which task, which measure, by how much."""

    artefact: str
    task: str
    measure: str
    found: float | str | None
    budget: float | str | None
    unit: str = ""
    image: str = ""

    def __str__(self) -> str:
        """One sentence."""
        where = f", worst image {self.image}" if self.image else ""
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"{self.artefact}: {self.task}: {self.measure} is {_number(self.found)}{unit}, budget "
            f"{_number(self.budget)}{where}"
        )


def _number(value: float | str | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Reference:
    """A label set seen under the keys of the held-out images.

    A set that was labelled from another one's images may have other keys; its ``uri`` then names
    the original key. Images that it lacks are left out and counted in ``missing``.
    """

    def __init__(self, name: str, labels: LabelSet, keys: Sequence[str]) -> None:
        """``name`` is "teacher" or "truth"; ``keys`` are those of the held-out images."""
        self.name, self.labels, self.classes = name, labels, labels.classes
        by_uri = {row["uri"]: row["key"] for row in labels.rows if row["state"] == "labelled"}
        self.key_of = {k: k if k in labels else by_uri.get(k, "") for k in keys}
        self.missing = [k for k, own in self.key_of.items() if not own]
        if len(self.missing) == len(keys):
            raise UsageError(
                f"{name}={labels.path}: none of the {len(keys)} held-out images is in it; expected "
                "a label set of the same images."
            )

    def __len__(self) -> int:
        """Number of images that it knows."""
        return len(self.key_of) - len(self.missing)

    def __iter__(self) -> Iterator[Label]:
        """Labels under the held-out keys, in their order."""
        return (self[key] for key, own in self.key_of.items() if own)

    def __getitem__(self, key: str) -> Label:
        """One label under its held-out key."""
        return dataclasses.replace(self.labels[self.key_of[key]], key=key)


class Judge:
    """Applies one ruler and one set of budgets to everything that answered."""

    def __init__(
        self,
        *,
        folder: Path,
        keys: Sequence[str],
        references: Sequence[Reference],
        tasks: Sequence[str],
        budgets: Budgets,
        min_m: float,
        max_m: float,
    ) -> None:
        """``folder`` holds the saved answers; ``tasks`` are the ones to be judged."""
        self.folder, self.keys, self.references = folder, keys, references
        self.tasks, self.budgets = tasks, budgets
        self.bounds: dict[str, Any] = {"min_m": min_m, "max_m": max_m}

    def answers_for(self, name: str, label: Label) -> dict[Any, np.ndarray]:
        """The saved answers of ``name`` to a label's image, at the label's size."""
        raw = load(self.folder, name, label.key)
        raw.pop("semantic_margin", None)
        target = next(iter(raw.values())).shape[-2:]
        answers = to_label_space(raw, Letterbox.fit(label.image.shape[:2], target))
        if "semantic" in answers and Task.SEMANTIC in label.values:
            answers["semantic"] = answers["semantic"].astype(label.values[Task.SEMANTIC].dtype)
        return answers  # type: ignore[return-value]

    def scores(self, name: str) -> dict[str, Any]:
        """`teacher.score` of one runtime against every reference."""
        return {
            ref.name: score(
                lambda label: self.answers_for(name, label),
                ref,
                tasks=shared,
                classes=ref.classes or None,
                **self.bounds,
            )
            for ref in self.references
            if (shared := [t for t in self.tasks if t in ref.labels.tasks])
        }

    def teacher_scores(self) -> dict[str, Any]:
        """The teacher against the truth, when both are there."""
        by_name = {ref.name: ref for ref in self.references}
        if {"teacher", "truth"} - set(by_name):
            return {}
        teacher, truth = by_name["teacher"], by_name["truth"]
        shared = [t for t in self.tasks if t in teacher.labels.tasks and t in truth.labels.tasks]
        known = _Known(truth, [k for k, own in teacher.key_of.items() if own])
        if not shared or not len(known):
            return {}
        return {
            "truth": score(
                lambda label: _resampled(teacher[label.key], label.image.shape[:2]),
                known,
                tasks=shared,
                classes=truth.classes or None,
                **self.bounds,
            )
        }

    def parity(self, name: str, reference: str, outputs: Sequence[str]) -> dict[str, Any]:
        """Per output: `export.parity.summarise` over the images, and over the dark ones."""
        rows: dict[str, list[tuple[str, dict[str, float]]]] = {o: [] for o in outputs}
        dark: dict[str, list[tuple[str, dict[str, float]]]] = {o: [] for o in outputs}
        for keys, table in ((self.keys, rows), (DARK_KEYS, dark)):
            for key in keys:
                found, expected = (load(self.folder, n, key) for n in (name, reference))
                ties = expected["semantic_margin"] < TIE if "semantic_margin" in expected else None
                for output in outputs:
                    row = measures(output, found[output], expected[output], ties)
                    table[output].append((key, row))
        return {
            output: summarise(rows[output])
            | {"unit": UNITS[output], "dark": summarise(dark[output])}
            | {"rows": {key: row for key, row in rows[output]}}
            for output in outputs
        }

    def limits(self, task: str, precision: str, part: str) -> Mapping[str, Any]:
        """The budgets of a task; a missing one is an error that says where to write it."""
        try:
            return self.budgets[task][precision][part]
        except KeyError as error:
            raise UsageError(
                f"budgets: nothing under {task}.{precision}.{part}; write it into "
                f"conf/task/{task}.yaml, or leave the task out with tasks=[...]."
            ) from error

    def parity_findings(self, run: Mapping[str, Any], parity: Mapping[str, Any]) -> list[Finding]:
        """Budgets of parity and self-consistency that were missed."""
        findings = []
        for output, summary in parity.items():
            task = TASK_OF[output]
            table = self.limits(task, run["precision"], "parity")
            if output not in table:
                raise UsageError(
                    f"budgets: no parity for output {output} under {task}.{run['precision']}; "
                    f"write it into conf/task/{task}.yaml."
                )
            known = [*MEASURES, "consistency"] if output != "semantic" else ["mean", "consistency"]
            if strange := sorted(set(table[output]) - set(known)):
                raise UsageError(
                    f"budgets: {task}.{run['precision']}.parity.{output} has {strange}, expected "
                    f"{known}; what is misspelt would not be checked."
                )
            for measure, limit in table[output].items():
                seen: dict[str, tuple[float, str]] = {}
                if measure == "consistency":
                    told = run["consistency"][output]
                    seen = {f"{output} {q}": (_finite(v), "") for q, v in told.items()}
                else:
                    seen[f"{output} {measure}"] = (summary[measure], summary["worst_image"])
                    if measure != "mean":
                        dark = summary["dark"]
                        seen[f"{output} {measure} (dark)"] = (dark[measure], dark["worst_image"])
                findings += [
                    Finding(
                        artefact=run["file"],
                        task=task,
                        measure=name,
                        found=value if math.isfinite(value) else None,
                        budget=float(limit),
                        unit=UNITS[output],
                        image=image,
                    )
                    for name, (value, image) in seen.items()
                    if not value <= limit
                ]
        return findings

    def loss_findings(
        self, run: Mapping[str, Any], found: Mapping[str, Any], student: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Finding]]:
        """How much worse than the student, per reference and metric; and the missed budgets."""
        losses: dict[str, Any] = {}
        findings = []
        for reference, report in found.items():
            for task in self.tasks:
                for metric, limit in self.limits(task, run["precision"], "loss").items():
                    if not _is_measured(report, metric):
                        raise UsageError(
                            f"budgets: {task}.{run['precision']}.loss.{metric}: the ruler has no "
                            "such number (teacher.score); what is misspelt would not be checked."
                        )
                    ours, theirs = lookup(report, metric), lookup(student[reference], metric)
                    if theirs is None:
                        continue
                    sign = 1 if metric.split(".")[1].startswith(LARGER_IS_BETTER) else -1
                    loss = math.inf if ours is None else sign * (theirs - ours)
                    losses[f"{metric} vs {reference}"] = loss if math.isfinite(loss) else None
                    if not loss <= limit:
                        findings.append(
                            Finding(
                                artefact=run["file"],
                                task=task,
                                measure=f"loss of {metric} against the {reference}",
                                found=losses[f"{metric} vs {reference}"],
                                budget=float(limit),
                            )
                        )
        return losses, findings


class _Known:
    """The labels of a reference for some of its keys."""

    def __init__(self, reference: Reference, keys: Sequence[str]) -> None:
        self.reference = reference
        self.keys = [k for k in keys if reference.key_of.get(k)]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Label]:
        return (self.reference[k] for k in self.keys)


def _resampled(label: Label, size: tuple[int, int]) -> dict[Any, np.ndarray]:
    """A label's arrays at another size of the same picture, by the nearest pixel centre."""
    index = [
        np.clip(((np.arange(n) + 0.5) * m / n).astype(np.int64), 0, m - 1)
        for n, m in zip(size, label.image.shape[:2], strict=True)
    ]
    return {t: a[index[0][:, None], index[1][None, :]] for t, a in label.values.items()}


def _is_measured(report: Mapping[str, Any], metric: str) -> bool:
    """Whether a number exists in the ruler; a task that the reference lacks says nothing."""
    block, _, number = metric.partition(".")
    parts = [report[part][block] for part in ("mean", "set") if block in report[part]]
    if not parts:
        return block in ("sky", *Task)
    return any(number in part for part in parts)


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def lookup(report: Mapping[str, Any], metric: str) -> float | None:
    """``depth.delta1`` in a `teacher.score` report: the mean over images, else over the set."""
    block, number = metric.split(".")
    for part in ("mean", "set"):
        value = report[part].get(block, {}).get(number)
        if value is not None:
            return float(value)
    return None
