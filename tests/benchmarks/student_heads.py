"""Students compared at equal cost: heads, labels, augmentation, tasks, features; and a teacher.

    OMP_NUM_THREADS=1 python tests/benchmarks/student_heads.py train=six-a,six-b,... \\
        held=truth/held-out,truth/shifted out=out/heads steps=600 heads

    ... once=once-a,once-b,... answers
    ... truth=truth/a,truth/b,... truth
    ... once=once-a,... two=two-a,... budget=608 budget
    ... timm=backbone.safetensors timm
    ... init=student.safetensors heads

    python tests/benchmarks/student_heads.py versus students=a/student.safetensors,b/... \\
        held=truth/held-out,... answers=teacher/held-out,... [out=FILE]

`versus` compares students with a teacher's stored answers to the same images (`distill label
images=truth/held-out`), per image, by a paired bootstrap; and by the distance from the nearest
step in the true depth or crease of the true normals delta1 and the mean angle, pixels of all images
together. `losses`: without what they count twice or three times.

Every variant differs from the first, `step` (`STUDENT` and `TRAINER` on ``train``), in one thing;
all take as many steps of as many images, and each is scored on every held-out set.
Further label sets of the same images: `answers`, one answer per image instead of a consensus;
`truth`; `budget`, so many answers of the teacher in all: as many images with one each, half of them
with two, a sixth of them with six (``train``). The last lines compare each variant with the first
by a paired bootstrap over images. Runs resume; finished ones are scored again only. ``init=`` is a
student that all begin with, less its depth head: what a part is worth once the eyes are trained.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from distill import losses, losses_depth, masked, module
from distill.train import train
from student.checkpoint import load_student, save_student
from student.model import Student
from teacher.jobs.selection import write_selection
from teacher.label import Label, Task
from teacher.metrics import angles_deg
from teacher.score import score
from teacher.store import LabelSet

STUDENT = {
    "backbone": "mobilenetv4_conv_small",
    "height": 96,
    "width": 128,
    "decoder_channels": 48,
    "decoder_stride": 4,
    "tasks": ["depth", "normals"],
}
TRAINER = {
    "optimizer": "muon",
    "lr": 0.012,
    "precision": "bf16",
    "augment": "geometry",
    "device": "cpu",
    "threads": 1,
    "val_share": 0.02,
    "val_every": 100_000,
}
# group -> (name, argument of `train` or "data" or "uncertainty" -> what differs from the first)
FIRST: tuple[str, dict[str, Any]] = ("step", {})
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "heads": [(n, {"student": {"depth_head": n}}) for n in ("log", "bins", "mixture")],
    "rate": [(f"rate {lr}", {"trainer": {"lr": lr}}) for lr in (0.006, 0.024)],
    "adamw": [
        (f"adamw {lr}", {"trainer": {"optimizer": "adamw", "lr": lr}})
        for lr in (0.001, 0.003, 0.006)
    ],
    "answers": [("once", {"data": "once"})],
    "truth": [("truth", {"data": "truth"})],
    "budget": [
        (f"budget {n}", {"data": n, "answers": a})
        for n, a in (("once", 1), ("two", 2), ("train", 6))
    ],
    "timm": [("timm features", {"features": {"name": STUDENT["backbone"]}})],
    "weights": [("no weights", {"uncertainty": False})],
    "augment": [(n, {"trainer": {"augment": n}}) for n in ("strong", "none")],
    "tasks": [(f"{n} alone", {"student": {"tasks": [n]}}) for n in ("depth", "normals")],
    "losses": [
        ("no border weight", {"border": False}),
        ("no creases", {"crease_deg": 180.0}),
        ("plain losses", {"border": False, "weights": {"depth_robust": 0.0, "normals_angle": 1.0}}),
    ],
    "balance": [(f"normals {w:g}", {"weights": {"normals_angle": w}}) for w in (4.0, 8.0)],
    "features": [("mini's features", {"features": {"name": "mini"}})],
    "decoder": [
        ("stride 2", {"student": {"decoder_stride": 2}}),
        ("dpt", {"student": {"decoder": "dpt"}}),
    ],
}
LOSS_WEIGHTS, LABEL_CREASE_DEG = dict(losses.LOSS_WEIGHTS), losses.CREASE_DEG
CREASE_DEG = 30.0  # neighbours whose true normals are further apart
STEP = 1.15  # neighbours whose true depths differ by more are a border, as is the sky's
RINGS_PX = (0.0, 0.5, 1.5, 2.5, 4.5, 8.5, np.inf)  # distances from a border
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


def versus(
    students: list[str], held: list[LabelSet], answers: list[LabelSet]
) -> dict[str, dict[str, float]]:
    """Students and a teacher's stored answers against truth, on the images that it answered."""
    by_key = {key: labels for labels in answers for key in labels.keys}
    asked = [label for labels in held for label in labels if label.key in by_key]
    print(f"{len(asked)} of {sum(len(s.keys) for s in held)} images; {[s.path for s in answers]}")
    found: dict[str, dict[str, float]] = {}

    def answer(label: Label) -> dict[Task, np.ndarray]:
        return by_key[label.key][label.key].values

    said = score(answer, asked, tasks=list(NUMBERS))
    near_teacher = {t: by_distance(asked, answer, t) for t in NUMBERS}
    for path in students:
        model = load_student(path)
        tasks = [t for t in NUMBERS if t in model.tasks]
        report = score(predictor(model), asked, tasks=tasks)
        for task in tasks:
            (pixels, theirs), (_, ours) = (
                near_teacher[task],
                by_distance(asked, predictor(model), task),
            )
            for n, low in enumerate(RINGS_PX[:-1]):
                print(f"{path} {task}, {low} to {RINGS_PX[n + 1]} px from a border: share "
                      f"{pixels[n] / pixels.sum():.3f}, {NUMBERS[task][0]} of the teacher "
                      f"{theirs[n] / pixels[n]:.4f}, of the student {ours[n] / pixels[n]:.4f}, "
                      f"difference of all {(ours[n] - theirs[n]) / pixels.sum():+.4f}")  # fmt: skip
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


def rings(label: Label, task: str) -> np.ndarray:
    """The ring of `RINGS_PX` that each pixel lies in by its distance from a step of the true depth
    or, for the normals, from a crease; -1 where the task has no truth."""
    values = label.values[Task(task)]
    if task == "depth":
        known = np.isfinite(values) & (values > 0)
        values = np.log(np.where(known, values, 1.0))
    else:
        known = ~np.isnan(values).any(-1)
    border = ~known
    for axis in (0, 1):
        if task == "depth":
            step = np.abs(np.diff(values, axis=axis)) > np.log(STEP)
        else:
            one, other = (np.delete(values, end, axis) for end in (0, -1))
            step = np.einsum("hwc,hwc->hw", one, other) < np.cos(np.radians(CREASE_DEG))
        ahead, behind = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        ahead[axis], behind[axis] = (1, 0), (0, 1)
        border |= np.pad(step, ahead) | np.pad(step, behind)
    away_px = distance_transform_edt(~border) if border.any() else np.full(known.shape, np.inf)
    return np.where(known, np.digitize(away_px, RINGS_PX[1:-1]), -1)


def by_distance(asked: list[Label], answer: Any, task: str) -> np.ndarray:
    """For each of `rings` its pixels, and the sum over them of what `NUMBERS` has first: whether
    within 1.25 of the true depth, or the angle in degrees. [2, rings]."""
    counts = np.zeros((2, len(RINGS_PX) - 1))
    for label in asked:
        truth, said = label.values[Task(task)], answer(label)[task]
        ring = rings(label, task)
        if task == "depth":
            with np.errstate(divide="ignore", invalid="ignore"):
                value = np.abs(np.log(said / truth)) < np.log(1.25)
        else:
            value, _ = angles_deg(said, truth)
            ring = np.where(np.isnan(value), -1, ring)
        for row, weight in enumerate((None, value[ring >= 0])):
            counts[row] += np.bincount(ring[ring >= 0], weight, minlength=counts.shape[1])
    return counts


def unweighted(answer: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The losses as if no label had said how sure it is."""
    blind = {k: v * torch.nan if k.endswith("_uncertainty") else v for k, v in batch.items()}
    return losses.all_losses(answer, blind)


def as_they_are(weight: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """`border_weight` without it."""
    return weight


def first_images(paths: list[str], count: int, out: Path) -> list[str]:
    """Selection files that leave the first ``count`` images of these label sets."""
    files = []
    for n, labels in enumerate(map(LabelSet, paths)):
        keep = labels.keys[:count]
        count -= len(keep)
        files.append(str(out.parent / f"{out.name}-{n}.json"))
        write_selection(Path(files[-1]), labels=labels, keep=keep, dropped={}, criteria={})
    return files


def without_depth(path: str, out: Path) -> str:
    """A copy of a student that has no depth head."""
    whole = load_student(path)
    model = Student(**{**whole.config, "tasks": [t for t in whole.tasks if t != "depth"]})
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.state_dict()})
    target = out.parent / "without-depth.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    save_student(model, target, whole.provenance)
    return str(target)


def trained(differs: dict[str, Any], options: dict[str, str], out: Path) -> str:
    """Train one variant; the path of its student."""
    for room in (losses, losses_depth):
        room.border_weight = masked.border_weight if differs.get("border", True) else as_they_are
    losses.CREASE_DEG = differs.get("crease_deg", LABEL_CREASE_DEG)
    losses.LOSS_WEIGHTS.update(LOSS_WEIGHTS | differs.get("weights", {}))
    module.all_losses = losses.all_losses if differs.get("uncertainty", True) else unweighted
    data = options[differs.get("data", "train")].split(",")
    selection = None
    if "answers" in differs:
        images = int(options["budget"]) // differs["answers"]
        data = data[: -(-images // len(LabelSet(data[0]).keys))]
        selection = first_images(data, images, out)
    features = differs.get("features")
    if features and features["name"] != "mini":
        features = features | {"weights": options["timm"]}
    run = train(
        data=data,
        out=str(out),
        selection=selection,
        student=STUDENT | differs.get("student", {}),
        trainer=TRAINER
        | {"steps": int(options["steps"]), "batch_size": int(options.get("batch", "16"))}
        | {"lr": float(options.get("lr", TRAINER["lr"]))}
        | differs.get("trainer", {}),
        features=features,
        init=without_depth(options["init"], out) if "init" in options else None,
    )
    return str(run["student"])


def main() -> None:
    """Train, score, compare; writes a json per group into out."""
    options = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    groups = [a for a in sys.argv[1:] if "=" not in a]
    torch.set_num_threads(1)
    if groups == ["versus"]:
        found = versus(
            options["students"].split(","),
            *([LabelSet(p) for p in options[key].split(",")] for key in ("held", "answers")),
        )
        if "out" in options:
            Path(options["out"]).write_text(json.dumps(found, indent=1))
        return
    out = Path(options["out"])
    held = [LabelSet(p) for p in options["held"].split(",")]
    rows: dict[tuple, dict[str, list[float]]] = {}
    for name, differs in [FIRST, *(v for group in groups for v in VARIANTS[group])]:
        started = time.process_time()
        model = load_student(trained(differs, options, out / name.replace(" ", "-")))
        cpu_s = time.process_time() - started
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
    for (number, task, measure), by_name in rows.items():
        for name, values in by_name.items():
            if name != FIRST[0] and FIRST[0] in by_name:
                gain = bootstrap(by_name[FIRST[0]], values)
                print(f"set {number} {task} {measure}: {name} - {FIRST[0]} = "
                      f"{gain[0]:+.4f} [{gain[1]:+.4f}, {gain[2]:+.4f}]")  # fmt: skip
    stored = {"/".join(map(str, key)): value for key, value in rows.items()}
    (out / f"{'-'.join(groups) or FIRST[0]}.json").write_text(json.dumps(stored))


if __name__ == "__main__":
    main()
