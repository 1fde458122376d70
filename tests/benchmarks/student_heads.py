"""Students compared at equal cost: depth heads, augmentation, tasks, decoders, against truth.

    OMP_NUM_THREADS=1 python tests/benchmarks/student_heads.py train=labels/x \\
        held=truth/held-out,truth/shifted out=out/heads steps=3000 heads

    python tests/benchmarks/student_heads.py versus students=a/student.safetensors,b/... \\
        held=truth/held-out answers=teacher/held-out [out=FILE]

`versus` compares students with a teacher's stored answers to the same images (`distill label
images=truth/held-out`), per image, by a paired bootstrap.

Variants: heads (log, bins, mixture), augment (strong, geometry, none), tasks (both, depth alone,
normals alone), decoder (fpn, dpt). Every variant takes the same images in the same order for the
same steps; each is scored on every held-out set by `teacher.score`. The last lines compare each
variant with the first by a paired bootstrap over images. Runs resume.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from distill.train import train
from student.checkpoint import load_student
from student.model import Student
from teacher.label import Label
from teacher.score import score
from teacher.store import LabelSet

STUDENT = {
    "backbone": "mobilenetv4_conv_small",
    "height": 96,
    "width": 128,
    "decoder_channels": 32,
    "decoder_stride": 2,
    "tasks": ["depth", "normals"],
}
VARIANTS = {
    "heads": [(n, {"depth_head": n}, {}) for n in ("log", "bins", "mixture")],
    "augment": [(n, {}, {"augment": n}) for n in ("strong", "geometry", "none")],
    "tasks": [(n, {"tasks": n.split("+")}, {}) for n in ("depth+normals", "depth", "normals")],
    "decoder": [(n, {"decoder": n}, {}) for n in ("fpn", "dpt")],
}
NUMBERS = {"depth": ("delta1", "abs_rel", "boundary_f1"), "normals": ("mean_deg", "within_11_25")}


def predictor(student: Student):
    """A function that `teacher.score` can call, with the label's own camera."""

    @torch.inference_mode()
    def predict(label: Label) -> dict[str, np.ndarray]:
        image = torch.from_numpy(label.image.copy()).permute(2, 0, 1)[None].float() / 255
        said = student(image)
        out = {}
        if "depth" in said:
            metres = said["depth"][0, 0] * (label.camera.fx / student.canonical_focal_px)
            metres[said["sky"][0, 0] > 0] = torch.inf
            out["depth"] = metres.numpy()
        if "normals" in said:
            out["normals"] = said["normals"][0].permute(1, 2, 0).numpy()
        return out

    return predict


def bootstrap(first: list[float], other: list[float]) -> tuple[float, float, float]:
    """Mean of other - first over images, and its 95 % interval (2000 resamples)."""
    gain = np.array(other) - np.array(first)
    gain = gain[~np.isnan(gain)]
    draws = np.random.default_rng(0).integers(0, len(gain), (2000, len(gain)))
    low, high = np.percentile(gain[draws].mean(1), (2.5, 97.5))
    return float(gain.mean()), float(low), float(high)


def per_image(report: dict, task: str, measure: str) -> list[float]:
    """One number per image of a report of `teacher.score`; NaN where there is none."""
    values = [r[task][measure] for r in report["rows"] if task in r]
    return [np.nan if v is None else v for v in values]


def versus(students: list[str], held: LabelSet, answers: LabelSet) -> dict[str, dict[str, float]]:
    """Students and a teacher's stored answers against truth, on the images that it answered."""
    known = set(answers.keys)
    asked = [label for label in held if label.key in known]
    print(f"{len(asked)} of {len(held.keys)} images; {answers.path}")
    found: dict[str, dict[str, float]] = {}
    said = score(lambda x: answers[x.key].values, asked, tasks=list(NUMBERS))
    for path in students:
        model = load_student(path)
        tasks = [t for t in NUMBERS if t in model.tasks]
        report = score(predictor(model), asked, tasks=tasks)
        for task in tasks:
            for measure in NUMBERS[task]:
                teacher, student = (per_image(r, task, measure) for r in (said, report))
                gain = bootstrap(teacher, student)
                found[f"{path} {task} {measure}"] = {
                    "teacher": float(np.nanmean(teacher)), "student": float(np.nanmean(student)),
                    "gain": gain[0], "low": gain[1], "high": gain[2],
                }  # fmt: skip
    for name, row in found.items():
        print(f"{name}: teacher {row['teacher']:.4f}, student {row['student']:.4f}, difference "
              f"{row['gain']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]")  # fmt: skip
    return found


def main() -> None:
    """Train, score, compare; writes results.json into out."""
    options = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    what = next(a for a in sys.argv[1:] if "=" not in a)
    torch.set_num_threads(1)
    if what == "versus":
        found = versus(
            options["students"].split(","), LabelSet(options["held"]), LabelSet(options["answers"])
        )
        if "out" in options:
            Path(options["out"]).write_text(json.dumps(found, indent=1))
        return
    out = Path(options["out"])
    held = [LabelSet(p) for p in options["held"].split(",")]
    rows: dict[tuple, dict[str, list[float]]] = {}
    for name, student, trainer in VARIANTS[what]:
        started = time.process_time()
        run = train(
            data=options["train"].split(","),
            out=str(out / name),
            student=STUDENT | student,
            trainer={
                "steps": int(options["steps"]),
                "batch_size": int(options.get("batch", "16")),
                "augment": "geometry",
                "device": "cpu",
                "threads": 1,
                "val_share": 0.02,
                **trainer,
            },
        )
        cpu_s = time.process_time() - started
        model = load_student(run["student"])
        tasks = [t for t in NUMBERS if t in model.tasks]
        for number, labels in enumerate(held):
            report = score(predictor(model), labels, tasks=tasks)
            shown = []
            for task in tasks:
                for measure in NUMBERS[task]:
                    values = per_image(report, task, measure)
                    rows.setdefault((number, task, measure), {})[name] = values
                    shown.append(f"{measure} {np.nanmean(values):.4f}")
            print(f"{name:15s} set {number}: {', '.join(shown)}; {cpu_s:.0f} CPU s", flush=True)
    first = VARIANTS[what][0][0]
    for (number, task, measure), by_name in rows.items():
        for name, values in by_name.items():
            if name != first and first in by_name:
                gain = bootstrap(by_name[first], values)
                print(f"set {number} {task} {measure}: {name} - {first} = "
                      f"{gain[0]:+.4f} [{gain[1]:+.4f}, {gain[2]:+.4f}]")  # fmt: skip
    stored = {"/".join(map(str, key)): value for key, value in rows.items()}
    (out / f"{what}.json").write_text(json.dumps(stored))


if __name__ == "__main__":
    main()
