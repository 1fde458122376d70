"""From the fp32 graph to every precision asked for: calibrated, searched, timed, kept or declined.

The label set named ``calibration`` is split: some images calibrate, as many others judge every
trial of the search, with the budgets of ``conf/task`` and the code of `distill verify`. The worst
of a few images is not the worst of many: so what was found is judged again by up to `WHOLE` times
as many of those that did not calibrate, and if they are not content the search goes on under them.
A precision that misses a budget with all its islands, or that is measurably slower than fp32 where
it is meant to run, is declined: its file is not written and its numbers stand in ``export.json``.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from tqdm import tqdm

from export.answers import run_artefact, save_inputs
from export.artefact import Card, plain
from export.benchmark import race
from export.budgets import LABEL_TASKS, Finding, default_budgets
from export.judge import Judge
from export.letterbox import Letterbox
from export.precision import HALF, group_of, groups_of, lower, named, quantised_share
from export.references import find_references
from export.rounding import FP16_MAX, ranges
from export.runtimes import open_runtime
from export.search import smallest_islands
from export.verdict import integrity, judge_one
from teacher.errors import UsageError
from teacher.store import LabelSet

FASTER = 0.97  # of fp32's time, or less: what counts as faster
LOUDEST = 12  # tensors listed with their range
WHOLE = 8  # times as many images as judge a trial judge what the search found, at most


def split_keys(labels: LabelSet, images: int) -> tuple[list[str], list[str], list[str]]:
    """Keys that calibrate, that judge a trial, and that judge what was found (with the second).

    The first two alternate, evenly spread over the set; the last are at most `WHOLE` times as many.
    """
    step = max(1, len(labels.keys) / max(1, 2 * images))
    chosen = [labels.keys[int(i * step)] for i in range(min(len(labels.keys), 2 * images))]
    if len(chosen) < 4:
        raise UsageError(
            f"calibration={labels.path}: found {len(chosen)} images, expected at least 4: some "
            "calibrate and the others judge."
        )
    calibrating, judging = chosen[::2], chosen[1::2]
    used = set(chosen)
    rest = [key for key in labels.keys if key not in used]
    more = min(len(rest), (WHOLE - 1) * len(judging))
    return calibrating, judging, judging + [rest[i * len(rest) // more] for i in range(more)]


def feeds_of(labels: LabelSet, keys: Sequence[str], card: Card) -> list[dict[str, np.ndarray]]:
    """Letterboxed images as the graph takes them, one by one."""
    feeds = []
    for key in keys:
        label = labels[key]
        box = Letterbox.fit(label.image.shape[:2], (card.height, card.width))
        feed = {"image": np.repeat(box.apply(label.image)[None], card.batch or 1, 0)}
        if card.focal_input:
            focal_px = box.focal_px(label.camera.fx, label.camera.fy)
            feed["focal_px"] = np.full(card.batch or 1, focal_px, np.float32)
        feeds.append(feed)
    return feeds


class Trial:
    """Judges one graph after the other by some images, within the budgets of a precision."""

    def __init__(
        self, reference: Path, labels: LabelSet, keys: Sequence[str], folder: Path
    ) -> None:
        """Run the reference once; answers lie in ``folder``, which is temporary."""
        self.keys, self.reference = list(keys), reference.name
        own = Path(tempfile.mkdtemp(dir=folder))
        self.file, self.folder = own / "trial.onnx", own / "answers"
        self.folder.mkdir()
        with open_runtime(reference, threads=torch.get_num_threads()) as runtime:
            save_inputs(labels, keys, runtime.card, self.folder)
        self.student = self._run(reference)
        tasks = [t for t in LABEL_TASKS if t in self.student["outputs"]]
        tasks += ["instances"] if "center" in self.student["outputs"] else []
        self.judge = Judge(
            folder=self.folder,
            keys=self.keys,
            references=find_references(labels, keys, teacher=None, truth=None, folder=folder),
            tasks=tasks,
            budgets=default_budgets(),
            min_m=0.3,
            max_m=40.0,
        )
        self.scores = {self.reference: self.judge.scores(self.reference, self.student["outputs"])}
        self.strata = self.judge.strata(self.reference, self.student["outputs"])

    def _run(self, path: Path) -> dict[str, Any]:
        return run_artefact(
            path,
            self.keys,
            self.folder,
            batch=1,
            provider="cpu",
            threads=torch.get_num_threads(),
            question=False,
        )

    def __call__(self, model: onnx.ModelProto) -> tuple[float, list[Finding]]:
        """(worst measure as a multiple of its budget, what was missed)."""
        self.file.write_bytes(model.SerializeToString())
        run = self._run(self.file)
        if "error" in run:
            return np.inf, integrity({run["file"]: run}, None, "")
        findings, told, _ = judge_one(
            self.judge, run, self.student, self.scores, self.strata, self.reference
        )
        worst = _closest(told["parity"], run["precision"], self.judge)
        for finding in findings:
            known = isinstance(finding.found, float) and isinstance(finding.budget, float)
            share = finding.found / finding.budget if known else np.inf  # type: ignore[operator]
            worst = max(worst, share, 1.0 + 1e-9)
        return float(worst), findings


def _closest(parity: Mapping[str, Any], precision: str, judge: Judge) -> float:
    """The parity measure nearest to its budget, as a share of it; what is past it is a finding."""
    shares = [
        min(summary[measure] / limit, 1.0)
        for output, summary in parity.items()
        for measure, limit in judge.budgets.parity(output, precision).items()
        if measure in summary and limit > 0
    ]
    return max(shares, default=0.0)


def recarded(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The same graph whose card names its precision."""
    from export.artefact import PREFIX

    table = {p.key: p.value for p in model.metadata_props}
    table[PREFIX + "precision"] = f'"{precision}"'
    onnx.helper.set_model_props(model, table)
    return model


def lower_all(
    model: onnx.ModelProto,
    precisions: Sequence[str],
    *,
    card: Card,
    reference: Path,
    labels: LabelSet,
    images: int,
) -> Iterator[tuple[str, onnx.ModelProto | None, dict[str, Any]]]:
    """(precision, graph or None, facts) for each; ``reference``: the student's checkpoint."""
    calibrating, judging, confirming = split_keys(labels, images)
    feeds = feeds_of(labels, calibrating, card)
    about = {
        "labels": str(labels.path),
        "calibrating": calibrating,
        "judging": judging,
        "confirming": confirming,
    }
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(reference, labels, judging, Path(folder))
        whole = functools.cache(lambda: Trial(reference, labels, confirming, Path(folder)))
        for precision in tqdm(precisions, desc="precisions", disable=None, leave=False):
            graph, facts = make_precision(
                model,
                precision,
                trial=trial,
                whole=whole,
                feeds=feeds,
                threads=torch.get_num_threads(),
            )
            yield precision, graph, facts | {"calibration": about}


def make_precision(
    model: onnx.ModelProto,
    precision: str,
    *,
    trial: Trial,
    whole: Callable[[], Trial],
    feeds: list[dict[str, np.ndarray]],
    threads: int,
) -> tuple[onnx.ModelProto | None, dict[str, Any]]:
    """(the graph, or None if it was declined; everything that was found out, plain JSON).

    ``trial`` judges every set of islands, ``whole()`` what the search found; see the module.
    """
    source = named(model)
    groups = [g for g in groups_of(source) if precision in HALF or _has_weights(source, g)]
    missed: dict[frozenset[str], list[Finding]] = {}

    @functools.cache
    def lowered(islands: frozenset[str]) -> onnx.ModelProto:
        return recarded(lower(model, precision, feeds, islands=sorted(islands)), precision)

    def excess(islands: frozenset[str]) -> float:
        value, missed[islands] = trial(lowered(islands))
        return value

    def confirm(islands: frozenset[str]) -> float:
        value, missed[islands] = whole()(lowered(islands))
        return value

    found = smallest_islands(groups, excess, confirm)
    facts: dict[str, Any] = {"groups": groups, "trials": found.trail, "excess": found.excess}
    if found.islands is None:
        told = "; ".join(str(finding) for finding in missed[frozenset(groups)][:2])
        told = f"misses a budget even with every group in fp32: {told}"
        return None, plain(facts | {"declined": told})
    low = lowered(frozenset(found.islands))
    facts |= {"islands": list(found.islands), "lowered_share": round(quantised_share(low), 4)}
    if precision in HALF:
        facts["ranges"] = _loudest(model, feeds)
    facts["speed"] = _speed(model, low, precision, feeds, threads=threads)
    if (ratio := facts["speed"].get("ratio")) is not None and ratio > FASTER:
        told = (
            f"not faster: {ratio:.2f} of fp32's time on {facts['speed']['where']} "
            f"({facts['speed']['fp32_ms']:.2f} -> {facts['speed']['ms']:.2f} ms)"
        )
        return None, plain(facts | {"declined": told})
    return low, plain(facts)


def _has_weights(model: onnx.ModelProto, group: str) -> bool:
    """Whether there is something to quantise; halves also round what has no weights."""
    return any(group_of(t.name) == group for t in model.graph.initializer)


def _loudest(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Activation ranges on real images: the loudest tensors, and whether float16 holds them."""
    rows = ranges(model, feeds)
    loud = [max(r["max_abs"], r.get("max_square", 0.0)) for r in rows]
    return {
        "loudest": rows[:LOUDEST],
        "fp16_headroom": FP16_MAX / loud[0] if loud and loud[0] else None,
        "past_fp16": [r["tensor"] for r, top in zip(rows, loud, strict=True) if top > FP16_MAX],
    }


def _speed(
    model: onnx.ModelProto,
    low: onnx.ModelProto,
    precision: str,
    feeds: list[dict[str, np.ndarray]],
    *,
    threads: int,
) -> dict[str, Any]:
    """int8-cpu against fp32 on this CPU, interleaved; the others need a device that has them."""
    if precision != "int8-cpu":
        return {"where": "not measured: needs a GPU with TensorRT (distill bench there)"}
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, graph in (("fp32", model), (precision, low)):
            paths[name] = Path(folder) / f"{name}.onnx"
            paths[name].write_bytes(graph.SerializeToString())
        times = race(paths, feeds[0], threads=threads)
    ours, theirs = times[precision], times["fp32"]
    return {
        "where": f"this CPU, {threads} thread(s), interleaved medians"
        + (" of processor time" if threads == 1 else ""),
        "ms": ours,
        "fp32_ms": theirs,
        "ratio": ours / theirs,
    }
