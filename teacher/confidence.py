"""How sure a teacher is, in probabilities: the calibrated models and their use on new labels.

Per task two small models read the signs of `teacher.doubt`:

* **confidence**, the probability that a pixel is right (depth ratio < 1.25, angle < 11.25 deg,
  class right): logistic regression on the signs, their squares and products;
* **uncertainty** (depth: Laplace scale b of log depth; normals: expected angle in degrees): log b
  is linear in the same terms. Semantic uncertainty is 1 - confidence.

The calibration file is JSON; it carries the teacher it was made for and its domain, the spread of
a few image statistics. On an image outside the domain nothing is claimed (``used: none``).
`teacher.calibrate` makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from teacher.errors import UsageError
from teacher.label import Answer, Label, Task, unknown_class

FORMAT, VERSION = "dense-distill calibration", 1
DOMAIN_QUANTILE = 0.95  # share of the calibration's own images that count as inside its domain
SHIPPED = Path(__file__).parent / "weights" / "calibration.json"  # of the mini teacher as it is
# Keys of a teacher's description that do not change its answers (what is asked is `prompts`).
VOLATILE = ("device", "prompts_version")


def fingerprint(description: Mapping[str, Any]) -> dict[str, Any]:
    """What of `Teacher.describe` must be equal for a calibration to hold."""
    return {k: v for k, v in json.loads(json.dumps(description)).items() if k not in VOLATILE}


def image_facts(label_image: np.ndarray, answers: Mapping[Task, Answer]) -> dict[str, float]:
    """Statistics of an image and its answers that tell domains apart."""
    x = label_image.astype(np.float32) / 255
    grey = x.mean(-1)
    facts = {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "colour": float((x.max(-1) - x.min(-1)).mean()),
        "detail": float(np.log(1e-3 + np.abs(np.diff(grey, axis=1)).mean())),
    }
    for task, answer in answers.items():
        if answer.residual is not None:
            residual = np.nan_to_num(answer.residual, nan=255.0)
            facts[f"{task}_residual"] = float(np.log1p(residual.mean()))
    if Task.DEPTH in answers:
        depth = answers[Task.DEPTH].values
        known = np.clip(depth[np.isfinite(depth)], 0.05, 200)
        facts["log_depth"] = float(np.log(np.median(known))) if known.size else 0.0
    return facts


@dataclass
class Domain:
    """Where a calibration holds: mean and covariance of `image_facts`, and how far is too far."""

    name: str
    facts: list[str]
    mean: np.ndarray
    inverse: np.ndarray
    limit: float

    @classmethod
    def of(cls, name: str, rows: list[dict[str, float]]) -> Domain:
        """From the facts of the calibration's images."""
        facts = sorted(rows[0])
        x = np.array([[row[f] for f in facts] for row in rows])
        covariance = np.cov(x.T).reshape(len(facts), len(facts)) + 1e-4 * np.eye(len(facts))
        domain = cls(name, facts, x.mean(0), np.linalg.inv(covariance), 0.0)
        # distances as if each image had been left out (the rank-one update of the covariance)
        n, square = len(rows), np.array([domain.distance(row) ** 2 for row in rows])
        left_out = (n - 2) * n**2 / (n - 1) ** 3 * square
        left_out /= np.maximum(1 - n * square / (n - 1) ** 2, 1e-6)
        domain.limit = float(np.quantile(np.sqrt(left_out), DOMAIN_QUANTILE))
        return domain

    def distance(self, facts: Mapping[str, float]) -> float:
        """Mahalanobis distance of an image."""
        gap = np.array([facts[f] for f in self.facts]) - self.mean
        return float(np.sqrt(gap @ self.inverse @ gap))


@dataclass
class Head:
    """Standardised signs -> quadratic terms -> two linear models -> monotone curves, of one task.

    A curve [2, n] holds linear outputs and the share of right pixels (mean |error|) found there;
    between them it is interpolated, beyond its ends constant, so nothing is extrapolated.
    """

    signs: list[str]
    mean: np.ndarray
    std: np.ndarray
    right: np.ndarray
    error: np.ndarray | None
    right_curve: np.ndarray
    error_curve: np.ndarray | None

    def terms(self, signs: Mapping[str, np.ndarray]) -> np.ndarray:
        """[N, K] of maps (any shape, N elements)."""
        x = np.stack([gentle(n, signs[n]).ravel() for n in self.signs], axis=1)
        x = np.clip((x - self.mean) / self.std, -4, 4)
        i, j = np.triu_indices(x.shape[1])
        return np.concatenate([np.ones((len(x), 1)), x, x[:, i] * x[:, j]], axis=1)

    def confidence(self, terms: np.ndarray) -> np.ndarray:
        """Probability of being right."""
        return np.interp(terms @ self.right, *self.right_curve)

    def scale(self, terms: np.ndarray) -> np.ndarray:
        """Mean |error|: Laplace b of log depth, or degrees."""
        assert self.error is not None and self.error_curve is not None
        return np.interp(terms @ self.error, *self.error_curve)


def gentle(name: str, values: np.ndarray) -> np.ndarray:
    """A sign on the scale it is used at: all but log depth are positive with long tails."""
    return values if name == "far" else np.log1p(values * (100.0 if "spread" in name else 1.0))


@dataclass
class Calibration:
    """What `distill calibrate` found out about one teacher on one domain.

    ``licences``: ledger of the truth it was fitted on (`teacher.jobs.licences`); empty in files of
    before.
    """

    teacher: dict[str, Any]
    domain: Domain
    heads: dict[Task, Head]
    report: dict[str, Any]
    licences: list[dict[str, Any]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """What a label set says of it: domain, what it was measured on, hash, ancestors."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return {
            "domain": self.domain.name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "images": self.report.get("images"),
            "tasks": self.report.get("tasks"),
            **({"licences": self.licences} if self.licences else {}),
        }

    def fits(self, description: Mapping[str, Any], tasks: Sequence[Task]) -> None:
        """Raise `UsageError` if it was made for another teacher, or with tasks that are not asked.

        The signs of one task come from the answers to all (depth against normals, say).
        """
        unasked = [str(t) for t in self.heads if t not in tasks]
        if unasked:
            raise UsageError(
                f"calibration: it was made with {[str(t) for t in self.heads]} and needs them all,"
                f" but {', '.join(unasked)} is not asked. Give tasks=[{','.join(self.heads)}], or"
                f" run `distill calibrate tasks=[{','.join(str(t) for t in tasks)}]`"
            )
        found, made_for = fingerprint(description), fingerprint(self.teacher)
        differs = [
            f"{k}: {found.get(k)!r} here, {made_for.get(k)!r} there"
            for k in sorted({*found, *made_for})
            if found.get(k) != made_for.get(k)
        ]
        if differs:
            raise UsageError(
                "calibration: it was made for another teacher (" + "; ".join(differs)[:600] + ")."
                " Ask the same teacher, or run `distill calibrate` for this one"
            )

    def apply(self, label: Label, answers: Mapping[Task, Answer]) -> None:
        """Give ``label`` calibrated uncertainty and confidence, or say why it has none.

        ``label.provenance["calibration"]`` names the domain, the distance to it and its limit;
        outside, its ``used`` is "none" and the label keeps what the teacher said of itself.
        """
        from teacher import doubt  # needs scipy, which other jobs do without

        distance = self.domain.distance(image_facts(label.image, answers))
        inside = distance <= self.domain.limit
        label.provenance["calibration"] = {
            "used": self.domain.name if inside else "none",
            "nearest": self.domain.name,
            "distance": round(distance, 4),
            "limit": round(self.domain.limit, 4),
        }
        if not inside:
            return
        for task, head in self.heads.items():
            shape = label.values[task].shape[:2]
            terms = head.terms(doubt.signs(answers, task, label.camera))
            confidence = head.confidence(terms).reshape(shape).astype(np.float32)
            spread = (
                1 - confidence
                if head.error is None
                else head.scale(terms).reshape(shape).astype(np.float32)
            )
            unknown = _unknown(task, label.values[task])
            confidence[unknown], spread[unknown] = np.nan, np.nan
            label.confidence[task], label.uncertainty[task] = confidence, spread

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, `from_json` reads it."""
        heads = {}
        for task, h in self.heads.items():
            arrays = {
                "mean": h.mean, "std": h.std, "right": h.right, "error": h.error,
                "right_curve": h.right_curve, "error_curve": h.error_curve,
            }  # fmt: skip
            listed = {k: None if v is None else v.tolist() for k, v in arrays.items()}
            heads[str(task)] = {"signs": h.signs, **listed}
        d = self.domain
        return {
            "format": FORMAT, "version": VERSION, "teacher": self.teacher, "heads": heads,
            "domain": {"name": d.name, "facts": d.facts, "mean": d.mean.tolist(),
                       "inverse": d.inverse.tolist(), "limit": d.limit},
            "report": self.report, **({"licences": self.licences} if self.licences else {}),
        }  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration file, or ``shipped``; `UsageError` says what is wrong with another."""
        path = SHIPPED if str(path) == "shipped" else path
        try:
            found = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise UsageError(
                f"{path}: no calibration there; `distill calibrate` makes one"
            ) from None
        except ValueError as error:
            raise UsageError(f"{path}: not a calibration file ({error})") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UsageError(f"{path}: not a calibration file, expected format {FORMAT!r}")
        if found["version"] > VERSION:
            raise UsageError(
                f"{path}: version {found['version']}, this release reads up to {VERSION}"
            )
        d = found["domain"]
        domain = Domain(
            d["name"], d["facts"], np.array(d["mean"]), np.array(d["inverse"]), d["limit"]
        )
        heads = {}
        for task, h in found["heads"].items():
            arrays = {k: None if v is None else np.array(v) for k, v in h.items() if k != "signs"}
            heads[Task(task)] = Head(signs=h["signs"], **arrays)  # type: ignore[arg-type]
        return cls(found["teacher"], domain, heads, found["report"], found.get("licences", []))


def _unknown(task: Task, values: np.ndarray) -> np.ndarray:
    if task is Task.SEMANTIC:
        return values == unknown_class(values.dtype)
    return ~np.isfinite(values if task is Task.DEPTH else values[..., 0])
