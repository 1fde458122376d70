"""What an artefact may cost: budgets by task and precision, and a finding for each that is missed.

Budgets (``conf/task/*.yaml``): {task: {precision: {"parity": {output: {measure: limit}},
"loss": {metric: limit}, "strata": {metric: limit}, "image": {metric: limit}, "score": {metric:
limit}}}}; ``score`` is optional. Every output of an artefact needs a budget: what is not bounded is
not checked, so a missing one is an error and not a pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from export.parity import MEASURES, TASK_OF
from teacher.errors import UsageError
from teacher.label import Task

LARGER_IS_BETTER = ("delta", "iou", "miou", "within", "pixel_accuracy", "f1")
LABEL_TASKS = ("depth", "normals", "semantic")  # those with a number in the ruler; others: parity
CHECKS = ("integrity", "runs", "contract", "parity", "consistency", "score", "strata", "image")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One missed budget: which artefact, task and measure, by how much; ``check``: of `CHECKS`."""

    artefact: str
    task: str
    measure: str
    found: float | str | None
    budget: float | str | None
    check: str
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


def default_budgets() -> dict[str, Any]:
    """The budgets of ``conf/task/*.yaml``, by task."""
    import yaml

    folder = files("conf") / "task"
    return {
        task: yaml.safe_load((folder / f"{task}.yaml").read_text())
        for task in ("depth", "normals", "semantic", "instances")
    }


class Budgets:
    """The budgets of every task; asking for one that is not there is an error."""

    def __init__(self, table: Mapping[str, Any], tasks: Sequence[str]) -> None:
        """``table`` as the module says; ``tasks`` are those that are judged."""
        self.table, self.tasks = table, tasks
        for task in table:
            _check_limits(table[task], f"budgets.{task}", depth=0)

    def limits(self, task: str, precision: str, part: str) -> Mapping[str, Any]:
        """The budgets of a task; a missing one is an error that says where to write it."""
        try:
            return self.table[task][precision][part]
        except KeyError as error:
            raise UsageError(
                f"budgets: nothing under {task}.{precision}.{part}; write it into "
                f"conf/task/{task}.yaml, or leave the task out with tasks=[...]."
            ) from error

    def scored(self, task: str, precision: str) -> bool:
        """Whether a model's own score has a budget (``score``), whoever made it."""
        return bool(self.table.get(task, {}).get(precision, {}).get("score"))

    def parity(self, output: str, precision: str) -> Mapping[str, float]:
        """Measure -> limit of one output."""
        task = TASK_OF[output]
        table = self.limits(task, precision, "parity")
        if output not in table:
            raise UsageError(
                f"budgets: no parity for output {output} under {task}.{precision}; "
                f"write it into conf/task/{task}.yaml."
            )
        if not isinstance(table[output], Mapping):
            raise UsageError(f"budgets.{task}.{precision}.parity.{output}: expected a table.")
        known = [*MEASURES, "consistency"] if output != "semantic" else ["mean", "consistency"]
        strange = sorted(set(table[output]) ^ set(known))
        if strange and (set(table[output]) - set(known) or "consistency" not in table[output]):
            raise UsageError(
                f"budgets: {task}.{precision}.parity.{output} differs in {strange} from "
                f"{known}; what is misspelt would not be checked."
            )
        return table[output]

    def metrics(
        self, run: Mapping[str, Any], reports: Mapping[str, Any], part: str
    ) -> list[tuple[str, str, str, float]]:
        """(reference, task, metric, limit) of one part of the budgets; misspelt ones are errors."""
        listed = []
        for task in (t for t in self.tasks if t in LABEL_TASKS):
            if part == "score" and not self.scored(task, run["precision"]):
                continue
            for metric, limit in self.limits(task, run["precision"], part).items():
                for reference, report in reports.items():
                    if not _is_measured(report, metric, part):
                        raise UsageError(
                            f"budgets: {task}.{run['precision']}.{part}.{metric}: the ruler has no "
                            "such number (teacher.score, export.strata); what is misspelt would "
                            "not be checked."
                        )
                    listed.append((reference, task, metric, limit))
        return listed


def _check_limits(table: Any, where: str, *, depth: int) -> None:
    """Every leaf a number, and none so high up that a whole part would not be checked."""
    if isinstance(table, Mapping):
        for key, value in table.items():
            _check_limits(value, f"{where}.{key}", depth=depth + 1)
    elif depth < 3 or type(table) not in (int, float) or math.isnan(table):
        wanted = "a table" if depth < 3 else "a number"
        raise UsageError(f"{where} is {table!r}, expected {wanted} (conf/task shows all).")


def sign(metric: str) -> int:
    """1 where a larger number is better, else -1."""
    return 1 if metric.split(".")[1].startswith(LARGER_IS_BETTER) else -1


STRATA_METRICS = (
    "depth.delta1",
    "depth.abs_rel",
    "normals.mean_deg",
    "normals.within_11_25",
    "semantic.pixel_accuracy",
)


def _is_measured(report: Mapping[str, Any], metric: str, part: str) -> bool:
    """Whether a number exists in the ruler; a task that the reference lacks says nothing."""
    if part in ("strata", "image"):
        return metric in STRATA_METRICS
    block, _, number = metric.partition(".")
    parts = [report[name][block] for name in ("mean", "set") if block in report[name]]
    if not parts:
        return block in ("sky", *Task)
    return any(number in part for part in parts)


def lookup(report: Mapping[str, Any], metric: str) -> float | None:
    """``depth.delta1`` in a `teacher.score` report: the mean over images, else over the set."""
    block, number = metric.split(".")
    for part in ("mean", "set"):
        value = report[part].get(block, {}).get(number)
        if value is not None:
            return float(value)
    return None
