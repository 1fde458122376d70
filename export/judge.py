"""Run, then judge: this half judges saved answers (`export.answers`) against `export.budgets`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.answers import DARK_KEYS, load
from export.budgets import LABEL_TASKS, Budgets, Finding, lookup, sign
from export.letterbox import Letterbox, to_label_space
from export.parity import TASK_OF, UNITS, measures, moved_steps, summarise
from export.precision import HALF
from export.references import Known, Reference, resampled
from export.strata import Table, far_m, strata_table, worst_losses
from teacher.label import Label, Task
from teacher.score import score


class Judge:
    """Applies one ruler and one set of budgets to everything that answered."""

    def __init__(
        self,
        *,
        folder: Path,
        keys: Sequence[str],
        references: Sequence[Reference],
        tasks: Sequence[str],
        budgets: Mapping[str, Any],
        min_m: float,
        max_m: float,
    ) -> None:
        """``folder`` holds the saved answers; ``tasks`` are the ones to be judged."""
        self.folder, self.keys, self.references = folder, keys, references
        self.tasks, self.budgets = tasks, Budgets(budgets, tasks)
        self.bounds: dict[str, Any] = {"min_m": min_m, "max_m": max_m}
        self.far_m = {ref.name: far_m(ref, **self.bounds) for ref in references}

    def answers_for(self, name: str, label: Label) -> dict[Any, np.ndarray]:
        """The saved answers of ``name`` to a label's image, at the label's size."""
        raw = load(self.folder, name, label.key)
        raw = {n: a for n, a in raw.items() if n != "semantic_tie" and not n.endswith("_logits")}
        target = next(iter(raw.values())).shape[-2:]
        answers = to_label_space(raw, Letterbox.fit(label.image.shape[:2], target))
        if "semantic" in answers and Task.SEMANTIC in label.values:
            answers["semantic"] = answers["semantic"].astype(label.values[Task.SEMANTIC].dtype)
        return answers  # type: ignore[return-value]

    def scores(self, name: str, outputs: Sequence[str]) -> dict[str, Any]:
        """`teacher.score` of one runtime against every reference, in the tasks that it answers."""
        return {
            ref.name: score(
                lambda label: self.answers_for(name, label),
                ref,
                tasks=shared,
                classes=ref.classes or None,
                **self.bounds,
            )
            for ref in self.references
            if (shared := self._shared(ref, outputs))
        }

    def _shared(self, ref: Reference, outputs: Sequence[str]) -> list[str]:
        """Judged tasks that a reference has, that have a number, and that were answered."""
        return [
            t for t in self.tasks if t in ref.labels.tasks and t in LABEL_TASKS and t in outputs
        ]

    def strata(self, name: str, outputs: Sequence[str]) -> dict[str, Table]:
        """`export.strata.strata_table` of one runtime against every reference."""
        return {
            ref.name: strata_table(
                lambda label: self.answers_for(name, label),
                ref,
                tasks=self._shared(ref, outputs),
                beyond_m=self.far_m[ref.name],
                **self.bounds,
            )
            for ref in self.references
        }

    def teacher_scores(self) -> dict[str, Any]:
        """The teacher against the truth, when both are there."""
        by_name = {ref.name: ref for ref in self.references}
        if {"teacher", "truth"} - set(by_name):
            return {}
        teacher, truth = by_name["teacher"], by_name["truth"]
        shared = [t for t in self._shared(truth, self.tasks) if t in teacher.labels.tasks]
        known = Known(truth, [k for k, own in teacher.key_of.items() if own])
        if not shared or not len(known):
            return {}
        return {
            "truth": score(
                lambda label: resampled(teacher[label.key], label.image.shape[:2]),
                known,
                tasks=shared,
                classes=truth.classes or None,
                **self.bounds,
            )
        }

    def parity(
        self, name: str, reference: str, outputs: Sequence[str], precision: str
    ) -> dict[str, Any]:
        """Per output: `export.parity.summarise` over the images, and over the dark ones.

        Of half precisions alone, and on images that truth may judge too, steps may move a little.
        """
        rows: dict[str, list[tuple[str, dict[str, float]]]] = {o: [] for o in outputs}
        dark: dict[str, list[tuple[str, dict[str, float]]]] = {o: [] for o in outputs}
        for keys, table in ((self.keys, rows), (DARK_KEYS, dark)):
            for key in keys:
                found, expected = (load(self.folder, n, key) for n in (name, reference))
                ties = {"semantic": expected.get("semantic_tie")}
                if "depth" in outputs and precision in HALF and table is rows:
                    ties["depth"] = moved_steps(found["depth"], expected["depth"])
                for output in outputs:
                    row = measures(output, found[output], expected[output], ties.get(output))
                    table[output].append((key, row))
        return {
            output: summarise(rows[output])
            | {"unit": UNITS[output], "dark": summarise(dark[output])}
            | {"rows": {key: row for key, row in rows[output]}}
            for output in outputs
        }

    def contract_findings(self, run: Mapping[str, Any]) -> list[Finding]:
        """Values that the contract of `export.artefact` rules out, whatever the budgets say."""
        return [
            Finding(
                artefact=run["file"],
                task=TASK_OF[output],
                measure=f"{output}: {broken['what']}",
                found=f"broken on {broken['images']} images",
                budget="never",
                check="contract",
                image=broken["first"],
            )
            for output, broken in run["broken"].items()
            if TASK_OF[output] in self.tasks
        ]

    def parity_findings(self, run: Mapping[str, Any], parity: Mapping[str, Any]) -> list[Finding]:
        """Budgets of parity that were missed."""
        findings = []
        for output, summary in parity.items():
            for measure, limit in self.budgets.parity(output, run["precision"]).items():
                if measure == "consistency":
                    continue
                seen = {output + " " + measure: summary}
                if measure != "mean":
                    seen[f"{output} {measure} (dark)"] = summary["dark"]
                findings += [
                    Finding(
                        artefact=run["file"],
                        task=TASK_OF[output],
                        measure=name,
                        found=part[measure] if math.isfinite(part[measure]) else None,
                        budget=float(limit),
                        check="parity",
                        unit=UNITS[output],
                        image=part["worst_mean_image" if measure == "mean" else "worst_image"],
                    )
                    for name, part in seen.items()
                    if not part[measure] <= limit
                ]
        return findings

    def consistency_findings(self, run: Mapping[str, Any]) -> list[Finding]:
        """Budgets of an artefact's agreement with itself that were missed."""
        findings = []
        for output, told in run["consistency"].items():
            if TASK_OF[output] not in self.tasks:
                continue
            limit = self.budgets.parity(output, run["precision"])["consistency"]
            findings += [
                Finding(
                    artefact=run["file"],
                    task=TASK_OF[output],
                    measure=f"{output} {question}",
                    found=value,
                    budget=float(limit),
                    check="consistency",
                    unit=UNITS[output],
                )
                for question, value in told.items()
                if value is None or not value <= limit
            ]
        return findings

    def loss_findings(
        self, run: Mapping[str, Any], found: Mapping[str, Any], student: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Finding]]:
        """How much worse than the student, per reference and metric; and the missed budgets."""
        losses: dict[str, Any] = {}
        findings = []
        for reference, task, metric, limit in self.budgets.metrics(run, found, "loss"):
            ours = lookup(found[reference], metric)
            theirs = lookup(student[reference], metric)
            if theirs is None:
                continue
            loss = math.inf if ours is None else sign(metric) * (theirs - ours)
            losses[f"{metric} vs {reference}"] = loss if math.isfinite(loss) else None
            if not loss <= limit:
                findings.append(
                    Finding(
                        artefact=run["file"],
                        task=task,
                        measure=f"loss of {metric} against the {reference}",
                        found=losses[f"{metric} vs {reference}"],
                        budget=float(limit),
                        check="score",
                    )
                )
        return losses, findings

    def score_findings(self, run: Mapping[str, Any], found: Mapping[str, Any]) -> list[Finding]:
        """Budgets that a score itself must keep (``score``; optional), whoever made the model."""
        findings = []
        for reference, task, metric, limit in self.budgets.metrics(run, found, "score"):
            ours, way = lookup(found[reference], metric), sign(metric)
            if ours is None or not way * (ours - limit) >= 0:
                findings.append(
                    Finding(
                        artefact=run["file"],
                        task=task,
                        measure=f"{metric} against the {reference}",
                        found=ours,
                        budget=f"at {'least' if way > 0 else 'most'} {limit:g}",
                        check="score",
                    )
                )
        return findings

    def strata_findings(
        self, run: Mapping[str, Any], found: Mapping[str, Any], student: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Finding]]:
        """The worst stratum and the worst image against the student, and the missed budgets."""
        losses: dict[str, Any] = {}
        findings = []
        for part, kind in (("strata", "stratum"), ("image", "image")):
            for reference, task, metric, limit in self.budgets.metrics(run, student, part):
                if metric not in student[reference]:
                    continue
                worst = worst_losses(
                    metric,
                    found[reference][metric],
                    student[reference][metric],
                    larger_is_better=sign(metric) > 0,
                )
                if kind not in worst:
                    continue
                loss, where = worst[kind]
                name = f"worst {kind}: {metric} vs {reference}"
                losses[name] = {"loss": loss if math.isfinite(loss) else None, "where": where}
                if not loss <= limit:
                    findings.append(
                        Finding(
                            artefact=run["file"],
                            task=task,
                            measure=f"loss of {metric} against the {reference}, worst {kind}"
                            + (f" ({where})" if kind == "stratum" else ""),
                            found=losses[name]["loss"],
                            budget=float(limit),
                            check=part,
                            image=where if kind == "image" else "",
                        )
                    )
        return losses, findings
